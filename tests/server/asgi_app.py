"""ASGI applications of several frameworks beside a WSGI one, and the process that serves them.

Run by the tests as ``python asgi_app.py JSON``: the JSON object holds the fields of ServerOptions, and under
``only`` the name of an application to serve alone.
"""

# ruff: noqa: E402 - everything else is imported patched
from __future__ import annotations

import puff_patch

puff_patch.patch_all()

import asyncio
import contextlib
import contextvars
import gc
import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import anyio.to_thread
import gevent
from asgiref.sync import async_to_sync, sync_to_async
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from puff_patch.runtime import aio
from puff_patch.server import Applications, ServerError, ServerOptions, serve
from puff_patch.server.filters import Filter

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

seen: dict[str, Any] = {"left": [], "ended": [], "running": 0}
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
RAW: dict[str, Any] = {}


def raw(app: Any) -> Any:
    """Serve a coroutine function ``(scope, receive, send, query)`` below ``/raw``, under its name."""
    RAW["/" + app.__name__] = app
    return app


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: Any, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def answer(send: Send, value: object) -> None:
    await send(start(200, (b"Content-Type", b"application/json")))
    await send(body(json.dumps(value).encode()))


async def whole_body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client left amid its request")
        parts.append(message["body"])
        if not message["more_body"]:
            return b"".join(parts)


@raw
async def show_scope(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    await answer(
        send, {key: value if isinstance(value, (str, int)) else repr(value) for key, value in scope.items()}
    )


@raw
async def show_seen(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await answer(send, {**seen, "tasks": len(others), "variable": variable.get()})


@raw
async def collect(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    gc.collect()
    await answer(send, len(gc.get_objects()))


@raw
async def echo(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    await send(start())
    await send(body(await whole_body(receive)))


@raw
async def digest(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    size, found = 0, hashlib.sha256()
    while True:
        message = await receive()
        size += len(message["body"])
        found.update(message["body"])
        if not message["more_body"]:
            break
    await answer(send, {"size": size, "sha256": found.hexdigest()})


@raw
async def unread(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    await send(start(413))
    await send(body(b"not read"))


@raw
async def stream(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    await send(start(200, (b"content-type", b"application/octet-stream")))
    for _ in range(int(query["parts"])):
        await send(body(b"x" * int(query["size"]), more=True))
    await send(body(b""))


@raw
async def endless(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    """Streams until the client leaves, and listens for nothing."""
    seen["running"] += 1
    try:
        await send(start())
        while True:
            await send(body(b"tick\n", more=True))
            await asyncio.sleep(0.01)
    except OSError as error:
        seen["left"].append(type(error).__name__)
        raise
    finally:
        seen["running"] -= 1


@raw
async def wait_for_leaving(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    await whole_body(receive)
    seen["running"] += 1
    try:
        seen["left"].append((await receive())["type"])
    finally:
        seen["running"] -= 1


@raw
async def nap(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    seen["running"] += 1
    try:
        await asyncio.sleep(float(query["seconds"]))
    except asyncio.CancelledError:
        logging.getLogger("asgi_app").warning("the nap was cancelled")
        raise
    finally:
        seen["running"] -= 1
    await send(start())
    await send(body(b"slept"))


@raw
async def impatient(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    """Gives up receiving again and again, and misses nothing of the body."""
    parts = []
    while True:
        try:
            message = await asyncio.wait_for(receive(), 0.01)
        except asyncio.TimeoutError:
            continue
        parts.append(message["body"])
        if not message["more_body"]:
            break
    await send(start())
    await send(body(b"".join(parts)))


@raw
async def after_the_end(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    listening = asyncio.create_task(whole_body_and_more(receive))
    await asyncio.sleep(0.1)
    await send(start())
    await send(body(b"done"))
    seen["ended"].append([(await listening)["type"], (await receive())["type"]])


async def whole_body_and_more(receive: Receive) -> dict[str, Any]:
    await whole_body(receive)
    return await receive()


@raw
async def messages(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    """Sends what the query holds as a Python expression."""
    for message in eval(query["list"], {"start": start, "body": body}):
        if message == "fail":
            raise ValueError("this was meant to fail")
        await send(message)


@raw
async def pathsend(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    await send(start(200, (b"content-type", query["type"].encode())))
    await send({"type": "http.response.pathsend", "path": __file__})


@raw
async def set_variable(scope: Scope, receive: Receive, send: Send, query: dict[str, str]) -> None:
    variable.set("leaked")
    await answer(send, variable.get())


async def raw_app(scope: Scope, receive: Receive, send: Send) -> None:
    path = scope["path"].rpartition("/raw")[2]
    query = {key: values[0] for key, values in parse_qs(scope["query_string"].decode()).items()}
    await RAW[path](scope, receive, send, query)


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[dict[str, str]]:
    if os.environ.get("FAIL_START"):
        raise RuntimeError("the database is away")
    variable.set("of the lifespan")
    background = asyncio.create_task(asyncio.sleep(3600))
    yield {"made_by": "lifespan"}
    await asyncio.sleep(0)
    logging.getLogger("asgi_app").warning("the lifespan ended with %d running", seen["running"])
    del background  # left to the server


fast = FastAPI()


@fast.get("/async")
async def fast_async(request: Request) -> dict[str, Any]:
    return {"on_loop": aio.in_thread(), "state": request.state.made_by}


@fast.get("/def")
def fast_def() -> dict[str, Any]:
    time.sleep(0.1)
    return {"on_loop": aio.in_thread(), "main_hub": gevent.get_hub().main_hub}


@fast.post("/item")
def fast_item(item: dict[str, Any]) -> dict[str, Any]:
    return {"got": item}


@fast.get("/chain")
async def fast_chain(depth: int = 3) -> dict[str, Any]:
    variable.set("from the endpoint")
    return {"depth": await down(depth), "variable": variable.get()}


async def down(depth: int) -> int:
    if depth == 0:
        await asyncio.to_thread(time.sleep, 0.001)
        await anyio.to_thread.run_sync(time.sleep, 0.001)
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.001)
        return 0
    assert variable.get().startswith("from")
    variable.set("from below")
    return 1 + await sync_to_async(async_to_sync(down))(depth - 1)


@fast.get("/sensitive")
async def fast_sensitive() -> list[Any]:
    """What asgiref calls thread-sensitive: one greenlet a request."""
    variable.set("from the endpoint")
    found = [await sync_to_async(where)() for _ in range(3)]
    return [len(set(found)), await sync_to_async(async_to_sync(down))(1)]


def where() -> int:
    time.sleep(0.05)
    return threading.get_ident()


@fast.get("/fails")
async def fast_fails() -> None:
    await sync_to_async(async_to_sync(failing))()


async def failing() -> None:
    raise LookupError("raised at the bottom")


async def parts() -> AsyncIterator[bytes]:
    try:
        for number in range(1000):
            yield b"%d\n" % number
            await asyncio.sleep(0.001)
    finally:
        seen["ended"].append("parts")


async def streaming(request: Any) -> StreamingResponse:
    return StreamingResponse(parts(), media_type="text/plain")


async def file(request: Any) -> FileResponse:
    return FileResponse(__file__)


async def plain(request: Any) -> PlainTextResponse:
    return PlainTextResponse("plain " * 200)


async def talk(websocket: WebSocket) -> None:
    """Does what the client says."""
    if "refuse" in websocket.query_params:
        await websocket.close()
        return
    if "deny" in websocket.query_params:
        await websocket.send_denial_response(PlainTextResponse("no entry", 401))
        return
    if "fail" in websocket.query_params:
        raise ValueError("before it was accepted")
    await websocket.accept(subprotocol="chat" if "chat" in websocket.scope["subprotocols"] else None)
    seen["running"] += 1
    try:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            if message.get("bytes") is not None:
                await websocket.send_bytes(message["bytes"])
            elif message["text"] == "close":
                await websocket.close(4001, "as you wish")
                return
            elif message["text"] == "fail":
                raise ValueError("this was meant to fail")
            elif message["text"] == "return":
                return
            else:
                await websocket.send_text(message["text"])
    except WebSocketDisconnect as left:
        seen["left"].append(left.code)
    finally:
        seen["running"] -= 1


frameworks = Starlette(
    routes=[
        Mount("/fast", fast),
        Route("/starlette/stream", streaming),
        Route("/starlette/file", file),
        Route("/starlette/plain", plain),
        WebSocketRoute("/talk", talk),
    ],
    lifespan=lifespan,
)


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """What is below ``/raw`` is called by the server itself, all else through Starlette."""
    await (raw_app if "/raw/" in scope.get("path", "") else frameworks)(scope, receive, send)


async def no_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    """As simple as it gets, and as Django's: it knows nothing of lifespan."""
    assert scope["type"] == "http"
    await send(start(200, (b"content-length", b"5")))
    await send(body(b"plain"))


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    time.sleep(0.01)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"wsgi": environ["PATH_INFO"], "on_loop": aio.in_thread()}).encode()]


class Upper:
    """An encoder."""

    def feed(self, data: bytes) -> bytes:
        return data.upper()

    def finish(self) -> bytes:
        return b" END"


class Noting(Filter):
    """Does what the query asks for, and notes the end of each request."""

    def __init__(self) -> None:
        self.ends: deque[Any] = deque(maxlen=200)

    def begin(self, scope: Scope) -> Any:
        scope.setdefault("noted", aio.in_thread())
        if scope["path"] == "/fast/broken_filter":
            raise ValueError("the filter is broken")
        if scope["path"] == "/fast/responder":
            return self.respond
        return None

    def respond(self, exchange: Any) -> None:
        gevent.sleep(0.01)
        exchange.respond(200, [(b"content-type", b"application/json")], json.dumps(list(self.ends)).encode())

    def head(self, scope: Scope, status: int, headers: list[tuple[bytes, bytes]]) -> Upper | None:
        headers.append((b"x-filter", b"seen"))
        if b"upper" not in scope["query_string"]:
            return None
        headers[:] = [header for header in headers if header[0] != b"content-length"]
        return Upper()

    def end(self, scope: Scope, status: int, size: int) -> None:
        self.ends.append([scope["path"], status, size])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    options = json.loads(sys.argv[1])
    only = options.pop("only", None)
    if options.pop("with_filter", False):
        options["filters"] = (Noting(),)
    if only is None:
        apps = Applications(wsgi=wsgi, asgi=application, asgi_paths=("/raw", "/fast", "/starlette", "/talk"))
    else:
        apps = Applications(asgi=globals()[only])
    try:
        code = serve(apps, ServerOptions(**options, on_stop=(lambda: print("on_stop", file=sys.stderr),)))
    except ServerError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)
