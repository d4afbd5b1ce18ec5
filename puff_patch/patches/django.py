"""Django: what its PostgreSQL and Redis backends do per greenlet is done once per process.

Replaces ``RedisCache._cache`` (one shared client a process), and of the PostgreSQL backend's
``DatabaseWrapper``: ``get_new_connection`` (the time zone comes with the lease, which goes back at the end of
the request, whatever CONN_MAX_AGE says, and at the end of its greenlet) and ``close_pool`` (test databases can
be dropped).  Every other effect on Django comes from the patches of the drivers.
"""

from __future__ import annotations

import _thread
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
            self.ledger.on_restore(_forget_clients)
        else:
            self._apply_postgresql(module.DatabaseWrapper)

    def _apply_postgresql(self, wrapper_class: Any) -> None:
        original, close_native_pool = wrapper_class.get_new_connection, wrapper_class.close_pool

        # Not `connect`: that is a method of every backend's base class, where others (Sentry) replace it.
        @functools.wraps(original)
        def get_new_connection(self: Any, conn_params: dict[str, Any]) -> Any:
            if driver().is_patched():
                conn_params = with_setup(self, conn_params)
            connection = original(self, conn_params)
            if is_leased(connection):
                _give_back_early(self)
            return connection

        @functools.wraps(close_native_pool)
        def close_pool(self: Any) -> None:
            close_native_pool(self)
            # Django calls this before it drops or copies a test database, which must have no sessions then.
            close_idle_connections(self)

        self.ledger.replace(wrapper_class, "get_new_connection", get_new_connection)
        self.ledger.replace(wrapper_class, "close_pool", close_pool)


def driver() -> Patch:
    """The patch of the driver that Django's PostgreSQL backend uses in this process."""
    from django.db.backends.postgresql.psycopg_any import is_psycopg3

    from puff_patch.patches import psycopg, psycopg2

    return psycopg.PATCH if is_psycopg3 else psycopg2.PATCH


def _give_back_early(wrapper: Any) -> None:
    """Have the wrapper's lease returned at the end of a request, and when the current greenlet ends.

    Greenlets are many and leases few: one that is kept between requests starves the others.  The main greenlet
    is but one, as the thread of a management command is without us, so there CONN_MAX_AGE keeps its meaning.
    """
    import gevent

    greenlet = gevent.getcurrent()
    hub = gevent.get_hub()
    if hub.main_hub and greenlet is hub.parent:
        return
    wrapper.close_at = time.monotonic()
    # A wrapper may be shared between threads, and its owner go on after the end of the one that had it connect.
    if isinstance(greenlet, gevent.Greenlet) and wrapper._thread_ident == _thread.get_ident():
        _return_at_end_of(greenlet, wrapper)


def _return_at_end_of(greenlet: Any, wrapper: Any) -> None:
    """Have the wrapper's lease returned when the greenlet ends.

    Django's wrappers are greenlet-local but sit in reference cycles, so that without this the lease of a
    finished greenlet would come back only with the next garbage collection.
    """
    linked = vars(wrapper).get("_puff_linked")
    if linked is not None and linked() is greenlet:
        return
    wrapper._puff_linked = weakref.ref(greenlet)
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

    servers.drain_pools(dbname=wrapper.settings_dict["NAME"] or "")


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
        from django.core.cache.backends.redis import RedisCacheClient

        client = client_class(servers, **options)
        if issubclass(client_class, RedisCacheClient):
            # What it makes pools and clients with, so that each of its methods can be overridden as before.
            client._pool_class = shared = _Shared(client)
            client._client = shared.client
        # Two greenlets may both make one; the first stays, and neither has connected yet.
        client = _cache_clients.setdefault(key, client)
    return client


class _Shared:
    """Gives a cache client of Django the pools of this process, and for each the same client of redis-py."""

    def __init__(self, client: Any) -> None:
        # Django's default is the plain pool; any other class was chosen in OPTIONS and is kept.
        self._pool_class = None if client._pool_class is client._lib.ConnectionPool else client._pool_class
        self._client_class = client._client
        self._clients: dict[Any, Any] = {}

    def from_url(self, url: str, **options: Any) -> Any:
        from puff_patch.pools.redis import shared_client

        return shared_client(url, options, self._pool_class).connection_pool

    def client(self, *, connection_pool: Any) -> Any:
        client = self._clients.get(id(connection_pool))
        if client is None:  # it holds the pool, so that the id stays the pool's
            client = self._clients[id(connection_pool)] = self._client_class(connection_pool=connection_pool)
        return client


def with_setup(wrapper: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Let the pool set the time zone once, where Django would ask for it at every lease.

    Args:
        wrapper: Django's DatabaseWrapper.
        params: what it will pass to the driver's ``connect``.

    Returns:
        The parameters to pass in their place.
    """
    pool = params.get("pool")
    zone = wrapper.timezone_name
    if pool is False or not zone:
        return params
    quoted = zone.replace("'", "''")
    return {**params, "pool": {"setup": f"SET TIME ZONE '{quoted}'", **(pool if isinstance(pool, dict) else {})}}


PATCH = DjangoPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
