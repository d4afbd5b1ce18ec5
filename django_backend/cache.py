"""``BACKEND = "django_backend.cache.RedisCache"``: Django's Redis cache over one shared client a process.

With no LOCATION, the server is the Redis that puff_patch is configured for (``PUFF_DEFAULT_REDIS_URL``, the
embedded one, or localhost); ``OPTIONS["service"]`` names another configured one.  ``OPTIONS`` otherwise are
Django's and the pool's: ``max_connections``, ``timeout`` (seconds a command waits for a connection), ...
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from django.core.cache.backends import redis
from django.utils.functional import cached_property

from django_backend import conf
from puff_patch.config import current
from puff_patch.patches.django import shared_cache_client


@cache
def _configured_server(service: str) -> tuple[str, Mapping[str, Any]]:
    # Django makes a cache object for each request, and reading the configuration costs more than a GET.
    conf.install()
    config = current()
    return config.redis_url(service), config.redis_pools.get(service.lower(), {})


class RedisCache(redis.RedisCache):
    """Django's, with the server from puff_patch's configuration if LOCATION names none."""

    # Django's own attributes, which its stubs leave out.
    _class: type[Any]
    _options: dict[str, Any]
    _servers: list[str]

    def __init__(self, server: str | list[str], params: dict[str, Any]) -> None:
        super().__init__(server, params)
        # A copy: the settings' own dictionary also makes the caches of other greenlets.
        self._options = dict(self._options)
        self._service: str = self._options.pop("service", "default")
        self._configured = not server

    @cached_property
    def _cache(self) -> Any:
        if not self._configured:
            return shared_cache_client(self._class, self._servers, self._options)
        server, pool = _configured_server(self._service)
        # A pool class of the project's own does not know the option.
        options = (
            {"pool_options": pool, **self._options}
            if pool and "pool_class" not in self._options
            else self._options
        )
        return shared_cache_client(self._class, [server], options)
