"""Many clients at a time."""

from __future__ import annotations

import socket

from server_process import ServerProcess, StartServer

REQUEST = b"GET /hello HTTP/1.1\r\nHost: h\r\n\r\n"


def ask_all(sockets: list[socket.socket], request: bytes = REQUEST) -> list[bytes]:
    """Send a request on every connection, then read every response."""
    for sock in sockets:
        sock.sendall(request)
    return [sock.recv(65536) for sock in sockets]


def test_1000_keep_alive_clients(server: ServerProcess) -> None:
    sockets = [server.connect(20) for _ in range(1000)]
    try:
        for _ in range(3):
            answers = ask_all(sockets)
            assert all(answer.startswith(b"HTTP/1.1 200 OK") for answer in answers)
            assert all(answer.endswith(b"hello\n") for answer in answers)
        # All at the same time.
        answers = ask_all(sockets, b"GET /nap?seconds=0.5 HTTP/1.1\r\nHost: h\r\n\r\n")
        assert all(answer.endswith(b"slept") for answer in answers)
    finally:
        for sock in sockets:
            sock.close()
    assert server.request("/hello")[1] == b"hello\n"


def test_connections_beyond_the_limit_wait(start_server: StartServer) -> None:
    server = start_server(max_connections=2)
    first, second = server.connect(), server.connect()
    third = server.connect()
    third.settimeout(0.3)
    try:
        assert len(ask_all([first, second])) == 2
        third.sendall(REQUEST)
        try:
            assert third.recv(65536) == b"never"
        except TimeoutError:
            pass
        first.close()
        third.settimeout(5)
        assert third.recv(65536).endswith(b"hello\n")
    finally:
        for sock in (first, second, third):
            sock.close()


def test_access_log(start_server: StartServer) -> None:
    server = start_server(access_log=True)
    server.request("/hello?a=%0A")
    server.request("/fail_early")
    server.request("/stream", "HEAD")
    output = server.wait_for_output("HEAD /stream")
    assert '127.0.0.1 "GET /hello?a=%0A HTTP/1.1" 200 6 ' in output
    assert '127.0.0.1 "GET /fail_early HTTP/1.1" 500 22 ' in output
    assert '127.0.0.1 "HEAD /stream HTTP/1.1" 200 0 ' in output


def test_no_access_log(server: ServerProcess) -> None:
    server.request("/hello?unlogged")
    assert "unlogged" not in server.output()
