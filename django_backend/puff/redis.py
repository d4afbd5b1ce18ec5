"""``BACKEND = "puff.contrib.django.redis.PuffRedisCache"``: `django_backend.cache` for Puff's settings."""

from __future__ import annotations

from functools import cache
from typing import Any
from urllib.parse import urlsplit

from django_backend.cache import RedisCache
from puff_patch.config import current


class PuffRedisCache(RedisCache):
    """The cache of the Redis that is configured.

    As in Puff, LOCATION says nothing of the server; but ``redis://NAME`` means the service of that name if there
    is one (``PUFF_<NAME>_REDIS_URL``).
    """

    def __init__(self, server: str | list[str], params: dict[str, Any]) -> None:
        service = _service(server if isinstance(server, str) else server[0] if server else "")
        super().__init__("", {**params, "OPTIONS": {"service": service, **params.get("OPTIONS", {})}})


@cache
def _service(location: str) -> str:
    # Django makes a cache object for each request, and reading the configuration costs more than a GET.
    name = urlsplit(location).hostname or ""
    return name if name in current().redis_urls else "default"
