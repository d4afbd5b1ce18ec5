"""A small HTTP load generator, for machines without wrk: keep-alive GETs over N connections, one epoll loop.

    python benchmarks/load.py URL --connections 64 --seconds 5

Prints one JSON object: requests, errors, seconds, rate (requests/s), p50_ms, p99_ms.  It stops by itself.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import time
from urllib.parse import urlsplit


class Connection:
    """One keep-alive client that sends a request as soon as the response before it is complete."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self._address = address
        self._request = request
        self.socket = socket.create_connection(address, timeout=10)
        self.socket.setblocking(False)
        self._received = b""
        self._expected: int | None = None
        self._sent_at = 0.0

    def send(self) -> None:
        """Send a request; small enough for any socket buffer."""
        self._received, self._expected = b"", None
        self._sent_at = time.perf_counter()
        self.socket.sendall(self._request)

    def receive(self) -> tuple[float, bool] | None:
        """Read what is there: None while the response is incomplete, else (seconds, whether it was a 200)."""
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionResetError("closed by the server")
        self._received += data
        if self._expected is None:
            head, separator, _ = self._received.partition(b"\r\n\r\n")
            if not separator:
                return None
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            if not length:
                raise ValueError("this load generator reads responses with a Content-Length only")
            self._expected = len(head) + 4 + int(length[0].partition(b":")[2])
        if len(self._received) < self._expected:
            return None
        return time.perf_counter() - self._sent_at, self._received.startswith(b"HTTP/1.1 200")


def run(url: str, connections: int, seconds: float) -> dict[str, float]:
    """Load ``url`` for ``seconds`` over ``connections`` keep-alive connections."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    request = f"GET {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    selector = selectors.DefaultSelector()
    latencies: list[float] = []
    errors = 0

    def connect() -> None:
        connection = Connection(address, request)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send()

    for _ in range(connections):
        connect()
    started = time.perf_counter()
    while (now := time.perf_counter()) - started < seconds:
        for key, _ in selector.select(timeout=0.1):
            connection = key.data
            try:
                result = connection.receive()
                if result is not None:
                    latencies.append(result[0])
                    errors += not result[1]
                    connection.send()
            except OSError:
                errors += 1
                selector.unregister(connection.socket)
                connection.socket.close()
                connect()
    elapsed = now - started
    latencies.sort()
    return {
        "requests": len(latencies),
        "errors": errors,
        "seconds": elapsed,
        "rate": len(latencies) / elapsed,
        "p50_ms": latencies[len(latencies) // 2] * 1000 if latencies else 0.0,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1000 if latencies else 0.0,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    print(json.dumps(run(options.url, options.connections, options.seconds)))
