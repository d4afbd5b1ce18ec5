"""What psycopg2 leaves out of libpq, called through the library that psycopg2 itself has loaded."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import psycopg2
from gevent.event import Event
from gevent.monkey import get_original
from psycopg2 import _psycopg, extensions

from puff_patch.pools.turns import is_inherited
from puff_patch.runtime.mailbox import Mailbox

logger = logging.getLogger("puff_patch.pools")

_start_thread: Callable[..., Any] = get_original("_thread", "start_new_thread")


def is_busy(connection: extensions.connection) -> bool:
    """Whether the server works on a query of this connection, for whichever greenlet."""
    # psycopg2's own method: an instance may have another, or be forbidden it.
    status = extensions.connection.get_transaction_status(connection)
    return bool(status == extensions.TRANSACTION_STATUS_ACTIVE)


def stop_query(connection: extensions.connection, then: Callable[[], object] | None = None) -> bool:
    """Ask the server to stop what it does for a connection; does not wait for it, and does nothing if it is idle.

    Args:
        connection: what the server works for.  If it is to be used again, then only after ``then``: a request
            that comes late would stop its next query.
        then: called in this hub when the server has been told.

    Returns:
        Whether there was something to stop, so that ``then`` will be called.

    Not by ``connection.cancel()``: that keeps the GIL until the server has answered, which a server that is gone
    does not, and with it every greenlet and thread of the process.
    """
    if not is_busy(connection) or is_inherited(connection):
        return False
    libpq = _libpq()
    # Independent of the connection, which psycopg2 closes as soon as the interrupted query has raised.
    request = libpq.PQgetCancel(connection.pgconn_ptr)
    if not request:
        return False
    _start_thread(_send_cancel, (libpq, request, Mailbox.current(), then))
    return True


def cancel(connection: extensions.connection) -> None:
    """``connection.cancel()``, while other greenlets run; see `stop_query` for why.

    Raises:
        psycopg2.OperationalError: the request could not be sent.
    """
    libpq = _libpq()
    request = libpq.PQgetCancel(connection.pgconn_ptr)
    if not request:
        extensions.connection.cancel(connection)  # says what is wrong
        return
    outcome: list[str] = []
    done = Event()
    mailbox = Mailbox.current()

    def send() -> None:
        outcome.extend(_cancel(libpq, request))
        mailbox.post(done.set)

    _start_thread(send, ())
    with mailbox.hold():
        done.wait()
    if outcome:
        raise psycopg2.OperationalError(outcome[0])


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


def _send_cancel(libpq: Any, request: int, mailbox: Mailbox, then: Callable[[], object] | None) -> None:
    for reason in _cancel(libpq, request):
        mailbox.post(logger.info, "a query nobody waits for could not be stopped: %s", reason)
    if then is not None:
        mailbox.post(then)


def _cancel(libpq: Any, request: int) -> list[str]:
    """Send a request to cancel and wait for the answer; gives what went wrong, if anything did."""
    reason = ctypes.create_string_buffer(256)
    sent = libpq.PQcancel(request, reason, len(reason))
    libpq.PQfreeCancel(request)
    return [] if sent else [reason.value.decode(errors="replace").strip()]


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
