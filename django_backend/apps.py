"""The app ``django_backend`` of INSTALLED_APPS: system checks and management commands."""

from __future__ import annotations

from django.apps import AppConfig


class DjangoBackendConfig(AppConfig):
    """Registers the checks of `django_backend.checks`."""

    name = "django_backend"
    verbose_name = "puff_patch"

    def ready(self) -> None:
        """Register the checks, once the settings and all apps are loaded."""
        from django_backend import checks

        checks.register()
