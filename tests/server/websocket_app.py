"""Handlers of WebSockets with a path for each thing that can go wrong, and the process that serves them.

Run by the tests as ``python websocket_app.py JSON``: the JSON object holds the fields of ServerOptions, and
``only`` for WebSockets without a WSGI application beside them.
"""

# ruff: noqa: E402 - everything else is imported patched
from __future__ import annotations

import puff_patch

puff_patch.patch_all()

import contextlib
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import gevent
from gevent.event import Event

from puff_patch.server import Applications, ServerOptions, WebSocket, WebSocketClosed, WebSocketTimeout, serve

HANDLERS: dict[str, Callable[[WebSocket], object]] = {}
running: dict[str, gevent.Greenlet] = {}
ended: dict[str, list[Any]] = {}


def handle(handler: Callable[[WebSocket], object]) -> Callable[[WebSocket], object]:
    """Serve a function under its name, and note how it ended."""

    def run(ws: WebSocket) -> None:
        name = handler.__name__
        running[name] = gevent.getcurrent()
        try:
            handler(ws)
        finally:
            ended.setdefault(name, []).append([ws.close_code, ws.close_reason])

    HANDLERS["/" + handler.__name__] = run
    return handler


@handle
def echo(ws: WebSocket) -> None:
    for message in ws:
        ws.send(message)


def about(ws: WebSocket) -> None:
    ws.send_json(
        {
            "path": ws.path,
            "params": ws.path_params,
            "query": ws.query,
            "query_string": ws.query_string,
            "agent": ws.headers["x-agent"],
            "cookies": ws.cookies,
            "client": ws.client,
            "closed": ws.closed,
        }
    )
    with contextlib.suppress(WebSocketClosed):
        ws.receive()
    with contextlib.suppress(WebSocketClosed):
        ws.send("to nobody")
    assert ws.closed


HANDLERS["/about/{room}/of/{user}"] = about
HANDLERS["/about/this/of/that"] = lambda ws: ws.send("this path itself")


@handle
def choose(ws: WebSocket) -> None:
    with contextlib.suppress(ValueError):
        ws.accept("not offered")
        raise AssertionError
    ws.accept("v1")
    ws.accept()  # once is enough
    ws.send_json([ws.subprotocols, ws.subprotocol])


@handle
def fail(ws: WebSocket) -> None:
    ws.receive()
    raise RuntimeError("a bug in the handler")


@handle
def fail_first(ws: WebSocket) -> None:
    raise RuntimeError("a bug before the handshake")


@handle
def refuse(ws: WebSocket) -> None:
    ws.refuse(401, "who are you?", [("WWW-Authenticate", "Basic")])
    try:
        ws.send("x")
    except WebSocketClosed:
        return
    raise AssertionError("sent")


@handle
def nothing(ws: WebSocket) -> None:
    pass


@handle
def goodbye(ws: WebSocket) -> None:
    for code, reason in ((1005, ""), (999, ""), (5000, ""), (4000, "x" * 124)):
        with contextlib.suppress(ValueError):
            ws.close(code, reason)
            raise AssertionError(code)
    with ws:
        ws.send("the last")
        ws.close(4001, "enough")
        ws.close(4002)  # too late
        ws.send("after the end")


@handle
def patience(ws: WebSocket) -> None:
    try:
        ws.receive(0.05)
    except WebSocketTimeout:
        ws.send("still there")
    ws.send(ws.receive(5))


@handle
def typed(ws: WebSocket) -> None:
    ws.send_json(ws.receive_json())
    ws.send(ws.receive_text())
    ws.send(memoryview(ws.receive_bytes()))  # type: ignore[arg-type]
    for wrong in ("\ud800", 1, None):
        try:
            ws.send(wrong)  # type: ignore[arg-type]
        except (TypeError, UnicodeEncodeError):
            continue
        raise AssertionError(wrong)
    {"json": ws.receive_json, "text": ws.receive_text, "bytes": ws.receive_bytes}[ws.path_params["last"]]()


HANDLERS["/typed/{last}"] = typed


@handle
def all_at_once(ws: WebSocket) -> None:
    # Whoever comes first accepts it; nobody's message is lost meanwhile.
    gevent.joinall([gevent.spawn(ws.send, str(number)) for number in range(5)], raise_error=True)


@handle
def crowd(ws: WebSocket) -> None:
    def work(letter: str) -> None:
        for _ in range(20):
            ws.send(letter * 30_000)

    greenlets = [gevent.spawn(work, letter) for letter in "abcdefgh"]
    for message in ws:
        ws.send(message)
        if message == "end":
            gevent.joinall(greenlets, raise_error=True)
            return


@handle
def two_receivers(ws: WebSocket) -> None:
    ws.accept()
    other = gevent.spawn(ws.receive)
    gevent.sleep(0)
    try:
        ws.receive()
    except RuntimeError as error:
        ws.send(str(error))
    ws.close(4003)
    # Whoever waits hears of it.
    other.join(5)
    ended["other"] = [other.exception.code]  # type: ignore[union-attr]


@handle
def wait(ws: WebSocket) -> None:
    ws.accept()
    gevent.sleep(60)


@handle
def stay(ws: WebSocket) -> None:
    ws.send("here")
    gevent.sleep(60)


@handle
def look_away(ws: WebSocket) -> None:
    left = Event()
    ws.on_close(left.set)
    ws.accept()
    assert left.wait(10)
    again = Event()
    ws.on_close(again.set)
    assert again.wait(10)


@handle
def pour(ws: WebSocket) -> None:
    ws.accept()
    while True:
        ws.send("x" * 65536)


@handle
def try_to_pour(ws: WebSocket) -> None:
    sent = 0
    with contextlib.suppress(WebSocketTimeout):
        while True:
            ws.send(b"x" * 65536, timeout=0)
            gevent.sleep(0.01)
            sent += 1
    ended["tried"] = [sent, ws.closed]


@handle
def backlog(ws: WebSocket) -> None:
    for number in range(3000):
        ws.send(f"{number} " + "x" * (number % 100))
    ws.send("y" * 500_000)
    for number in range(500):
        ws.send(f"{number}")  # none of these waits
    ws.close(4004, "all sent")


@handle
def clean_up(ws: WebSocket) -> None:
    ws.accept()
    try:
        ws.receive()
    except WebSocketClosed as closed:
        gevent.sleep(0.3)
        logging.getLogger("websocket_app").warning("cleaned up after %d: %s", closed.code, closed.reason)


def application(environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
    path = environ["PATH_INFO"]
    if path.startswith("/kill/"):
        running[path.removeprefix("/kill/")].kill(block=False)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"ended": ended, "path": path}).encode()]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    options = json.loads(sys.argv[1])
    wsgi = None if options.pop("only", False) else application
    sys.exit(serve(Applications(wsgi=wsgi, websockets=HANDLERS), ServerOptions(**options)))
