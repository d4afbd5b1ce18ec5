"""``puff.contrib.django.static``: Django's own view of static files, which greenlets need no other for."""

from __future__ import annotations

from django.views.static import serve

__all__ = ["serve"]
