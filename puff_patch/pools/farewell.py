"""Connections that are closed here, and that the server still has.

A pool that replaces a connection would, for a moment, have one more at the server than `max_size` allows: closing
is a message, and the server acts on it a little later.  Where the processes' pools add up to the server's limit,
that one is refused.  So a closed connection is followed to its end, which is when the server closes its side, and
a new one waits for it.

If the server works on a query, that is cancelled, more than once if need be: a cancel that overtakes its query is
ignored.

The following is done by a native thread each, since it must go on whatever becomes of the hub or the greenlet that
closed the connection, and since a finalizer may have been the one.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gevent
from gevent.monkey import get_original

_start_thread: Callable[..., Any] = get_original("_thread", "start_new_thread")
_poll: Callable[[], Any] = get_original("select", "poll")
_socket: Callable[..., Any] = get_original("socket", "socket")

#: Seconds after which a server that does not close its side is not waited for any longer.
PATIENCE = 2.0
# Seconds a server has to act on what it was told before it is told again; doubled each time.
_POLITENESS = 0.02
_PAUSE = 0.0005


class Farewells:
    """The connections of one pool that are closed here and not yet at the server."""

    def __init__(self) -> None:
        self._pending: set[Any] = set()

    def __len__(self) -> int:
        return len(self._pending)

    def follow(self, fileno: int, cancel: Callable[[], object] | None = None) -> None:
        """Follow a connection that will not be used any more; safe in a finalizer, never waits.

        Args:
            fileno: its socket.
            cancel: sends a request to stop what the server does for it, without waiting; None if it is idle.
        """
        try:
            descriptor = os.dup(fileno)
        except OSError:
            return  # closed already
        sock = _socket(fileno=descriptor)
        self._pending.add(sock)
        try:
            _start_thread(self._see_off, (sock, cancel))
        except RuntimeError:  # no thread can be had, or the interpreter is ending
            self._forget(sock)

    def wait(self, has_room: Callable[[int], bool]) -> None:
        """Wait until ``has_room(number of those still there)``; at most `PATIENCE` seconds."""
        deadline = time.monotonic() + PATIENCE
        while not has_room(len(self._pending)) and time.monotonic() < deadline:
            gevent.sleep(_PAUSE)

    def forget_all(self) -> None:
        """In a forked child: the parent follows its connections itself."""
        for sock in list(self._pending):
            self._forget(sock)

    def _see_off(self, sock: Any, cancel: Callable[[], object] | None) -> None:
        seconds, total = _POLITENESS, 0.0
        try:
            while total < PATIENCE:
                if cancel is not None:
                    cancel()
                if _reads_the_end(sock, seconds):
                    return
                # Nothing but this ends a connection that was closed amid the handshake.
                sock.shutdown(socket.SHUT_WR)
                total += seconds
                seconds *= 2
            sock.shutdown(socket.SHUT_RDWR)  # a greenlet may still wait in it
        except OSError:
            return  # reset: the server has gone
        finally:
            self._forget(sock)

    def _forget(self, sock: Any) -> None:
        self._pending.discard(sock)
        sock.close()


def _reads_the_end(sock: Any, seconds: float) -> bool:
    """Whether the server closes its side in time; reads, for one that is stuck in writing an answer never does."""
    deadline = time.monotonic() + seconds
    poll = _poll()
    poll.register(sock, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(left * 1000):
            with suppress(BlockingIOError):  # a greenlet that still waits in it was faster
                if not sock.recv(65536):
                    return True
    return False
