"""This project's own server for the tests of its HTTP client: ``python http_app.py PORT``."""

# ruff: noqa: E402 - everything else is imported patched
from __future__ import annotations

import puff_patch

puff_patch.patch_all()

import json
import sys
import time
from typing import Any

from puff_patch.server import ServerOptions, serve


def app(environ: dict[str, Any], start: Any) -> list[bytes]:
    path, status = environ["PATH_INFO"], "200 OK"
    headers = [("Content-Type", "application/json"), ("X-Twice", "1"), ("X-Twice", "2")]
    received = environ["wsgi.input"].read()
    body = json.dumps(
        {
            "port": environ["REMOTE_PORT"],  # the client's, so that connections can be told apart
            "protocol": environ["SERVER_PROTOCOL"],
            "method": environ["REQUEST_METHOD"],
            "query": environ["QUERY_STRING"],
            "type": environ.get("CONTENT_TYPE"),
            "agent": environ.get("HTTP_USER_AGENT"),
            "mine": environ.get("HTTP_X_MINE"),
            "cookie": environ.get("HTTP_COOKIE"),
            "body": received.decode("latin-1"),
        }
    ).encode()
    if path.startswith("/sleep/"):
        time.sleep(float(path.removeprefix("/sleep/")))
    elif path == "/cookie":
        headers += [("Set-Cookie", "a=1; Path=/"), ("Set-Cookie", "b=2; Path=/")]
    elif path == "/redirect":
        status, headers = "302 Found", [("Location", "/echo?redirected")]
    elif path == "/missing":
        status, body = "404 Not Found", "nö".encode("latin-1")
        headers = [("Content-Type", "text/plain; charset=latin-1")]
    elif path == "/large":
        body = b"x" * 3_000_000
    start(status, headers)
    return [body]


serve(app, ServerOptions(port=int(sys.argv[1])))
