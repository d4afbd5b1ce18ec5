"""The connections of this process, found among its open files: the front has them, but no way to cut one.

Needs Linux's ``/proc``; elsewhere there are none to be found.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import struct
from collections.abc import Iterator


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


def is_connected(client: tuple[str, str], *, reset: bool = False) -> bool:
    """Tell whether this process has a connection to a TCP client.

    Args:
        client: the client's host and port, as an ASGI scope has them.
        reset: also cut the connection.
    """
    family = socket.AF_INET6 if ":" in client[0] else socket.AF_INET
    # The same text for the same address, whoever wrote it.
    peer = (socket.inet_ntop(family, socket.inet_pton(family, client[0])), int(client[1]))
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


def _reset(fd: int) -> None:
    """Make the peer of a connection see at once that it is cut."""
    # connect() to AF_UNSPEC (0) is Linux's way: it sends RST and drops what is not sent yet. See connect(2).
    if _libc().connect(fd, ctypes.create_string_buffer(16), 16) != 0:
        _libc().shutdown(fd, socket.SHUT_RDWR)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
