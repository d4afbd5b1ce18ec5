"""``settings.PUFF``, the Django form of puff.toml, over the puff.toml beside manage.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from django.conf import settings

from puff_patch import config, project
from puff_patch.config import Config, ConfigError
from puff_patch.project import Project, Source

_project: Project | None = None
_installed = False


def install() -> None:
    """Put the project's configuration below the environment, from now on; a second call does nothing.

    It is read when it is asked for, so a wrong key is the error of what needs it, and of ``manage.py check``.
    """
    global _installed
    if not _installed:
        _installed = True
        config.use(_config)


def read() -> Project:
    """What puff.toml and ``settings.PUFF`` say.

    Raises:
        ConfigError: a key is unknown, or its value does not fit.
    """
    global _project
    if _project is None:
        # The `puff` command has read the file already.
        found = project.in_use()
        if found is None:
            base = getattr(settings, "BASE_DIR", None)
            found = project.find(None if base is None else Path(base))
            if found.values.get("dotenv") is True:  # else it is the project's own business
                project.load_dotenv(found)
        values = getattr(settings, "PUFF", {})
        if not isinstance(values, Mapping):
            raise ConfigError(f"settings.PUFF takes a dict with the keys of puff.toml, got {values!r}")
        # Handlers may be functions, which no file can say: django_backend.websocket looks at those.
        values = {key: value for key, value in values.items() if key != "websockets"}
        _project = found.overlaid(values, Source("settings.PUFF")) if values else found
    return _project


def _config() -> Config:
    return read().config
