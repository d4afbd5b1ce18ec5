"""ASGI on the front: its requests, run through an ASGI application on the asyncio thread.

See https://asgi.readthedocs.io/en/latest/specs/www.html and, for start and stop, .../specs/lifespan.html.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from puff_patch.server.admission import Refusal
from puff_patch.server.apps import Applications, ASGIApplication
from puff_patch.server.exchange import ClientDisconnected, Exchange
from puff_patch.server.exchange_async import AsyncExchange, AsyncWebSocket
from puff_patch.server.filters import Answer
from puff_patch.server.front import AsyncioSide
from puff_patch.server.headers import CLOSE, ERROR_BODY, HOP_BY_HOP
from puff_patch.server.options import ServerError

if TYPE_CHECKING:
    from puff_patch.server.filters import Filters, Responder

Message = MutableMapping[str, Any]

logger = logging.getLogger("puff_patch.server")

# 2.4: send() raises an OSError once the client is gone, so nobody needs a task that listens for that.
_VERSIONS = {"version": "3.0", "spec_version": "2.4"}
_LIFESPAN_VERSIONS = {"version": "3.0", "spec_version": "2.0"}

# As for WSGI: what is longer goes in pieces, as the client takes them.
_WHOLE_BODY = 1024 * 1024
_PIECE = 64 * 1024

_NOTHING_SENT, _PART_SENT, _WHOLE_SENT = "nothing sent", "part sent", "whole sent"

# RFC 6455, 7.4: to a WebSocket that is open when the server stops, and when its application failed.
_SERVICE_RESTART, _INTERNAL_ERROR = 1012, 1011


class ASGIHandler:
    """Runs an ASGI application for the front's requests, each in a task of the asyncio thread.

    Args:
        apps: the applications; ``apps.asgi`` must be there.
        loop: the event loop of the asyncio thread.
        answer: has a responder of a filter run on a greenlet; called in the event loop.
        filters: what every request goes through.
        check: says how a request is to be refused, None if it is not.
        count: called with nothing for each request; None for nobody.
        max_websockets: how many WebSockets are open at a time; further ones are refused with 503.
        is_others: whether a WebSocket of this scope has a handler on a greenlet; asked in the front's thread.
        root_path: the path below which a proxy has mounted the application.

    Attributes:
        closing: set it to have every further HTTP/1 response ask the client to close its connection.
        http1_begun: how many requests of HTTP/1 have begun so far.
        lifespan: the application's start and stop.
    """

    def __init__(
        self,
        apps: Applications,
        loop: Any,
        *,
        answer: Callable[[Responder, Exchange], object],
        filters: Filters | None,
        check: Callable[[dict[str, Any]], Refusal | None],
        count: Callable[[], object] | None = None,
        max_websockets: int = 10000,
        is_others: Callable[[dict[str, Any]], bool],
        root_path: str = "",
    ) -> None:
        assert apps.asgi is not None
        self.app = apps.asgi
        self.lifespan = Lifespan(apps.asgi)
        self.closing = False
        self.http1_begun = 0
        self._http1_ended = 0
        self._loop = loop
        self._answer = answer
        self._filters = filters
        self._check = check
        self._count = count
        self._max_websockets = max_websockets
        self._is_others = is_others
        self._root_path = root_path
        self._raw_root_path = root_path.encode()
        self._alone = apps.wsgi is None
        self._paths = frozenset(apps.asgi_paths)
        self._below = tuple(path.rstrip("/") + "/" for path in apps.asgi_paths)
        # asyncio itself keeps no task alive.
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: set[_Socket] = set()

    @property
    def side(self) -> AsyncioSide:
        """What the front needs to know."""
        return AsyncioSide(self._loop, self.takes, self._begin_request, self._begin_websocket)

    @property
    def http1_running(self) -> int:
        """How many requests of HTTP/1 are running."""
        return self.http1_begun - self._http1_ended

    @property
    def running(self) -> int:
        """How many requests and WebSockets are running."""
        return len(self._tasks)

    @property
    def websockets_running(self) -> int:
        """How many WebSockets are open."""
        return len(self._sockets)

    @property
    def requests_running(self) -> int:
        """How many requests are running."""
        return max(0, len(self._tasks) - len(self._sockets))

    def takes(self, scope: dict[str, Any]) -> bool:
        """Whether a request is for this application; called in a thread of the front's, of which there is one."""
        path = scope["path"]
        if scope["type"] == "websocket":
            return not self._is_others(scope)
        if not (self._alone or path in self._paths or path.startswith(self._below)):
            return False
        if scope["http_version"] != "2":
            self.http1_begun += 1
        return True

    async def close_websockets(self) -> None:
        """Tell the open WebSockets that the server stops."""
        await asyncio.gather(*(socket.close(_SERVICE_RESTART) for socket in list(self._sockets)))

    async def cancel(self) -> int:
        """Cancel what is running; return how many requests that were."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks)

    def _begin_request(self, exchange: AsyncExchange) -> None:
        scope = exchange.scope
        if self._count is not None:
            self._count()
        responder = None if self._filters is None else self._filters.begin(scope)
        if isinstance(responder, Answer) and responder.urgent:
            responder(exchange)
            self._end(exchange)
        elif (refused := self._check(scope)) is not None:
            self._start(self._refuse(exchange, refused))
        elif responder is not None:
            self._answer(responder, exchange.for_greenlet())
            self._end_request(scope)
        else:
            self._start(_Request(self, exchange).run())

    async def _refuse(self, exchange: AsyncExchange, refused: Refusal) -> None:
        """Answer a request at once that is not let in; from then on it does not count."""
        status, headers, body = refused
        if self.closing and exchange.scope["http_version"] != "2":
            headers.append(CLOSE)
        try:
            exchange.respond(status, headers, body)
            exchange.forget()
            await exchange.discard_rest()
        finally:
            self._end(exchange)

    def _end(self, exchange: AsyncExchange) -> None:
        exchange.release()
        self._end_request(exchange.scope)

    def _begin_websocket(self, websocket: AsyncWebSocket) -> None:
        socket = _Socket(self, websocket)
        if len(self._sockets) >= self._max_websockets:
            self._start(socket.refuse())
            return
        self._sockets.add(socket)
        self._start(socket.run())

    def _start(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end_request(self, scope: dict[str, Any]) -> None:
        if scope["http_version"] != "2":
            self._http1_ended += 1

    def _scope(self, scope: dict[str, Any]) -> dict[str, Any]:
        """The scope as the specification has it, a copy: what the application does to it is its own affair."""
        host, port = scope["client"]
        server_host, server_port = scope["server"]
        mine = {
            **scope,
            "asgi": _VERSIONS,
            # Of a Unix socket there is neither.
            "client": (host, int(port)) if host else None,
            "server": (server_host, int(server_port)) if server_host else None,
            "root_path": self._root_path,
            # Each request has its own copy, of what the lifespan has put there.
            "state": self.lifespan.state.copy(),
        }
        if self._root_path:
            mine["path"] = self._root_path + mine["path"]
            mine["raw_path"] = self._raw_root_path + mine["raw_path"]
        if mine["http_version"] == "1":
            mine["http_version"] = "1.0"
        return mine


class _Request:
    """One HTTP request and the application's response."""

    __slots__ = (
        "_bodyless",
        "_exchange",
        "_handler",
        "_head",
        "_headers",
        "_left",
        "_state",
        "_status",
        "_swallow",
    )

    def __init__(self, handler: ASGIHandler, exchange: AsyncExchange) -> None:
        self._handler = handler
        self._exchange = exchange
        self._head = exchange.scope["method"] == "HEAD"
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._left = -1  # bytes of the body still to come, -1 if that is not known
        self._bodyless = False
        self._swallow = False
        self._state = _NOTHING_SENT

    async def run(self) -> None:
        """Run the request to its end. Nothing but cancellation comes out of it."""
        handler, exchange = self._handler, self._exchange
        scope = exchange.scope
        context = _enter_thread_sensitive_context()
        try:
            await handler.app(handler._scope(scope), self._receive, self._send)
            if self._state is not _WHOLE_SENT or self._swallow:
                self._fail_incomplete()
            elif scope["method"] not in ("GET", "HEAD"):
                await exchange.discard_rest()
        except asyncio.CancelledError:
            # The server stops, or the application has cancelled its own task.
            if self._state is not _WHOLE_SENT:
                exchange.abort()
            raise
        except BaseException as error:  # noqa: BLE001 - logged with its traceback; one request must not end the server
            self._fail(error)
        finally:
            handler._end(exchange)
            await _leave_thread_sensitive_context(context)

    async def _receive(self) -> dict[str, Any]:
        if self._state is _WHOLE_SENT:
            return {"type": "http.disconnect"}
        return await self._exchange.receive_message()

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self._begin(message)
        elif kind == "http.response.body":
            await self._send_body(message.get("body", b""), bool(message.get("more_body", False)))
        elif kind == "http.response.pathsend":
            await self._send_file(message["path"])
        else:
            raise RuntimeError(f"an ASGI application cannot send {kind!r} in answer to a request")

    def _begin(self, message: Message) -> None:
        if self._status:
            raise RuntimeError("'http.response.start' was sent a second time")
        status = message["status"]
        if not isinstance(status, int) or not 200 <= status <= 999:
            raise ValueError(f"not a status that an application can send: {status!r}")
        http1 = self._exchange.scope["http_version"] != "2"
        last = self._handler.closing and http1
        wire: list[tuple[bytes, bytes]] = []
        left = -1
        for name, value in message.get("headers", ()):
            if not (isinstance(name, bytes) and isinstance(value, bytes)):
                raise TypeError(f"a header's name and value must be bytes, unlike {name!r}: {value!r}")
            lower = name.lower()
            if lower in HOP_BY_HOP:
                last = last or (http1 and lower == b"connection" and value.lower() == b"close")
            elif lower == b"content-length":
                if not value.isdigit():
                    raise ValueError(f"not a Content-Length: {value!r}")
                if left >= 0 and left != int(value):
                    raise ValueError(f"two different values of Content-Length: {left} and {int(value)}")
                left = int(value)
            else:
                wire.append((lower, value))
        if left >= 0 and status != 204:
            wire.append((b"content-length", b"%d" % left))
        if last:
            wire.append(CLOSE)
        self._bodyless = self._head or status in (204, 304)
        self._status = int(status)
        self._headers = wire
        self._left = left

    async def _send_body(self, body: bytes, more: bool) -> None:
        if type(body) is not bytes:
            if not isinstance(body, (bytes, bytearray, memoryview)):
                raise TypeError(f"an ASGI application must send bytes as its body, not {type(body).__name__}")
            body = bytes(body)
        exchange = self._exchange
        if self._state is _WHOLE_SENT:
            if not self._swallow:
                raise RuntimeError("'http.response.body' was sent after the response was complete")
            self._swallow = more
            return
        if not self._status:
            raise RuntimeError("'http.response.body' was sent before 'http.response.start'")
        if exchange.client_gone:
            raise ClientDisconnected("the client closed the connection")
        size = len(body)
        if self._bodyless:
            if self._head and not more and self._left < 0 and size:
                self._headers.append((b"content-length", b"%d" % size))
            self._respond(b"")
            self._swallow = more
            return
        if self._left >= 0:
            if size > self._left:
                raise ValueError(
                    f"the body is longer than its Content-Length, by {size - self._left} bytes or more"
                )
            self._left -= size
            if not more and self._left:
                raise ValueError(f"the body is {self._left} bytes shorter than its Content-Length")
        if not more and self._state is _NOTHING_SENT and size <= _WHOLE_BODY:
            self._respond(body)
            return
        begun = self._state is _PART_SENT
        if not begun:
            exchange.start(self._status, self._headers)
            self._state = _PART_SENT
        # The first part goes even if it is empty: the head goes with it.
        if size or not begun:
            for at in range(0, size or 1, _PIECE):
                await exchange.send_part(body if size <= _PIECE else body[at : at + _PIECE])
        if not more:
            exchange.end()
            self._complete()

    async def _send_file(self, path: str) -> None:
        if not self._status or self._state is not _NOTHING_SENT:
            raise RuntimeError("'http.response.pathsend' must be sent once, after 'http.response.start'")
        size = os.stat(path).st_size
        if self._bodyless:
            if self._head and self._left < 0:
                self._headers.append((b"content-length", b"%d" % size))
            self._respond(b"")
            return
        if self._left not in (-1, size):
            raise ValueError(f"{path} has {size} bytes, and the Content-Length says {self._left}")
        self._exchange.start(self._status, self._headers)
        self._state = _PART_SENT
        await self._exchange.send_file(path)
        self._complete()

    def _respond(self, body: bytes) -> None:
        self._exchange.respond(self._status, self._headers, body)
        self._complete()

    def _complete(self) -> None:
        self._state = _WHOLE_SENT
        self._exchange.finish()

    def _fail(self, error: BaseException) -> None:
        """Log the exception being handled; answer with a 500, or cut the connection where it is too late."""
        scope, exchange = self._exchange.scope, self._exchange
        method, path = scope["method"], scope["path"]
        if exchange.refused or _is_for_want_of_client(error):
            if self._state is not _WHOLE_SENT:
                exchange.abort()
            logger.debug("The client left during %s %s, or sent too much", method, path)
        elif self._state is _WHOLE_SENT:
            logger.error("%s %s failed after its response was sent", method, path, exc_info=error)
        elif self._state is _PART_SENT:
            logger.error("%s %s failed amid its response, which was cut", method, path, exc_info=error)
            exchange.abort()
        else:
            logger.error("%s %s failed", method, path, exc_info=error)
            self._answer_500()

    def _fail_incomplete(self) -> None:
        """The application has returned without a whole response."""
        scope = self._exchange.scope
        if self._exchange.client_gone or self._exchange.refused:
            self._exchange.abort()
        elif self._state is _NOTHING_SENT:
            logger.error(
                "%s %s failed: the ASGI application returned without a response", scope["method"], scope["path"]
            )
            self._answer_500()
        elif not self._swallow:
            logger.error(
                "%s %s failed amid its response, which was cut: the ASGI application returned without its end",
                *(scope["method"], scope["path"]),
            )
            self._exchange.abort()

    def _answer_500(self) -> None:
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(ERROR_BODY))]
        if self._handler.closing and self._exchange.scope["http_version"] != "2":
            headers.append(CLOSE)
        self._status, self._headers = 500, headers
        self._respond(b"" if self._head else ERROR_BODY)


class _Socket:
    """One WebSocket and the application that has it."""

    __slots__ = ("_accepted", "_denial", "_handler", "_over", "_websocket")

    def __init__(self, handler: ASGIHandler, websocket: AsyncWebSocket) -> None:
        self._handler = handler
        self._websocket = websocket
        self._accepted = False
        self._over = False
        self._denial: dict[str, Any] | None = None

    async def run(self) -> None:
        """Run the application to its end."""
        handler, websocket = self._handler, self._websocket
        scope = websocket.scope
        context = _enter_thread_sensitive_context()
        try:
            await handler.app(handler._scope(scope), self._receive, self._send)
        except asyncio.CancelledError:
            await websocket.close(_SERVICE_RESTART)
            raise
        except BaseException as error:
            if _is_for_want_of_client(error):
                logger.debug("The client left the WebSocket %s", scope["path"])
            else:
                logger.error("The WebSocket %s failed", scope["path"], exc_info=error)
                await self._fail()
        finally:
            handler._sockets.discard(self)
            if self._accepted:
                # Also if it is being closed already: letting go of it would be faster than the code of that.
                await websocket.close(1000)
            websocket.release()
            await _leave_thread_sensitive_context(context)

    async def refuse(self) -> None:
        """Answer the handshake with 503."""
        try:
            await self._deny({"type": "websocket.http.response.start", "status": 503, "body": b""})
        finally:
            self._websocket.release()

    async def close(self, code: int) -> None:
        """Close it from without; the application receives ``websocket.disconnect``."""
        if self._accepted:
            await self._websocket.close(code)
        else:
            self._websocket.end(code)

    async def _receive(self) -> dict[str, Any]:
        return await self._websocket.receive()

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.send":
            if not self._accepted:
                raise RuntimeError("'websocket.send' was sent before 'websocket.accept'")
            text, data = message.get("text"), message.get("bytes")
            if data is not None and text is None:
                await self._websocket.send({"type": kind, "bytes": bytes(data)})
            elif text is not None and data is None:
                await self._websocket.send({"type": kind, "text": text})
            else:
                raise ValueError("'websocket.send' needs either text or bytes")
        elif kind == "websocket.accept":
            if self._accepted or self._over:
                raise RuntimeError("'websocket.accept' was sent a second time, or after a refusal")
            if any(name.lower() != b"sec-websocket-protocol" for name, _ in message.get("headers", ())):
                logger.warning("Headers of 'websocket.accept' are not sent: the HTTP front has no place for them")
            await self._websocket.send({"type": kind, "subprotocol": message.get("subprotocol")})
            self._accepted = True
        elif kind == "websocket.close":
            code = message.get("code", 1000)
            self._over = True
            if self._accepted:
                await self._websocket.close(1000 if code is None else code, message.get("reason") or "")
            else:
                self._websocket.end(1006)  # refused with a 403 when the application returns
        elif kind == "websocket.http.response.start" and not (self._accepted or self._over):
            self._over = True
            self._denial = {**message, "body": b""}
        elif kind == "websocket.http.response.body" and self._denial is not None:
            self._denial["body"] += message.get("body", b"")
            if not message.get("more_body", False):
                await self._deny(self._denial)
        else:
            raise RuntimeError(f"an ASGI application cannot send {kind!r} now to a WebSocket")

    async def _deny(self, denial: dict[str, Any]) -> None:
        body = denial.pop("body")
        self._denial = None
        await self._websocket.send({**denial, "headers": list(denial.get("headers", ()))})
        await self._websocket.send({"type": "websocket.http.response.body", "body": body})
        self._websocket.end(1006)

    async def _fail(self) -> None:
        if self._accepted:
            await self._websocket.close(_INTERNAL_ERROR)
        elif not self._over:
            start = {"type": "websocket.http.response.start", "status": 500}
            await self._deny({**start, "headers": [(b"content-type", b"text/plain")], "body": ERROR_BODY})


class Lifespan:
    """The start and the stop of an ASGI application; use it in the event loop.

    Attributes:
        state: what the application has put into its state.
    """

    def __init__(self, app: ASGIApplication) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._task: asyncio.Task[None] | None = None
        self._messages: asyncio.Queue[dict[str, Any]] | None = None
        self._started: asyncio.Future[str | None] | None = None
        self._stopped: asyncio.Future[str | None] | None = None

    async def start(self) -> None:
        """Have the application start, if it takes part in lifespan at all.

        Raises:
            ServerError: it failed to.
        """
        loop = asyncio.get_running_loop()
        self._messages = asyncio.Queue()
        self._started, self._stopped = loop.create_future(), loop.create_future()
        self._messages.put_nowait({"type": "lifespan.startup"})
        self._task = loop.create_task(self._run())
        try:
            failure = await self._started
        except asyncio.CancelledError:
            self._task.cancel()
            raise
        if failure is not None:
            raise ServerError(f"The ASGI application failed to start: {failure}")

    async def stop(self) -> None:
        """Have it stop, if it has started."""
        if self._task is None or self._task.done() or self._messages is None or self._stopped is None:
            return
        self._messages.put_nowait({"type": "lifespan.shutdown"})
        failure = await self._stopped
        if failure is not None:
            logger.error("The ASGI application failed to stop: %s", failure)

    async def _run(self) -> None:
        assert self._messages is not None
        assert self._started is not None
        assert self._stopped is not None
        scope = {"type": "lifespan", "asgi": _LIFESPAN_VERSIONS, "state": self.state}
        started, stopped = self._started, self._stopped
        try:
            await self._app(scope, self._messages.get, self._send)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if not started.done():
                logger.debug("The ASGI application takes no part in lifespan: it raised %r", error)
            elif not stopped.done() and started.result() is None:
                logger.error("The lifespan of the ASGI application failed", exc_info=error)
        finally:
            for future in (started, stopped):
                if not future.done():
                    future.set_result(None)

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        stage, _, outcome = kind.removeprefix("lifespan.").partition(".")
        future = {"startup": self._started, "shutdown": self._stopped}.get(stage)
        if future is None or outcome not in ("complete", "failed"):
            raise RuntimeError(f"an ASGI application cannot send {kind!r} in its lifespan")
        if future.done():
            raise RuntimeError(f"{kind!r} was sent when the lifespan's {stage} was over")
        failed = outcome == "failed"
        future.set_result((message.get("message") or "it gave no reason").strip() if failed else None)


def _enter_thread_sensitive_context() -> Any:
    """Have the sync code of this task run on a greenlet of its own, and not on the one of all requests.

    It is what asgiref's ``ThreadSensitiveContext`` is for, and what Django does; here for every application.

    Returns:
        What `_leave_thread_sensitive_context` wants; None if the program does not use asgiref.
    """
    sync = sys.modules.get("asgiref.sync")
    if sync is None:
        return None
    context = sync.ThreadSensitiveContext()
    context.token = sync.SyncToAsync.thread_sensitive_context.set(context)
    return context


async def _leave_thread_sensitive_context(context: Any) -> None:
    if context is not None and context in sys.modules["asgiref.sync"].SyncToAsync.context_to_thread_executor:
        await context.__aexit__(None, None, None)


def _is_for_want_of_client(error: BaseException | None) -> bool:
    """Whether an exception comes of a client that left, maybe by way of a framework's own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, ClientDisconnected):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
