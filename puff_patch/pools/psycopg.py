"""The psycopg 3 pool, and the connection class whose instances are its leases.

What is pooled is libpq's connection, psycopg's ``PGconn``.  Each lease is a new ``psycopg.Connection`` around it,
so that whatever a program sets on a connection object (autocommit, factories, adapters, handlers, the cache of
prepared statements, ...) ends with its lease; what it did to the server's session, ``DISCARD ALL`` takes back.

``close()`` returns the lease and leaves the handle with a ``PGconn`` that is closed for good: handle and cursors
do what those of a closed connection do, for all their work goes through ``Connection.wait``.  What got hold of the
``PGconn`` itself (``connection.pgconn``, ``connection.info``) could still reach the session; so it is never leased
again while anybody but cursors refers to it, as its reference count tells: it is replaced instead.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Generator, Mapping
from functools import cache
from typing import Any

import psycopg
from gevent._hub_local import get_hub_if_exists
from gevent.monkey import get_original
from psycopg import errors, pq
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_to_dict

from puff_patch.config import PoolOptions
from puff_patch.pools import base
from puff_patch.pools.base import Slot
from puff_patch.pools.farewell import Farewells
from puff_patch.pools.servers import Cursors, Registry, ServerPool, at_most, is_silent, says_unreachable
from puff_patch.pools.sockets import cut_off
from puff_patch.runtime.mailbox import Mailbox

logger = logging.getLogger("puff_patch.pools")

_start_thread: Callable[..., Any] = get_original("_thread", "start_new_thread")
_poll: Callable[[], Any] = get_original("select", "poll")
_RETURNABLE = frozenset({pq.TransactionStatus.IDLE, pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR})
# Seconds that a request to cancel may take.
_CANCEL_TIMEOUT = 30.0


class PoolTimeout(base.PoolTimeout, psycopg.OperationalError):
    """No connection came free in time."""


class TooManyRequests(base.TooManyRequests, psycopg.OperationalError):
    """`max_waiting` checkouts wait already."""


class PoolClosed(base.PoolClosed, psycopg.OperationalError):
    """The pool was closed."""


class Session:
    """What is pooled: a connection of libpq, and which cursors of its leases are still about."""

    __slots__ = ("__weakref__", "cursors", "pgconn", "slot")

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self.pgconn = pgconn
        self.slot: Slot[Session] | None = None  # while it is leased
        self.cursors = Cursors()


class _Lease:
    """What a leased connection knows of its pool."""

    __slots__ = ("pool", "session", "slot")

    def __init__(self, pool: PsycopgPool, slot: Slot[Session], session: Session) -> None:
        self.pool = pool
        self.slot = slot
        self.session = session


class _Bare(psycopg.Connection[Any]):
    """A connection object that does not mind being dropped: what it held lives on; one class for each pool."""

    _puff_farewells: Farewells
    #: The sockets of those that are connecting, by their generators.
    _puff_connecting: dict[Any, int]

    @classmethod
    def _connect_gen(cls, *args: Any, **kwargs: Any) -> Generator[tuple[int, Any], Any, Any]:
        connecting: Any = super()._connect_gen(*args, **kwargs)
        ready = None
        try:
            while True:
                fileno, state = connecting.send(ready)
                cls._puff_connecting[connecting] = fileno
                ready = yield fileno, state
        except StopIteration as end:
            return end.value
        except GeneratorExit:
            # Nobody waits for it any longer, and amid the handshake the server has it already.
            cls._puff_farewells.follow(fileno)
            raise
        finally:
            cls._puff_connecting.pop(connecting, None)
            connecting.close()

    def __del__(self, *_: Any) -> None:
        """No ResourceWarning."""


class LeasedConnection(psycopg.Connection[Any]):
    """A connection leased from a pool; `close`, also at the end of ``with``, returns it."""

    __module__ = "psycopg"
    __qualname__ = "Connection"

    _puff_lease: _Lease | None = None
    _puff_farewells: Farewells
    _puff_left = False

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg's; raises if another greenlet has ended the lease: who follows the session reads along."""
        try:
            answer = super().wait(*args, **kwargs)
        except psycopg.Error as error:
            if self._puff_left:
                raise self._closed_meanwhile() from error
            raise
        if self._puff_left:
            raise self._closed_meanwhile()
        return answer

    def _closed_meanwhile(self) -> psycopg.OperationalError:
        return psycopg.OperationalError("the connection was closed while this waited for an answer")

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg's; remembered, for it may refer to the session after the lease has ended."""
        cursor = super().cursor(*args, **kwargs)
        if self._puff_lease is not None:
            self._puff_lease.session.cursors.add(cursor)
        return cursor

    def close(self) -> None:
        """Return the lease: from now on this handle and its cursors are those of a closed connection."""
        lease = self._puff_lease
        if lease is None:
            super().close()
            return
        self._puff_lease = None
        self._closed = self._closed or not self.closed
        session, pgconn = lease.session, self.pgconn
        # By another greenlet, or a generator that nobody has finished; after a fork, by one of the parent's.
        in_use = self.lock.locked()
        reusable = (
            not in_use
            and pgconn.transaction_status in _RETURNABLE
            and pgconn.pipeline_status == pq.PipelineStatus.OFF
            and not self._num_transactions
        )
        if in_use and lease.pool.owns(lease.slot):
            # Not to be closed under those who wait in it: when the server has ended it they wake with an error.
            self._puff_left = True
            _follow(pgconn, lease.pool.farewells)
            session.pgconn = _closed_pgconn()
        if reusable:
            pgconn.untrace()
        self.pgconn = _closed_pgconn()
        session.slot = None
        lease.pool.checkin(lease.slot, session, reusable=reusable)

    def __del__(self, *_: Any) -> None:
        # Dropped without close(), of which psycopg warns: its place in the pool is free again.
        lease = self._puff_lease
        try:
            super().__del__()
        finally:
            if lease is not None:
                self._puff_lease = None
                lease.pool.checkin(lease.slot, lease.session, reusable=False)


@cache
def _closed_pgconn() -> pq.abc.PGconn:
    # libpq refuses this string at once, and without a word to anybody.
    pgconn = pq.PGconn.connect_start(b"closed")
    pgconn.finish()
    return pgconn


class PsycopgPool(ServerPool[Session]):
    """A bounded pool of psycopg 3 connections to one DSN; see `ServerPool`."""

    PoolTimeout = PoolTimeout
    TooManyRequests = TooManyRequests
    PoolClosed = PoolClosed

    def __init__(self, dsn: str, options: PoolOptions, *, setup: str | None = None, name: str = "") -> None:
        super().__init__(dsn, options, setup=setup, name=name)
        self._connecting: dict[Any, int] = {}
        shared = {"_puff_farewells": self.farewells, "_puff_connecting": self._connecting}
        self._bare: type[_Bare] = type("Connection", (_Bare,), shared)

    @staticmethod
    def parse(dsn: str) -> Mapping[str, Any]:
        """The parameters of a connection string."""
        return conninfo_to_dict(dsn)

    def lease(
        self,
        *,
        autocommit: bool = False,
        prepare_threshold: int | None = 5,
        context: Any = None,
        row_factory: Any = None,
        cursor_factory: Any = None,
        timeout: float | None = None,
    ) -> psycopg.Connection[Any]:
        """Lease a connection; its ``close()`` returns it.

        Args:
            autocommit, prepare_threshold, context, row_factory, cursor_factory: as ``psycopg.connect`` takes them.
            timeout: seconds to wait for a free place; the pool's own by default.

        Raises:
            PoolTimeout, TooManyRequests, PoolClosed: see there.
            psycopg.OperationalError: the server cannot be reached or refuses.
        """
        slot = self.checkout(timeout)
        session, slot.connection = slot.connection, None
        assert session is not None
        session.slot = slot
        connection = LeasedConnection(session.pgconn)
        connection._puff_lease = _Lease(self, slot, session)
        connection._puff_farewells = self.farewells
        connection._autocommit = bool(autocommit)
        connection.prepare_threshold = prepare_threshold
        if row_factory is not None:
            connection.row_factory = row_factory
        if cursor_factory is not None:
            connection.cursor_factory = cursor_factory
        if context is not None:
            connection._adapters = AdaptersMap(context.adapters)
        return connection

    def _connect(self) -> Session:
        # psycopg heeds connect_timeout by itself, for each host; if there is none it would wait for minutes.
        limited = "connect_timeout" in self.parse(self.dsn) or "PGCONNECT_TIMEOUT" in os.environ
        seconds = None if limited else self.options.timeout
        late = f"timeout expired: no answer in {self.options.timeout:g} s"
        with at_most(seconds, lambda: errors.ConnectionTimeout(self._unreachable(late))):
            try:
                connection = self._bare.connect(self.dsn)
            except psycopg.OperationalError as error:
                if says_unreachable(str(error)):
                    raise type(error)(self._unreachable(str(error))) from error
                raise
            try:
                self._set_up(connection)
            except BaseException:
                self._close(Session(connection.pgconn))
                raise
        return Session(connection.pgconn)

    def _set_up(self, connection: _Bare) -> None:
        if self._setup:
            connection.autocommit = True
            connection.execute(self._setup.encode())

    def _reset(self, session: Session) -> None:
        connection = self._bare(session.pgconn)
        seconds = self.options.timeout
        with at_most(seconds, lambda: psycopg.OperationalError(f"no answer in {seconds:g} s")):
            connection.rollback()
            connection.autocommit = True
            # SET, temporary tables, LISTEN, advisory locks, prepared statements, open cursors.
            connection.execute("DISCARD ALL")
            self._set_up(connection)

    def _check(self, session: Session) -> bool:
        pgconn = session.pgconn
        return pgconn.transaction_status == pq.TransactionStatus.IDLE and is_silent(pgconn.socket)

    def _is_free(self, slot: Slot[Session]) -> bool:
        session = slot.connection
        assert session is not None
        others = sys.getrefcount(session.pgconn) - _IDLE_REFERENCES
        if others <= 0:
            return True
        return others <= sum(_references(cursor, session.pgconn) for cursor in session.cursors.alive())

    def _close(self, session: Session) -> None:
        _follow(session.pgconn, self.farewells)
        session.pgconn.finish()

    def _fileno(self, session: Session) -> int | None:
        return session.pgconn.socket if session.pgconn.status == pq.ConnStatus.OK else None

    def _keeps_over_fork(self, session: Session) -> bool:
        # What this greenlet holds it may go on using, as a daemon does whose parent has left.
        return session.slot is not None and session.slot.is_held_here() and not _is_busy(session.pgconn)

    def _after_fork_in_child(self) -> None:
        for fileno in self._connecting.values():
            cut_off(fileno)
        self._connecting.clear()
        super()._after_fork_in_child()

    def _abandon(self, session: Session) -> None:
        """Nothing to do: psycopg leaves the socket alone in a process that did not open it."""


def _references(cursor: Any, pgconn: pq.abc.PGconn) -> int:
    """How many references to a PGconn a cursor accounts for: its own and those of its dumpers and loaders."""
    found, seen, todo = 0, {id(cursor)}, [cursor]
    while todo:
        for referent in gc.get_referents(todo.pop()):
            if referent is pgconn:
                found += 1
            elif id(referent) not in seen and _belongs_to_cursor(referent):
                seen.add(id(referent))
                todo.append(referent)
    return found


def _belongs_to_cursor(value: Any) -> bool:
    kind = type(value)
    if kind in (dict, list, tuple):
        return True
    return kind.__module__.startswith("psycopg") and not isinstance(
        value, (type, AdaptersMap, psycopg.BaseConnection)
    )


def _idle_references() -> int:
    """What ``sys.getrefcount(session.pgconn)`` gives, in this interpreter, if only the session refers to it."""
    session = Session(object())  # type: ignore[arg-type]
    return sys.getrefcount(session.pgconn)


_IDLE_REFERENCES = _idle_references()


class Cancel:
    """A request to the server to stop what it does for a connection; outlives the connection."""

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._request: Any = (
            pgconn.cancel_conn() if psycopg.capabilities.has_cancel_safe() else pgconn.get_cancel()
        )
        # A finalizer may run in a thread that has no hub, and must not get one for it.
        self._mailbox = Mailbox.current() if get_hub_if_exists() else None
        self._is_under_way = False

    def send(self) -> None:
        """Send it, by a native thread, unless one is under way; does not wait for it."""
        if not self._is_under_way:
            self._is_under_way = True
            try:
                _start_thread(self._send, ())
            except RuntimeError:  # no thread can be had, or the interpreter is ending
                self._is_under_way = False

    def _send(self) -> None:
        try:
            if psycopg.capabilities.has_cancel_safe():
                self._converse()
            else:
                # libpq before 17 has no other; the C implementation keeps the interpreter lock meanwhile.
                self._request.cancel()
        except psycopg.Error as error:
            if self._mailbox is not None:
                self._mailbox.post(logger.info, "a query nobody waits for could not be stopped: %s", error)
        finally:
            self._is_under_way = False

    def _converse(self) -> None:
        request = self._request
        reading, writing = pq.PollingStatus.READING, pq.PollingStatus.WRITING
        deadline = time.monotonic() + _CANCEL_TIMEOUT
        try:
            request.start()
            while (status := request.poll()) in (reading, writing):
                poll = _poll()
                poll.register(request.socket, select.POLLIN if status == reading else select.POLLOUT)
                if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                    raise psycopg.OperationalError(f"no answer in {_CANCEL_TIMEOUT:g} s")
            if status != pq.PollingStatus.OK:
                raise psycopg.OperationalError(request.get_error_message())
        finally:
            request.reset()  # to be sent again


def _is_busy(pgconn: pq.abc.PGconn) -> bool:
    return pgconn.transaction_status == pq.TransactionStatus.ACTIVE


def _follow(pgconn: pq.abc.PGconn, farewells: Farewells) -> None:
    """Follow a connection that will not be used any more to its end at the server; see `Farewells`."""
    if pgconn.status == pq.ConnStatus.OK:
        farewells.follow(pgconn.socket, Cancel(pgconn).send if _is_busy(pgconn) else None)


_unpooled = Farewells()


def give_up(connection: psycopg.Connection[Any]) -> None:
    """Stop what the server does for an interrupted greenlet, and close its connection, which cannot be used on.

    Args:
        connection: a pool's or not; left alone if it is idle.
    """
    pgconn = connection.pgconn
    if not _is_busy(pgconn):
        return
    lease: _Lease | None = getattr(connection, "_puff_lease", None)
    if lease is None or lease.pool.owns(lease.slot):
        _follow(pgconn, getattr(connection, "_puff_farewells", _unpooled))
    pgconn.finish()


_registry = Registry(PsycopgPool)
#: See `Registry.get`.
get_pool = _registry.get


__all__ = [
    "LeasedConnection",
    "PoolClosed",
    "PoolTimeout",
    "PsycopgPool",
    "TooManyRequests",
    "get_pool",
    "give_up",
]
