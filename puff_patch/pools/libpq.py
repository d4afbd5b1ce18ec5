"""What psycopg2 leaves out of libpq, called through the library that psycopg2 itself has loaded."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import psycopg2
from gevent._hub_local import get_hub_if_exists
from gevent.event import Event
from gevent.monkey import get_original
from psycopg2 import _psycopg, extensions

from puff_patch.pools.farewell import Farewells
from puff_patch.pools.turns import is_inherited
from puff_patch.runtime.mailbox import Mailbox

logger = logging.getLogger("puff_patch.pools")

_start_thread: Callable[..., Any] = get_original("_thread", "start_new_thread")


def is_busy(connection: extensions.connection) -> bool:
    """Whether the server works on a query of this connection, for whichever greenlet."""
    # psycopg2's own method: an instance may have another, or be forbidden it.
    status = extensions.connection.get_transaction_status(connection)
    return bool(status == extensions.TRANSACTION_STATUS_ACTIVE)


class Cancel:
    """A request to the server to stop what it does for a connection; outlives the connection.

    Not ``connection.cancel()``: that keeps the GIL until the server has answered, which a server that is gone does
    not, and with it every greenlet and thread of the process.
    """

    def __init__(self, connection: extensions.connection) -> None:
        self._libpq = _libpq()
        # For what a native thread has to say; a finalizer may run in a thread that has no hub.
        self._mailbox = Mailbox.current() if get_hub_if_exists() else None
        self._under_way: set[object] = set()
        self._pointer = self._libpq.PQgetCancel(connection.pgconn_ptr)

    def __bool__(self) -> bool:
        """Whether there is a server to be asked."""
        return bool(self._pointer)

    def send(self) -> None:
        """Send it, by a native thread; does not wait for it."""
        if self:
            token = object()
            self._under_way.add(token)
            try:
                _start_thread(self._send, (token,))
            except RuntimeError:  # no thread can be had, or the interpreter is ending
                self._under_way.discard(token)

    @property
    def is_under_way(self) -> bool:
        """Whether the server may still act on one that was sent."""
        return bool(self._under_way)

    def tell(self) -> str:
        """In a native thread: send it and wait for the answer; returns what went wrong, if anything did."""
        reason = ctypes.create_string_buffer(256)
        sent = self._libpq.PQcancel(self._pointer, reason, len(reason))
        return "" if sent else reason.value.decode(errors="replace").strip()

    def _send(self, token: object) -> None:
        reason = self.tell()
        self._under_way.discard(token)
        if reason and self._mailbox is not None:
            self._mailbox.post(logger.info, "a query nobody waits for could not be stopped: %s", reason)

    def __del__(self) -> None:
        self._libpq.PQfreeCancel(self._pointer)


def cancel(connection: extensions.connection) -> None:
    """``connection.cancel()``, while other greenlets run; see `Cancel` for why.

    Raises:
        psycopg2.OperationalError: the request could not be sent.
    """
    request = Cancel(connection)
    if not request:
        extensions.connection.cancel(connection)  # says what is wrong
        return
    outcome: list[str] = []
    done = Event()
    mailbox = Mailbox.current()

    def send() -> None:
        outcome.append(request.tell())
        mailbox.post(done.set)

    _start_thread(send, ())
    with mailbox.hold():
        done.wait()
    if outcome[0]:
        raise psycopg2.OperationalError(outcome[0])


def follow(connection: extensions.connection, farewells: Farewells | None = None) -> None:
    """Follow a connection that will not be used any more to its end at the server; see `Farewells`.

    A second call does nothing, nor does one in a process that has inherited the connection.

    Args:
        connection: busy or idle, a pool's or not.
        farewells: those of its pool; by default its own, if it has one.
    """
    if farewells is None:
        pool = getattr(connection, "_puff_pool", None)
        if pool is not None:
            pool.is_closing(connection)
            return
        farewells = _unpooled
    if is_inherited(connection) or getattr(connection, "_puff_followed", False):
        return
    with suppress(AttributeError):  # a class of the caller's may have slots
        connection._puff_followed = True  # type: ignore[attr-defined]
    fileno = connection.info.socket  # psycopg2's own fileno() refuses for one that is broken
    if fileno >= 0:
        farewells.follow(fileno, Cancel(connection).send if is_busy(connection) else None)


_unpooled = Farewells()


def finish(pointer: int) -> None:
    """Close a connection that no object of psycopg2's refers to any longer.

    Args:
        pointer: what its ``pgconn_ptr`` was.
    """
    _libpq().PQfinish(pointer)


def leave_copy(connection: extensions.connection) -> None:
    """Read what is left of a COPY that was broken off, so that the connection can be used; waits by itself.

    PQexec does so first thing, which psycopg2 relies on, but a cooperative connection's commands do not use it.
    """
    if is_busy(connection):
        libpq = _libpq()
        libpq.PQclear(libpq.PQexec(connection.pgconn_ptr, b""))


@contextmanager
def blocking_mode(connection: extensions.connection) -> Iterator[None]:
    """Within the block, calls of libpq wait by themselves, which they do not on a cooperative connection."""
    libpq, pointer = _libpq(), connection.pgconn_ptr
    libpq.PQsetnonblocking(pointer, 0)
    try:
        yield
    finally:
        if not connection.closed:
            libpq.PQsetnonblocking(pointer, 1)


@cache
def _libpq() -> Any:
    # Symbols of a library are found through the extension module that is linked to it.
    libpq = ctypes.CDLL(_psycopg.__file__)
    libpq.PQgetCancel.argtypes, libpq.PQgetCancel.restype = [ctypes.c_void_p], ctypes.c_void_p
    libpq.PQcancel.argtypes, libpq.PQcancel.restype = (
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int],
        ctypes.c_int,
    )
    libpq.PQsetnonblocking.argtypes, libpq.PQsetnonblocking.restype = [ctypes.c_void_p, ctypes.c_int], ctypes.c_int
    libpq.PQexec.argtypes, libpq.PQexec.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p
    libpq.PQclear.argtypes, libpq.PQclear.restype = [ctypes.c_void_p], None
    libpq.PQfinish.argtypes, libpq.PQfinish.restype = [ctypes.c_void_p], None
    libpq.PQfreeCancel.argtypes, libpq.PQfreeCancel.restype = [ctypes.c_void_p], None
    return libpq
