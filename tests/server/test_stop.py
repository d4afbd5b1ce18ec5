"""Stopping: no accepted request is lost, within limits."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from server_process import ServerProcess, StartServer, read_all

SOAK = Path(__file__).parent.parent / "soak" / "sigterm_soak.py"


def begin(server: ServerProcess, path: str) -> http.client.HTTPConnection:
    """Send a request that takes a while, and wait until the application runs it."""
    running = server.json("/show_seen")["running"]
    connection = server.http()
    connection.request("GET", path)
    limit = time.monotonic() + 5
    while server.json("/show_seen")["running"] == running:
        assert time.monotonic() < limit
        time.sleep(0.01)
    return connection


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_running_request_is_finished(start_server: StartServer, signum: int) -> None:
    server = start_server()
    connection = begin(server, "/nap?seconds=0.7")
    server.signal(signum)
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"slept")
    assert response.headers["Connection"] == "close"
    connection.close()
    assert server.wait() == 0
    assert "on_stop was called" in server.output()


def test_waiting_requests_are_finished(start_server: StartServer) -> None:
    server = start_server(max_greenlets=1)
    connections = [server.http() for _ in range(4)]
    for connection in connections:
        connection.request("GET", "/nap?seconds=0.2")
    time.sleep(0.1)
    server.signal()
    for connection in connections:
        assert connection.getresponse().read() == b"slept"
        connection.close()
    assert server.wait() == 0


def test_idle_server_stops_at_once(start_server: StartServer) -> None:
    server = start_server()
    idle = server.http()
    idle.request("GET", "/hello")
    idle.getresponse().read()
    silent = server.connect()
    began = time.monotonic()
    server.signal()
    assert server.wait() == 0
    assert time.monotonic() - began < 2
    idle.close()
    silent.close()


def test_kept_connection_serves_one_more_request_and_is_closed(start_server: StartServer) -> None:
    server = start_server()
    kept = server.http()
    kept.request("GET", "/hello")
    kept.getresponse().read()
    slow = begin(server, "/nap?seconds=0.6")
    server.signal()
    time.sleep(0.2)
    kept.request("GET", "/hello")
    response = kept.getresponse()
    assert response.read() == b"hello\n"
    assert response.headers["Connection"] == "close"
    assert slow.getresponse().read() == b"slept"
    assert server.wait() == 0
    kept.close()
    slow.close()


def test_slow_client_gets_its_whole_response(start_server: StartServer) -> None:
    server = start_server()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", server.port))
        # The application is done with it at once: it is the front that still has to send.
        sock.sendall(b"GET /whole?size=1000000 HTTP/1.1\r\nHost: h\r\n\r\n")
        received = len(sock.recv(1000))
        server.signal()
        while part := sock.recv(20_000):
            received += len(part)
            time.sleep(0.01)
    assert received > 1_000_000
    assert server.wait() == 0


def test_new_client_is_not_reset_and_finds_the_next_server(start_server: StartServer) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("the kernel cannot drop SYN packets here")
    server = start_server()
    slow = begin(server, "/nap?seconds=0.5")
    server.signal()
    time.sleep(0.1)
    answers: list[bytes | OSError] = []

    def ask() -> None:
        connection = server.http(8)
        try:
            connection.request("GET", "/hello")
            answers.append(connection.getresponse().read())
        except OSError as exc:
            answers.append(exc)
        finally:
            connection.close()

    client = threading.Thread(target=ask)
    client.start()
    assert slow.getresponse().read() == b"slept"
    slow.close()
    assert server.wait() == 0
    assert not answers
    # TCP sends the first SYN again after one second, and then finds who listens there now.
    with socket.create_server(("127.0.0.1", server.port)) as successor:
        successor.settimeout(8)
        accepted, _ = successor.accept()
        with accepted:
            accepted.recv(65536)
            accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n")
    client.join(10)
    assert answers == [b"hello\n"]


def test_second_signal_cuts_running_requests(start_server: StartServer) -> None:
    server = start_server()
    connection = begin(server, "/nap?seconds=30")
    server.signal()
    server.wait_for_output("Stopping")
    began = time.monotonic()
    server.signal()
    assert server.wait() == 1
    assert time.monotonic() - began < 4
    output = server.output()
    assert "Cut 1 running requests" in output
    assert "a second signal came" in output
    assert "on_stop was called" in output
    connection.close()


def test_limit_cuts_running_requests(start_server: StartServer) -> None:
    server = start_server(graceful_timeout=0.5)
    connection = begin(server, "/nap?seconds=30")
    began = time.monotonic()
    server.signal()
    assert server.wait() == 1
    assert 0.4 < time.monotonic() - began < 4
    assert "0.5 s are over" in server.output()
    connection.close()


def test_cut_response_does_not_look_whole(start_server: StartServer) -> None:
    server = start_server(graceful_timeout=0.3)
    with server.connect() as sock:
        sock.sendall(b"GET /trickle HTTP/1.1\r\nHost: h\r\n\r\n")
        received = sock.recv(65536)
        server.signal()
        with contextlib.suppress(ConnectionResetError):
            received += read_all(sock)
    assert not received.endswith(b"0\r\n\r\n")
    assert server.wait() == 1


def test_http_2_request_is_finished(start_server: StartServer) -> None:
    curl = shutil.which("curl")
    if curl is None or "HTTP2" not in subprocess.run([curl, "-V"], capture_output=True, text=True).stdout:
        pytest.skip("curl with HTTP/2 is not here")
    server = start_server()
    command = [curl, "-s", "-m", "10", "--http2-prior-knowledge", f"{server.url}/nap?seconds=0.8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        limit = time.monotonic() + 5
        while not server.json("/show_seen")["running"]:
            assert time.monotonic() < limit
            time.sleep(0.01)
        server.signal()
        assert client.communicate(timeout=10)[0] == b"slept"
    assert server.wait() == 0


def test_restarts_under_load_lose_nothing() -> None:
    """Five seconds of what ``tests/soak/sigterm_soak.py`` does for thirty."""
    done = subprocess.run([sys.executable, str(SOAK), "5"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
