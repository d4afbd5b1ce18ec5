"""Filters of a program's own, and what becomes of faulty ones."""

from __future__ import annotations

from typing import Any

from support.process import run_python

from puff_patch.server.filters import Answer, Filter, Filters, Life

SCOPE: dict[str, Any] = {"method": "GET", "path": "/", "http_version": "1.1", "headers": []}


class Upper:
    def feed(self, data: bytes) -> bytes:
        return data.upper()

    def finish(self) -> bytes:
        return b"!"


class Quotes:
    def feed(self, data: bytes) -> bytes:
        return b"<" + data + b">"

    def finish(self) -> bytes:
        return b""


class Noting(Filter):
    def __init__(self, name: str, seen: list[str], encoder: Any = None, responder: Any = None) -> None:
        self.name, self.seen, self.encoder, self.responder = name, seen, encoder, responder

    def begin(self, scope: Any) -> Any:
        self.seen.append("begin " + self.name)
        return self.responder

    def head(self, scope: Any, status: int, headers: Any) -> Any:
        self.seen.append("head " + self.name)
        return self.encoder

    def end(self, scope: Any, status: int, size: int) -> None:
        self.seen.append(f"end {self.name} {status} {size}")


def test_order() -> None:
    seen: list[str] = []
    filters = Filters([Noting("outer", seen, Quotes()), Filter(), Noting("inner", seen, Upper())])
    assert filters.begin(SCOPE) is None
    encoder = filters.head(SCOPE, 200, [])
    assert encoder is not None
    assert encoder.feed(b"a") + encoder.feed(b"b") + encoder.finish() == b"<A><B><!>"
    filters.end(SCOPE, 200, 7)
    assert seen == ["begin outer", "begin inner", "head inner", "head outer", "end inner 200 7", "end outer 200 7"]
    answer = Answer(204)
    assert Filters([Noting("first", seen, responder=answer), Noting("second", seen)]).begin(SCOPE) is answer
    assert seen[-1] == "begin first"


def test_responses_ask_to_close_while_the_server_stops() -> None:
    life = Life()
    filters = Filters([], life)
    headers: list[tuple[bytes, bytes]] = []
    filters.head(SCOPE, 200, headers)
    assert headers == []
    life.stopping = True
    filters.head(SCOPE, 200, headers)
    filters.head(SCOPE, 200, headers)
    assert headers == [(b"connection", b"close")]
    headers.clear()
    filters.head({**SCOPE, "http_version": "2"}, 200, headers)
    assert headers == []


FAULTY = """
import puff_patch
puff_patch.patch_all()
import logging, signal, sys
import gevent, requests
from puff_patch.server import ServerOptions, serve
from puff_patch.server.filters import Answer, Filter

class Faulty(Filter):
    def __init__(self):
        self.sizes = {}
    def begin(self, scope):
        if scope["path"] == "/begin":
            raise LookupError("begin")
        if scope["path"] == "/responder":
            return self.fail
        if scope["path"] == "/wait":
            return self.wait
    def fail(self, exchange):
        raise LookupError("responder")
    def wait(self, exchange):
        body = b"".join(iter(exchange.receive, b""))
        gevent.sleep(0.01)
        exchange.start(201, [(b"content-type", b"text/plain")])
        exchange.send(body)
        exchange.send(b" received")
        exchange.end()
    def head(self, scope, status, headers):
        if scope["path"] == "/head":
            raise LookupError("head")
    def end(self, scope, status, size):
        self.sizes[scope["path"]] = status, size
        raise LookupError("end")

def app(environ, start_response):
    start_response("200 OK", [])
    return [b"whole"]

faulty, answers = Faulty(), {}
def visit():
    for path in ("/begin", "/responder", "/head", "/fine"):
        response = requests.get(f"http://127.0.0.1:{port}{path}", timeout=10)
        answers[path] = response.status_code, response.text
    response = requests.post(f"http://127.0.0.1:{port}/wait", b"what was", timeout=10)
    answers["/wait"] = response.status_code, response.text
    os.kill(os.getpid(), signal.SIGTERM)

import socket
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
logging.basicConfig(stream=sys.stdout, format="%(message)s %(exc_text)s")
gevent.config.print_blocking_reports = False
gevent.get_hub().exception_stream = None
gevent.spawn_later(0.3, visit)
assert serve(app, ServerOptions(port=port, filters=(faulty,))) == 0
assert answers["/begin"] == (500, "Internal Server Error\\n"), answers
assert answers["/responder"][0] == answers["/head"][0] == 500, answers
assert answers["/fine"] == (200, "whole"), answers
assert answers["/wait"] == (201, "what was received"), answers
assert faulty.sizes["/fine"] == (200, 5) and faulty.sizes["/wait"] == (201, 17), faulty.sizes
assert faulty.sizes["/responder"] == (0, 0), faulty.sizes
"""


def test_faulty_filters_end_in_a_500_and_in_the_log() -> None:
    run_python(FAULTY.replace("\\\\n", "\\n"))
