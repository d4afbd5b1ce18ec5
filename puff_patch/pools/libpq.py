"""What psycopg2 leaves out of libpq, called through the library that psycopg2 itself has loaded."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import psycopg2
from gevent._hub_local import get_hub_if_exists
from gevent.monkey import get_original
from psycopg2 import _psycopg, extensions

from puff_patch.pools.farewell import Farewells
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

    def send(self) -> None:
        """Send it, by a native thread; does not wait for it."""
        if self._pointer:
            token = object()
            self._under_way.add(token)
            _start_thread(self._send, (token,))

    @property
    def is_under_way(self) -> bool:
        """Whether the server may still act on one that was sent."""
        return bool(self._under_way)

    def _send(self, token: object) -> None:
        reason = ctypes.create_string_buffer(256)
        sent = self._libpq.PQcancel(self._pointer, reason, len(reason))
        self._under_way.discard(token)
        if not sent and self._mailbox is not None:
            text = reason.value.decode(errors="replace").strip()
            self._mailbox.post(logger.info, "a query nobody waits for could not be stopped: %s", text)

    def __del__(self) -> None:
        self._libpq.PQfreeCancel(self._pointer)


def stop_query(connection: extensions.connection) -> None:
    """Ask the server to stop what it does for a connection; does not wait for it, and does nothing if it is idle.

    The server ignores it if it comes before the query itself has been read.
    """
    if is_busy(connection):
        Cancel(connection).send()


def follow(connection: extensions.connection, farewells: Farewells | None = None) -> None:
    """Follow a connection that is closed right after this to its end at the server; see `Farewells`.

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
    try:
        # psycopg2's own method: an instance's may be forbidden.
        fileno = extensions.connection.fileno(connection)
    except psycopg2.Error:
        return  # it has no socket, not yet or any more
    farewells.follow(fileno, Cancel(connection).send if is_busy(connection) else None)


_unpooled = Farewells()


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
    libpq.PQfreeCancel.argtypes, libpq.PQfreeCancel.restype = [ctypes.c_void_p], None
    return libpq
