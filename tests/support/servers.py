"""Small servers that count and dawdle, on a real thread so that a blocked hub cannot block them."""

from __future__ import annotations

import base64
import contextlib
import select
import socket
import ssl
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from psycopg2 import extensions
from redis.connection import parse_url


class CountingHTTPServer(ThreadingHTTPServer):
    """Answers GET on keep-alive connections; counts connections accepted and requests served.

    ``/slow`` answers when ``release`` is set; ``/cookie`` sets a cookie; ``/session`` tells the client's port;
    ``/flaky`` is served at the third time; ``/peer`` tells the name in the client's certificate; ``/ntlm`` tells
    who has authenticated the connection, as NTLM does.  Any other answer tells the request's cookies.

    Args:
        tls: makes it HTTPS.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.flaky = 0
        self.accepted = 0
        self.open_now = 0
        self.most_open = 0
        self.served = 0
        self.sessions: dict[int, socket.socket] = {}
        self.release = threading.Event()
        self.arrived = threading.Semaphore(0)
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.server_port}"

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.tls is not None:  # in the request's own thread, where a slow handshake harms nobody
            try:
                request = self.tls.wrap_socket(request, server_side=True)
            except OSError:
                return
        super().finish_request(request, client_address)
        if self.tls is not None:
            request.close()

    def count(self, change: int) -> None:
        with self._lock:
            self.open_now += change
            self.accepted += change > 0
            self.most_open = max(self.most_open, self.open_now)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    server: CountingHTTPServer
    challenged = False
    user = ""

    def setup(self) -> None:
        super().setup()
        self.server.sessions[self.client_address[1]] = self.connection
        self.server.count(+1)

    def finish(self) -> None:
        self.server.count(-1)
        del self.server.sessions[self.client_address[1]]
        super().finish()

    def do_GET(self) -> None:
        if self.path.startswith("/slow"):
            self.server.arrived.release()
            self.server.release.wait(30)
        status, said = 200, self.headers.get("Cookie") or "-"
        challenge = ""
        if self.path == "/session":
            said = str(self.client_address[1])
        elif self.path == "/flaky":
            self.server.flaky += 1
            status = 503 if self.server.flaky % 3 else 200
        elif self.path == "/peer":
            certificate = self.connection.getpeercert()  # type: ignore[attr-defined]
            said = (
                dict(pair for part in certificate["subject"] for pair in part)["commonName"]
                if certificate
                else "-"
            )
        elif self.path == "/ntlm":
            status, said, challenge = self.authenticate_connection(self.headers.get("Authorization", ""))
        body = said.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if challenge:
            self.send_header("WWW-Authenticate", challenge)
        if self.path.startswith("/cookie"):
            self.send_header("Set-Cookie", "who=me")
        self.end_headers()
        self.wfile.write(body)
        self.server.served += 1

    def authenticate_connection(self, said: str) -> tuple[int, str, str]:
        if said == "NTLM hello":
            self.challenged = True
            return 401, "", "NTLM challenge"
        if said.startswith("NTLM I am ") and self.challenged:
            self.user = said.removeprefix("NTLM I am ")
        self.challenged = False
        return (200, self.user, "") if self.user else (401, "", "NTLM")

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


class ForwardProxy(ThreadingHTTPServer):
    """An HTTP proxy that wants a user and a password; passes on GET and CONNECT to 127.0.0.1."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        self.accepted = 0
        self.refused = 0
        super().__init__(("127.0.0.1", 0), _ForwardHandler)


class _ForwardHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ForwardProxy

    def setup(self) -> None:
        super().setup()
        self.server.accepted += 1

    def may_pass(self) -> bool:
        if self.headers.get("Proxy-Authorization") == "Basic " + base64.b64encode(b"me:secret").decode():
            return True
        self.server.refused += 1
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_GET(self) -> None:
        if self.may_pass():
            parts = urlsplit(self.path)
            upstream = HTTPConnection("127.0.0.1", parts.port or 80, timeout=10)
            upstream.request("GET", parts.path or "/")
            body = upstream.getresponse().read()
            upstream.close()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def do_CONNECT(self) -> None:
        if self.may_pass():
            port = int(self.path.rpartition(":")[2])
            self.send_response(200)
            self.end_headers()
            with socket.create_connection(("127.0.0.1", port), timeout=10) as upstream:
                both = [self.connection, upstream]
                while True:
                    for source in select.select(both, [], [], 30)[0]:
                        data = source.recv(65536)
                        if not data:
                            self.close_connection = True
                            return
                        both[source is self.connection].sendall(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


class Proxy:
    """Passes TCP connections on to a server, until told to fall silent.

    Args:
        address: where the server is: a path, or a host and a port.
    """

    def __init__(self, address: str | tuple[str, int]) -> None:
        self._address = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        self.port: int = self._listener.getsockname()[1]
        self.silent = threading.Event()
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _connect(self) -> socket.socket:
        if not isinstance(self._address, str):
            return socket.create_connection(self._address)
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._address)
        return server

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
            server = self._connect()
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


class PostgresProxy(Proxy):
    """One before PostgreSQL; ``dsn`` leads through it."""

    def __init__(self, dsn: str) -> None:
        parameters = extensions.parse_dsn(dsn)
        host, port = parameters.get("host", "localhost"), int(parameters.get("port", 5432))
        super().__init__(f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port))
        self.dsn = extensions.make_dsn(dsn, host="127.0.0.1", port=self.port)


class RedisProxy(Proxy):
    """One before Redis; ``url`` leads through it."""

    def __init__(self, url: str) -> None:
        parameters = parse_url(url)
        super().__init__(parameters.get("path") or (parameters["host"], parameters.get("port", 6379)))
        self.url = f"redis://127.0.0.1:{self.port}/{parameters.get('db', 0)}"
