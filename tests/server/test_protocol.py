"""Requests as they should not be, and as they rarely are."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from server_process import ServerProcess, StartServer, read_all
from support.waiting import eventually

# What an attacker would have the next one on the connection, or a proxy's next client, send.
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
GET = b"GET /hello HTTP/1.1\r\nHost: h\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: h\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"

REFUSED = {
    "different lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "list of lengths": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "signed length": POST + b"Content-Length: +5\r\n\r\nhello",
    "negative length": POST + b"Content-Length: -5\r\n\r\nhello",
    "hexadecimal length": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "no length": POST + b"Content-Length: \r\n\r\nhello",
    "length beyond 64 bits": POST + b"Content-Length: 18446744073709551621\r\n\r\nhello",
    "space before the colon": POST + b"Content-Length : 5\r\n\r\nhello",
    "chunked not last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello",
    "unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "control character before the coding": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "quoted coding": POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "chunked in HTTP/1.0": b"POST /echo HTTP/1.0\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "folded header": GET + b"X-A: 1\r\n folded\r\n\r\n",
    "folded coding": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "bare CR": GET + b"X-A: 1\rX-B: 2\r\n\r\n",
    "NUL in a value": GET + b"X-A: a\0b\r\n\r\n",
    "NUL in a name": GET + b"X\0A: a\r\n\r\n",
    "header without a colon": GET + b"nonsense\r\n\r\n",
    "header without a name": GET + b": a\r\n\r\n",
    "space before the first header": b"GET /hello HTTP/1.1\r\n Host: h\r\n\r\n",
    "two hosts": GET + b"Host: i\r\n\r\n",
    "no host": b"GET /hello HTTP/1.1\r\n\r\n",
    "HTTP/0.9": b"GET /hello\r\n\r\n",
    "HTTP/1.2": b"GET /hello HTTP/1.2\r\nHost: h\r\n\r\n",
    "HTTP/2.0 as a text": b"GET /hello HTTP/2.0\r\nHost: h\r\n\r\n",
    "two spaces": b"GET  /hello HTTP/1.1\r\nHost: h\r\n\r\n",
    "method with a bracket": b"GE(T /hello HTTP/1.1\r\nHost: h\r\n\r\n",
    "NUL in the path": b"GET /he\0llo HTTP/1.1\r\nHost: h\r\n\r\n",
    "star for a path": b"GET * HTTP/1.1\r\nHost: h\r\n\r\n",
    "chunk size that is no number": POST + CHUNKED + b"\r\nzz\r\nhello\r\n0\r\n\r\n",
    "chunk size beyond 64 bits": POST + CHUNKED + b"\r\n10000000000000005\r\nhello\r\n0\r\n\r\n",
    "negative chunk size": POST + CHUNKED + b"\r\n-1\r\nhello\r\n0\r\n\r\n",
    "chunk size with 0x": POST + CHUNKED + b"\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "chunk that is longer": POST + CHUNKED + b"\r\n5\r\nhello world\r\n0\r\n\r\n",
    "bare LF after a chunk size": POST + CHUNKED + b"\r\n5\nhello\r\n0\r\n\r\n",
    "bare LF in a chunk extension": POST + CHUNKED + b"\r\n5;a\nb\r\nhello\r\n0\r\n\r\n",
    "endless chunk extension": POST + CHUNKED + b"\r\n5;" + b"a" * 100_000 + b"\r\nhello\r\n0\r\n\r\n",
    "endless trailers": POST + CHUNKED + b"\r\n0\r\nX-T: " + b"t" * 100_000 + b"\r\n\r\n",
}


def reached(server: ServerProcess, path: str) -> bool:
    return path in server.json("/show_seen")["paths"]


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_request_is_refused_and_nothing_after_it_is_taken_for_one(
    server: ServerProcess, name: str
) -> None:
    with server.connect(5) as sock:
        # Whoever is refused early may see a reset while it sends the rest.
        with contextlib.suppress(ConnectionError):
            sock.sendall(REFUSED[name] + SMUGGLED)
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(65536):
                received += part
    assert received.startswith(b"HTTP/1.1 400 Bad Request\r\n"), received
    assert received.count(b"HTTP/1.1") == 1
    assert b"connection: close" in received
    assert not reached(server, "/smuggled")


@pytest.mark.parametrize(
    "request_",
    [
        POST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
        POST + b"Content-Length: %d\r\n" % (5 + len(SMUGGLED)) + CHUNKED + b"\r\n0\r\n\r\n",
    ],
)
def test_chunks_win_over_a_length_and_the_connection_ends(server: ServerProcess, request_: bytes) -> None:
    answer = server.raw(request_ + SMUGGLED)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.endswith(b"\r\n\r\n")
    assert not reached(server, "/smuggled")


def test_request_in_a_body_is_no_request(server: ServerProcess) -> None:
    length = b"Content-Length: %d\r\n" % len(SMUGGLED)
    chunk = CHUNKED + b"\r\n%x\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\n\r\n"
    for path, expected in ((b"/echo", b"200 OK"), (b"/unread", b"413 "), (b"/fail_early", b"500 ")):
        post = POST.replace(b"/echo", path)
        for request in (post + length + b"\r\n" + SMUGGLED, post + length * 2 + b"\r\n" + SMUGGLED, post + chunk):
            answer = server.raw(request + GET + b"Connection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 " + expected)
            # The next one on the connection is read from where it begins, or not at all.
            assert answer.endswith(b"\r\n\r\nhello\n") or b"connection: close" in answer
    assert not reached(server, "/smuggled")


def test_requests_of_no_path(server: ServerProcess) -> None:
    def ask(line: bytes, headers: bytes = b"Host: h\r\n") -> tuple[int, bytes]:
        head, body = server.raw(line + b"\r\n" + headers + b"Connection: close\r\n\r\n").split(b"\r\n\r\n", 1)
        return int(head.split(b" ")[1]), body

    assert ask(b"OPTIONS * HTTP/1.1") == (200, b"")
    assert ask(b"CONNECT h:80 HTTP/1.1") == (405, b"Method Not Allowed\n")
    status, body = ask(b"GET http://there.example:81/show_environ?a=b HTTP/1.1", b"Host: there.example:81\r\n")
    assert status == 200
    environ = json.loads(body)
    assert environ["PATH_INFO"] == "/show_environ"
    assert environ["QUERY_STRING"] == "a=b"
    assert environ["HTTP_HOST"] == "there.example:81"
    assert not reached(server, "*")


def test_lenience_that_clients_may_need(server: ServerProcess) -> None:
    close = b"Connection: close\r\n\r\n"
    for request in (
        b"\r\n\r\n" + GET + close,
        (GET + close).replace(b"\r\n", b"\n"),
        GET + b"X-A: caf\xe9\r\n" + close,
        GET + b"X-Empty:\r\n" + close,
        b"FROBNICATE /hello HTTP/1.1\r\nHost: h\r\n" + close,
    ):
        assert server.raw(request).endswith(b"\r\n\r\nhello\n")


def test_chunks_with_extensions_and_trailers(server: ServerProcess) -> None:
    body = b"5;a=b\r\nhello\r\n00006\r\n world\r\n0\r\nX-Trailer: 1\r\n\r\n"
    answer = server.raw(POST + CHUNKED + b"\r\n" + body + GET + b"Connection: close\r\n\r\n")
    assert answer.split(b"\r\n\r\n", 1)[1].startswith(b"hello worldHTTP/1.1 200 OK")
    assert answer.endswith(b"hello\n")


def test_http_1_0_keeps_alive_only_if_asked_to(server: ServerProcess) -> None:
    kept = b"GET /hello HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    plain = b"GET /hello HTTP/1.0\r\n\r\n"
    assert server.raw(kept + kept + plain).count(b"hello\n") == 3
    assert server.raw(plain + plain).count(b"hello\n") == 1
    # Without a length only the end of the connection ends a body; no chunks, which HTTP/1.0 does not know.
    head, body = server.raw(kept.replace(b"/hello", b"/stream") + kept).split(b"\r\n\r\n", 1)
    assert b"transfer-encoding" not in head
    assert body == b"x" * 15


def test_client_is_told_to_go_on_when_the_body_is_read(server: ServerProcess) -> None:
    with server.connect(5) as sock:
        sock.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 5\r\nConnection: close\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"hello")
        assert read_all(sock).endswith(b"\r\n\r\nhello")
    # And not if it is not.
    with server.connect(5) as sock:
        sock.sendall(POST.replace(b"/echo", b"/unread") + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_slow_heads_and_bodies_hold_up_nobody(server: ServerProcess) -> None:
    sockets = [server.connect() for _ in range(200)]
    try:
        for number, sock in enumerate(sockets):
            sock.sendall(GET if number % 2 else POST + b"Content-Length: 100\r\n\r\nslow")
        for _ in range(3):
            began = time.monotonic()
            assert server.request("/hello")[1] == b"hello\n"
            assert time.monotonic() - began < 2
    finally:
        for sock in sockets:
            sock.close()


class HTTP2Client:
    """A connection of HTTP/2 that does what it should not."""

    def __init__(self, server: ServerProcess) -> None:
        self.sock = server.connect(5)
        config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.ended = False

    def __enter__(self) -> HTTP2Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.close()

    def request(self, *more: tuple[str, str], path: str = "/hello", end: bool = True) -> int:
        stream: int = self.h2.get_next_available_stream_id()
        head = [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", "h")]
        self.h2.send_headers(stream, [*head, *more], end_stream=end)
        return stream

    def flush(self) -> None:
        self.send(self.h2.data_to_send())

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except ConnectionError:
            self.ended = True

    def events(self, until: Callable[[object], bool]) -> list[object]:
        """What comes, up to the event asked for or the end of the connection."""
        self.flush()
        found: list[object] = []
        while not self.ended:
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                data = b""
            self.ended = not data
            for event in self.h2.receive_data(data):
                found.append(event)
                if until(event):
                    return found
            self.flush()
        return found


def answered(stream: int) -> Callable[[object], bool]:
    return lambda event: (
        getattr(event, "stream_id", None) == stream
        and isinstance(event, h2.events.StreamEnded | h2.events.StreamReset)
    )


def test_streams_of_http_2_that_are_reset_over_and_over(start_server: StartServer) -> None:
    server = start_server(max_greenlets=10, max_queued=10)
    before: float | None = None
    for _ in range(5):
        with HTTP2Client(server) as client:
            for _ in range(2000):
                client.h2.reset_stream(client.request(path="/nap?seconds=0.05"))
                if len(client.h2._data_to_send) > 10_000:
                    client.flush()
                if client.ended:
                    break
            client.events(lambda event: False)
            # The server has had enough of it.
            assert client.ended
        if before is None:
            before = server.rss()
    assert server.request("/hello")[0].status in (200, 503)
    eventually(lambda: server.request("/hello")[0].status == 200)
    eventually(lambda: server.json("/show_seen")["running"] == 0)
    assert server.rss() - before < 15


def test_headers_of_http_2_without_an_end(server: ServerProcess) -> None:
    before = server.rss()
    with HTTP2Client(server) as client:
        client.flush()
        # HEADERS without END_HEADERS, then one CONTINUATION after the other.
        client.send(b"\x00\x00\x01\x01\x01\x00\x00\x00\x01\x82")
        field = b"\x00\x01a\x7f\xe1\x7e" + b"v" * (127 + 16225)
        frame = len(field).to_bytes(3, "big") + b"\x09\x00\x00\x00\x00\x01" + field
        sent = 0
        while not client.ended and sent < 100_000_000:
            client.send(frame)
            sent += len(frame)
        assert client.ended
    assert server.rss() - before < 15


def test_malformed_requests_of_http_2_are_reset(server: ServerProcess) -> None:
    for number, (headers, end) in enumerate(
        [
            ([("connection", "close")], True),
            ([("transfer-encoding", "chunked")], True),
            ([("Upper", "case")], True),
            ([("x-a", "b\r\nx-c: d")], True),
            ([("x-a", "b\0c")], True),
            ([("content-length", "abc")], True),
            ([("content-length", "5")], True),
            ([("content-length", "0"), ("content-length", "abc")], True),
            ([("content-length", "0"), ("content-length", "5")], True),
            ([("content-length", "0_0")], True),
            ([("host", "a"), ("host", "b")], True),
            ([(":path", "/second")], True),
            ([(":path", "/malformed_0")], True),
        ]
    ):
        path = f"/malformed_{number}"
        with HTTP2Client(server) as client:
            stream = client.request(*headers, path=path, end=end)
            events = client.events(answered(stream))
            statuses = [
                value
                for event in events
                if isinstance(event, h2.events.ResponseReceived)
                for name, value in event.headers
                if name == b":status"
            ]
            assert all(status == b"400" for status in statuses), (headers, events)
        assert not reached(server, path), headers
    with HTTP2Client(server) as client:
        client.events(answered(client.request(("x-a", "b"), path="/well_formed")))
    assert reached(server, "/well_formed")


def test_body_of_http_2_that_is_not_as_long_as_it_says(server: ServerProcess) -> None:
    with HTTP2Client(server) as client:
        stream = client.request(("content-length", "5"), path="/echo", end=False)
        client.h2.send_data(stream, b"four", end_stream=True)
        events = client.events(answered(stream))
    assert not any(isinstance(event, h2.events.DataReceived) and event.data == b"four" for event in events)


def test_client_of_http_2_that_stops_reading_stops_the_application(start_server: StartServer) -> None:
    server = start_server(client_timeout=0.5)
    with HTTP2Client(server) as client:
        client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        client.request(path="/trickle?fast,big")
        client.flush()
        eventually(lambda: "trickle ended" in server.json("/show_seen")["events"])


def test_connection_closed_at_once(server: ServerProcess) -> None:
    for _ in range(200):
        sock = server.connect()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.sendall(GET + b"\r\n")
        sock.close()
    assert server.request("/hello")[1] == b"hello\n"
