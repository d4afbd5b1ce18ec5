"""Servers in processes of their own, on a free port of the loopback interface."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

HERE = Path(__file__).parent
READY = "puff_patch is listening on "


def read_all(sock: socket.socket) -> bytes:
    """Read until the end of the connection."""
    received = b""
    while part := sock.recv(65536):
        received += part
    return received


class ServerProcess:
    """A process that serves; it prints a line with its address when it is ready."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            )
        self.url = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(READY):
                self.url = line.removeprefix(READY).strip()
                break
        else:
            self.process.wait(10)
            self.process.stdout.close()
            pytest.fail(f"the server did not start:\n{self.output()}")
        if self.url.startswith("http"):
            self.host, port = self.url.split("://")[1].rsplit(":", 1)
            self.port = int(port)

    def output(self) -> str:
        """What it wrote to stderr so far."""
        return self.log.read_text()

    def wait_for_output(self, text: str, seconds: float = 5) -> str:
        """Wait until ``text`` is in its stderr."""
        limit = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < limit, f"{text!r} is not in:\n{self.output()}"
            time.sleep(0.01)
        return self.output()

    def connect(self, timeout: float = 10) -> socket.socket:
        """A connection to it."""
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def http(self, timeout: float = 10) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(
        self, path: str, method: str = "GET", body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send one request on a connection of its own; return the response and its body."""
        connection = self.http()
        try:
            connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def json(self, path: str, **kwargs: Any) -> Any:
        """The JSON value that a path answers with."""
        response, body = self.request(path, **kwargs)
        assert response.status == 200, body
        return json.loads(body)

    def raw(self, *data: bytes) -> bytes:
        """Send bytes, each argument in a packet of its own, and return all that comes until the end."""
        with self.connect() as sock:
            for part in data:
                sock.sendall(part)
                time.sleep(0.02 if len(data) > 1 else 0)
            return read_all(sock)

    def rss(self) -> float:
        """Resident memory, in MB."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    def signal(self, signum: int = signal.SIGTERM) -> None:
        self.process.send_signal(signum)

    def wait(self, seconds: float = 10) -> int:
        """Wait for its end; return the exit code."""
        return self.process.wait(seconds)

    def stop(self) -> int:
        """End it with SIGTERM, or SIGKILL if it must be."""
        if self.process.poll() is None:
            self.signal()
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()


def sample_command(**options: Any) -> list[str]:
    options = {"port": 0, **options}
    # Warnings are errors in the server, too.
    return [sys.executable, "-W", "error", str(HERE / "sample_app.py"), json.dumps(options)]


StartServer = Callable[..., ServerProcess]
