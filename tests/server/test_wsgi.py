"""What a WSGI application and its clients see of the server."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import time

import pytest
from server_process import ServerProcess, StartServer, read_all
from support.waiting import eventually

GET = b"GET %s HTTP/1.1\r\nHost: h\r\n%s\r\n"


def get(path: bytes, headers: bytes = b"Connection: close\r\n") -> bytes:
    return GET % (path, headers)


def test_plain_response(server: ServerProcess) -> None:
    response, body = server.request("/hello")
    assert (response.status, body) == (200, b"hello\n")
    assert response.headers["Content-Length"] == "6"
    assert response.headers["Date"]


def test_environ(server: ServerProcess) -> None:
    with server.connect() as sock:
        port = sock.getsockname()[1]
        sock.sendall(
            b"POST /show_environ?a=1&b=%20x HTTP/1.1\r\nHost: example.org:81\r\nContent-Type: text/x\r\n"
            b"Content-Length: 2\r\nX-Two: a\r\nX-Two: b\r\nCookie: c=1\r\nCookie: d=2\r\nX_Forged: no\r\n"
            b"X-Forwarded-For: 1.2.3.4\r\n\r\nhi"
        )
        response = http.client.HTTPResponse(sock)
        response.begin()
        environ = json.loads(response.read())
    assert environ["REQUEST_METHOD"] == "POST"
    assert environ["SCRIPT_NAME"] == ""
    assert environ["PATH_INFO"] == "/show_environ"
    assert environ["QUERY_STRING"] == "a=1&b=%20x"
    assert environ["CONTENT_TYPE"] == "text/x"
    assert environ["CONTENT_LENGTH"] == "2"
    assert environ["REMOTE_ADDR"] == "127.0.0.1"
    assert environ["REMOTE_PORT"] == str(port)
    assert environ["SERVER_NAME"] == "127.0.0.1"
    assert environ["SERVER_PORT"] == str(server.port)
    assert environ["SERVER_PROTOCOL"] == "HTTP/1.1"
    assert environ["HTTP_HOST"] == "example.org:81"
    assert environ["HTTP_X_TWO"] == "a,b"
    assert environ["HTTP_COOKIE"] == "c=1; d=2"
    assert environ["HTTP_X_FORWARDED_FOR"] == "1.2.3.4"
    assert environ["wsgi.url_scheme"] == "http"
    assert environ["wsgi.version"] == "(1, 0)"
    assert environ["wsgi.multithread"] == "True"
    assert environ["wsgi.multiprocess"] == environ["wsgi.run_once"] == "False"


def test_header_with_underscore_cannot_forge_another(server: ServerProcess) -> None:
    environ = server.json("/show_environ", headers={"X_User": "admin", "X-Real": "yes"})
    assert "HTTP_X_USER" not in environ
    assert environ["HTTP_X_REAL"] == "yes"


@pytest.mark.parametrize(
    ("sent", "path"),
    [
        (b"/show_environ", b"/show_environ"),
        (b"/show%5Fenviron", b"/show_environ"),
        (b"/show_environ%2Fx", b"/show_environ/x"),
        (b"/caf%C3%A9", "/café".encode()),
        (b"/%FF%00", b"/\xff\x00"),
        (b"//double//", b"//double//"),
    ],
)
def test_path_info_is_the_decoded_path_as_latin_1(server: ServerProcess, sent: bytes, path: bytes) -> None:
    # The sample application finds its routes by PATH_INFO, and answers what it got there.
    answer = server.raw(get(b"/show_path" + sent))
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1]).encode("latin-1") == b"/show_path" + path


def test_http_1_0_without_host(server: ServerProcess) -> None:
    answer = server.raw(b"GET /show_environ HTTP/1.0\r\n\r\n")
    environ = json.loads(answer.split(b"\r\n\r\n", 1)[1])
    assert environ["SERVER_PROTOCOL"] == "HTTP/1.0"
    assert "HTTP_HOST" not in environ


def test_wsgiref_validator_finds_nothing(server: ServerProcess) -> None:
    assert server.request("/validated")[1] == b"validated "
    assert server.request("/validated", "POST", b"body")[1] == b"validated body"
    assert server.request("/validated", "HEAD")[0].status == 200


def test_wsgiref_validator_finds_nothing_in_any_kind_of_response(start_server: StartServer) -> None:
    server = start_server()
    for path, length in (
        ("hello", 6),
        ("stream", 15),
        ("use_write", 22),
        ("send_file", 200_000),
        ("exc_info", 14),
    ):
        response, body = server.request(f"/validated/{path}")
        assert (response.status, len(body)) == (503 if path == "exc_info" else 200, length)
        head, nothing = server.request(f"/validated/{path}", "HEAD")
        assert (head.status, nothing) == (response.status, b"")
    for body in (b"x" * 100_000, iter([b"x" * 50_000] * 2)):
        assert json.loads(server.request("/validated/digest", "POST", body)[1])["size"] == 100_000
    for path in ("fail_late", "exc_info_late"):
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            server.request(f"/validated/{path}")
    with server.connect() as sock:
        sock.sendall(get(b"/validated/trickle"))
        assert sock.recv(1000)
    eventually(lambda: "trickle ended" in server.json("/show_seen")["events"])
    closed = server.json("/show_seen")["closed"]
    assert {name: closed.count(name) for name in closed} == {"stream": 2, "file": 2, "fail late": 1}
    assert server.stop() == 0
    output = server.output()
    # It complains by assertions, and of iterators that were not closed when they are collected.
    assert "AssertionError" not in output
    assert "garbage collected" not in output


def test_keep_alive_and_pipelining(server: ServerProcess) -> None:
    with server.connect() as sock:
        sock.sendall(get(b"/hello", b"") * 3 + get(b"/own_pid"))
        received = b""
        while part := sock.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 200 OK") == 4
    assert received.count(b"hello\n") == 3


def test_big_request_headers(server: ServerProcess) -> None:
    value = "v" * 60_000
    environ = server.json("/show_environ", headers={"X-Big": value})
    assert environ["HTTP_X_BIG"] == value


@pytest.mark.parametrize("path", ["/hello", "/stream?count=2&length=10", "/status?line=200+OK&body=hello"])
def test_head_is_get_without_a_body(server: ServerProcess, path: str) -> None:
    got, body = server.request(path)
    head, nothing = server.request(path, "HEAD")
    assert body
    assert nothing == b""
    assert head.status == got.status
    assert head.headers["Content-Length"] == got.headers["Content-Length"] == str(len(body))


@pytest.mark.parametrize("code", [204, 304])
def test_statuses_without_a_body(server: ServerProcess, code: int) -> None:
    connection = server.http()
    connection.request("GET", f"/status?line={code}+x&body=dropped")
    response = connection.getresponse()
    assert (response.status, response.read()) == (code, b"")
    # Whatever was wrong with the framing would be taken for the start of the next response.
    connection.request("GET", "/hello")
    assert connection.getresponse().read() == b"hello\n"
    connection.close()


@pytest.mark.parametrize("line", ["101 Switching", "100 Continue", "099 x", "abc"])
def test_statuses_an_application_cannot_send(server: ServerProcess, line: str) -> None:
    assert server.request("/status?line=" + line.replace(" ", "+"))[0].status == 500


def test_response_headers(server: ServerProcess) -> None:
    response, _ = server.request("/many_headers")
    assert response.headers.get_all("Set-Cookie") == ["a=1", "b=2"]
    assert response.headers["X-Latin"] == "café"
    assert response.headers["Content-Length"] == "0"


def test_hop_by_hop_headers_are_the_servers(server: ServerProcess) -> None:
    response, body = server.request("/hop_by_hop")
    assert body == b"body"
    assert "Transfer-Encoding" not in response.headers
    assert "Keep-Alive" not in response.headers
    assert response.headers["Connection"] == "close"


def test_malformed_header_is_an_error(server: ServerProcess) -> None:
    response, _ = server.request("/bad_header")
    assert response.status == 500
    assert "Set-Cookie" not in response.headers


def test_write_then_iterable(server: ServerProcess) -> None:
    assert server.request("/use_write")[1] == b"written, then returned"


def test_file_wrapper(server: ServerProcess) -> None:
    assert server.request("/send_file")[1] == b"f" * 200_000
    assert "file" in server.json("/show_seen")["closed"]


def test_exc_info_replaces_an_unsent_response(server: ServerProcess) -> None:
    response, body = server.request("/exc_info")
    assert (response.status, body) == (503, b"the error page")


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/fail_early", "LookupError: fail early"),
        ("/fail_in_list", "LookupError: fail after start_response"),
        ("/start_twice", "AssertionError: start_response was called a second time"),
        ("/never_started", "AssertionError: the application did not call start_response"),
        ("/text_body", "TypeError: a WSGI application must give bytes"),
        ("/exit_process", "SystemExit: 3"),
        (
            "/status?line=200+OK&length=3&body=four",
            "ValueError: the body has 4 bytes, and its Content-Length says 3",
        ),
        (
            "/status?line=200+OK&length=5&body=four",
            "ValueError: the body has 4 bytes, and its Content-Length says 5",
        ),
        ("/status?line=200+OK&length=x", "ValueError: invalid literal"),
        (
            "/stream?count=1&size=9&length=3",
            "ValueError: the body is longer than its Content-Length of 3 bytes",
        ),
    ],
)
def test_error_before_the_response(server: ServerProcess, path: str, error: str) -> None:
    connection = server.http()
    connection.request("GET", path)
    response = connection.getresponse()
    assert (response.status, response.read()) == (500, b"Internal Server Error\n")
    output = server.wait_for_output(error)
    assert "Traceback (most recent call last)" in output
    # The connection is still good.
    connection.request("GET", "/hello")
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/fail_late", "LookupError: fail late"),
        ("/exc_info_late", "LookupError: too late to replace"),
        ("/stream?count=2&length=11", "ValueError: the body has 10 bytes, and its Content-Length says 11"),
        ("/stream?count=3&length=11", "ValueError: the body is longer than its Content-Length of 11 bytes"),
    ],
)
def test_error_amid_the_response_cuts_the_connection(server: ServerProcess, path: str, error: str) -> None:
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        server.request(path)
    server.wait_for_output(error)


def test_error_amid_a_response_of_http_1_0_is_a_reset(server: ServerProcess) -> None:
    # There the end of the connection is the end of the body: only a reset tells it from a whole one.
    with pytest.raises(ConnectionResetError):
        server.raw(b"GET /fail_late HTTP/1.0\r\nHost: h\r\n\r\n")


def test_close_is_called(server: ServerProcess) -> None:
    assert server.request("/stream")[1] == b"x" * 15
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        server.request("/fail_late")
    server.request("/stream", "HEAD")
    assert {"stream", "fail late"} <= set(server.json("/show_seen")["closed"])


def test_error_in_close_is_logged_and_the_response_is_whole(server: ServerProcess) -> None:
    response, body = server.request("/fail_close")
    assert (response.status, body) == (200, b"whole")
    server.wait_for_output("/fail_close failed after its response was sent")


def test_first_part_does_not_wait_for_the_second(server: ServerProcess) -> None:
    with server.connect() as sock:
        sock.sendall(get(b"/event_stream?text/event-stream"))
        began = time.monotonic()
        received = b""
        while b"first" not in received:
            received += sock.recv(65536)
        assert time.monotonic() - began < 0.8
        assert b"second" not in received
        while b"second" not in received:
            received += sock.recv(65536)


def test_context_variables_end_with_the_request_and_greenlet_locals_stay(start_server: StartServer) -> None:
    # One greenlet serves all, so whatever a request leaves on it the next one would find.
    server = start_server(max_greenlets=1)
    assert server.json("/context") == {"variable": "unset", "local": "unset"}
    assert server.json("/context") == {"variable": "unset", "local": "kept"}


def test_requests_beyond_max_greenlets_wait_in_order(start_server: StartServer) -> None:
    server = start_server(max_greenlets=1)
    sockets = []
    for _ in range(3):
        sock = server.connect()
        sock.sendall(get(b"/nap?seconds=0.2"))
        sockets.append(sock)
        time.sleep(0.02)
    ended = []
    for sock in sockets:
        with sock:
            assert b"slept" in read_all(sock)
        ended.append(time.monotonic())
    assert ended[1] - ended[0] > 0.15
    assert ended[2] - ended[1] > 0.15


def test_requests_run_at_the_same_time(server: ServerProcess) -> None:
    began = time.monotonic()
    sockets = []
    for _ in range(20):
        sock = server.connect()
        sock.sendall(get(b"/nap?seconds=0.3"))
        sockets.append(sock)
    for sock in sockets:
        with sock:
            assert b"slept" in read_all(sock)
    assert time.monotonic() - began < 2


def test_unix_socket(start_server: StartServer, tmp_path: object) -> None:
    path = f"{tmp_path}/puff.sock"
    server = start_server(uds=path)
    assert server.url == f"unix:{path}"

    def ask(request: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(3)
            sock.connect(path)
            sock.sendall(request)
            return read_all(sock)

    environ = json.loads(ask(get(b"/show_environ")).split(b"\r\n\r\n", 1)[1])
    assert environ["REMOTE_ADDR"] == ""
    assert not ask(get(b"/fail_late")).endswith(b"0\r\n\r\n")
    assert b"500 Internal" in ask(get(b"/fail_early"))
    assert server.stop() == 0
    with pytest.raises(FileNotFoundError):
        ask(b"")


def test_http_2_with_prior_knowledge(server: ServerProcess) -> None:
    curl = shutil.which("curl")
    if curl is None or "HTTP2" not in subprocess.run([curl, "-V"], capture_output=True, text=True).stdout:
        pytest.skip("curl with HTTP/2 is not here")

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [curl, "-s", "-m", "10", "--http2-prior-knowledge", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    environ = json.loads(ask("-b", "a=1; b=2", f"{server.url}/show_environ").stdout)
    assert environ["SERVER_PROTOCOL"] == "HTTP/2.0"
    assert environ["HTTP_HOST"] == f"127.0.0.1:{server.port}"
    assert environ["HTTP_COOKIE"] == "a=1; b=2"
    assert ask("-d", "body", f"{server.url}/echo").stdout == "body"
    assert ask(f"{server.url}/stream").stdout == "x" * 15
    assert "connection:" not in ask("-i", f"{server.url}/hop_by_hop").stdout
    # The stream is reset; the connection, and so the other streams on it, stays.
    failed = ask("-v", f"{server.url}/fail_late")
    assert failed.returncode == 92
    assert "was not closed cleanly" in failed.stderr
    assert "left intact" in failed.stderr
