"""Whatever clients send, filters answer or ignore: an exception would be a 500."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from puff_patch.server.filters import CompressionOptions, CorsOptions, StaticFiles
from puff_patch.server.filters.compression import Compression
from puff_patch.server.filters.cors import Cors
from puff_patch.server.filters.proxies import FORWARDED_HEADERS, TrustedProxies
from puff_patch.server.filters.request_ids import RequestIds
from puff_patch.server.filters.static import Static

NAMES = [
    *(name.encode() for name in FORWARDED_HEADERS),
    *(b"accept-encoding", b"if-none-match", b"if-modified-since", b"if-range", b"range", b"x-request-id", b"host"),
    *(b"origin", b"access-control-request-method", b"access-control-request-headers", b"content-length"),
]
PIECES = [
    *(
        b"for=",
        b"proto=",
        b"https",
        b"1.2.3.4",
        b"10.0.0.1",
        b"[::1]",
        b"::ffff:",
        b":80",
        b",",
        b";",
        b'"',
        b"\\",
    ),
    *(b"bytes=", b"0-", b"-1", b"99999999999999999999", b"gzip", b";q=", b"0.5", b"*", b"W/", b'"x"', b" "),
    *(b"Mon, 01 Jan 2024 00:00:00 GMT", b"Mon,", b"+9999", b"99:99:99", b"\xff", b"\xb2", b"https://app.example"),
]


class Response:
    """Takes what a responder sends, and forgets it."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope = scope

    def respond(self, status: int, headers: object, body: bytes) -> None:
        assert status in (200, 206, 301, 304, 400, 404, 405, 416)


def test_random_headers(tmp_path: Path) -> None:
    (tmp_path / "name.txt").write_text("text")
    chance = random.Random(4)
    filters = [
        TrustedProxies(["10.0.0.0/8"], FORWARDED_HEADERS),
        RequestIds(),
        Compression(CompressionOptions()),
        Cors(CorsOptions(allow_origin_regex="https://[a-z.]+", allow_headers=("X-A",))),
        Static((StaticFiles("/", str(tmp_path), index="name.txt"),)),
    ]
    served = 0
    for _ in range(5000):
        scope: dict[str, Any] = {
            "method": chance.choice(["GET", "HEAD", "OPTIONS", "POST"]),
            "path": "/" + chance.choice(["name.txt", "", "..", "none", "\ufffd", "\ud800", "a/b", "x" * 300]),
            "raw_path": b"/x",
            "query_string": b"",
            "client": (chance.choice(["10.0.0.1", "1.2.3.4", "", "::1"]), "1"),
            "scheme": "http",
            "headers": [
                (name, b"".join(chance.choices(PIECES, k=chance.randrange(8))))
                for name in chance.choices(NAMES, k=chance.randrange(6))
            ],
        }
        responders = [responder for one in filters if (responder := one.begin(scope)) is not None]
        for responder in responders:
            responder(Response(scope))  # type: ignore[arg-type]
            served += 1
        for one in filters:
            one.head(scope, 200, [(b"content-type", b"text/plain"), (b"content-length", b"9999")])
    assert served > 1000
