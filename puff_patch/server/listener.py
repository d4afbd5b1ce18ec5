"""The listening socket: opened here and not by the front, for clear errors and a stop that loses nothing."""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Sequence

from puff_patch.server.options import ServerError, ServerOptions

# linux/filter.h and asm-generic/socket.h; Python has no names for them.
_SO_ATTACH_FILTER = 26
# Connections dropped to have room for one that the front is told of.
_NUDGE_ROOM = 2
# struct tcp_info of linux/tcp.h: of a listening socket, tcpi_unacked is the length of the accept queue.
_TCPI_UNACKED_OFFSET = 24

# Classic BPF over the TCP header: drop what has SYN set (byte 13, bit 2), pass everything else.
_DROP_SYN = (
    (0x30, 0, 0, 13),  # ldb [13]
    (0x45, 0, 1, 0x02),  # jset #2, next, skip one
    (0x06, 0, 0, 0),  # ret #0: drop
    (0x06, 0, 0, 0xFFFFFFFF),  # ret #-1: pass whole
)


Instruction = tuple[int, int, int, int]
"""Of classic BPF: operation, jumps if true and if false, constant."""


def attach(sock: _socket.socket, option: int, program: Sequence[Instruction]) -> bool:
    """Have the kernel run a program of classic BPF for a socket; return False if it will not.

    Args:
        sock: the socket.
        option: the option of setsockopt(2), at the level SOL_SOCKET, that takes such a program.
        program: its instructions.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("HP", len(program), ctypes.addressof(code)))
    except OSError:
        return False
    return True


class Listener:
    """A bound and listening socket, TCP or Unix.

    Attributes:
        path: the Unix socket's path, None for TCP.
        backlog: as asked for in the options.

    Args:
        options: ``host``, ``port``, ``uds``, ``backlog``, ``reuse_port`` and ``ssl_certfile`` are read.
        shared: a socket that listens already, which others use and close.

    Raises:
        ServerError: the address is in use, not allowed or not of this machine; the message names it.
    """

    def __init__(self, options: ServerOptions, shared: _socket.socket | None = None) -> None:
        self.path = options.uds
        self.backlog = options.backlog
        self._scheme = "http" if options.ssl_certfile is None else "https"
        self._shared = shared is not None
        if shared is not None:
            self._socket = shared
        elif options.uds is None:
            self._socket = bind_tcp(options)
            self._socket.listen(options.backlog)
        else:
            self._socket = _open_unix(options.uds, options.backlog)
        self._inode = None if options.uds is None else _inode(options.uds)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port; ``("", 0)`` for a Unix socket."""
        if self.path is not None:
            return "", 0
        host, port = self._socket.getsockname()[:2]
        return host, port

    @property
    def url(self) -> str:
        """Where clients find it, as one writes it: ``http://127.0.0.1:8000`` or ``unix:/run/app.sock``."""
        if self.path is not None:
            return f"unix:{self.path}"
        host, port = self.address
        return f"{self._scheme}://[{host}]:{port}" if ":" in host else f"{self._scheme}://{host}:{port}"

    def fileno(self) -> int:
        """Return the socket's file descriptor."""
        return self._socket.fileno()

    def nudge(self) -> None:
        """Make who waits for connections look again: it is told of new ones only, and there are none if the queue
        is full."""
        with contextlib.suppress(OSError):
            for _ in range(_NUDGE_ROOM):
                os.close(self._socket._accept()[0])  # type: ignore[attr-defined]
        probe = _socket.socket(self._socket.family, socket.SOCK_STREAM)
        probe.setblocking(False)
        probe.connect_ex(self._socket.getsockname())
        probe.close()

    def dup_fd(self) -> int:
        """Return a duplicate of the socket's file descriptor; closing it is up to the caller."""
        return os.dup(self._socket.fileno())

    def turn_away(self) -> bool:
        """Let no new client in, without harm to those already connected or in the accept queue.

        TCP: the kernel drops SYN packets, so that new clients try again (and find the next server) instead
        of being reset. Unix: the path is removed.

        Returns:
            False where the platform cannot do it.
        """
        if self.path is not None:
            self._unlink()
            return True
        if not sys.platform.startswith("linux"):
            return False
        return attach(self._socket, _SO_ATTACH_FILTER, _DROP_SYN)

    def queued(self) -> int:
        """How many connections wait to be accepted; 0 where the platform does not tell."""
        if self.path is not None or not sys.platform.startswith("linux"):
            return 0
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        queued: int = struct.unpack_from("I", info, _TCPI_UNACKED_OFFSET)[0]
        return queued

    def close(self) -> None:
        """Close the socket, and remove the Unix socket's path if it is still ours and no others listen there."""
        if not self._shared:
            self._unlink()
        self._socket.close()

    def _unlink(self) -> None:
        if self.path is not None and self._inode is not None and _inode(self.path) == self._inode:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


def bind_tcp(options: ServerOptions) -> _socket.socket:
    """Return a socket bound to the options' host and port, and not listening yet.

    Raises:
        ServerError: see `Listener`.
    """
    host, port = options.host, options.port
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as exc:
        raise ServerError(f"Cannot listen on {host}:{port}: the host is not known ({exc.strerror}).") from exc
    # IPv4 first: "" and names such as localhost mean what they mean to most clients and scripts.
    family, kind, proto, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    # The plain socket of C: a listening socket that gevent's would own is of no use to the front.
    sock = _socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if options.reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Accepted sockets inherit these.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _watch_for_the_dead(sock, options.client_timeout)
        sock.bind(address)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        raise _explained(exc, host, port) from exc
    return sock


def _watch_for_the_dead(sock: _socket.socket, seconds: float) -> None:
    """Have the kernel close connections whose peer is gone without a word, after about ``seconds``.

    A WebSocket may be silent for hours, and the front cannot send it a ping.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    whole = min(max(1, int(seconds)), 32767)
    for name, value in (
        ("TCP_KEEPIDLE", whole),
        ("TCP_KEEPINTVL", max(1, whole // 4)),
        ("TCP_KEEPCNT", 4),
        # Of what was sent: how long it may remain without an acknowledgement or room at the peer, in ms.
        ("TCP_USER_TIMEOUT", min(int(seconds * 1000), 2**31 - 1)),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _explained(exc: OSError, host: str, port: int) -> ServerError:
    where = f"{host or '0.0.0.0'}:{port}"
    if exc.errno == errno.EADDRINUSE:
        return ServerError(
            f"Cannot listen on {where}: port {port} is in use. Stop the other server or choose another port."
        )
    if exc.errno in (errno.EACCES, errno.EPERM):
        return ServerError(
            f"Cannot listen on {where}: permission denied. "
            + ("Ports below 1024 need a privilege; choose a higher one." if port < 1024 else str(exc.strerror))
        )
    if exc.errno == errno.EADDRNOTAVAIL:
        return ServerError(f"Cannot listen on {where}: the address is not one of this machine.")
    return ServerError(f"Cannot listen on {where}: {exc.strerror or exc}.")


def open_nowhere() -> _socket.socket:
    """Return a socket that listens where nobody can find it."""
    sock = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with tempfile.TemporaryDirectory(prefix="puff-") as folder:
        sock.bind(os.path.join(folder, "nowhere"))
        sock.listen(1)
    sock.setblocking(False)
    return sock


def _open_unix(path: str, backlog: int) -> _socket.socket:
    sock = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise ServerError(f"Cannot listen on unix:{path}: another server uses it.") from exc
        raise ServerError(f"Cannot listen on unix:{path}: {exc.strerror or exc}.") from exc
    return sock


def _remove_stale(path: str) -> None:
    """Remove a socket that a dead server left; leave a live one (bind fails then) and any other file."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    probe = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(1)
        probe.connect(path)
    except ConnectionRefusedError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    finally:
        probe.close()


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
