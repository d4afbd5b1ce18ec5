"""Request bodies: wsgi.input, as a file and as a stream from the client."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import time
from collections.abc import Iterator

import pytest
from server_process import ServerProcess, StartServer, read_all

from puff_patch.server.body import RequestBody

TEXT = b"one\ntwo\n\nthree, without an end"


def body_of(text: bytes, size: int) -> RequestBody:
    """A body that comes in parts of ``size`` bytes."""
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    return RequestBody(lambda: parts.pop(0) if parts else b"")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
def test_reads_like_a_file(size: int) -> None:
    calls = [
        *(
            lambda f: f.read(),
            lambda f: f.read(-1),
            lambda f: f.read(None),
            lambda f: f.read(5),
            lambda f: f.read(0),
        ),
        *(lambda f: f.readline(), lambda f: f.readline(2), lambda f: f.readline(-1), lambda f: f.readlines()),
        *(lambda f: list(f), lambda f: next(f), lambda f: f.read(1000)),
    ]
    for first in calls:
        for second in calls:
            body, file = body_of(TEXT, size), io.BytesIO(TEXT)
            assert first(body) == first(file)
            if file.tell() < len(TEXT):
                assert second(body) == second(file)
            assert body.read() == file.read()
            assert body.read() == body.readline() == body.read(3) == b""


def test_read1_and_readinto() -> None:
    body = body_of(TEXT, 6)
    assert body.read1() == TEXT[:6]
    assert body.read1(2) == TEXT[6:8]
    buffer = bytearray(8)
    assert body.readinto(buffer) == 8
    assert buffer == TEXT[8:16]
    assert body.readinto1(buffer) == 2
    assert io.TextIOWrapper(body).read() == TEXT[18:].decode()


def test_closed_body_cannot_be_read() -> None:
    body = body_of(TEXT, 6)
    body.close()
    with pytest.raises(ValueError, match="closed"):
        body.read()


def test_reads_only_what_is_asked_for() -> None:
    received = []

    def receive() -> bytes:
        received.append(1)
        return b"x" * 10

    assert RequestBody(receive).read(15) == b"x" * 15
    assert len(received) == 2


def test_body_with_length(server: ServerProcess) -> None:
    assert server.request("/echo", "POST", b"some body")[1] == b"some body"
    assert server.json("/read_body", method="POST", body=b"abcdef\nghijk\nl\nm") == [
        *("abc", "", "def\n", "gh", "i", "jk\n", "l\n", "m", "", "", "")
    ]


def test_no_body(server: ServerProcess) -> None:
    assert server.request("/echo", "POST")[1] == b""
    assert server.request("/echo")[1] == b""


def test_chunked_body(server: ServerProcess) -> None:
    def parts() -> Iterator[bytes]:
        for number in range(5):
            yield b"part %d " % number

    assert server.request("/echo", "POST", parts())[1] == b"part 0 part 1 part 2 part 3 part 4 "


def test_body_comes_slowly(server: ServerProcess) -> None:
    answer = server.raw(
        b"POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 6\r\n\r\n", b"ab", b"cd", b"ef"
    )
    assert answer.endswith(b"abcdef")


def test_expect_100_continue(server: ServerProcess) -> None:
    with server.connect() as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"body")
        assert sock.recv(65536).endswith(b"body")


def test_expecting_client_is_not_asked_for_a_body_nobody_reads(server: ServerProcess) -> None:
    with server.connect() as sock:
        sock.sendall(b"POST /unread HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 413")


def test_an_application_that_keeps_its_request_does_not_keep_the_connection(server: ServerProcess) -> None:
    with server.connect() as sock:
        sock.sendall(b"POST /keep HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert sock.recv(65536).endswith(b"kept")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(65536) == b""  # the server closes its side as well
    assert server.request("/read_kept")[1].startswith(b"ClientDisconnected: the request is over")


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_client_gets_the_answer_though_its_body_was_not_read(server: ServerProcess, size: int) -> None:
    # http.client sends it all before it reads: a reset connection would hide the answer from it.
    connection = server.http()
    connection.request("POST", "/unread", body=b"z" * size)
    response = connection.getresponse()
    assert (response.status, response.read()) == (413, b"not read")
    connection.request("GET", "/hello")
    assert connection.getresponse().read() == b"hello\n"
    connection.close()


def test_client_leaves_in_the_middle(server: ServerProcess) -> None:
    with server.connect() as sock:
        sock.sendall(b"POST /read_error HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nonly this")
        time.sleep(0.1)
    wait_for_event(server, "read raised ClientDisconnected")


def test_client_that_stops_sending_is_given_up(start_server: StartServer) -> None:
    server = start_server(client_timeout=0.3)
    answer = server.raw(b"POST /read_error HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nonly this")
    assert b"200 OK" not in answer
    wait_for_event(server, "read raised ClientDisconnected")


def test_length_spares_waiting_for_the_end() -> None:
    parts = [b"abc", b"def"]
    body = RequestBody(lambda: parts.pop(0), 6)
    assert body.read() == b"abcdef"
    assert body.read() == b""
    assert RequestBody(lambda: parts.pop(0), 0).read() == b""


def test_malformed_chunk(server: ServerProcess) -> None:
    server.raw(b"POST /read_error HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nnot hex\r\n")
    wait_for_event(server, "read raised ClientDisconnected")


def test_big_body_is_not_kept_in_memory(server: ServerProcess) -> None:
    size = 64 * 1024 * 1024
    block = bytes(range(256)) * 256
    expected = hashlib.sha256()
    server.request("/digest", "POST", block)
    before = server.rss()
    highest = 0.0
    with server.connect(30) as sock:
        sock.sendall(b"PUT /digest HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size)
        for number in range(size // len(block)):
            sock.sendall(block)
            expected.update(block)
            if number % 100 == 0:
                highest = max(highest, server.rss())
        answer = read_all(sock)
    found = json.loads(answer.split(b"\r\n\r\n", 1)[1])
    assert found == {"size": size, "sha256": expected.hexdigest()}
    assert max(highest, server.rss()) - before < 25


def test_application_that_does_not_read_stops_the_client(server: ServerProcess) -> None:
    server.request("/hello")
    before = server.rss()
    with server.connect(1) as sock:
        sock.sendall(b"PUT /nap?seconds=2 HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\n\r\n")
        with pytest.raises(TimeoutError):
            sock.sendall(b"x" * 100_000_000)
    assert server.rss() - before < 25


def wait_for_event(server: ServerProcess, event: str) -> None:
    limit = time.monotonic() + 5
    while event not in server.json("/show_seen")["events"]:
        assert time.monotonic() < limit, server.json("/show_seen")
        time.sleep(0.02)
