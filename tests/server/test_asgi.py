"""ASGI applications on the asyncio thread, beside a WSGI application: what their users and clients see."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import websockets.exceptions
import websockets.sync.client
from server_process import HERE, ServerProcess, StartServer, read_all

APP = HERE / "asgi_app.py"


def command(**options: Any) -> list[str]:
    # Warnings are errors in the server, too.
    return [sys.executable, "-W", "error", str(APP), json.dumps({"port": 0, **options})]


@pytest.fixture(scope="module")
def asgi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """All applications on one server, for tests that leave it as it was."""
    log = tmp_path_factory.mktemp("asgi") / "stderr"
    process = ServerProcess(command(with_filter=True, client_timeout=2, access_log=True), log)
    yield process
    assert process.stop() == 0, process.output()
    assert "the lifespan ended with 0 running" in process.output()


def send_list(server: ServerProcess, messages: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    """Have the application send these messages."""
    return server.request(f"/raw/messages?list={quote(messages)}", method)


def seen(server: ServerProcess) -> Any:
    return server.json("/raw/show_seen")


def eventually(server: ServerProcess, key: str, value: Any, seconds: float = 5) -> None:
    limit = time.monotonic() + seconds
    while (found := seen(server)[key]) != value:
        assert time.monotonic() < limit, f"{key} is {found}, not {value}"
        time.sleep(0.02)


def test_each_framework_beside_wsgi(asgi: ServerProcess) -> None:
    assert asgi.json("/fast/async") == {"on_loop": True, "state": "lifespan"}
    assert asgi.json("/fast/def") == {"on_loop": False, "main_hub": True}
    headers = {"Content-Type": "application/json"}
    assert asgi.json("/fast/item", method="POST", body='{"a": 1}', headers=headers) == {"got": {"a": 1}}
    assert asgi.request("/starlette/stream")[1] == b"".join(b"%d\n" % number for number in range(1000))
    assert asgi.request("/starlette/file")[1] == APP.read_bytes()
    # A prefix ends where a name does.
    for path in ("/", "/rawer", "/fas"):
        assert asgi.json(path) == {"wsgi": path, "on_loop": False}


def test_def_endpoints_and_wsgi_run_side_by_side(asgi: ServerProcess) -> None:
    with httpx.Client(base_url=asgi.url, timeout=10) as client, ThreadPoolExecutor(40) as pool:
        began = time.monotonic()
        answers = list(pool.map(lambda path: client.get(path).status_code, ["/fast/def", "/wsgi"] * 60))
    assert answers == [200] * 120
    assert time.monotonic() - began < 3  # and not 60 x 0.1 s


def test_chain_of_sync_and_async(asgi: ServerProcess) -> None:
    with httpx.Client(base_url=asgi.url, timeout=10) as client, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: client.get("/fast/chain").json(), range(100)))
        assert answers == [{"depth": 3, "variable": "from below"}] * 100
        began = time.monotonic()
        assert [answer.json() for answer in pool.map(client.get, ["/fast/sensitive"] * 60)] == [[1, 1]] * 60
        assert time.monotonic() - began < 4  # and not 60 x 3 x 0.05 s
    assert asgi.request("/fast/fails")[0].status == 500
    assert "LookupError: raised at the bottom" in asgi.wait_for_output("LookupError")


def test_scope(asgi: ServerProcess, start_server: StartServer) -> None:
    scope = asgi.json("/raw/show_scope?a=%20b")
    assert scope["type"] == "http"
    assert scope["asgi"] == "{'version': '3.0', 'spec_version': '2.4'}"
    assert scope["http_version"] == "1.1"
    assert scope["raw_path"] == "b'/raw/show_scope'"
    assert scope["query_string"] == "b'a=%20b'"
    assert scope["root_path"] == ""
    assert scope["server"] == f"('127.0.0.1', {asgi.port})"
    assert scope["client"].startswith("('127.0.0.1', ")
    assert not scope["client"].endswith("')")
    assert scope["state"] == "{'made_by': 'lifespan'}"
    assert scope["noted"] is True
    assert b'"http_version": "1.0"' in asgi.raw(b"GET /raw/show_scope HTTP/1.0\r\nHost: h\r\n\r\n")
    mounted = start_server(command(root_path="/below"))
    scope = mounted.json("/raw/show_scope")
    assert (scope["path"], scope["raw_path"]) == ("/below/raw/show_scope", "b'/below/raw/show_scope'")
    assert scope["root_path"] == "/below"
    assert mounted.json("/fast/async")["on_loop"] is True


def test_context_of_a_request_ends_with_it(asgi: ServerProcess) -> None:
    assert asgi.json("/raw/set_variable") == "leaked"
    assert seen(asgi)["variable"] == "unset"


def test_request_body(asgi: ServerProcess) -> None:
    assert asgi.request("/raw/echo", "POST", b"abc" * 1000)[1] == b"abc" * 1000
    assert asgi.request("/raw/echo", "GET")[1] == b""
    assert asgi.request("/raw/echo", "POST", iter([b"chunk", b"ed"]))[1] == b"chunked"
    parts = (
        b"POST /raw/impatient HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 8\r\n\r\n",
        b"slow",
        b"ness",
    )
    with asgi.connect() as sock:
        for part in parts:
            sock.sendall(part)
            time.sleep(0.1)
        assert read_all(sock).endswith(b"\r\n\r\nslowness")


def test_upload_is_read_as_it_comes(asgi: ServerProcess) -> None:
    before = asgi.rss()
    found = asgi.json("/raw/digest", method="POST", body=iter([b"u" * 1_000_000] * 60))
    assert found["size"] == 60_000_000
    assert asgi.rss() - before < 40


def test_body_nobody_reads(asgi: ServerProcess) -> None:
    response, body = asgi.request("/raw/unread", "POST", b"u" * 5_000_000)
    assert (response.status, body) == (413, b"not read")


def test_client_that_sends_nothing_more_is_given_up(asgi: ServerProcess) -> None:
    with asgi.connect() as sock:
        sock.sendall(b"POST /raw/echo HTTP/1.1\r\nHost: h\r\nContent-Length: 8\r\n\r\nhalf")
        assert b" 408 " in sock.recv(1000)
    asgi.wait_for_output('"POST /raw/echo HTTP/1.1" 408')


def test_slow_client_of_a_large_response(asgi: ServerProcess) -> None:
    before = asgi.rss()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", asgi.port))
        sock.sendall(b"GET /raw/stream?parts=400&size=500000 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        time.sleep(0.5)
        assert asgi.rss() - before < 40
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_000_000)
        received = 0
        while part := sock.recv(1_000_000):
            received += len(part)
    assert received > 200_000_000
    assert asgi.rss() - before < 60


def test_one_large_body(asgi: ServerProcess) -> None:
    response, body = send_list(asgi, "[start(), body(b'w' * 5_000_000)]")
    assert (response.status, len(body)) == (200, 5_000_000)


@pytest.mark.parametrize("path", ["/raw/endless", "/starlette/stream"])
def test_stream_ends_when_the_client_leaves(asgi: ServerProcess, path: str) -> None:
    before, written = seen(asgi), len(asgi.output())
    with asgi.connect() as sock:
        sock.sendall(b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % path.encode())
        sock.recv(1000)
    if path == "/raw/endless":
        eventually(asgi, "left", [*before["left"], "ClientDisconnected"])
    else:
        eventually(asgi, "ended", [*before["ended"], "parts"])
    eventually(asgi, "tasks", before["tasks"])
    assert "Traceback" not in asgi.output()[written:]


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_disconnect_is_received(asgi: ServerProcess, method: bytes) -> None:
    left = seen(asgi)["left"]
    with asgi.connect() as sock:
        sock.sendall(b"%s /raw/wait_for_leaving HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx" % method)
        eventually(asgi, "running", 1)
    eventually(asgi, "left", [*left, "http.disconnect"])


def test_receive_after_the_response(asgi: ServerProcess) -> None:
    assert asgi.request("/raw/after_the_end")[1] == b"done"
    eventually(asgi, "ended", [*[e for e in seen(asgi)["ended"] if e == "parts"], ["http.disconnect"] * 2])


BROKEN = {
    "['fail']": "ValueError: this was meant to fail",
    "[]": "returned without a response",
    "[start()]": "returned without a response",
    "[body(b'')]": "'http.response.body' was sent before 'http.response.start'",
    "[start(), start()]": "'http.response.start' was sent a second time",
    "[start(99)]": "not a status that an application can send: 99",
    "[start(200, ('a', 'b'))]": "a header's name and value must be bytes, unlike 'a': 'b'",
    "[start(200, (b'a b', b'c')), body(b'')]": "malformed header: b'a b'",
    "[start(200, (b'content-length', b'x'))]": "not a Content-Length: b'x'",
    "[start(200, (b'content-length', b'2')), body(b'abc')]": "longer than its Content-Length, by 1 bytes",
    "[start(200, (b'content-length', b'5')), body(b'abc')]": "2 bytes shorter than its Content-Length",
    "[start(), body('text')]": "must send bytes as its body, not str",
    "[{'type': 'http.response.nonsense'}]": "cannot send 'http.response.nonsense'",
    "[start(), {'type': 'http.response.pathsend', 'path': '/no/such/file'}]": "FileNotFoundError",
}


def test_broken_application_is_an_error_500(asgi: ServerProcess) -> None:
    for messages, logged in BROKEN.items():
        response, body = send_list(asgi, messages)
        assert (response.status, body) == (500, b"Internal Server Error\n"), messages
        asgi.wait_for_output(logged)


def test_failure_amid_a_response_cuts_it(asgi: ServerProcess) -> None:
    for messages in ("[start(), body(b'a', True), 'fail']", "[start(), body(b'a', True)]"):
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            send_list(asgi, messages)
    short = "[start(200, (b'content-length', b'5')), body(b'abc', True), body(b'')]"
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        send_list(asgi, short)
    output = asgi.wait_for_output("returned without its end")
    assert "failed amid its response, which was cut" in output
    response, body = send_list(asgi, "[start(), body(b'whole'), 'fail']")
    assert (response.status, body) == (200, b"whole")
    asgi.wait_for_output("failed after its response was sent")


def test_responses_without_a_body(asgi: ServerProcess) -> None:
    response, body = send_list(asgi, "[start(), body(b'whole')]", "HEAD")
    assert (response.headers["Content-Length"], body) == ("5", b"")
    response, body = send_list(
        asgi, "[start(200, (b'content-length', b'9')), body(b'part', True), body(b'')]", "HEAD"
    )
    assert (response.status, response.headers["Content-Length"], body) == (200, "9", b"")
    for status in (204, 304):
        response, body = send_list(asgi, f"[start({status}), body(b'ignored')]")
        assert (response.status, body) == (status, b"")
    response, body = asgi.request("/raw/pathsend?type=text/plain", "HEAD")
    assert (response.headers["Content-Length"], body) == (str(APP.stat().st_size), b"")


def test_headers(asgi: ServerProcess) -> None:
    headers = "(b'Set-Cookie', b'a=1'), (b'set-cookie', b'b=2'), (b'Transfer-Encoding', b'chunked')"
    response, body = send_list(asgi, f"[start(200, {headers}), body(bytearray(b'x'))]")
    assert response.headers.get_all("Set-Cookie") == ["a=1", "b=2"]
    assert (response.headers["Content-Length"], response.headers["Transfer-Encoding"], body) == ("1", None, b"x")
    assert b"\r\nconnection: close\r\n" in asgi.raw(
        b"GET /raw/messages?list=[start(200,(b'connection',b'close')),body(b'')] HTTP/1.1\r\nHost: h\r\n\r\n"
    )


@pytest.mark.parametrize("media_type", ["text/plain", "text/event-stream"])
def test_pathsend(asgi: ServerProcess, media_type: str) -> None:
    response, body = asgi.request(f"/raw/pathsend?type={media_type}")
    assert (response.status, body) == (200, APP.read_bytes())


def test_filters_and_access_log(asgi: ServerProcess) -> None:
    response, body = asgi.request("/starlette/plain?upper")
    assert (response.headers["X-Filter"], body) == ("seen", b"PLAIN " * 200 + b" END")
    assert asgi.request("/starlette/stream?upper")[1].endswith(b"999\n END")
    assert asgi.request("/raw/pathsend?type=text/plain&upper")[1] == APP.read_bytes().upper() + b" END"
    ends = asgi.json("/fast/responder")
    assert ["/starlette/plain", 200, 1204] in ends
    assert asgi.request("/fast/broken_filter")[0].status == 500
    asgi.wait_for_output("A filter failed at the beginning of GET /fast/broken_filter")
    assert '"GET /starlette/plain?upper HTTP/1.1" 200 1204 ' in asgi.wait_for_output("/starlette/plain?upper")


def test_limits_are_the_same_as_for_wsgi(start_server: StartServer) -> None:
    server = start_server(command=command(max_body_size=1000, max_websockets=1, access_log=True))
    assert server.request("/raw/echo", "POST", body=b"x" * 1000)[1] == b"x" * 1000
    assert server.request("/raw/echo", "POST", body=b"x" * 1001)[0].status == 413
    with server.connect() as sock:
        sock.sendall(b"POST /raw/echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        sock.sendall(b"258\r\n%b\r\n" % (b"x" * 600) * 2)
        assert b" 413 " in sock.recv(1000)
    assert "Traceback" not in server.output()
    with server.connect() as sock:
        sock.sendall(b"GET /raw/echo HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
        assert b" 400 " in sock.recv(1000)
    with websockets.sync.client.connect(f"ws://{server.host}:{server.port}/talk"):
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            websockets.sync.client.connect(f"ws://{server.host}:{server.port}/talk")
        assert refused.value.response.status_code == 503


def test_http_2(asgi: ServerProcess) -> None:
    curl = shutil.which("curl")
    if curl is None or "HTTP2" not in subprocess.run([curl, "-V"], capture_output=True, text=True).stdout:
        pytest.skip("curl with HTTP/2 is not here")
    base = [curl, "-s", "-m", "10", "--http2-prior-knowledge"]
    posted = [*base, "--data-binary", "x" * 100_000, f"{asgi.url}/raw/echo"]
    assert subprocess.run(posted, capture_output=True, timeout=20).stdout == b"x" * 100_000
    done = subprocess.run([*base, f"{asgi.url}/raw/show_scope"], capture_output=True, timeout=20)
    assert json.loads(done.stdout)["http_version"] == "2"
    with subprocess.Popen([*base, "-N", f"{asgi.url}/raw/endless"], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        left = seen(asgi)["left"]
        assert client.stdout.readline() == b"tick\n"
        client.kill()
    eventually(asgi, "left", [*left, "ClientDisconnected"])


def connect(server: ServerProcess, query: str = "", **options: Any) -> Any:
    return websockets.sync.client.connect(
        f"ws://127.0.0.1:{server.port}/talk?{query}", open_timeout=10, close_timeout=10, proxy=None, **options
    )


def test_websocket(asgi: ServerProcess) -> None:
    left = seen(asgi)["left"]
    with connect(asgi, subprotocols=["other", "chat"]) as talk:
        assert talk.subprotocol == "chat"
        for message in ("text", b"bytes", "ü" * 100_000, b"b" * 1_000_000):
            talk.send(message)
            assert talk.recv(10) == message
        talk.ping().wait(5)
    eventually(asgi, "left", [*left, 1000])
    for said, code, reason in (("close", 4001, "as you wish"), ("fail", 1011, ""), ("return", 1000, "")):
        with connect(asgi) as talk:
            talk.send(said)
            with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                talk.recv(10)
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (code, reason)
    asgi.wait_for_output("The WebSocket /talk failed")
    for query, status, text in (("refuse", 403, b""), ("deny", 401, b"no entry"), ("fail", 500, b"Internal")):
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused, connect(asgi, query):
            pass
        assert refused.value.response.status_code == status
        assert (refused.value.response.body or b"").startswith(text)
    # To the WSGI application there is no WebSocket.
    eventually(asgi, "running", 0)


def test_leaving_clients_leave_nothing(asgi: ServerProcess) -> None:
    """10,000 requests, half of whose clients leave before the answer."""

    def run(number: int) -> None:
        kept = asgi.http()
        for at in range(number):
            if at % 2:
                kept.request("GET", "/fast/async")
                kept.getresponse().read()
            else:
                with asgi.connect() as sock:
                    path = (b"/raw/wait_for_leaving", b"/raw/endless", b"/fast/def", b"/raw/nap?seconds=0.05")[
                        at // 2 % 4
                    ]
                    sock.sendall(b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % path)
        kept.close()

    def settle() -> tuple[int, float]:
        eventually(asgi, "running", 0, 20)
        eventually(asgi, "tasks", before, 20)
        return asgi.json("/raw/collect"), asgi.rss()

    before = seen(asgi)["tasks"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, [500] * 4))
    objects, rss = settle()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, [2000] * 4))
    objects_after, rss_after = settle()
    # The list of those who left, which the application keeps itself, is of strings that exist once.
    assert objects_after - objects < 3000
    assert rss_after - rss < 15


def test_unix_socket(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(command(uds=str(tmp_path / "socket"), access_log=True))
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(tmp_path / "socket"))) as client:
        scope = client.get("http://h/raw/show_scope").json()
    assert (scope["client"], server.stop()) == ("None", 0)


def test_failed_start_is_told() -> None:
    done = subprocess.run(
        command(), capture_output=True, text=True, timeout=20, env={**os.environ, "FAIL_START": "1"}
    )
    assert done.returncode == 1
    assert "listening" not in done.stdout
    assert "error: The ASGI application failed to start: Traceback" in done.stderr
    assert "RuntimeError: the database is away" in done.stderr
    assert "on_stop" in done.stderr


def test_application_without_lifespan(start_server: StartServer) -> None:
    server = start_server(command(only="no_lifespan"))
    assert server.request("/")[1] == b"plain"
    assert server.stop() == 0
    assert "Traceback" not in server.output()


def begin(server: ServerProcess, path: str) -> http.client.HTTPConnection:
    """Send a request that takes a while, and wait until the application runs it."""
    connection = server.http()
    connection.request("GET", path)
    eventually(server, "running", 1)
    return connection


def test_stop_waits_for_requests_and_closes_websockets(start_server: StartServer) -> None:
    server = start_server(command())
    with connect(server) as talk:
        talk.send("hello")
        assert talk.recv(10) == "hello"
        connection = server.http()
        connection.request("GET", "/raw/nap?seconds=0.7")
        eventually(server, "running", 2)
        server.signal()
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            talk.recv(10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"slept")
        assert response.headers["Connection"] == "close"
        connection.close()
    assert server.wait() == 0
    assert "the lifespan ended with 0 running" in server.output()
    assert server.output().rstrip().endswith("on_stop")


def test_stop_cancels_what_takes_too_long(start_server: StartServer) -> None:
    server = start_server(command(graceful_timeout=0.5))
    connection = begin(server, "/raw/nap?seconds=30")
    began = time.monotonic()
    server.signal()
    assert server.wait() == 1
    assert 0.4 < time.monotonic() - began < 4
    output = server.output()
    assert output.index("the nap was cancelled") < output.index("the lifespan ended with 0 running")
    assert connection.getresponse().status == 500
    connection.close()


def test_requests_during_stop_are_answered(start_server: StartServer) -> None:
    """Of clients that keep asking while the server stops, every request that was taken is answered."""
    server = start_server(command())
    wrong: list[object] = []
    asked = []

    def ask() -> None:
        connection = server.http()
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                connection.request("GET", "/fast/async")
                response = connection.getresponse()
                asked.append(response.read())
                if response.status != 200:
                    wrong.append(response.status)
                if response.headers["Connection"] == "close":
                    break
        connection.close()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    server.signal()
    for thread in threads:
        thread.join(10)
    assert server.wait() == 0
    assert not wrong
    assert len(asked) > 50
