"""What the commands that run a program have in common: options of the services, and what comes first."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from puff_patch import config, project, schema, serving
from puff_patch.config import Config, ConfigError
from puff_patch.project import Project, load_dotenv

_OF_CONFIG = ("embedded", "data_dir", "slow_checkout_ms", "blocked_hub_ms")


def service_parser(command: str, project: Project, description: str, **options: Any) -> argparse.ArgumentParser:
    """A parser with the options that every command of a program has.

    Args:
        command: its name.
        project: whose services have options for their URLs.
        description: what the command does.
        options: of ``ArgumentParser``.
    """
    load_dotenv(project)  # the help text shows the environment
    parser = argparse.ArgumentParser(
        prog=f"puff {command}",
        usage=f"puff {command} [OPTIONS]",
        description=f"{description[0].upper()}{description[1:]}.",
        formatter_class=serving.HelpFormatter,
        allow_abbrev=False,
        **options,
    )
    group = parser.add_argument_group("services")
    serving.add_urls(group, project)
    serving.add_options(group, _config_keys(), defaults=project.values)
    return parser


def prepare(project_: Project, given: argparse.Namespace) -> None:
    """Make this process one that runs a program: patched, configured, with what it needs on its path.

    Args:
        project_: the program.
        given: what `service_parser` parsed.

    Raises:
        ConfigError: something that was said cannot be used.
    """
    import puff_patch

    puff_patch.patch_all()
    program = project_.program
    if program.add_cwd_to_path:
        add_cwd_to_path()
    if program.django_settings_module:
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", program.django_settings_module)
    # In the environment, where child processes and the program's own settings find it, too.
    keys = _config_keys()
    for name, value in vars(given).items():
        if name in keys:
            key = keys[name]
            os.environ[key.variable] = str(int(value)) if key.kind.flag else str(value)
        elif name.startswith("PUFF_"):
            os.environ[name] = value
    project.use(project_)
    start_embedded()
    if program.asyncio:
        from puff_patch.runtime.aio import get_thread

        get_thread()


def add_cwd_to_path() -> None:
    """Find modules in the working directory first, as ``python -m`` does."""
    if (cwd := os.getcwd()) not in sys.path[:1]:
        sys.path.insert(0, cwd)


def start_embedded() -> None:
    """Start the embedded services if they are wanted, and put their URLs into the environment.

    Raises:
        ConfigError: they do not start.
    """
    current = config.current()
    if not current.embedded:
        return
    for kind, urls in (("POSTGRES", current.postgres_urls), ("REDIS", current.redis_urls)):
        if "default" in urls:
            os.environ.setdefault(f"PUFF_DEFAULT_{kind}_URL", urls["default"])
    if not {"PUFF_DEFAULT_POSTGRES_URL", "PUFF_DEFAULT_REDIS_URL"} <= os.environ.keys():
        from puff_patch import embedded

        try:
            embedded.ensure(export=True)
        except embedded.EmbeddedError as error:
            raise ConfigError(str(error)) from error


def _config_keys() -> dict[str, schema.Key]:
    keys = schema.keys(Config)
    return {name: keys[name] for name in _OF_CONFIG}
