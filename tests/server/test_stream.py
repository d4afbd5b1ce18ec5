"""Responses in parts: backpressure, clients that leave, and memory."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest
from server_process import ServerProcess, StartServer, read_all


def events(server: ServerProcess) -> list[str]:
    found: list[str] = server.json("/show_seen")["events"]
    return found


def wait_for_event(server: ServerProcess, event: str, count: int = 1) -> None:
    limit = time.monotonic() + 5
    while events(server).count(event) < count:
        assert time.monotonic() < limit, events(server)[-10:]
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["slow", "fast"])
@pytest.mark.parametrize("body", [b"", b"x" * 100, b"x" * 1_000_000])
def test_generator_ends_when_the_client_leaves(server: ServerProcess, how: str, body: bytes) -> None:
    """With and without a request body that nobody reads; with a generator that waits and one that does not."""
    before = events(server).count("trickle ended")
    with server.connect() as sock:
        sock.sendall(b"POST /trickle?%s HTTP/1.1\r\nHost: h\r\n" % how.encode())
        sock.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        received = b""
        while b"part 3\n" not in received:
            received += sock.recv(65536)
    wait_for_event(server, "trickle ended", before + 1)


def test_fast_generator_leaves_others_their_turn(server: ServerProcess) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /trickle?fast HTTP/1.1\r\nHost: h\r\n\r\n")
        for _ in range(20):
            sock.recv(65536)
            began = time.monotonic()
            assert server.request("/hello")[1] == b"hello\n"
            assert time.monotonic() - began < 1


def test_slow_client_stops_the_generator(server: ServerProcess) -> None:
    server.request("/hello")
    before = server.rss()
    with slow_client(server, b"/trickle?fast,big") as sock:
        sock.recv(1000)
        time.sleep(0.3)
        parts = events(server).count("trickle")
        time.sleep(0.3)
        # It waits for the client, and so makes no more parts.
        assert events(server).count("trickle") == parts
    assert server.rss() - before < 25


@pytest.mark.parametrize("path", [b"/stream?count=3200&size=65536", b"/whole?size=60000000"])
def test_long_response_to_a_slow_client(start_server: StartServer, path: bytes) -> None:
    server = start_server()
    server.request(path.decode())
    before = server.rss()
    highest = 0.0
    received = 0
    began = time.monotonic()
    with slow_client(server, path) as sock:
        while part := sock.recv(256 * 1024):
            received += len(part)
            # 100 MB a second at most.
            time.sleep(max(0.0, received / 100e6 - (time.monotonic() - began)))
            highest = max(highest, server.rss())
    assert received > (3200 * 65536 if b"stream" in path else 60_000_000)
    # A response that is in memory is there as often as the application has it: once.
    assert highest - before < (25 if b"stream" in path else 85)


def test_client_that_stops_reading_is_given_up(start_server: StartServer) -> None:
    server = start_server(client_timeout=0.5)
    with slow_client(server, b"/trickle?fast,big") as sock:
        sock.recv(1000)
        wait_for_event(server, "trickle ended")
        with contextlib.suppress(ConnectionResetError):
            assert not read_all(sock).endswith(b"0\r\n\r\n")


def test_many_slow_clients_hold_no_greenlet_for_short_responses(start_server: StartServer) -> None:
    server = start_server(max_greenlets=1)
    clients = [slow_client(server, b"/whole?size=900000") for _ in range(5)]
    try:
        assert server.request("/hello")[1] == b"hello\n"
    finally:
        for client in clients:
            client.close()


def slow_client(server: ServerProcess, path: bytes) -> socket.socket:
    """A connection with small buffers that has sent a request."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(b"GET %s HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n" % path)
    return sock
