"""The worker's end of what ties it to its supervisor: a socket pair with messages of one byte.

The listening socket comes over it, and not by inheritance: what the program starts before it serves (the keeper of
the embedded services, for one) must not hold it open.  See `puff_patch.server.supervisor` for the other end.
"""

from __future__ import annotations

import _socket
import array
import contextlib
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gevent import get_hub

from puff_patch.server.options import ServerError

VARIABLE = "PUFF_WORKER"
"""Environment variable of a worker: the number of the file descriptor of its end."""

READY, REPLACE = b"r", b"p"
"""What a worker says: it has loaded the application and could serve; it asks to be replaced."""
GO, LEAVE, STOP, CUT = b"g", b"l", b"s", b"c"
"""What it is told: serve; end, others take over; end with all others; cut what still runs."""

# A worker that is still loading must neither die nor show a traceback when these come to the whole process group:
# the supervisor starts it with them blocked.
GROUP_SIGNALS = (signal.SIGINT, signal.SIGHUP)


def _nothing() -> None:
    """What a worker does about signals that its supervisor gets as well."""


class Link:
    """A worker's end; get it with `link`."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        # No socket yet: a program that fails before it serves would end with a warning that it was not closed.
        self._fd = fd

    def receive_listener(self) -> _socket.socket:
        """Take the listening socket.

        Raises:
            ServerError: the supervisor is gone.
        """
        self._socket = _socket.socket(fileno=self._fd)
        self._socket.setblocking(True)
        numbers = array.array("i")
        with contextlib.suppress(OSError):
            _, ancillary, _, _ = self._socket.recvmsg(1, socket.CMSG_SPACE(numbers.itemsize))
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
        self._socket.setblocking(False)
        if not numbers:
            raise ServerError("this is a worker, and its supervisor is gone")
        return _socket.socket(fileno=numbers[0])

    def close(self) -> None:
        """Have the supervisor hear that nothing more comes; after `receive_listener`."""
        self._socket.close()

    def say(self, message: bytes) -> None:
        """Send a message to the supervisor; it does not matter if that is gone."""
        with contextlib.suppress(OSError):
            self._socket.send(message)

    @contextmanager
    def listening(self, callback: Callable[[bytes], object]) -> Iterator[None]:
        """Have the hub call ``callback`` within the block with each message, and once with b"" if it has ended."""
        loop = get_hub().loop
        watcher: Any = loop.io(self._socket.fileno(), 1)

        def read() -> None:
            try:
                messages = self._socket.recv(64)
            except BlockingIOError:
                return
            except OSError:
                messages = b""
            if not messages:
                watcher.stop()
                callback(b"")
            for number in messages:
                callback(bytes([number]))

        signals = [loop.signal(signum) for signum in GROUP_SIGNALS]
        try:
            watcher.start(read)
            for each in signals:
                each.start(_nothing)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
            yield
        finally:
            for each in (watcher, *signals):
                each.close()


_link: Link | None = None


def link() -> Link | None:
    """The link of this process to its supervisor; None if it has none."""
    global _link
    # Not left to children: they are no workers.
    number = os.environ.pop(VARIABLE, "")
    if number:
        try:
            if stat.S_ISSOCK(os.fstat(int(number)).st_mode):
                _link = Link(int(number))
        except (ValueError, OSError):
            return None
    return _link
