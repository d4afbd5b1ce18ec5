"""The psycopg2 pool, and the connection class whose instances are its leases.

A lease *is* a ``psycopg2.extensions.connection``, not a proxy of one, because psycopg2's C functions
(``register_type``, ``quote_ident``, ``adapt(x).prepare``, ...) want the real object.  ``close()`` returns it.
To make a returned handle as dead as a closed one, its ``__class__`` is switched to a class that raises
InterfaceError; and a connection is never leased again while anybody still holds a reference to it (seen in
its reference count): it is replaced instead.  So an old handle, or a cursor of it, can never reach into somebody
else's session, and the hot path runs psycopg2's own C methods.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import psycopg2
from psycopg2 import _psycopg, extensions

from puff_patch.pools import base
from puff_patch.pools.base import Discard, Slot
from puff_patch.pools.libpq import finish, follow, is_busy
from puff_patch.pools.offload import CooperativeConnection, has_large_objects
from puff_patch.pools.servers import (
    Cursors,
    Registry,
    ServerPool,
    at_most,
    is_silent,
    says_unreachable,
)

# What psycopg2.connect() calls, which is replaced by a patch.
_connect: Callable[..., Any] = _psycopg._connect
# The methods of psycopg2's own class, whatever class an instance has now.
_C: Any = extensions.connection
_RETURNABLE = frozenset(
    {
        extensions.TRANSACTION_STATUS_IDLE,
        extensions.TRANSACTION_STATUS_INTRANS,
        extensions.TRANSACTION_STATUS_INERROR,
    }
)


class PoolTimeout(base.PoolTimeout, psycopg2.OperationalError):
    """No connection came free in time."""


class TooManyRequests(base.TooManyRequests, psycopg2.OperationalError):
    """`max_waiting` checkouts wait already."""


class PoolClosed(base.PoolClosed, psycopg2.OperationalError):
    """The pool was closed."""


class NotLeasable(TypeError):
    """A lease cannot be an instance of this connection_factory."""

    def __init__(self, factory: Any) -> None:
        super().__init__(f"{factory!r} cannot be leased from a pool; connect with pool=False")


class _Lease:
    """What a leased connection knows of its pool."""

    __slots__ = ("initialized", "pool", "slot")

    def __init__(self, pool: PostgresPool, slot: Slot[Any]) -> None:
        self.pool = pool
        self.slot = slot
        self.initialized = False


class LeasedConnection(CooperativeConnection):
    """A connection leased from a pool; `close` returns it."""

    _puff_lease: _Lease | None = None
    _puff_pool: PostgresPool
    _puff_generation: int
    _puff_cursors: Cursors

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A caller's connection_factory may define __init__; it runs at every lease, the connecting once.
        lease = self._puff_lease
        if lease is None:
            super().__init__(*args, **kwargs)
            self._puff_cursors = Cursors()
        elif args[:1] == (lease.pool.dsn,) and not any(args[1:]) and not any(kwargs.values()):
            lease.initialized = True
        else:
            raise NotLeasable(type(self))  # it wants another connection than the one it was given

    def _puff_failed(self) -> None:
        # One that is broken leaves its place to others, whether or not the program closes it.
        lease = self._puff_lease
        if lease is not None and self.closed:
            self._puff_lease = None
            lease.pool.is_closing(self)  # the program may never close it
            lease.pool.checkin_broken(lease.slot)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg2's; remembered, to be closed when the lease ends."""
        cursor = super().cursor(*args, **kwargs)
        self._puff_cursors.add(cursor)
        return cursor

    def close(self) -> None:
        """Return the lease: from now on this handle and its cursors raise InterfaceError."""
        lease = self._puff_lease
        if lease is None:
            super().close()
            return
        self._puff_lease = None
        named = False
        for cursor in self._puff_cursors.alive():
            if cursor.name is None:
                cursor.close()
            elif not cursor.closed:
                named = True  # only the server could close it, and until then it would go on working
        reusable = (
            not self.closed
            and not named
            and self.get_transaction_status() in _RETURNABLE
            and self.status != extensions.STATUS_PREPARED
            and not has_large_objects(self)  # as with the cursors
            and weakref.getweakrefcount(self) == 1  # the pool's; who holds another could reach into the next lease
        )
        self.__class__ = _returned_class(type(self))
        lease.pool.checkin(lease.slot, self, reusable=reusable)

    def __del__(self) -> None:
        # Dropped without close(): psycopg2 closes the connection; its place in the pool is free again.
        lease = self._puff_lease
        if lease is not None:
            self._puff_lease = None
            lease.pool.is_closing(self)
            lease.pool.reclaim(lease.slot)


def _closed_error(*args: Any, **kwargs: Any) -> Any:
    raise psycopg2.InterfaceError("connection already closed")


_FORBIDDEN_METHODS = (
    "__enter__",
    "__exit__",
    "cancel",
    "commit",
    "cursor",
    "fileno",
    "get_backend_pid",
    "get_dsn_parameters",
    "get_native_connection",
    "get_parameter_status",
    "get_transaction_status",
    "isexecuting",
    "lobject",
    "poll",
    "reset",
    "rollback",
    "set_client_encoding",
    "set_isolation_level",
    "set_session",
    "tpc_begin",
    "tpc_commit",
    "tpc_prepare",
    "tpc_recover",
    "tpc_rollback",
    "xid",
)
_READ_ONLY_ATTRIBUTES = ("autocommit", "deferrable", "isolation_level", "readonly")


def _make_leased_class(factory: Any) -> Any:
    """The class of a lease for a caller's connection_factory: LeasedConnection comes behind it in the MRO."""
    if factory is extensions.connection:
        return LeasedConnection
    if issubclass(factory, LeasedConnection):
        return factory
    body: dict[str, Any] = {"__module__": factory.__module__}
    finalizer = getattr(factory, "__del__", None)
    if finalizer is not None:

        def __del__(self: Any) -> None:
            try:
                finalizer(self)
            finally:
                LeasedConnection.__del__(self)

        body["__del__"] = __del__
    return type(factory.__name__, (factory, LeasedConnection), body)


_not_leasable: weakref.WeakSet[type] = weakref.WeakSet()


def can_be_leased(factory: Any) -> bool:
    """Whether a lease can be an instance of this connection_factory.

    Not if it is a function, is for replication, or has ``__slots__``: then a connection cannot become one.  Nor if
    its ``__init__`` has been seen to connect elsewhere, by itself or not at all.
    """
    if factory is extensions.connection:
        return True
    return (
        isinstance(factory, type)
        and issubclass(factory, extensions.connection)
        and not issubclass(factory, _psycopg.ReplicationConnection)
        and factory not in _not_leasable
        and not any(vars(base).get("__slots__") for base in factory.__mro__)
    )


def _make_returned_class(leased: Any) -> Any:
    """What a lease of this class turns into when it is returned."""
    body: dict[str, Any] = {"__module__": leased.__module__, "closed": property(lambda self: 1)}
    body.update(dict.fromkeys(_FORBIDDEN_METHODS, _closed_error))
    for name in _READ_ONLY_ATTRIBUTES:
        body[name] = property(getattr(extensions.connection, name).__get__, _closed_error)
    body["close"] = lambda self: None
    body["__del__"] = lambda self: None
    body["__repr__"] = lambda self: f"<connection object at {id(self):#x}; returned to its pool>"
    return type(leased.__name__, (leased,), body)


_leased_class: Callable[[Any], Any] = lru_cache(256)(_make_leased_class)
_returned_class: Callable[[Any], Any] = lru_cache(256)(_make_returned_class)


class _ResettingConnection(_returned_class(LeasedConnection)):  # type: ignore[misc]
    """A returned connection while its pool resets it: only the wait callback may get through."""

    poll = extensions.connection.poll
    fileno = extensions.connection.fileno


class PostgresPool(ServerPool[LeasedConnection]):
    """A bounded pool of psycopg2 connections to one DSN; see `ServerPool`."""

    PoolTimeout = PoolTimeout
    TooManyRequests = TooManyRequests
    PoolClosed = PoolClosed

    @staticmethod
    def parse(dsn: str) -> Mapping[str, Any]:
        """The parameters of a connection string."""
        return extensions.parse_dsn(dsn)

    def lease(
        self,
        factory: type[extensions.connection] = extensions.connection,
        timeout: float | None = None,
    ) -> extensions.connection:
        """Lease a connection as an instance of ``factory``; its ``close()`` returns it.

        Args:
            factory: a subclass of ``psycopg2.extensions.connection``, see `can_be_leased`.
            timeout: seconds to wait for a free place; the pool's own by default.

        Raises:
            PoolTimeout, TooManyRequests, PoolClosed: see there.
            psycopg2.OperationalError: the server cannot be reached or refuses.
            NotLeasable: ``factory`` makes something else of its connection than a lease can be.
        """
        if not can_be_leased(factory):
            raise NotLeasable(factory)
        leased = _leased_class(factory)
        slot = self.checkout(timeout)
        connection, slot.connection = slot.connection, None
        assert connection is not None
        _forget(connection)  # also what was done to the old handle after the reset
        connection.__class__ = leased
        connection._puff_lease = _Lease(self, slot)
        if leased.__init__ is not LeasedConnection.__init__:
            self._initialize(connection, factory)
        return connection

    def _initialize(self, connection: LeasedConnection, factory: type[extensions.connection]) -> None:
        """Run the ``__init__`` of a caller's class on a connection that is open already."""
        lease, pointer = connection._puff_lease, connection.pgconn_ptr or 0
        assert lease is not None
        try:
            try:
                connection.__init__(self.dsn)  # type: ignore[misc]
            finally:
                if connection.pgconn_ptr != pointer:
                    # It called psycopg2's own __init__ past ours, which opened another connection in this object.
                    finish(pointer)
                    connection._puff_lease = None
                    self.reclaim(lease.slot)
                    _not_leasable.add(factory)
            if connection._puff_lease is not None and not lease.initialized:
                raise NotLeasable(factory)
        except BaseException as error:
            if isinstance(error, NotLeasable):
                _not_leasable.add(factory)
            connection.close()
            raise

    def _connect(self) -> LeasedConnection:
        seconds = connect_timeout(self.dsn) or self.options.timeout
        with at_most(seconds, lambda: self._error(f"timeout expired: no answer in {seconds:g} s")):
            try:
                connection: LeasedConnection = _connect(self.dsn, connection_factory=self._new)
            except psycopg2.OperationalError as error:
                if says_unreachable(str(error)):
                    raise self._error(str(error)) from error
                raise
            if self._setup:
                connection.autocommit = True
                with connection.cursor() as cursor:
                    cursor.execute(self._setup)
                connection.autocommit = False
        return connection

    def _error(self, reason: str) -> psycopg2.OperationalError:
        return psycopg2.OperationalError(self._unreachable(reason))

    def _new(self, *args: Any) -> LeasedConnection:
        connection = LeasedConnection.__new__(LeasedConnection)
        # Before it connects, which may be interrupted.
        connection._puff_pool, connection._puff_generation = self, self._generation
        self._all.add(connection)
        LeasedConnection.__init__(connection, *args)
        return connection

    def is_closing(self, connection: LeasedConnection) -> None:
        """Have the connection, which is closed right after this, counted as long as the server has it."""
        if connection._puff_generation == self._generation:  # else it is the parent's
            follow(connection, self.farewells)

    def _reset(self, connection: LeasedConnection) -> None:
        connection.__class__ = _ResettingConnection
        for cursor in connection._puff_cursors.alive():
            cursor.close()
        seconds = self.options.timeout
        with at_most(seconds, lambda: psycopg2.OperationalError(f"no answer in {seconds:g} s")):
            self._reset_session(connection)
        _forget(connection)
        connection.__class__ = _returned_class(LeasedConnection)

    def _reset_session(self, connection: LeasedConnection) -> None:
        # psycopg2's own methods: the instance's raise on everything while it is in the pool.
        if not _is_idle(connection) or connection.status != extensions.STATUS_READY:
            _C.rollback(connection)
        with extensions.cursor(connection) as cursor:
            if not _is_idle(connection):
                cursor.execute("ROLLBACK")  # begun by hand in autocommit, which psycopg2 does not follow
            if (connection.isolation_level, connection.readonly, connection.deferrable) != (None, None, None):
                _C.set_session(connection, isolation_level="DEFAULT", readonly="DEFAULT", deferrable="DEFAULT")
            # In autocommit no BEGIN goes out before DISCARD ALL.
            _C.set_session(connection, autocommit=True)
            # SET, temporary tables, LISTEN, advisory locks, prepared statements, open cursors.
            cursor.execute("DISCARD ALL")
            if _C.get_parameter_status(connection, "client_encoding") != connection.encoding or not (
                _C.get_parameter_status(connection, "DateStyle") or ""
            ).startswith("ISO"):
                _C.reset(connection)  # psycopg2 reads the encoding anew and asks for ISO dates again
                _C.set_session(connection, autocommit=True)
            if self._setup:
                cursor.execute(self._setup)
        _C.set_session(connection, autocommit=False)

    def _check(self, connection: LeasedConnection) -> bool:
        # A finalizer runs once: a connection that one has rescued could not be reclaimed if it were dropped again.
        if not _is_idle(connection) or gc.is_finalized(connection):
            return False
        return is_silent(_C.fileno(connection))

    def _is_free(self, slot: Slot[LeasedConnection]) -> bool:
        # Somebody who still holds the old handle could use the next lease: see the module.  Old cursors are
        # closed for good; each accounts for one reference.
        references = sys.getrefcount(slot.connection)
        if references <= _IDLE_REFERENCES:
            return True
        assert slot.connection is not None
        return references - len(slot.connection._puff_cursors.alive()) <= _IDLE_REFERENCES

    def _close(self, connection: LeasedConnection) -> None:
        self.is_closing(connection)
        # Else another greenlet waits in this connection and holds its lock, a native one: closing it here would
        # stop the whole thread for ever.  When the server has ended it, that greenlet wakes with an error.
        if not is_busy(connection):
            _C.close(connection)

    def _fileno(self, connection: LeasedConnection) -> int | None:
        try:
            return _C.fileno(connection)  # type: ignore[no-any-return]
        except psycopg2.Error:
            return None

    def _keeps_over_fork(self, connection: LeasedConnection) -> bool:
        # What this greenlet holds it may go on using, as a daemon does whose parent has left.
        lease = connection._puff_lease
        return lease is not None and lease.slot.is_held_here() and not is_busy(connection)

    def _abandon(self, connection: LeasedConnection) -> None:
        """Nothing to do: psycopg2 leaves the socket alone in a process that did not open it."""


def _is_idle(connection: extensions.connection) -> bool:
    return bool(_C.get_transaction_status(connection) == extensions.TRANSACTION_STATUS_IDLE)


def _forget(connection: LeasedConnection) -> None:
    """Drop what a program attached to the connection object."""
    connection.cursor_factory = None  # type: ignore[assignment]
    connection.string_types.clear()
    connection.binary_types.clear()
    connection.notices = []
    connection.notifies = []
    attributes = vars(connection)
    kept = {name: attributes[name] for name in ("_puff_pool", "_puff_generation", "_puff_cursors")}
    attributes.clear()
    attributes.update(kept)


def connect_timeout(dsn: str) -> float | None:
    """Seconds that a DSN gives the server to answer; None for ever.

    In its cooperative mode libpq leaves keeping to it to its caller.
    """
    limit = extensions.parse_dsn(dsn).get("connect_timeout") or os.environ.get("PGCONNECT_TIMEOUT")
    try:
        seconds = float(limit or 0)
    except ValueError:
        return None  # libpq says what is wrong with it
    return seconds if seconds > 0 else None


def _idle_references() -> int:
    """What ``sys.getrefcount(slot.connection)`` gives, in this interpreter, if only the slot refers to it."""
    slot: Slot[Any] = Slot(0)
    slot.connection = object()
    return sys.getrefcount(slot.connection)


_IDLE_REFERENCES = _idle_references()


_registry = Registry(PostgresPool)
#: See `Registry.get`.
get_pool = _registry.get


__all__ = [
    "Discard",
    "LeasedConnection",
    "PoolClosed",
    "PoolTimeout",
    "PostgresPool",
    "TooManyRequests",
    "get_pool",
]
