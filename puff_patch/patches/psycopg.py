"""psycopg 3: waits are cooperative, with every implementation, and ``psycopg.connect`` leases from a pool.

Replaces ``psycopg.connect``; ``psycopg.waiting.wait`` and ``wait_conn``, through which a synchronous connection
does all its waiting; the lock of a connection; and two methods of ``psycopg.Connection``: ``wait``, which stops
the server's work if the waiting greenlet is interrupted, and ``cancel``, which waits in C.

``Connection.connect``, which psycopg_pool uses and which a subclass inherits, gives connections of their own, as
does ``AsyncConnection``, which is asyncio's and left alone.
"""

from __future__ import annotations

import functools
import selectors
import threading
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from puff_patch.patches import sockets
from puff_patch.patches.base import Ledger, Patch, pooled_elsewhere


class PsycopgPatch(Patch):
    """Pooled, cooperative psycopg 3."""

    name = "psycopg"
    modules = ("psycopg",)
    requires = ("psycopg", (3, 2, 4))

    def apply(self, module: ModuleType) -> None:
        """Make waits cooperative and replace ``psycopg.connect``."""
        make_cooperative(self.ledger)
        original = module.connect

        def connect(
            conninfo: str = "",
            *,
            pool: bool | Mapping[str, Any] = True,
            **kwargs: Any,
        ) -> Any:
            if pool is True and pooled_elsewhere.get():
                pool = False
            if pool is not False:
                lease = _lease(conninfo, pool, kwargs)
                if lease is not None:
                    return lease
            return original(conninfo, **kwargs)

        connect.__doc__ = (original.__doc__ or "") + _CONNECT_DOC
        self.ledger.replace(module, "connect", connect)

        def close_pools() -> None:
            from puff_patch.pools import psycopg, servers

            servers.close_pools(psycopg.PsycopgPool)

        self.ledger.on_restore(close_pools)


_CONNECT_DOC = """
        With puff_patch the connection is leased from a bounded pool, one for each DSN, and `close()` returns it.
        *pool* is False for a connection of its own, or a mapping of pool options (max_size, timeout, ...).
"""
# What psycopg.connect() does not pass on to libpq.
_OF_THE_CLIENT = ("autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory")


def _lease(conninfo: str, pool: bool | Mapping[str, Any], kwargs: Mapping[str, Any]) -> Any:
    """A lease, or None if there can be none or the operator wants no pool for this server."""
    from puff_patch.config import ConfigError
    from puff_patch.pools import psycopg

    if pool is not True and not isinstance(pool, Mapping):
        raise ConfigError(f"psycopg.connect(pool=...) takes True, False or a mapping of options, got {pool!r}")
    of_the_client = {name: kwargs[name] for name in _OF_THE_CLIENT if name in kwargs}
    of_the_server = {name: value for name, value in kwargs.items() if name not in of_the_client}
    dsn = _dsn(conninfo, tuple(of_the_server.items()))
    if dsn is None:
        return None
    overrides = dict(pool) if isinstance(pool, Mapping) else {}
    setup = overrides.pop("setup", None)
    found = psycopg.get_pool(dsn, overrides, setup=setup)
    return None if found is None else found.lease(**of_the_client)


@functools.lru_cache(maxsize=256)
def _dsn(conninfo: str, parameters: tuple[tuple[str, Any], ...]) -> str | None:
    """One connection string; None for a replication connection, which is not pooled."""
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    dsn = make_conninfo(conninfo, **dict(parameters))
    if "replication" in dsn and conninfo_to_dict(dsn).get("replication"):
        return None
    return dsn


def make_cooperative(ledger: Ledger) -> None:
    """Have psycopg's synchronous connections wait in gevent.

    Args:
        ledger: keeps the originals.
    """
    import gevent
    from psycopg import Connection, _acompat, connection, errors, waiting

    from puff_patch.pools.psycopg_waits import wait, wait_conn
    from puff_patch.runtime.locks import Lock

    # What psycopg took from the standard library when it was imported, patched or not; unpatching gives it what
    # the standard library has then.
    native = sockets.PATCH.ledger.original
    for module in (_acompat, connection):
        if "Lock" not in vars(module):
            continue  # before 3.3, only the second has it
        if vars(module)["Lock"] is threading.Lock:
            ledger.record(module, "Lock", native(threading, "Lock"), alias=True)
        ledger.replace(module, "Lock", Lock, alias=True)
    if vars(waiting)["DefaultSelector"] is selectors.DefaultSelector:
        ledger.record(waiting, "DefaultSelector", native(selectors, "DefaultSelector"), alias=True)
    ledger.replace(waiting, "wait", wait)
    ledger.replace(waiting, "wait_conn", wait_conn)
    original_wait, original_cancel = Connection.wait, Connection.cancel
    expected = getattr(errors, "_WaitTimeout", ())

    @functools.wraps(original_wait)
    def wait_or_stop(self: Any, gen: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original_wait(self, gen, *args, **kwargs)
        except expected:
            raise
        except BaseException:
            # A generator that has not ended did not raise this itself: the greenlet was killed or timed out.
            if gen.gi_frame is not None and not self.closed:
                from puff_patch.pools.psycopg import give_up

                give_up(self)
            raise

    @functools.wraps(original_cancel)
    def cancel(self: Any) -> None:
        from psycopg import capabilities

        if capabilities.has_cancel_safe():
            self.cancel_safe()
        elif self._should_cancel():
            # libpq before 17 has only this one, which waits in C.
            gevent.get_hub().threadpool.apply(self.pgconn.get_cancel().cancel)

    ledger.replace(Connection, "wait", wait_or_stop)
    ledger.replace(Connection, "cancel", cancel)


PATCH = PsycopgPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
