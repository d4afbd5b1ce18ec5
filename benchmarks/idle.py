"""Idle keep-alive clients: opens connections, asks once on each, and again when it is told to.

    python benchmarks/idle.py URL CONNECTIONS

Prints ``open N`` once all are open, waits for a line on standard input, asks again on every connection, and prints
one JSON object: connections, errors (connections that gave no 200 either time).
"""

from __future__ import annotations

import json
import resource
import selectors
import socket
import sys
import time
from urllib.parse import urlsplit

# At a time: more would only wait in the server's accept queue.
AT_ONCE = 256
SECONDS = 60.0


def ask(connections: list[socket.socket], request: bytes) -> set[socket.socket]:
    """Send a request on every connection; return those that gave no whole 200 in time."""
    failed: set[socket.socket] = set()
    waiting = list(reversed(connections))
    received: dict[socket.socket, bytes] = {}
    limit = time.monotonic() + SECONDS
    with selectors.DefaultSelector() as selector:

        def end(sock: socket.socket, ok: bool) -> None:
            selector.unregister(sock)
            del received[sock]
            if not ok:
                failed.add(sock)

        while (waiting or received) and time.monotonic() < limit:
            while waiting and len(received) < AT_ONCE:
                sock = waiting.pop()
                try:
                    sock.sendall(request)
                except OSError:
                    failed.add(sock)
                    continue
                received[sock] = b""
                selector.register(sock, selectors.EVENT_READ)
            for key, _ in selector.select(timeout=0.1):
                sock = key.fileobj  # type: ignore[assignment]
                try:
                    data = sock.recv(65536)
                except OSError:
                    data = b""
                received[sock] += data
                if not data or received[sock].endswith(b"Hello, world!\n"):
                    end(sock, received[sock].startswith(b"HTTP/1.1 200"))
    return failed | set(waiting) | set(received)


def main(url: str, count: int) -> None:
    """Open, ask, wait, ask."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    request = f"GET {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(count + 64, hard), hard))
    connections: list[socket.socket] = []
    failed: set[socket.socket] = set()
    while len(connections) < count:
        some = [
            socket.create_connection(address, timeout=10) for _ in range(min(AT_ONCE, count - len(connections)))
        ]
        failed |= ask(some, request)
        connections += some
    print(f"open {len(connections)}", flush=True)
    sys.stdin.readline()
    failed |= ask(connections, request)
    print(json.dumps({"connections": len(connections), "errors": len(failed)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
