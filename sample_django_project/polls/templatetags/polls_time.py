"""Times as a glance wants them: one unit, no more."""

from __future__ import annotations

from datetime import datetime, timedelta

from django import template
from django.utils import timezone
from django.utils.timesince import timesince, timeuntil

register = template.Library()


@register.filter
def ago(value: datetime) -> str:
    """``3 days ago``."""
    if timezone.now() - value < timedelta(minutes=1):
        return "just now"
    return f"{timesince(value, depth=1)} ago"


@register.filter
def ahead(value: datetime) -> str:
    """``in 3 days``."""
    if value - timezone.now() < timedelta(minutes=1):
        return "in a moment"
    return f"in {timeuntil(value, depth=1)}"
