"""A WSGI application with a path for each thing a server can get wrong, and the process that serves it.

Run by the tests as ``python sample_app.py JSON``: the JSON object holds the fields of ServerOptions.
"""

# ruff: noqa: E402 - everything else is imported patched
from __future__ import annotations

import puff_patch

puff_patch.patch_all()

import contextvars
import functools
import hashlib
import io
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs
from wsgiref.validate import validator

import gevent

from puff_patch.server import ServerError, ServerOptions, run
from puff_patch.server.filters import CompressionOptions, CorsOptions, StaticFiles

Environ = dict[str, Any]
Start = Callable[..., Callable[[bytes], object]]

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
local = threading.local()
seen: dict[str, Any] = {"closed": [], "events": [], "running": 0, "paths": deque(maxlen=100)}
TEXT = [("Content-Type", "text/plain")]


App = Callable[[Environ, Start], Iterable[bytes]]
ROUTES: dict[str, App] = {}


def route(app: App) -> App:
    """Serve a function under its name."""
    ROUTES["/" + app.__name__] = app
    return app


def plain(start: Start, body: bytes, status: str = "200 OK") -> list[bytes]:
    start(status, [*TEXT, ("Content-Length", str(len(body)))])
    return [body]


def show(start: Start, value: object) -> list[bytes]:
    return plain(start, json.dumps(value).encode())


class Closing:
    """An iterable that notes in ``seen`` when it is closed."""

    def __init__(self, name: str, parts: Iterable[bytes]) -> None:
        self.name = name
        self.parts = iter(parts)

    def __iter__(self) -> Iterator[bytes]:
        return self.parts

    def close(self) -> None:
        seen["closed"].append(self.name)


def query_of(environ: Environ) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(environ["QUERY_STRING"]).items()}


@route
def hello(environ: Environ, start: Start) -> list[bytes]:
    return plain(start, b"hello\n")


@route
def show_environ(environ: Environ, start: Start) -> list[bytes]:
    return show(start, {key: value if isinstance(value, str) else repr(value) for key, value in environ.items()})


@route
def show_seen(environ: Environ, start: Start) -> list[bytes]:
    return show(start, {**seen, "paths": list(seen["paths"])})


@route
def echo(environ: Environ, start: Start) -> list[bytes]:
    return plain(start, environ["wsgi.input"].read())


@route
def digest(environ: Environ, start: Start) -> list[bytes]:
    """Read the body in pieces; answer with its size and SHA-256."""
    size = 0
    found = hashlib.sha256()
    while part := environ["wsgi.input"].read(64 * 1024):
        size += len(part)
        found.update(part)
    return show(start, {"size": size, "sha256": found.hexdigest()})


@route
def read_body(environ: Environ, start: Start) -> list[bytes]:
    """Read the body in each of the ways a file offers."""
    body = environ["wsgi.input"]
    read: list[bytes] = [body.read(3), body.read(0), body.readline(), body.readline(2), body.read1(1)]
    read += [next(iter(body)), *body.readlines(), body.read(5), body.read(), body.readline()]
    return show(start, [part.decode("latin-1") for part in read])


@route
def unread(environ: Environ, start: Start) -> list[bytes]:
    return plain(start, b"not read", "413 Content Too Large")


kept: list[Environ] = []


@route
def keep(environ: Environ, start: Start) -> list[bytes]:
    """Reads nothing, and holds on to the request."""
    kept.append(environ)
    return plain(start, b"kept")


@route
def read_kept(environ: Environ, start: Start) -> list[bytes]:
    """What reading the body of a request that is over gives."""
    try:
        kept[-1]["wsgi.input"].read()
    except OSError as exc:
        return plain(start, f"{type(exc).__name__}: {exc}".encode())
    return plain(start, b"read")


@route
def read_error(environ: Environ, start: Start) -> list[bytes]:
    """Note what reading the body raises when the client leaves."""
    try:
        environ["wsgi.input"].read()
    except OSError as exc:
        seen["events"].append(f"read raised {type(exc).__name__}")
        raise
    return plain(start, b"complete")


@route
def swallow_error(environ: Environ, start: Start) -> list[bytes]:
    """Answer as if nothing were, whatever reading the body raises."""
    try:
        environ["wsgi.input"].read()
    except OSError as exc:
        seen["events"].append(f"swallowed {type(exc).__name__}")
    return plain(start, b"all is well")


@route
def echo_parts(environ: Environ, start: Start) -> Iterable[bytes]:
    """Send the body back while it comes."""
    start("200 OK", TEXT)
    yield b"begin "
    while part := environ["wsgi.input"].read1():
        yield part


@route
def stream(environ: Environ, start: Start) -> Iterable[bytes]:
    query = query_of(environ)
    count, size = int(query.get("count", 3)), int(query.get("size", 5))
    headers = list(TEXT)
    if "length" in query:
        headers.append(("Content-Length", query["length"]))
    start("200 OK", headers)
    return Closing("stream", (b"x" * size for _ in range(count)))


@route
def trickle(environ: Environ, start: Start) -> Iterable[bytes]:
    """Parts without an end, until the client leaves."""
    start("200 OK", TEXT)

    def parts() -> Iterator[bytes]:
        number = 0
        padding = b"." * (65536 if "big" in environ["QUERY_STRING"] else 0)
        try:
            while True:
                yield b"part %d\n" % number + padding
                number += 1
                seen["events"].append("trickle")
                if "fast" not in environ["QUERY_STRING"]:
                    gevent.sleep(0.02)
        except GeneratorExit:
            seen["events"].append("trickle ended")
            raise

    return parts()


@route
def event_stream(environ: Environ, start: Start) -> Iterable[bytes]:
    """One part at once, the second one only after a while: the first must not wait for it."""
    start("200 OK", [("Content-Type", environ["QUERY_STRING"] or "text/plain")])
    yield b"first"
    gevent.sleep(1)
    yield b"second"


@route
def nap(environ: Environ, start: Start) -> list[bytes]:
    seen["running"] += 1
    try:
        gevent.sleep(float(query_of(environ)["seconds"]))
    finally:
        seen["running"] -= 1
    return plain(start, b"slept")


@route
def hold_hub(environ: Environ, start: Start) -> list[bytes]:
    limit = time.thread_time() + 0.6
    while time.thread_time() < limit:
        pass
    return plain(start, b"held")


@route
def fail_early(environ: Environ, start: Start) -> list[bytes]:
    raise LookupError("fail early")


@route
def fail_in_list(environ: Environ, start: Start) -> list[bytes]:
    start("200 OK", TEXT)
    raise LookupError("fail after start_response")


@route
def fail_late(environ: Environ, start: Start) -> Iterable[bytes]:
    start("200 OK", TEXT)

    def parts() -> Iterator[bytes]:
        yield b"some of it"
        raise LookupError("fail late")

    return Closing("fail late", parts())


@route
def fail_close(environ: Environ, start: Start) -> Iterable[bytes]:
    class Failing(list[bytes]):
        def close(self) -> None:
            raise LookupError("fail in close")

    start("200 OK", TEXT)
    return Failing([b"whole"])


@route
def exit_process(environ: Environ, start: Start) -> list[bytes]:
    raise SystemExit(3)


@route
def exc_info(environ: Environ, start: Start) -> list[bytes]:
    start("200 OK", TEXT)
    try:
        raise LookupError("replaced")
    except LookupError:
        start("503 Service Unavailable", TEXT, sys.exc_info())
    return [b"the error page"]


@route
def exc_info_late(environ: Environ, start: Start) -> Iterable[bytes]:
    start("200 OK", TEXT)
    yield b"sent"
    try:
        raise LookupError("too late to replace")
    except LookupError:
        start("503 Service Unavailable", TEXT, sys.exc_info())


@route
def start_twice(environ: Environ, start: Start) -> list[bytes]:
    start("200 OK", TEXT)
    start("200 OK", TEXT)
    return [b""]


@route
def never_started(environ: Environ, start: Start) -> list[bytes]:
    return [b"body without a head"]


@route
def text_body(environ: Environ, start: Start) -> list[Any]:
    start("200 OK", TEXT)
    return ["text"]


@route
def bad_header(environ: Environ, start: Start) -> list[bytes]:
    start("200 OK", [("X-Split", "a\r\nSet-Cookie: b=c")])
    return [b"never"]


@route
def status(environ: Environ, start: Start) -> list[bytes]:
    query = query_of(environ)
    headers = [("Content-Length", query["length"])] if "length" in query else []
    start(query["line"], headers)
    return [query["body"].encode()] if "body" in query else []


@route
def use_write(environ: Environ, start: Start) -> list[bytes]:
    write = start("200 OK", TEXT)
    write(b"written, ")
    write(b"")
    return [b"then ", b"returned"]


@route
def send_file(environ: Environ, start: Start) -> Iterable[bytes]:
    start("200 OK", TEXT)

    class Noted(io.BytesIO):
        def close(self) -> None:
            seen["closed"].append("file")
            super().close()

    wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](Noted(b"f" * 200_000), 4096)
    return wrapped


@route
def hop_by_hop(environ: Environ, start: Start) -> list[bytes]:
    start(
        "200 OK",
        [("Connection", "close"), ("Transfer-Encoding", "chunked"), ("Keep-Alive", "7"), ("X-A", "1")],
    )
    return [b"body"]


@route
def many_headers(environ: Environ, start: Start) -> list[bytes]:
    start("200 OK", [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("X-Latin", "caf\u00e9")])
    return []


@route
def context(environ: Environ, start: Start) -> list[bytes]:
    """What the last request left behind: in a context variable, and in a greenlet-local."""
    before = {"variable": variable.get(), "local": getattr(local, "value", "unset")}
    variable.set("leaked")
    local.value = "kept"
    return show(start, before)


@route
def whole(environ: Environ, start: Start) -> list[bytes]:
    return plain(start, b"w" * int(query_of(environ)["size"]))


@route
def own_pid(environ: Environ, start: Start) -> list[bytes]:
    return show(start, os.getpid())


@route
def respond(environ: Environ, start: Start) -> Iterable[bytes]:
    """Answer as the query says: its status line, its headers (JSON), so many bytes of text."""
    query = query_of(environ)
    headers = list(json.loads(query.get("headers", "{}")).items())
    body = (b"some text that repeats itself; " * (int(query.get("size", 0)) // 31 + 1))[
        : int(query.get("size", 0))
    ]
    if "stream" in query:
        start(query.get("line", "200 OK"), headers)
        return (body[at : at + 1000] for at in range(0, len(body), 1000))
    start(query.get("line", "200 OK"), [*headers, ("Content-Length", str(len(body)))])
    return [body]


@functools.cache
def many_digits() -> bytes:
    return os.urandom(5_000_000).hex().encode()


@route
def digits(environ: Environ, start: Start) -> list[bytes]:
    """Text that takes a while to compress."""
    return plain(start, many_digits()[: int(query_of(environ)["size"])])


checked = validator(
    lambda environ, start: plain(
        start, b"validated " + environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0))
    )
)


def application(environ: Environ, start: Start) -> Iterable[bytes]:
    seen["paths"].append(environ["PATH_INFO"])
    if environ["PATH_INFO"] == "/validated":
        # The validator holds that CONTENT_LENGTH is there, or the body must not be read.
        environ.setdefault("CONTENT_LENGTH", "0")
        return checked(environ, start)
    if environ["PATH_INFO"].startswith("/validated/"):
        return validator(ROUTES[environ["PATH_INFO"].removeprefix("/validated")])(environ, start)
    if environ["PATH_INFO"].startswith("/show_path"):
        return show(start, environ["PATH_INFO"])
    app = ROUTES.get(environ["PATH_INFO"])
    if app is None:
        return plain(start, b"no such path", "404 Not Found")
    return app(environ, start)


def stop_slowly() -> None:
    """An on_stop hook, seen in the log."""
    logging.getLogger("sample_app").warning("on_stop was called")


def options_of(values: dict[str, Any]) -> ServerOptions:
    """Options from what JSON can say."""
    for name, kind in (("compression", CompressionOptions), ("cors", CorsOptions)):
        if name in values:
            values[name] = kind(**values[name])
    values["static"] = tuple(StaticFiles(**one) for one in values.get("static", ()))
    return ServerOptions(**values, on_stop=(stop_slowly,))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        code = run(lambda: application, options_of(json.loads(sys.argv[1])))
    except ServerError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)
