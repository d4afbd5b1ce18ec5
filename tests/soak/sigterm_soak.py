"""A server that is stopped with SIGTERM and started again, over and over, under load. It must lose no request.

    python tests/soak/sigterm_soak.py [SECONDS [WORKERS]]

With several workers it is also told, with SIGHUP, to replace them, and now and then again before it is done.

Lost is a request whose bytes were sent on an established connection and whose response did not come, or not
whole. A client may find the connection refused or slow while it connects, and a kept connection closed
before it sends. Exits with 0 if none was lost and every server ended with 0.
"""

# ruff: noqa: E402 - everything else is imported patched
from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import gevent

SAMPLE_APP = Path(__file__).parent.parent / "server" / "sample_app.py"
CLIENTS = 24
GET = b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n"
REQUESTS = [
    *[GET % b"/hello"] * 3,
    *[GET % path for path in (b"/nap?seconds=0.05", b"/stream?count=20&size=1000", b"/whole?size=200000")],
    b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 20000\r\n\r\n" + b"x" * 20_000,
]


class Lost(Exception):
    """A request was sent and its response is not whole."""


class Client:
    """Sends requests on one connection, kept alive as long as the server lets it."""

    def __init__(self, port: int, counts: Counter[str], think: float) -> None:
        self.port = port
        self.counts = counts
        self.think = think
        self.sock: socket.socket | None = None
        self.buffer = b""

    def run(self) -> None:
        while True:
            try:
                self.connect()
            except OSError as exc:
                self.counts[f"not connected ({type(exc).__name__})"] += 1
                gevent.sleep(0.02)
                continue
            try:
                self.exchange(random.choice(REQUESTS))
                self.counts["answered"] += 1
            except (Lost, OSError) as exc:
                self.counts["lost"] += 1
                print(f"lost after {self.counts['answered']}: {type(exc).__name__}: {exc}", flush=True)
                self.close()
            gevent.sleep(self.think * random.random())

    def connect(self) -> None:
        """Keep the connection, unless the server has closed it."""
        if self.sock is not None:
            if not select.select([self.sock], [], [], 0)[0]:
                return
            self.counts["closed while idle"] += 1
            self.close()
        self.sock = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        self.sock.settimeout(20)
        self.counts["connections"] += 1

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
        self.sock = None
        self.buffer = b""

    def exchange(self, request: bytes) -> None:
        assert self.sock is not None
        self.sock.sendall(request)
        head = self.until(b"\r\n\r\n").lower()
        if not head.startswith(b"http/1.1 200"):
            raise Lost(f"answered {head[:40]!r}")
        if b"transfer-encoding: chunked" in head:
            while size := int(self.until(b"\r\n"), 16):
                self.exactly(size + 2)
            self.exactly(2)
        else:
            self.exactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        if b"connection: close" in head:
            self.counts["asked to close"] += 1
            self.close()

    def until(self, end: bytes) -> bytes:
        while end not in self.buffer:
            self.receive()
        found, self.buffer = self.buffer.split(end, 1)
        return found + end

    def exactly(self, size: int) -> None:
        while len(self.buffer) < size:
            self.receive()
        self.buffer = self.buffer[size:]

    def receive(self) -> None:
        assert self.sock is not None
        data = self.sock.recv(65536)
        if not data:
            raise Lost(f"the connection ended after {len(self.buffer)} bytes that were not yet used")
        self.buffer += data


def start(port: int, workers: int) -> subprocess.Popen[bytes]:
    options = json.dumps({"port": port, "graceful_timeout": 10, "workers": workers})
    process = subprocess.Popen([sys.executable, str(SAMPLE_APP), options], stdout=subprocess.PIPE)
    assert process.stdout is not None
    if not process.stdout.readline():
        raise SystemExit(f"the server did not start, exit code {process.wait()}")
    return process


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def main(seconds: float, workers: int) -> int:
    """Run the soak and print what was counted."""
    port = free_port()
    counts: Counter[str] = Counter()
    process = start(port, workers)
    # Most clients are busy, some leave their connection idle for longer than the server stays quiet.
    clients = [Client(port, counts, 0.5 if number % 6 == 5 else 0.02) for number in range(CLIENTS)]
    tasks = [gevent.spawn(client.run) for client in clients]
    end = time.monotonic() + seconds
    stops: list[float] = []
    try:
        while time.monotonic() < end:
            gevent.sleep(random.uniform(0.3, 0.8))
            for _ in range(random.choice((1, 2, 4)) if workers > 1 else 0):
                if counts["SIGHUP"] and time.monotonic() > end:
                    break
                process.send_signal(signal.SIGHUP)
                counts["SIGHUP"] += 1
                gevent.sleep(random.uniform(0.1, 1.5))
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            code = process.wait()
            stops.append(time.monotonic() - began)
            counts[f"exit code {code}"] += 1
            process = start(port, workers)
    finally:
        gevent.killall(tasks)
        process.send_signal(signal.SIGTERM)
        counts[f"exit code {process.wait()}"] += 1
    print(f"{len(stops)} restarts in {seconds:g} s, stopping took {max(stops):.2f} s at most")
    for name, count in sorted(counts.items()):
        print(f"{count:8} {name}")
    bad = counts["lost"] or any(name.startswith("exit code") and name != "exit code 0" for name in counts)
    return 1 if bad or not counts["answered"] else 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(main(float(arguments[0]) if arguments else 30, int(arguments[1]) if len(arguments) > 1 else 1))
