"""The app ``django_backend`` of INSTALLED_APPS: system checks and management commands."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig


class DjangoBackendConfig(AppConfig):
    """Reads ``settings.PUFF`` and registers the checks of `django_backend.checks`."""

    name = "django_backend"
    verbose_name = "puff_patch"

    def __init__(self, app_name: str, app_module: Any) -> None:
        from django_backend import conf

        # Before any models are imported, which ask for database connections.
        conf.install()
        super().__init__(app_name, app_module)

    def ready(self) -> None:
        """Register the checks, once the settings and all apps are loaded."""
        from django_backend import checks

        checks.register()
