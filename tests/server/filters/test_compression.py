"""Compressed responses, as clients get them."""

from __future__ import annotations

import http.client
import importlib
import json
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest
from server_process import ServerProcess, StartServer

from puff_patch.server.filters import CompressionOptions
from puff_patch.server.filters.negotiation import negotiate

TEXT = {"Content-Type": "text/plain", "ETag": '"abc"'}


def decompress(encoding: str | None, data: bytes) -> bytes:
    if encoding is None:
        return data
    if encoding == "gzip":
        return zlib.decompress(data, 31)
    if encoding == "br":
        brotli: Any = importlib.import_module("brotli")
        return bytes(brotli.decompress(data))
    try:
        zstd: Any = importlib.import_module("compression.zstd")
    except ImportError:
        zstd = importlib.import_module("backports.zstd")
    return bytes(zstd.decompress(data))


@pytest.fixture(scope="module")
def server(start_module_server: StartServer) -> ServerProcess:
    return start_module_server(compression={}, access_log=True)


Ask = Callable[..., tuple[http.client.HTTPResponse, bytes]]


@pytest.fixture
def ask(server: ServerProcess) -> Ask:
    def send(
        headers: dict[str, str] = TEXT,
        accept: str | None = "gzip",
        method: str = "GET",
        **query: object,
    ) -> tuple[http.client.HTTPResponse, bytes]:
        path = "/respond?" + urlencode({"headers": json.dumps(headers), "size": 5000, **query})
        return server.request(path, method, headers={} if accept is None else {"Accept-Encoding": accept})

    return send


@pytest.mark.parametrize("encoding", ["zstd", "br", "gzip"])
@pytest.mark.parametrize("size", [512, 5000, 300_000, 3_000_000])
def test_body_comes_compressed_and_whole(ask: Ask, encoding: str, size: int) -> None:
    response, body = ask(accept=encoding, size=size)
    assert response.headers["Content-Encoding"] == encoding
    assert response.headers["Vary"] == "Accept-Encoding"
    assert response.headers["ETag"] == 'W/"abc"'
    assert len(body) < size / 2
    plain = decompress(encoding, body)
    assert plain == ask(accept=None, size=size)[1]
    assert len(plain) == size


@pytest.mark.parametrize("encoding", ["zstd", "br", "gzip"])
def test_stream_comes_compressed(ask: Ask, encoding: str) -> None:
    response, body = ask(accept=encoding, size=50_000, stream=1)
    assert response.headers["Content-Encoding"] == encoding
    assert decompress(encoding, body) == ask(accept=None, size=50_000)[1]


@pytest.mark.parametrize("encoding", ["zstd", "br", "gzip"])
def test_part_of_a_stream_can_be_read_at_once(server: ServerProcess, encoding: str) -> None:
    connection = server.http()
    connection.request("GET", "/event_stream?text/plain", headers={"Accept-Encoding": encoding})
    began = time.monotonic()
    response = connection.getresponse()
    first = response.read1(1000)
    assert time.monotonic() - began < 0.8, "the first part waited for the second one"
    if encoding == "gzip":
        assert zlib.decompressobj(31).decompress(first) == b"first"
    assert decompress(encoding, first + response.read()) == b"firstsecond"
    connection.close()


def test_event_stream_is_left_alone(server: ServerProcess) -> None:
    response, body = server.request("/event_stream?text/event-stream", headers={"Accept-Encoding": "gzip"})
    assert "Content-Encoding" not in response.headers
    assert body == b"firstsecond"


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain", "Content-Encoding": "identity"},
        {"Content-Type": "text/plain", "Content-Encoding": "br"},
        {"Content-Type": "text/plain", "Content-Range": "bytes 0-4999/9999"},
        {"Content-Type": "text/plain", "Cache-Control": "public, No-Transform"},
        {"Content-Type": "image/png"},
        {"Content-Type": "video/mp4"},
        {"Content-Type": "application/zip"},
        {"Content-Type": "application/octet-stream"},
        {},
    ],
)
def test_what_is_not_to_be_compressed_stays_as_it_is(ask: Ask, headers: dict[str, str]) -> None:
    response, body = ask(headers)
    assert len(body) == 5000
    assert response.headers.get("Content-Encoding") == headers.get("Content-Encoding")
    assert "Vary" not in response.headers


@pytest.mark.parametrize(
    "content_type",
    [
        "text/html; charset=utf-8",
        "application/json",
        "application/problem+json",
        "application/javascript",
        "image/svg+xml",
        "application/wasm",
    ],
)
def test_what_shrinks_is_compressed(ask: Ask, content_type: str) -> None:
    assert ask({"Content-Type": content_type})[0].headers["Content-Encoding"] == "gzip"


def test_small_bodies_parts_and_bodyless_statuses_stay_as_they_are(ask: Ask) -> None:
    assert "Content-Encoding" not in ask(size=511)[0].headers
    assert "Content-Encoding" not in ask(line="206 Partial Content")[0].headers
    for line in ("204 No Content", "304 Not Modified"):
        response, body = ask(line=line)
        assert (response.headers.get("Content-Encoding"), body) == (None, b"")
    assert response.headers["Vary"] == "Accept-Encoding", "a 304 says on what its 200 depends"


def test_error_pages_are_compressed(ask: Ask) -> None:
    response, body = ask(line="404 Not Found")
    assert (response.status, response.headers["Content-Encoding"]) == (404, "gzip")
    assert len(decompress("gzip", body)) == 5000


def test_client_that_takes_none_is_told_that_there_are_some(ask: Ask) -> None:
    for accept in (None, "identity", "gzip;q=0", "deflate"):
        response, _ = ask({**TEXT, "Vary": "Cookie"}, accept=accept)
        assert "Content-Encoding" not in response.headers
        assert response.headers["Content-Length"] == "5000"
        assert response.headers["ETag"] == '"abc"'
        assert response.headers.get_all("Vary") == ["Cookie", "Accept-Encoding"]
    assert ask({**TEXT, "Vary": "accept-encoding"})[0].headers.get_all("Vary") == ["accept-encoding"]


def test_head_has_the_headers_of_get(ask: Ask) -> None:
    got, _ = ask()
    head, nothing = ask(method="HEAD")
    assert nothing == b""
    # But for the length, which only compressing would tell.
    names = set(got.headers.keys()) - {"content-length", "date"}
    assert {name: head.headers[name] for name in names} == {name: got.headers[name] for name in names}
    assert "Content-Length" not in head.headers


def test_access_log_has_the_bytes_sent(server: ServerProcess, ask: Ask) -> None:
    _, body = ask(size=7000)
    server.wait_for_output(f'size=7000 HTTP/1.1" 200 {len(body)} '.replace("\\", ""))


@pytest.mark.parametrize("size", [1_000_000, 10_000_000])  # sent as a whole, and in pieces
def test_others_have_their_turn_while_a_long_body_is_compressed(server: ServerProcess, size: int) -> None:
    server.request("/digits?size=10")  # makes them
    ended = threading.Event()
    bodies: list[bytes] = []

    def fetch() -> None:
        for _ in range(10_000_000 // size):
            response, body = server.request(f"/digits?size={size}", headers={"Accept-Encoding": "gzip"})
            assert response.headers["Content-Encoding"] == "gzip"
            bodies.append(body)
        ended.set()

    thread = threading.Thread(target=fetch)
    thread.start()
    small = server.http()
    answered = 0
    while not ended.is_set():
        small.request("GET", "/hello")
        assert small.getresponse().read() == b"hello\n"
        answered += 1
    small.close()
    thread.join()
    assert sum(len(decompress("gzip", body)) for body in bodies) == 10_000_000
    # Without turns it is fewer than 20 (of 10 MB in one body, 5), with them more than 100.
    assert answered > 30, answered


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("gzip, deflate, br, zstd", "zstd"),
        ("gzip, deflate, br", "br"),
        ("gzip;q=1.0, br;q=0.5", "gzip"),
        ("GZIP", "gzip"),
        ("x-gzip", "gzip"),
        ("*", "zstd"),
        ("*;q=0.1, gzip;q=0.2", "gzip"),
        ("zstd;q=0, *", "br"),
        ("identity, gzip;q=0.5", None),
        ("gzip;q=x", None),
        ("gzip;q=nan", None),
        ("gzip;q=7", None),
        (", ;,gzip ; q = 0.5", "gzip"),
        ("", None),
        (None, None),
    ],
)
def test_negotiation(accept: str | None, chosen: str | None) -> None:
    assert negotiate(None if accept is None else accept.encode(), ("zstd", "br", "gzip")) == chosen


@pytest.mark.parametrize(
    "wrong",
    [{"encodings": ("deflate",)}, {"encodings": ()}, {"min_size": -1}, {"gzip_level": 0}, {"brotli_quality": 12}],
)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CompressionOptions(**wrong)
