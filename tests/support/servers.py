"""Small servers that count and dawdle, on a real thread so that a blocked hub cannot block them."""

from __future__ import annotations

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from psycopg2 import extensions


class CountingHTTPServer(ThreadingHTTPServer):
    """Answers GET on keep-alive connections; counts connections accepted and requests served.

    ``/slow`` answers when ``release`` is set; ``/cookie`` sets a cookie; any answer tells the request's cookies.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        self.accepted = 0
        self.open_now = 0
        self.most_open = 0
        self.served = 0
        self.release = threading.Event()
        self.arrived = threading.Semaphore(0)
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, change: int) -> None:
        with self._lock:
            self.open_now += change
            self.accepted += change > 0
            self.most_open = max(self.most_open, self.open_now)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CountingHTTPServer

    def setup(self) -> None:
        super().setup()
        self.server.count(+1)

    def finish(self) -> None:
        self.server.count(-1)
        super().finish()

    def do_GET(self) -> None:
        if self.path.startswith("/slow"):
            self.server.arrived.release()
            self.server.release.wait(30)
        body = (self.headers.get("Cookie") or "-").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if self.path.startswith("/cookie"):
            self.send_header("Set-Cookie", "who=me")
        self.end_headers()
        self.wfile.write(body)
        self.server.served += 1

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


class PostgresProxy:
    """Passes connections on to a PostgreSQL server, until told to fall silent."""

    def __init__(self, dsn: str) -> None:
        parameters = extensions.parse_dsn(dsn)
        self._host, self._port = parameters.get("host", "localhost"), int(parameters.get("port", 5432))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        self.silent = threading.Event()
        self.accepted = 0
        self.dsn = extensions.make_dsn(dsn, host="127.0.0.1", port=self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._open.append(client)
            if self.silent.is_set():
                continue  # never answered
            if self._host.startswith("/"):
                server = socket.socket(socket.AF_UNIX)
                server.connect(f"{self._host}/.s.PGSQL.{self._port}")
            else:
                server = socket.create_connection((self._host, self._port))
            self._open.append(server)
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not self.silent.is_set():
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed by the other side, or by `close`

    def close(self) -> None:
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
