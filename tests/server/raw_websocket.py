"""A WebSocket client that sends what it is told, right or wrong."""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import Any

from server_process import ServerProcess

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
SO_ATTACH_FILTER = 26


def frame(opcode: int, data: bytes = b"", *, fin: bool = True, mask: bool = True, rsv: int = 0) -> bytes:
    """One frame; the mask is zero."""
    bit = 0x80 if mask else 0
    size = len(data)
    if size < 126:
        length = bytes([bit | size])
    elif size < 65536:
        length = bytes([bit | 126]) + struct.pack("!H", size)
    else:
        length = bytes([bit | 127]) + struct.pack("!Q", size)
    return bytes([(0x80 if fin else 0) | rsv << 4 | opcode]) + length + (b"\0\0\0\0" if mask else b"") + data


def closing(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, struct.pack("!H", code) + reason)


class RawWebSocket:
    """A connection that has, unless told otherwise, shaken hands for a path."""

    def __init__(self, server: ServerProcess, path: str, *headers: str, without: str = "", size: int = 0) -> None:
        self.sock = socket.socket()
        if size:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        self.sock.settimeout(10)
        self.sock.connect(("127.0.0.1", server.port))
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: 127.0.0.1:{server.port}",
            "Connection: keep-alive, Upgrade",
            "Upgrade: WebSocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ]
        kept = [line for line in lines if not without or not line.startswith(without + ":")]
        self.sock.sendall("\r\n".join([*kept, *headers, "", ""]).encode())
        self.stream = self.sock.makefile("rb")
        self.status = int(self.stream.readline().split()[1])
        self.headers = {}
        while (line := self.stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            self.headers[name.lower()] = value.strip()

    def __enter__(self) -> RawWebSocket:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.stream.close()
        self.sock.close()

    def body(self) -> bytes:
        """The body of a refusal."""
        return self.stream.read(int(self.headers["content-length"]))

    def send(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(frames))

    def receive(self) -> tuple[int, bytes] | None:
        """Opcode and data of the next frame, which is a whole one; None at the end of the connection."""
        head = self.stream.read(2)
        if not head:
            return None
        assert head[0] & 0xF0 == 0x80, head  # FIN, and no reserved bits
        size = head[1]
        if size == 126:
            size = struct.unpack("!H", self.stream.read(2))[0]
        elif size == 127:
            size = struct.unpack("!Q", self.stream.read(8))[0]
        return head[0] & 0x0F, self.stream.read(size)

    def closed_with(self) -> int | None:
        """The code of the close frame that comes next, before the end; None for an end without."""
        try:
            found = self.receive()
            if found is not None:
                assert found[0] == CLOSE, found
                assert self.receive() is None
        except ConnectionResetError:
            return None
        return None if found is None else struct.unpack("!H", found[1][:2])[0] if found[1] else 1005

    def vanish(self) -> None:
        """Be as if the cable was cut: the kernel drops whatever comes, and acknowledges nothing."""
        code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
        program = struct.pack("HP", 1, ctypes.addressof(code))
        self.sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
