"""Django: what its PostgreSQL and Redis backends do per greenlet is done once per process.

Replaces ``RedisCache._cache`` and ``RedisCacheClient.get_client`` (one shared client a URL), and of the
PostgreSQL backend's ``DatabaseWrapper``: ``get_connection_params`` (the time zone comes with the lease) and
``connect`` (a lease goes back at the end of the request, whatever CONN_MAX_AGE says, and at the end of its
greenlet) and ``close_pool`` (test databases can be dropped).  Every other effect on Django comes from the
patches of the drivers.
"""

from __future__ import annotations

import functools
import time
import weakref
from functools import cached_property
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch

_POSTGRESQL = "django.db.backends.postgresql.base"
_REDIS = "django.core.cache.backends.redis"


class DjangoPatch(Patch):
    """Shared Redis clients and cheaper leases for Django's own backends."""

    name = "django"
    modules = (_POSTGRESQL, _REDIS)
    requires = ("django", (5, 2))

    def apply(self, module: ModuleType) -> None:
        """Replace what the freshly imported backend module needs."""
        if module.__name__ == _REDIS:
            shared = cached_property(_shared_cache)
            shared.__set_name__(module.RedisCache, "_cache")
            self.ledger.replace(module.RedisCache, "_cache", shared)
            self.ledger.replace(module.RedisCacheClient, "get_client", get_client)
            self.ledger.on_restore(_forget_clients)
        else:
            self._apply_postgresql(module.DatabaseWrapper)

    def _apply_postgresql(self, wrapper_class: Any) -> None:
        get_params, connect = wrapper_class.get_connection_params, wrapper_class.connect
        close_native_pool = wrapper_class.close_pool

        @functools.wraps(get_params)
        def get_connection_params(self: Any) -> dict[str, Any]:
            params: dict[str, Any] = get_params(self)
            # Django's own pool (OPTIONS["pool"], psycopg 3 only) asks here, too; it sets the time zone by itself.
            if driver().is_patched() and not self.settings_dict["OPTIONS"].get("pool"):
                add_setup(self, params)
            return params

        @functools.wraps(connect)
        def connect_and_lease(self: Any) -> None:
            try:
                connect(self)
            finally:  # a receiver of connection_created may fail, and the lease is there all the same
                if is_leased(self.connection):
                    # Greenlets are many and leases few: one that is kept between requests starves the others.
                    self.close_at = time.monotonic()
                    _return_at_end_of_greenlet(self)

        @functools.wraps(close_native_pool)
        def close_pool(self: Any) -> None:
            close_native_pool(self)
            # Django calls this before it drops or copies a test database, which must have no sessions then.
            close_idle_connections(self)

        self.ledger.replace(wrapper_class, "get_connection_params", get_connection_params)
        self.ledger.replace(wrapper_class, "connect", connect_and_lease)
        self.ledger.replace(wrapper_class, "close_pool", close_pool)


def driver() -> Patch:
    """The patch of the driver that Django's PostgreSQL backend uses in this process."""
    from django.db.backends.postgresql.psycopg_any import is_psycopg3

    from puff_patch.patches import psycopg, psycopg2

    return psycopg.PATCH if is_psycopg3 else psycopg2.PATCH


def _return_at_end_of_greenlet(wrapper: Any) -> None:
    """Have the wrapper's lease returned when the current greenlet ends.

    Django's wrappers are greenlet-local but sit in reference cycles, so that without this the lease of a
    finished greenlet would come back only with the next garbage collection.
    """
    import gevent

    greenlet = gevent.getcurrent()
    if not isinstance(greenlet, gevent.Greenlet) or vars(wrapper).get("_puff_linked") == id(greenlet):
        return
    wrapper._puff_linked = id(greenlet)
    reference = weakref.ref(wrapper)

    def ended(_: object) -> None:
        wrapper = reference()
        # A wrapper that is shared between threads (Django's live server test case) outlives its greenlet.
        if wrapper is not None and is_leased(wrapper.connection) and not wrapper.allow_thread_sharing:
            connection, wrapper.connection = wrapper.connection, None
            connection.close()

    greenlet.rawlink(ended)


def close_idle_connections(wrapper: Any) -> None:
    """Close what the pools keep open to the wrapper's database."""
    from puff_patch.pools import servers

    settings = wrapper.settings_dict
    servers.drain_pools(
        dbname=settings["NAME"] or "", host=settings["HOST"] or "", port=str(settings["PORT"] or "")
    )


def is_leased(connection: Any) -> bool:
    """Whether this is a connection leased from a pool, and not returned yet."""
    return getattr(connection, "_puff_lease", None) is not None


_cache_clients: dict[Any, Any] = {}


def _forget_clients() -> None:
    from puff_patch.pools.redis import close_shared_clients

    _cache_clients.clear()
    close_shared_clients()


def _shared_cache(self: Any) -> Any:
    return shared_cache_client(self._class, self._servers, self._options)


def shared_cache_client(client_class: Any, servers: list[str], options: dict[str, Any]) -> Any:
    """The one instance in this process of Django's cache client for these servers and options.

    Django makes one for each thread, here each greenlet, and with it an object that reads redis-py's package
    metadata: half the cost of a request that reads one key.

    Args:
        client_class: ``RedisCacheClient`` or a subclass.
        servers: Redis URLs, the first one for writing.
        options: ``OPTIONS`` of the cache.
    """
    from puff_patch.pools.redis import freeze

    key = (client_class, tuple(servers), freeze(options))
    client = _cache_clients.get(key)
    if client is None:
        # Two greenlets may both make one; the first stays, and neither has connected yet.
        client = _cache_clients.setdefault(key, client_class(servers, **options))
    return client


def get_client(self: Any, key: Any = None, *, write: bool = False) -> Any:
    """Stands for ``RedisCacheClient.get_client``: the shared client of the server the original would choose."""
    from puff_patch.pools.redis import shared_client

    url = self._servers[self._get_connection_pool_index(write)]
    # Django's default is the plain pool; any other class was chosen in OPTIONS and is kept.
    pool_class = None if self._pool_class is self._lib.ConnectionPool else self._pool_class
    return shared_client(url, self._pool_options, pool_class)


def add_setup(wrapper: Any, params: dict[str, Any]) -> None:
    """Let the pool set the time zone once, where Django would ask for it at every lease.

    Args:
        wrapper: Django's DatabaseWrapper.
        params: what it will pass to the driver's ``connect``; changed in place.
    """
    pool = params.get("pool")
    zone = wrapper.timezone_name
    if pool is False or not zone:
        return
    quoted = zone.replace("'", "''")
    params["pool"] = {"setup": f"SET TIME ZONE '{quoted}'", **(pool if isinstance(pool, dict) else {})}


PATCH = DjangoPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
