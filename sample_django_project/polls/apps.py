from django.apps import AppConfig


class PollsConfig(AppConfig):
    """The polls application."""

    name = "polls"

    def ready(self) -> None:
        """Connect the signal receivers."""
        from polls import signals  # noqa: F401
