"""How much of a client the server takes, and how long it waits for one."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from server_process import ServerProcess, StartServer, read_all, sample_command
from support.waiting import eventually

GET = b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST %s HTTP/1.1\r\nHost: h\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
LIMIT = 1000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that takes little."""
    command = sample_command(max_body_size=LIMIT, max_head_size=8192, access_log=True)
    process = ServerProcess(command, tmp_path_factory.mktemp("small") / "stderr")
    yield process
    assert process.stop() == 0, process.output()


@pytest.fixture(params=[False, True], ids=["http1", "http2"])
def client(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    with httpx.Client(http1=not request.param, http2=request.param, timeout=5) as made:
        yield made


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def paths(server: ServerProcess) -> list[str]:
    found: list[str] = server.json("/show_seen")["paths"]
    return found


def test_head_of_a_request(small: ServerProcess, client: httpx.Client) -> None:
    assert client.get(f"{small.url}/hello", headers={"X-Big": "v" * 7000}).status_code == 200
    assert client.get(f"{small.url}/big_head", headers={"X-Big": "v" * 9000}).status_code == 431
    assert "/big_head" not in paths(small)


def test_number_of_headers_and_long_line(small: ServerProcess) -> None:
    for headers, target, status in ((90, "/many", 404), (101, "/many", 431), (1, "/" + "a" * 9000, 431)):
        head = f"GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n" + "X: 1\r\n" * headers
        assert status_of(small.raw(head.encode() + b"\r\n")) == status
    assert paths(small).count("/many") == 1


def test_body_up_to_the_limit(small: ServerProcess, client: httpx.Client) -> None:
    assert client.post(f"{small.url}/echo", content=b"x" * LIMIT).text == "x" * LIMIT
    assert client.post(f"{small.url}/echo", content=iter([b"x" * LIMIT])).text == "x" * LIMIT


@pytest.mark.parametrize("path", ["/echo", "/swallow_error"])
def test_body_beyond_the_limit(small: ServerProcess, client: httpx.Client, path: str) -> None:
    before = paths(small).count(path)
    refused = client.post(f"{small.url}{path}", content=b"x" * (LIMIT + 1))
    assert (refused.status_code, refused.text) == (413, "Content Too Large\n")
    # It said so beforehand, so the application was spared.
    assert paths(small).count(path) == before
    # In parts, of which nobody knows how many come; whatever the application makes of the error.
    refused = client.post(f"{small.url}{path}", content=iter([b"x" * 600] * 2))
    assert (refused.status_code, refused.text) == (413, "Content Too Large\n")
    assert f'"POST {path} HTTP/{refused.http_version[5:].removesuffix(".0")}" 413' in small.output()
    assert client.get(f"{small.url}/hello").status_code == 200


def test_body_beyond_the_limit_is_not_waited_for(small: ServerProcess) -> None:
    for headers, begin in (
        (b"Content-Length: 1000000000", b"x" * 2000),
        (b"Transfer-Encoding: chunked", b"7d0\r\n" + b"x" * 2000 + b"\r\n"),
        (b"Transfer-Encoding: chunked\r\nExpect: 100-continue", b"7d0\r\n" + b"x" * 2000 + b"\r\n"),
    ):
        with small.connect(3) as sock:
            sock.sendall(POST % b"/echo" + headers + b"\r\n\r\n" + begin)
            received = b""
            while b"Content Too Large\n" not in received:
                received += sock.recv(65536)
            assert b"connection: close" in received


def test_client_that_asks_first_is_not_told_to_go_on(small: ServerProcess) -> None:
    with small.connect() as sock:
        sock.sendall(POST % b"/echo" + b"Expect: 100-continue\r\nContent-Length: 1001\r\n\r\n")
        assert status_of(read_all(sock)) == 413


def test_body_beyond_the_limit_amid_the_response_cuts_it(small: ServerProcess) -> None:
    with small.connect() as sock:
        sock.sendall(POST % b"/echo_parts" + b"Transfer-Encoding: chunked\r\n\r\n")
        received = b""
        while b"begin" not in received:
            received += sock.recv(65536)
        sock.sendall(b"7d0\r\n" + b"x" * 2000 + b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            received += read_all(sock)
    assert not received.endswith(b"0\r\n\r\n")
    assert b"413" not in received


def test_requests_beyond_the_queue_are_refused(start_server: StartServer) -> None:
    server = start_server(max_greenlets=1, max_queued=2)
    sockets = []
    for _ in range(3):
        sockets.append(server.connect())
        sockets[-1].sendall(GET % b"/nap?seconds=0.4")
        time.sleep(0.02)
    for _ in range(2):
        began = time.monotonic()
        response, body = server.request("/hello")
        assert (response.status, body) == (503, b"Service Unavailable\n")
        assert response.headers["Retry-After"] == "1"
        assert time.monotonic() - began < 0.3
    # With a body that nobody will read.
    assert server.request("/echo", "POST", b"x" * 5_000_000)[0].status == 503
    for sock in sockets:
        with sock:
            assert b"slept" in sock.recv(65536)
    assert server.request("/hello")[1] == b"hello\n"


def test_idle_connections_are_closed(start_server: StartServer) -> None:
    server = start_server(idle_timeout=0.6, http="auto")
    request = GET % b"/hello"
    closed: dict[str, float] = {}

    def wait_closed(name: str, *parts: bytes) -> None:
        with server.connect() as sock:
            for part in parts:
                sock.sendall(part)
                time.sleep(0.05)
            began = time.monotonic()
            read_all(sock)
            closed[name] = time.monotonic() - began

    kinds = {
        "silent": (),
        "maybe HTTP/2": (b"PRI * HT",),
        "part of a head": (b"GET /hello HTTP/1.1\r\nHo",),
        "kept alive": (request,),
        "part of a second head": (request, b"GET /"),
        "HTTP/2": (PREFACE,),
    }
    threads = [threading.Thread(target=wait_closed, args=(name, *parts)) for name, parts in kinds.items()]
    for thread in threads:
        thread.start()
    # A request that takes longer, be it idle all the while, is not harmed.
    assert server.request("/nap?seconds=1.5")[1] == b"slept"
    for thread in threads:
        thread.join(5)
    assert set(closed) == set(kinds)
    assert all(0.3 < seconds < 1.5 for seconds in closed.values()), closed


def test_head_in_drops_is_given_up(start_server: StartServer) -> None:
    server = start_server(idle_timeout=0.5)
    with server.connect() as sock:
        sock.sendall(b"GET /hello HTTP/1.1\r\n")
        sock.settimeout(0.05)
        began = time.monotonic()
        while time.monotonic() - began < 3:
            try:
                sock.sendall(b"X: 1\r\n")
                assert sock.recv(1000) == b""
                break
            except TimeoutError:
                pass
            except ConnectionError:
                break
        assert time.monotonic() - began < 3


def test_client_that_never_takes_its_response_is_cut(start_server: StartServer) -> None:
    server = start_server(idle_timeout=0.5)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    with sock:
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(GET % b"/whole?size=1000000" * 8)
        time.sleep(0.1)
        eventually(lambda: not _has_connection(server, sock.getsockname()[1]), seconds=5)


def test_body_that_stalls_is_answered(start_server: StartServer) -> None:
    server = start_server(client_timeout=0.3)
    for path in (b"/read_error", b"/swallow_error"):
        with server.connect() as sock:
            sock.sendall(POST % path + b"Content-Length: 5\r\n\r\nab")
            answer = read_all(sock)
        assert status_of(answer) == 408
        assert b"connection: close" in answer
    assert server.json("/show_seen")["events"] == [
        "read raised ClientDisconnected",
        "swallowed ClientDisconnected",
    ]


def _has_connection(server: ServerProcess, port: int) -> bool:
    return any(c.raddr and c.raddr.port == port for c in psutil.Process(server.process.pid).net_connections("tcp"))
