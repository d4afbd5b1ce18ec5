"""The connections of this process, found among its open files: the front has them, but no way to cut one.

Needs Linux's ``/proc``; elsewhere there are none to be found.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import struct
from collections.abc import Callable, Iterator

# struct tcp_info of linux/tcp.h: two of its fields, in milliseconds.
_TCP_INFO_SIZE = 104
_LAST_DATA_SENT, _LAST_DATA_RECV = 44, 52


def _duplicates() -> Iterator[int]:
    """Yield a duplicate of each of this process's file descriptors, closed after its turn.

    Of a duplicate one may say what it is without it being closed, and its number given to another, meanwhile.
    """
    if not os.path.isdir("/proc/self/fd"):
        return
    for name in os.listdir("/proc/self/fd"):
        try:
            fd = os.dup(int(name))
        except OSError:
            continue  # the directory's own descriptor, closed by now, and what others closed meanwhile
        try:
            yield fd
        finally:
            os.close(fd)


def _end(fd: int, which: str) -> tuple[str, int] | str | None:
    """Return what getpeername(2) or getsockname(2) says: host and port, a Unix path, None for neither.

    By way of libc, for a socket object of Python's may change the mode of the socket it is made of.
    """
    address = ctypes.create_string_buffer(128)
    size = ctypes.c_uint(len(address))
    if getattr(_libc(), which)(fd, address, ctypes.byref(size)) != 0:
        return None
    raw = address.raw
    family, port = struct.unpack_from("=H", raw)[0], struct.unpack_from("!H", raw, 2)[0]
    if family == socket.AF_INET:
        return socket.inet_ntop(family, raw[4:8]), port
    if family == socket.AF_INET6:
        return socket.inet_ntop(family, raw[8:24]), port
    if family == socket.AF_UNIX:
        return os.fsdecode(raw[2 : size.value].split(b"\0")[0])
    return None


def peer_of(client: tuple[str, str]) -> tuple[str, int]:
    """Return the host and port of a client as an ASGI scope has them, in the form used here."""
    family = socket.AF_INET6 if ":" in client[0] else socket.AF_INET
    # The same text for the same address, whoever wrote it.
    return socket.inet_ntop(family, socket.inet_pton(family, client[0])), int(client[1])


def is_connected(client: tuple[str, str], *, reset: bool = False) -> bool:
    """Tell whether this process has a connection to a TCP client.

    Args:
        client: the client's host and port, as an ASGI scope has them.
        reset: also cut the connection.
    """
    peer = peer_of(client)
    for fd in _duplicates():
        if _end(fd, "getpeername") == peer:
            if reset:
                _reset(fd)
            return True
    return False


def accepted_at(end: int | str) -> Iterator[int]:
    """Yield, of each connection accepted at a TCP port or a Unix socket's path, a descriptor open for its turn."""
    for fd in _duplicates():
        # What listens has no peer.
        if _end(fd, "getpeername") is not None:
            own = _end(fd, "getsockname")
            if (own[1] if isinstance(own, tuple) else own) == end:
                yield fd


def reset_all(end: int | str) -> int:
    """Cut every connection that was accepted at a TCP port or a Unix socket's path; return how many there were."""
    count = 0
    for fd in accepted_at(end):
        _reset(fd)
        count += 1
    return count


class IdleCutter:
    """Closes TCP connections on which nothing has come or gone for a while.

    Args:
        port: where they were accepted.
        seconds: how long is too long.
        in_use: returns the peers' host and port of connections that are needed all the same.
    """

    def __init__(self, port: int, seconds: float, in_use: Callable[[], set[tuple[str, int]]]) -> None:
        self._port = port
        self._milliseconds = seconds * 1000
        self._in_use = in_use
        self._asked: set[tuple[str, int]] = set()

    def run(self, pause: Callable[[], object]) -> None:
        """Look at every connection once.

        Args:
            pause: called every hundred files or so, for there can be many; only then do requests begin and end.
        """
        asked, self._asked = self._asked, set()
        in_use: set[tuple[str, int]] | None = None
        for count, fd in enumerate(_duplicates(), 1):
            if count % 100 == 0:
                pause()
                in_use = None
            peer, own = _end(fd, "getpeername"), _end(fd, "getsockname")
            if not isinstance(peer, tuple) or not isinstance(own, tuple) or own[1] != self._port:
                continue
            if _idle_milliseconds(fd) < self._milliseconds:
                continue
            if in_use is None:
                in_use = self._in_use()
            if peer in in_use:
                continue
            if peer in asked:
                # It holds on to a response that it does not take.
                _reset(fd)
            else:
                # The front sees the end of what the client has to say, and closes.
                _libc().shutdown(fd, socket.SHUT_RD)
                self._asked.add(peer)


def _idle_milliseconds(fd: int) -> int:
    """How long ago the last data was sent or received on a TCP connection."""
    info = ctypes.create_string_buffer(_TCP_INFO_SIZE)
    size = ctypes.c_uint(len(info))
    if _libc().getsockopt(fd, socket.IPPROTO_TCP, socket.TCP_INFO, info, ctypes.byref(size)) != 0:
        return 0
    sent: int = struct.unpack_from("=I", info, _LAST_DATA_SENT)[0]
    received: int = struct.unpack_from("=I", info, _LAST_DATA_RECV)[0]
    return min(sent, received)


def _reset(fd: int) -> None:
    """Make the peer of a connection see at once that it is cut."""
    # connect() to AF_UNSPEC (0) is Linux's way: it sends RST and drops what is not sent yet. See connect(2).
    if _libc().connect(fd, ctypes.create_string_buffer(16), 16) != 0:
        _libc().shutdown(fd, socket.SHUT_RDWR)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
