"""psycopg2: waits are cooperative (psycogreen), and ``psycopg2.connect`` leases from a pool.

Replaces ``psycopg2.connect`` and sets psycopg2's wait callback.  The connections of psycopg2's own pools
(``psycopg2.pool``) are no leases, see `puff_patch.patches.base.pooled_elsewhere`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch, pooled_elsewhere


class Psycopg2Patch(Patch):
    """Pooled, cooperative psycopg2."""

    name = "psycopg2"
    modules = ("psycopg2", "psycopg2.pool")
    requires = ("psycopg2-binary|psycopg2", (2, 9))

    def apply(self, module: ModuleType) -> None:
        """Set the wait callback and replace ``psycopg2.connect``; let psycopg2's own pools be."""
        if module.__name__ == "psycopg2.pool":
            self._apply_own_pool(module.AbstractConnectionPool)
            return
        from psycopg2 import extensions

        previous = extensions.get_wait_callback()
        extensions.set_wait_callback(wait_callback)
        self.ledger.on_restore(lambda: extensions.set_wait_callback(previous))
        original = module.connect
        connect_in_c = module._connect

        def connect(
            dsn: str | None = None,
            connection_factory: Any = None,
            cursor_factory: Any = None,
            *,
            pool: bool | Mapping[str, Any] = True,
            **kwargs: Any,
        ) -> Any:
            if module._connect is not connect_in_c:
                # A test's stand-in, a tracer: it is to see what the program asks for.
                return original(dsn, connection_factory, cursor_factory, **kwargs)
            if pool is True and pooled_elsewhere.get():
                pool = False
            if pool is not False and _poolable(dsn, connection_factory, kwargs):
                lease = _lease(dsn, connection_factory, cursor_factory, pool, kwargs)
                if lease is not None:
                    return lease
            with _patiently(dsn, kwargs):
                return original(dsn, _cooperative(connection_factory), cursor_factory, **kwargs)

        connect.__doc__ = (original.__doc__ or "") + _CONNECT_DOC
        self.ledger.replace(module, "connect", connect)

        def close_pools() -> None:
            from puff_patch.pools import postgres, servers

            servers.close_pools(postgres.PostgresPool)

        self.ledger.on_restore(close_pools)

    def _apply_own_pool(self, pool_class: Any) -> None:
        original = pool_class._connect

        @functools.wraps(original)
        def _connect(self: Any, *args: Any, **kwargs: Any) -> Any:
            token = pooled_elsewhere.set(True)
            try:
                return original(self, *args, **kwargs)
            finally:
                pooled_elsewhere.reset(token)

        self.ledger.replace(pool_class, "_connect", _connect)


_CONNECT_DOC = """
    With puff_patch the connection is leased from a bounded pool, one for each DSN, and `close()` returns it.
    *pool* is False for a connection of its own, or a mapping of pool options (max_size, timeout, ...).
    """


def _poolable(dsn: str | None, connection_factory: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a lease can stand for this connection."""
    from psycopg2 import extensions

    from puff_patch.pools.postgres import can_be_leased

    if kwargs.get("async") or kwargs.get("async_") or kwargs.get("replication"):
        return False
    if dsn and "replication" in dsn and extensions.parse_dsn(dsn).get("replication"):
        return False
    return connection_factory is None or can_be_leased(connection_factory)


def _patiently(dsn: str | None, kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Keeps to the connect_timeout of a connection that is not pooled."""
    from psycopg2 import OperationalError, extensions

    from puff_patch.pools.postgres import connect_timeout
    from puff_patch.pools.servers import at_most

    parameters = {name: value for name, value in kwargs.items() if name not in ("async", "async_")}
    if len(parameters) < len(kwargs) and any(kwargs[name] for name in kwargs.keys() - parameters.keys()):
        return nullcontext()  # an asynchronous one returns before it is connected
    if dsn is None and not parameters:
        return nullcontext()  # psycopg2 says what is missing
    seconds = connect_timeout(extensions.make_dsn(dsn, **parameters))
    return at_most(
        seconds, lambda: OperationalError(f"connection to server failed: timeout expired ({seconds:g} s)")
    )


def _cooperative(connection_factory: Any) -> Any:
    """The same factory with what psycopg2 refuses to cooperative connections, where it can have it."""
    from psycopg2 import extensions

    from puff_patch.pools.offload import connection_class

    if connection_factory is None or (
        isinstance(connection_factory, type) and issubclass(connection_factory, extensions.connection)
    ):
        return connection_class(connection_factory)
    return connection_factory


def _lease(
    dsn: str | None,
    connection_factory: Any,
    cursor_factory: Any,
    pool: bool | Mapping[str, Any],
    kwargs: dict[str, Any],
) -> Any:
    """A lease, or None if the operator wants no pool for this server or the factory cannot have one."""
    from psycopg2 import extensions

    from puff_patch.config import ConfigError
    from puff_patch.pools import postgres

    kwargs.pop("async", None)
    kwargs.pop("async_", None)
    if pool is not True and not isinstance(pool, Mapping):
        raise ConfigError(f"psycopg2.connect(pool=...) takes True, False or a mapping of options, got {pool!r}")
    overrides = dict(pool) if isinstance(pool, Mapping) else {}
    setup = overrides.pop("setup", None)
    found = postgres.get_pool(extensions.make_dsn(dsn, **kwargs), overrides, setup=setup)
    if found is None:
        return None
    try:
        connection = found.lease(connection_factory or extensions.connection)
    except postgres.NotLeasable:
        return None
    if cursor_factory is not None:
        connection.cursor_factory = cursor_factory
    return connection


def wait_callback(connection: Any, timeout: float | None = None) -> None:
    """psycogreen's wait, which also stops the server's work when the waiting greenlet is interrupted.

    Args:
        connection: the psycopg2 connection to wait for.
        timeout: seconds for each wait for the socket; None means no limit of its own.
    """
    from psycogreen.gevent import gevent_wait_callback

    try:
        gevent_wait_callback(connection, timeout)
    except BaseException:
        from puff_patch.pools.libpq import follow

        follow(connection)  # psycopg2 closes it right after
        raise


PATCH = Psycopg2Patch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
