"""``ENGINE = "puff.contrib.django.postgres"``: `django_backend.postgresql` for settings written for Puff.

Puff's connections come from its pools, whatever NAME says.  So without HOST, USER and so on NAME is no database:
the server is the one configured for the service of that name (``PUFF_<NAME>_POSTGRES_URL``) if there is one, else
for the alias's.
"""

from __future__ import annotations

from typing import Any

from django_backend.postgresql import base
from puff_patch.config import current


class DatabaseWrapper(base.DatabaseWrapper):
    """`django_backend.postgresql`'s, with NAME as Puff has it."""

    def __init__(self, settings_dict: dict[str, Any], alias: str = "default") -> None:
        server = (setting for setting in base.SERVER_SETTINGS.values() if setting != "NAME")
        if settings_dict.get("NAME") and not any(settings_dict.get(setting) for setting in server):
            service = str(settings_dict["NAME"])
            settings_dict["NAME"] = ""
            base.use_configured_server(
                settings_dict, service if service.lower() in current().postgres_urls else alias
            )
        super().__init__(settings_dict, alias)
