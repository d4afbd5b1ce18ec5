"""The one exception of this package."""

from __future__ import annotations


class EmbeddedError(RuntimeError):
    """The embedded services cannot be had; the message says why and what to do about it."""
