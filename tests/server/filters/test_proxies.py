"""Who the client is, behind proxies and behind liars."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, StartServer, read_all

from puff_patch.server.filters.proxies import FORWARDED_HEADERS, TrustedProxies

SPOOF = {
    "X-Forwarded-For": "6.6.6.6",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "evil.example",
    "X-Real-IP": "6.6.6.6",
    "Forwarded": "for=6.6.6.6;proto=https;host=evil.example",
}


def after(sent: dict[str, str], /, **options: Any) -> dict[str, Any]:
    """The scope of a request from 10.0.0.1 after the filter."""
    scope: dict[str, Any] = {
        "client": ("10.0.0.1", "5000"),
        "scheme": "http",
        "headers": [(b"host", b"inner:8000")]
        + [(name.lower().encode(), value.encode()) for name, value in sent.items()],
    }
    options = {"peers": ["10.0.0.0/8", "2001:db8::/32"], "headers": FORWARDED_HEADERS, **options}
    assert TrustedProxies(**options).begin(scope) is None
    return scope


@pytest.mark.parametrize(
    ("forwarded_for", "client"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("6.6.6.6, 1.2.3.4", "1.2.3.4"),
        ("6.6.6.6, 1.2.3.4, 10.1.1.1", "1.2.3.4"),
        ("6.6.6.6,1.2.3.4,2001:db8::7, 10.1.1.1", "1.2.3.4"),
        ("1.2.3.4:5678", "1.2.3.4"),
        ("[2002::1]:80", "2002::1"),
        ("2002::1", "2002::1"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("1.2.3.4, ::ffff:10.2.2.2", "1.2.3.4"),
        ("10.3.3.3, 10.2.2.2", "10.3.3.3"),
        ("unknown, 10.2.2.2", "10.2.2.2"),
        ("6.6.6.6, garbage", "10.0.0.1"),
        ("", "10.0.0.1"),
    ],
)
def test_client_is_the_rightmost_that_is_not_trusted(forwarded_for: str, client: str) -> None:
    assert after({"X-Forwarded-For": forwarded_for})["client"][0] == client


@pytest.mark.parametrize(
    ("forwarded", "client", "scheme", "host"),
    [
        ("for=1.2.3.4;proto=https;host=a.example", "1.2.3.4", "https", b"a.example"),
        ('For="[2002::1]:4711"; Proto=HTTPS', "2002::1", "https", b"inner:8000"),
        ("for=6.6.6.6;proto=http, for=1.2.3.4;proto=https, for=10.1.1.1", "1.2.3.4", "https", b"inner:8000"),
        # What a client sent cannot swallow what the proxy adds.
        ('for="6.6.6.6, for=1.2.3.4;proto=https', "1.2.3.4", "https", b"inner:8000"),
        ('for=6.6.6.6;x=", for=1.2.3.4, for=10.1.1.1', "1.2.3.4", "http", b"inner:8000"),
        ("for=_hidden, for=10.1.1.1", "10.1.1.1", "http", b"inner:8000"),
        ("nonsense", "10.0.0.1", "http", b"inner:8000"),
    ],
)
def test_forwarded(forwarded: str, client: str, scheme: str, host: bytes) -> None:
    scope = after({"Forwarded": forwarded, "X-Forwarded-For": "6.6.6.6"})
    assert (scope["client"][0], scope["scheme"]) == (client, scheme)
    assert [value for name, value in scope["headers"] if name == b"host"] == [host]


@pytest.mark.parametrize(
    ("headers", "scheme", "host"),
    [
        ({"Proto": "https"}, "https", b"inner:8000"),
        ({"Proto": "wss"}, "https", b"inner:8000"),
        ({"Proto": "gopher"}, "http", b"inner:8000"),
        ({"For": "6.6.6.6, 1.2.3.4, 10.1.1.1", "Proto": "ftp, https, http"}, "https", b"inner:8000"),
        ({"For": "1.2.3.4, 10.1.1.1", "Proto": "https"}, "https", b"inner:8000"),
        ({"Host": "a.example:81"}, "http", b"a.example:81"),
        ({"Host": "[::1]"}, "http", b"[::1]"),
        ({"Host": "a.example/x\ty"}, "http", b"inner:8000"),
        ({"Host": "a.example", "Port": "443", "Proto": "https"}, "https", b"a.example"),
        ({"Host": "a.example:1", "Port": "8443", "Proto": "https"}, "https", b"a.example:8443"),
        ({"Port": "99999"}, "http", b"inner:8000"),
        ({"Port": "80"}, "http", b"inner"),
    ],
)
def test_scheme_host_and_port(headers: dict[str, str], scheme: str, host: bytes) -> None:
    scope = after({f"X-Forwarded-{name}": value for name, value in headers.items()})
    assert scope["scheme"] == scheme
    assert [value for name, value in scope["headers"] if name == b"host"] == [host]


def test_only_the_named_headers_are_believed() -> None:
    scope = after(SPOOF, headers=["X-Forwarded-For"])
    assert scope["client"] == ("6.6.6.6", "0")
    assert scope["scheme"] == "http"
    assert (b"host", b"inner:8000") in scope["headers"]
    # They may be the application's business.
    assert (b"x-forwarded-host", b"evil.example") in scope["headers"]


def test_trusting_everybody_takes_the_first_client() -> None:
    assert after({"X-Forwarded-For": "6.6.6.6, 1.2.3.4"}, peers=["*"])["client"][0] == "6.6.6.6"


@pytest.mark.parametrize("options", [{"peers": ["proxy.local"]}, {"headers": ["x-real-ip"]}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"trusted_proxies takes IP|proxy_headers may name"):
        after({}, **options)


def test_over_http(start_server: StartServer, tmp_path: Path) -> None:
    liar = start_server(trusted_proxies=["10.0.0.0/8"], proxy_headers=FORWARDED_HEADERS, access_log=True)
    environ = liar.json("/show_environ", headers={**SPOOF, "X-Forwarded-Port": "99"})
    assert environ["REMOTE_ADDR"] == "127.0.0.1"
    assert environ["wsgi.url_scheme"] == "http"
    assert environ["HTTP_HOST"] == f"127.0.0.1:{liar.port}"
    assert not [key for key in environ if "FORWARDED" in key or "REAL" in key]
    liar.wait_for_output('127.0.0.1 "GET /show_environ')

    proxied = start_server(trusted_proxies=["127.0.0.1"], access_log=True)
    environ = proxied.json("/show_environ", headers=SPOOF)
    assert (environ["REMOTE_ADDR"], environ["wsgi.url_scheme"]) == ("6.6.6.6", "https")
    assert environ["HTTP_HOST"] == f"127.0.0.1:{proxied.port}"
    proxied.wait_for_output('6.6.6.6 "GET /show_environ')
    # A client that is said to be elsewhere is still seen to leave, by its true address.
    with proxied.connect() as sock:
        sock.sendall(b"GET /trickle?big HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n")
        sock.recv(1000)
    proxied.wait_for_output('1.2.3.4 "GET /trickle?big')
    assert "trickle ended" in proxied.json("/show_seen")["events"]
    with pytest.raises(ConnectionResetError):
        proxied.raw(b"GET /fail_late HTTP/1.0\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n")

    unix = start_server(uds=str(tmp_path / "socket"), trusted_proxies=["unix"])
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(unix.url.removeprefix("unix:"))
        sock.sendall(b"GET /show_environ HTTP/1.0\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n")
        response = read_all(sock)
    assert json.loads(response.split(b"\r\n\r\n", 1)[1])["REMOTE_ADDR"] == "1.2.3.4"


def test_without_trusted_proxies_headers_are_left_alone(server: ServerProcess) -> None:
    environ = server.json("/show_environ", headers=SPOOF)
    assert (environ["REMOTE_ADDR"], environ["HTTP_X_FORWARDED_FOR"]) == ("127.0.0.1", "6.6.6.6")
