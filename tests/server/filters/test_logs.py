"""Request ids, and the access log as text and as JSON."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from typing import Any

import pytest
from server_process import ServerProcess, StartServer
from support.process import run_python

from puff_patch.server import ServerOptions


# The sample application configures logging: the line has its format then.
def json_line(server: ServerProcess, marker: str) -> dict[str, Any]:
    server.wait_for_output(marker)
    [line] = [line for line in server.output().splitlines() if marker in line]
    found: dict[str, Any] = json.loads(line[line.index("{") :])
    return found


@pytest.fixture(scope="module")
def proxied(start_module_server: StartServer) -> ServerProcess:
    """Its peers are trusted."""
    return start_module_server(
        request_ids=True, trusted_proxies=["127.0.0.1"], access_log=True, access_log_format="json"
    )


def test_request_id_is_made(start_server: StartServer) -> None:
    server = start_server(request_ids=True, access_log=True)
    made = set()
    for sent in (None, "theirs"):
        response, body = server.request("/show_environ", headers={"X-Request-ID": sent} if sent else {})
        seen = json.loads(body)["HTTP_X_REQUEST_ID"]
        assert re.fullmatch("[0-9a-f]{32}", seen)
        assert response.headers.get_all("X-Request-ID") == [seen]
        server.wait_for_output(f"ms {seen}\n")
        made.add(seen)
    assert len(made) == 2
    assert len(server.request("/fail_early")[0].headers["X-Request-ID"]) == 32


def test_request_id_of_a_trusted_proxy_is_taken(proxied: ServerProcess) -> None:
    response, body = proxied.request("/show_environ", headers={"X-Request-ID": "abc-1.2_3"})
    assert json.loads(body)["HTTP_X_REQUEST_ID"] == response.headers["X-Request-ID"] == "abc-1.2_3"
    for bad in ("", "a b", 'x"y', "é".encode().decode("latin-1"), "x" * 129):
        response, body = proxied.request("/show_environ", headers={"X-Request-ID": bad})
        assert re.fullmatch("[0-9a-f]{32}", json.loads(body)["HTTP_X_REQUEST_ID"])


def test_json_log(proxied: ServerProcess) -> None:
    headers = {
        "User-Agent": 'browser "1"\t\u00e9',
        "Referer": "https://from.example/",
        "X-Forwarded-For": "1.2.3.4",
        "X-Forwarded-Proto": "https",
        "X-Request-ID": "an-id",
    }
    _, body = proxied.request("/respond?size=777", headers=headers)
    assert len(body) == 777
    line = json_line(proxied, "size=777")
    spent = datetime.now(timezone.utc) - datetime.fromisoformat(line.pop("time").replace("Z", "+00:00"))
    assert 0 <= spent.total_seconds() < 10
    assert 0 <= line.pop("ms") < 5000
    assert line == {
        "client": "1.2.3.4",
        "method": "GET",
        "target": "/respond?size=777",
        "http": "1.1",
        "scheme": "https",
        "status": 200,
        "size": 777,
        "host": f"127.0.0.1:{proxied.port}",
        "user_agent": 'browser "1"\t\\xe9',
        "referer": "https://from.example/",
        "request_id": "an-id",
    }


def test_what_is_logged_of_odd_ends(proxied: ServerProcess) -> None:
    proxied.request("/fail_early?odd")
    assert json_line(proxied, "/fail_early?odd")["status"] == 500
    proxied.request("/hello?head", "HEAD")
    assert json_line(proxied, "/hello?head")["size"] == 0
    with proxied.connect() as sock:
        sock.sendall(b"GET /trickle?odd HTTP/1.1\r\nHost: h\r\n\r\n")
        sock.recv(1000)
    line = json_line(proxied, "/trickle?odd")
    assert line["status"] == 200
    assert line["size"] > 0
    with proxied.connect() as sock:
        sock.sendall(b"POST /echo?odd HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nx")
    assert json_line(proxied, "/echo?odd")["status"] == 400


def test_json_goes_bare_to_stderr_where_logging_is_not_configured() -> None:
    run_python("""
import io, json, sys
sys.stderr = io.StringIO()
from time import perf_counter
from puff_patch.server import access_log
access_log.enable("json")
scope = {"client": ("", ""), "method": "GET", "raw_path": b"/caf\\xc3\\xa9", "query_string": b"", "scheme": "http",
         "http_version": "2", "headers": [(b"user-agent", b"x\\r\\ny")]}
access_log.log_request_as_json(scope, 200, 5, perf_counter())
line = json.loads(sys.stderr.getvalue())
assert sys.stderr.getvalue().count("\\n") == 1
assert (line["client"], line["target"], line["user_agent"]) == ("unix", "/caf\\\\xc3\\\\xa9", "x\\r\\ny"), line
""")


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match='access_log_format must be "text" or "json"'):
        ServerOptions(access_log_format="xml")
