"""The seam to Granian, the HTTP front written in Rust. No other module touches Granian.

Granian parses HTTP on its own threads and calls a ``CallbackScheduler`` for each request. It expects asyncio
behind it; here a hub stands there instead: the request goes through the hub's mailbox, and what Granian
wants an event loop for are only ``call_soon`` and ``call_soon_threadsafe``. The ASGI seam is used, and not
RSGI or WSGI, because only it streams with backpressure in both directions.

A request for an ASGI application goes from Granian's thread straight to the loop of the asyncio thread, and so do
the futures awaited there: see `AsyncioSide` and `_Loop`.

All of this is internal to Granian, so the version is checked and ``tests/server/test_front.py`` holds the
contract. Message formats: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import importlib
import logging
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import gevent
from gevent import get_hub
from gevent.event import Event
from gevent.hub import Waiter

from puff_patch.runtime import Mailbox
from puff_patch.server.connections import is_connected, reset_all
from puff_patch.server.filters import Encoder, Filters
from puff_patch.server.listener import Listener
from puff_patch.server.options import ServerError

TESTED_VERSIONS = ((2, 8, 7), (2, 9))
"""Granian from the first version on, below the second. Before 2.8.7 a response that failed midway looked whole."""

logger = logging.getLogger("puff_patch.server")

# Sends in a row that did not wait, after which other greenlets get a turn.
_SENDS_PER_TURN = 16
# Bytes of a request body kept while nobody reads it and we only watch for the client leaving.
_LOOKAHEAD = 256 * 1024
_PEER_CHECK_SECONDS = 1.0
# How much of a request body that the application did not want is taken from the client all the same.
_DISCARD_BYTES = 32 * 1024 * 1024
_DISCARD_SECONDS = 5.0


# Seconds after which one begins to listen for the client leaving: most requests are over by then, and a question
# to the front costs more than a timer.
_LISTEN_AFTER = 0.05
_FILE_PIECE = 256 * 1024


class ClientDisconnected(ConnectionError):
    """The client closed the connection before the request or its response was complete."""


def check_version() -> str:
    """Return Granian's version.

    Raises:
        ServerError: it is not installed, or not of the range this seam is tested with.
    """
    low, high = TESTED_VERSIONS
    wanted = f"granian>={'.'.join(map(str, low))},<{'.'.join(map(str, high))}"
    try:
        version = metadata.version("granian")
    except metadata.PackageNotFoundError:
        raise ServerError(f"puff_patch's server needs Granian: pip install '{wanted}'") from None
    numbers = re.match(r"(\d+)\.(\d+)\.?(\d+)?", version)
    found = tuple(int(number or 0) for number in numbers.groups()) if numbers else ()
    if not low <= found < high:
        raise ServerError(
            f"puff_patch's server is tested with {wanted}, and Granian {version} is installed: "
            f"pip install '{wanted}'"
        )
    return version


@dataclass(frozen=True)
class AsyncioSide:
    """Where the requests of an ASGI application go.

    Args:
        loop: the event loop they run on.
        takes: called with a scope in a thread of Granian's: whether this side takes it. It must be quick, and use
            no lock, for those are patched.
        on_request: called in the loop with each request that is taken; it must not block.
        on_websocket: the same for WebSockets.
    """

    loop: Any
    takes: Callable[[dict[str, Any]], bool]
    on_request: Callable[[AsyncExchange], object]
    on_websocket: Callable[[AsyncWebSocket], object]


class Front:
    """Granian serving HTTP on a listener, in threads of its own, for the hub of the calling thread.

    Args:
        listener: the listening socket; the front accepts on a duplicate, so closing it stays with the caller.
        on_request: called in the hub with each request; it must not block.
        http: ``"1"``, ``"2"`` or ``"auto"``.
        max_connections: connections open at a time; further ones are not accepted until one closes.
        client_timeout: seconds that a client may leave a request waiting for it.
        filters: what every response goes through.
        asgi: the side of the ASGI application, if there is one.

    Raises:
        ServerError: Granian is missing or of an untested version.
    """

    def __init__(
        self,
        listener: Listener,
        on_request: Callable[[Exchange], object],
        *,
        http: str = "auto",
        max_connections: int = 16384,
        client_timeout: float = 60.0,
        filters: Filters | None = None,
        asgi: AsyncioSide | None = None,
    ) -> None:
        version = check_version()
        try:
            granian: Any = importlib.import_module("granian._granian")
            settings: Any = importlib.import_module("granian.http")
            self._signal = granian.WorkerSignal()
            scheduler_type, worker_type = granian.CallbackScheduler, granian.ASGIWorker
            holder_type = granian.SocketHolder
        except (ImportError, AttributeError) as exc:
            raise ServerError(f"Granian {version} is installed, but its seam is not as tested: {exc}") from exc

        self._mailbox = mailbox = Mailbox.current()
        self._loop = _Loop(mailbox)
        self._end: int | str = listener.path or listener.address[1]
        self._on_request = on_request
        self._client_timeout = client_timeout
        self._filters = filters
        self._asgi = asgi
        self._stopped = Event()
        self._signal.add_cb(lambda: mailbox.post(self._stopped.set))

        accept = self._accept
        post = mailbox.post

        def schedule(watcher: Any) -> None:
            # In a thread of Granian's, which ignores what this returns and cannot take an exception.
            post(accept, watcher)

        # The arguments after the loop serve asyncio tasks, which there are none of.
        self._scheduler = scheduler_type(self._loop, None, None, None, None)
        self._scheduler._schedule_fn = schedule if asgi is None else self._schedule_on_either(asgi, schedule)
        self._worker = worker_type(
            1,  # worker_id
            (None, holder_type(listener.dup_fd(), listener.path is not None, listener.backlog)),
            None,  # ipc
            1,  # threads
            512,  # blocking_threads
            1,  # py_threads
            30,  # py_threads_idle_timeout
            max_connections,  # backpressure
            http,
            None if http == "2" else settings.HTTP1Settings(),
            None if http == "1" else settings.HTTP2Settings(),
            asgi is not None,  # websockets
            None,  # static files
            *(False, None, None, None, "1.3", None, [], False),  # TLS
            (None, None),  # metrics
        )
        self._serve = getattr(self._worker, "serve_mtr" if listener.path is None else "serve_mtr_uds")

    def start(self) -> None:
        """Begin to accept connections."""
        _redirect_log(self._mailbox)
        self._serve(self._scheduler, self._loop, self._signal)

    def stop(self) -> None:
        """Accept no more, close idle connections, let the others finish their request. Returns at once."""
        self._signal.set()

    def wait_stopped(self, timeout: float | None = None) -> bool:
        """Wait until every connection is closed and Granian's threads have ended, after :meth:`stop`.

        Args:
            timeout: seconds to wait at most; None waits for good.

        Returns:
            False if the time ran out.
        """
        return bool(self._stopped.wait(timeout))

    def reset_connections(self) -> int:
        """Reset every client's connection, whatever it is doing.

        Returns:
            How many there were.
        """
        return reset_all(self._end)

    def _schedule_on_either(self, asgi: AsyncioSide, to_hub: Callable[[Any], None]) -> Callable[[Any], None]:
        """What Granian calls where there is an ASGI application, maybe beside a WSGI one."""
        takes, call_soon, accept = asgi.takes, asgi.loop.call_soon_threadsafe, self._accept_on_loop
        # Each task copies it: the context of whoever made the server, and not of Granian's thread.
        context = contextvars.copy_context()

        def schedule(watcher: Any) -> None:
            try:
                if takes(watcher.scope):
                    call_soon(accept, watcher, context=context)
                else:
                    to_hub(watcher)
            except RuntimeError:
                # The loop is closed, at the very end of a server.
                watcher.done()

        return schedule

    def _accept_on_loop(self, watcher: Any) -> None:
        asgi = self._asgi
        assert asgi is not None
        if watcher.scope["type"] == "websocket":
            asgi.on_websocket(AsyncWebSocket(watcher, asgi.loop, self._client_timeout))
        else:
            asgi.on_request(AsyncExchange(watcher, asgi.loop, self._client_timeout, self._filters))

    def _accept(self, watcher: Any) -> None:
        if watcher.scope["type"] == "websocket":
            watcher.done()  # nobody's: refused with a 403
            return
        self._on_request(Exchange(watcher, self._client_timeout, self._filters))


class _Loop:
    """The two methods Granian uses of an asyncio event loop.

    Granian passes on the ``context`` that came with a callback and makes nothing of it. Whoever waits elsewhere
    than in the hub gives as the context what is to be called instead: the ``call_soon_threadsafe`` of its loop.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._run_callback = get_hub().loop.run_callback

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> None:
        """Called in the thread that gave the callback, if what it is for is done already."""
        if context is None:
            self._run_callback(callback, *args)
        else:
            context(callback, *args)

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Any = None) -> None:
        """Called in a thread of Granian's."""
        if context is None:
            self._mailbox.post(callback, *args)
        else:
            with contextlib.suppress(RuntimeError):  # that loop is closed, and nobody waits there
                context(callback, *args)


class Exchange:
    """One request and its response.

    The methods that wait do so cooperatively: call them in a greenlet, not in the hub.

    Attributes:
        scope: the ASGI connection scope.
    """

    __slots__ = ("_encoder", "_filters", "_inbound", "_proto", "_timeout", "_unwaited", "_watcher", "scope")

    def __init__(self, watcher: Any, timeout: float, filters: Filters | None = None) -> None:
        self._watcher = watcher
        self._filters = filters
        self._encoder: Encoder | None = None
        self._proto = watcher.proto
        self._timeout = timeout
        self._inbound: _Inbound | None = None
        self._unwaited = 0
        self.scope: dict[str, Any] = watcher.scope

    def respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a whole response. Never waits.

        Args:
            status: the status code, 200 to 999.
            headers: names in lower case and values. Without a content-length, the body's length is sent.
            body: the whole body.

        Raises:
            ValueError: a header is malformed; then nothing was sent.
        """
        send = self._proto.send
        self._start(status, headers)
        if self._encoder is not None:
            body = self._encoder.feed(body) + self._encoder.finish()
        send({"type": "http.response.body", "body": body, "more_body": False})

    def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin a response whose body follows in :meth:`send`, and watch for the client leaving.

        The head goes out with the first part of the body.

        Raises:
            ValueError: a header is malformed; then nothing was sent.
        """
        self._start(status, headers)
        self.inbound.watch()

    def send(self, data: bytes) -> None:
        """Send a part of the body, and wait while the client is slower than we are.

        Raises:
            ClientDisconnected: the client is gone.
        """
        inbound = self.inbound
        if inbound.client_gone:
            raise ClientDisconnected("the client closed the connection")
        if self._encoder is not None:
            data = self._encoder.feed(data)
            if not data:
                return
        pending = next(self._proto.send({"type": "http.response.body", "body": data, "more_body": True}), None)
        if pending is not None:
            self._unwaited = 0
            _wait(pending, self._timeout)
        else:
            self._unwaited += 1
            if self._unwaited >= _SENDS_PER_TURN:
                self._unwaited = 0
                gevent.sleep(0)
        inbound.check_peer()
        if inbound.client_gone:
            raise ClientDisconnected("the client closed the connection")

    def end(self) -> None:
        """End the body begun with :meth:`start`."""
        last = b"" if self._encoder is None else self._encoder.finish()
        self._proto.send({"type": "http.response.body", "body": last, "more_body": False})
        self.inbound.unwatch()

    def receive(self) -> bytes:
        """Return the next part of the request body, b"" at its end.

        Raises:
            ClientDisconnected: the client is gone before the end, or the request is over.
        """
        if self._proto is None:
            raise ClientDisconnected("the request is over: its body cannot be read any more")
        return self.inbound.receive()

    def discard_request(self) -> None:
        """Read and forget what is left of the request body, within limits, after the response was sent.

        A client that is still sending would otherwise be reset, and many then never read the response.
        """
        left = _DISCARD_BYTES
        limit = gevent.Timeout(_DISCARD_SECONDS)
        try:
            with limit, contextlib.suppress(ClientDisconnected):
                while left > 0 and (part := self.receive()):
                    left -= len(part)
        except gevent.Timeout as expired:
            if expired is not limit:
                raise

    def release(self) -> None:
        """Let go of the connection: the last thing done with a request.

        Applications keep their request in reference cycles (Django does); until the garbage collector comes, that
        would keep the connection of a request whose body was not read, even if its client is long gone.
        """
        if self._inbound is not None:
            self._inbound.release()
        self._proto = self._watcher = None

    def abort(self) -> None:
        """Give up: a 500 if nothing was sent, else a cut that no client can take for a whole response.

        Over HTTP/1 the connection is cut, over HTTP/2 the stream is reset.
        """
        if self.scope["http_version"] == "1" and self.scope["client"][0]:
            # Of HTTP/1.0 (nginx speaks it to its upstreams), where a body may just end with the connection.
            is_connected(self.scope["client"], reset=True)
        self.inbound.unwatch()
        self._watcher.done()

    @property
    def inbound(self) -> _Inbound:
        """The receiving side, made when first needed: most requests have no body."""
        inbound = self._inbound
        if inbound is None:
            inbound = self._inbound = _Inbound(self._proto, self.scope["client"], self._timeout)
        return inbound

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self._filters is not None:
            self._encoder = self._filters.head(self.scope, status, headers)
        try:
            self._proto.send({"type": "http.response.start", "status": status, "headers": headers})
        except RuntimeError as exc:
            raise ValueError(f"the response has a malformed header: {_malformed(headers) or exc}") from None


class AsyncExchange(Exchange):
    """The same for the asyncio thread: call it in the event loop.

    Attributes:
        broken: a part of the response was lost, so it cannot be completed.
    """

    __slots__ = ("_loop", "broken", "streams_at_once")

    _inbound: _AsyncInbound | None

    def __init__(self, watcher: Any, loop: Any, timeout: float, filters: Filters | None = None) -> None:
        super().__init__(watcher, timeout, filters)
        self._loop = loop
        self.broken = False
        self.streams_at_once = False

    def for_greenlet(self) -> Exchange:
        """The same request for a greenlet; this one must not be used any more."""
        return Exchange(self._watcher, self._timeout, self._filters)

    async def receive_message(self) -> dict[str, Any]:
        """The next ``http.request`` or ``http.disconnect``; nothing is lost if the caller is cancelled."""
        if self._proto is None:
            return {"type": "http.disconnect"}
        return await self.inbound.receive_message()

    async def send_part(self, data: bytes) -> None:
        """As `send`.

        Raises:
            ClientDisconnected: the client is gone.
        """
        inbound = self.inbound
        if inbound.client_gone or self.broken:
            raise ClientDisconnected("the client closed the connection")
        if self._encoder is not None:
            data = self._encoder.feed(data)
            if not data:
                return
        pending = next(self._proto.send({"type": "http.response.body", "body": data, "more_body": True}), None)
        if pending is not None:
            self._unwaited = 0
            self.broken = True
            await _settled(self._loop, pending, self._timeout)
            self.broken = False
        else:
            self._unwaited += 1
            if self._unwaited >= _SENDS_PER_TURN:
                self._unwaited = 0
                await asyncio.sleep(0)
        inbound.check_peer()
        if inbound.client_gone:
            raise ClientDisconnected("the client closed the connection")

    async def send_file(self, path: str) -> None:
        """Send a file as the whole body begun with `start`; the front reads it."""
        if self._encoder is None and not self.streams_at_once:
            self._proto.send({"type": "http.response.pathsend", "path": path})
            self.inbound.unwatch()
            return
        with open(path, "rb") as file:
            while part := file.read(_FILE_PIECE):
                await self.send_part(part)
        self.end()

    def finish(self) -> None:
        """The response is complete: whoever receives learns that there is nothing to come any more."""
        if self._inbound is not None:
            self._inbound.finish()

    async def discard_rest(self) -> None:
        """As `discard_request`."""
        # HTTP/2 can stop a stream by itself, and a client that asked first (Expect) has not begun to send.
        if self.scope["http_version"] != "2" and not any(name == b"expect" for name, _ in self.scope["headers"]):
            await self.inbound.discard()

    @property
    def client_gone(self) -> bool:
        """Whether the client is known to have left."""
        return self._inbound is not None and self._inbound.client_gone

    @property
    def inbound(self) -> _AsyncInbound:
        """The receiving side, made when first needed."""
        inbound = self._inbound
        if inbound is None:
            inbound = self._inbound = _AsyncInbound(self._proto, self.scope, self._timeout, self._loop)
        return inbound

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        super()._start(status, headers)
        # Granian begins such a response at once, and then takes no file.
        self.streams_at_once = any(
            name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
        )


class AsyncWebSocket:
    """One WebSocket, for the asyncio thread: call it in the event loop.

    Attributes:
        scope: the ASGI connection scope.
        code: the code with which it was closed, None while it is open.
    """

    __slots__ = (
        "_closing",
        "_loop",
        "_messages",
        "_pending",
        "_proto",
        "_timeout",
        "_waiters",
        "_watcher",
        "code",
        "scope",
    )

    def __init__(self, watcher: Any, loop: Any, timeout: float) -> None:
        self._watcher = watcher
        self._proto = watcher.proto
        self._loop = loop
        self._timeout = timeout
        self._pending: Any = None
        self._messages: deque[dict[str, Any]] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._closing: asyncio.Future[None] | None = None
        self.code: int | None = None
        self.scope: dict[str, Any] = watcher.scope

    async def receive(self) -> dict[str, Any]:
        """The next message; nothing is lost if the caller is cancelled."""
        while not self._messages:
            if self.code is not None:
                return {"type": "websocket.disconnect", "code": self.code, "reason": ""}
            self._ask()
            if not self._messages:
                await _news(self._loop, self._waiters)
        return self._messages.popleft()

    async def send(self, message: dict[str, Any]) -> None:
        """Send a message, and wait while the client is slower than we are.

        Raises:
            ClientDisconnected: the WebSocket is closed.
        """
        if self.code is not None:
            raise ClientDisconnected("the WebSocket is closed")
        try:
            pending = next(self._proto.send(message).__await__(), None)
            if pending is not None:
                await _settled(self._loop, pending, self._timeout)
        except RuntimeError as exc:
            if "closed" in str(exc):
                self.end(1006)
                raise ClientDisconnected("the client closed the WebSocket") from None
            raise

    async def close(self, code: int, reason: str = "") -> None:
        """Close it, or refuse it if it was not accepted."""
        if self._closing is not None:
            await asyncio.wait([self._closing])
            return
        if self.code is not None:
            return
        self._closing = self._loop.create_future()
        # A question that the client has yet to answer keeps Granian from closing.
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.cancel()
        self.end(code)
        message = {"type": "websocket.close", "code": code, "reason": reason}
        try:
            done = next(self._proto.send(message).__await__(), None)
            if done is not None:
                await _settled(self._loop, done, self._timeout)
        except (ClientDisconnected, RuntimeError):
            logger.debug("The client left the WebSocket %s before it was closed", self.scope["path"])
        finally:
            _settle(self._closing, None)

    def end(self, code: int) -> None:
        """Tell whoever receives that it is over."""
        if self.code is None:
            self.code = code
            _wake(self._waiters)

    def release(self) -> None:
        """Let go of it: the last thing done with a WebSocket. One that was not accepted is refused with a 403."""
        self.end(1000)
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.cancel()
        self._watcher.done()
        self._proto = self._watcher = None

    def _ask(self) -> None:
        if self._pending is not None:
            return
        try:
            pending = next(self._proto.receive().__await__())
        except StopIteration as stop:
            self._take(stop.value)
            return
        self._pending = pending
        pending.add_done_callback(self._on_done, context=self._loop.call_soon_threadsafe)

    def _on_done(self, pending: Any) -> None:
        if pending is not self._pending:
            return
        self._pending = None
        try:
            self._take(pending.result())
        except RuntimeError:
            self._take({"type": "websocket.disconnect", "code": 1006})
        _wake(self._waiters)

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "websocket.disconnect":
            self.code = message.get("code", 1005)
        else:
            self._messages.append(message)


class _Inbound:
    """What comes from one request's client: the body in parts, and the news that the client is gone."""

    __slots__ = (
        "_checked",
        "_client",
        "_context",
        "_ended",
        "_parts",
        "_parts_size",
        "_pending",
        "_proto",
        "_timeout",
        "_waiter",
        "_watching",
        "client_gone",
    )

    def __init__(self, proto: Any, client: tuple[str, str], timeout: float) -> None:
        self._proto = proto
        self._timeout = timeout
        self._client = client
        self._parts: list[bytes] = []
        self._parts_size = 0
        self._pending: Any = None
        self._waiter: Waiter[None] | None = None
        self._watching = False
        self._ended = False
        self._checked = 0.0
        self._context: Any = None
        self.client_gone = False

    def receive(self) -> bytes:
        while not self._parts:
            if self.client_gone and not self._ended:
                raise ClientDisconnected("the client closed the connection before the end of the request body")
            if self._ended:
                return b""
            self._ask()
            if self._pending is not None:
                self._waiter = Waiter()
                try:
                    with _patience(self._timeout, "sent nothing"):
                        self._waiter.get()
                finally:
                    self._waiter = None
        part = self._parts.pop(0)
        self._parts_size -= len(part)
        if self._watching:
            self._ask()
        return part

    def release(self) -> None:
        self.unwatch()
        self._proto = None

    def watch(self) -> None:
        """Ask for what comes next though nobody reads, so that the client's leaving is noticed."""
        self._watching = True
        self._checked = time.monotonic()
        self._ask()

    def unwatch(self) -> None:
        self._watching = False
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.cancel()

    def check_peer(self) -> None:
        """Look at the socket itself now and then while an unread body hides the news from us."""
        if self._pending is None and self._watching and not self.client_gone and self._client[0]:
            now = time.monotonic()
            if now - self._checked > _PEER_CHECK_SECONDS:
                self._checked = now
                self.client_gone = not is_connected(self._client)

    def _ask(self) -> None:
        if self._pending is not None or self.client_gone or self._parts_size >= _LOOKAHEAD:
            return
        try:
            pending = next(self._proto.receive().__await__())
        except StopIteration as stop:
            self._take(stop.value)
            return
        self._pending = pending
        pending.add_done_callback(self._on_done, context=self._context)

    def _on_done(self, pending: Any) -> None:
        # In the hub.
        if pending is not self._pending:
            return
        self._pending = None
        self._take(pending.result())
        if self._waiter is not None:
            self._waiter.switch(None)
        elif self._watching:
            self._ask()

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.disconnect":
            self.client_gone = True
            return
        if message["body"]:
            self._parts.append(message["body"])
            self._parts_size += len(message["body"])
        if not message["more_body"]:
            self._ended = True


class _AsyncInbound(_Inbound):
    """The same for the asyncio thread."""

    __slots__ = ("_left", "_loop", "_over", "_timer", "_told_end", "_waiters")

    def __init__(self, proto: Any, scope: dict[str, Any], timeout: float, loop: Any) -> None:
        super().__init__(proto, scope["client"], timeout)
        self._loop = loop
        self._context = loop.call_soon_threadsafe
        self._waiters: list[asyncio.Future[None]] = []
        self._timer: Any = None
        self._over = False
        self._told_end = False
        # HTTP/2 does not say beforehand whether there is a body.
        self._left = -1 if scope["http_version"] == "2" else 0
        for name, value in scope["headers"]:
            if name == b"content-length":
                self._left = int(value)
            elif name == b"transfer-encoding":
                self._left = -1
                break
        self._ended = self._left == 0

    async def receive_message(self) -> dict[str, Any]:
        while True:
            if self._parts:
                part = self._parts.pop(0)
                self._parts_size -= len(part)
                self._told_end = self._ended and not self._parts
                if self._watching:
                    self._ask()
                return {"type": "http.request", "body": part, "more_body": not self._told_end}
            if self._ended and not self._told_end:
                self._told_end = True
                return {"type": "http.request", "body": b"", "more_body": False}
            if self.client_gone or self._over:
                return {"type": "http.disconnect"}
            if self._told_end:
                self.watch()
                await _news(self._loop, self._waiters)
                continue
            self._ask()
            if self._pending is not None and not await _news(self._loop, self._waiters, self._timeout):
                self.client_gone = True  # one who sends nothing for that long is as good as gone

    async def discard(self) -> None:
        """Read and forget what is left, within limits."""
        left = _DISCARD_BYTES
        until = time.monotonic() + _DISCARD_SECONDS
        while not (self._ended or self.client_gone) and left > 0 and (seconds := until - time.monotonic()) > 0:
            self._ask()
            if self._pending is not None and not await _news(self._loop, self._waiters, seconds):
                return
            left -= self._parts_size
            self._parts.clear()
            self._parts_size = 0

    def watch(self) -> None:
        """As that of `_Inbound`, from a little later on."""
        if not (self._watching or self._over):
            self._watching = True
            self._checked = time.monotonic()
            self._timer = self._loop.call_later(_LISTEN_AFTER, self._ask)

    def unwatch(self) -> None:
        super().unwatch()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def release(self) -> None:
        self._over = True
        super().release()
        _wake(self._waiters)

    def finish(self) -> None:
        """The response is complete: there is nothing to come any more."""
        self._over = True
        self.unwatch()
        _wake(self._waiters)

    def _on_done(self, pending: Any) -> None:
        # In the loop.
        if pending is not self._pending:
            return
        self._pending = None
        self._take(pending.result())
        _wake(self._waiters)
        if self._watching:
            self._ask()

    def _take(self, message: dict[str, Any]) -> None:
        super()._take(message)
        if self._left > 0 and message["type"] == "http.request":
            self._left -= len(message["body"])
            # It spares asking for the end.
            self._ended = self._ended or self._left <= 0


async def _news(loop: Any, waiters: list[asyncio.Future[None]], timeout: float | None = None) -> bool:
    """Wait for `_wake`; False if the time ran out first."""
    future = loop.create_future()
    waiters.append(future)
    timer = None if timeout is None else loop.call_later(timeout, _settle, future, False)
    try:
        woken: bool = await future
        return woken
    finally:
        if timer is not None:
            timer.cancel()
        with contextlib.suppress(ValueError):
            waiters.remove(future)


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    for future in waiters:
        _settle(future, True)


def _settle(future: Any, result: object) -> None:
    if not future.done():
        future.set_result(result)


async def _settled(loop: Any, pending: Any, timeout: float) -> None:
    """Wait in the event loop for a future of Granian's."""
    future = loop.create_future()
    pending.add_done_callback(functools.partial(_settle, future), context=loop.call_soon_threadsafe)
    timer = loop.call_later(timeout, _settle, future, None)
    try:
        settled = await future
    except BaseException:
        pending.cancel()
        raise
    finally:
        timer.cancel()
    if settled is None:
        pending.cancel()
        raise ClientDisconnected(f"the client took nothing for {timeout:g} seconds")
    pending.result()


def _wait(pending: Any, timeout: float) -> None:
    """Wait for a future of Granian's."""
    waiter: Waiter[Any] = Waiter()
    pending.add_done_callback(waiter.switch)
    try:
        with _patience(timeout, "took nothing of the response"):
            waiter.get()
    except BaseException:
        pending.cancel()
        raise
    pending.result()


def _patience(seconds: float, what: str) -> gevent.Timeout:
    return gevent.Timeout(seconds, ClientDisconnected(f"the client {what} for {seconds:g} seconds"))


def _malformed(headers: list[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if not name or any(byte <= 32 or byte >= 127 or byte in b'"(),/:;<=>?@[\\]{}' for byte in name):
            return repr(name)
        if any((byte < 32 and byte != 9) or byte == 127 for byte in value):
            return f"{name!r}: {value!r}"
    return ""


def _redirect_log(mailbox: Mailbox) -> None:
    """Have Granian's own messages written by the hub's thread: its threads must not touch patched locks."""
    log = logging.getLogger("_granian")
    if not any(isinstance(handler, _ToServerLog) for handler in log.handlers):
        log.handlers[:] = [_ToServerLog(mailbox)]
        log.propagate = False
        log.setLevel(logging.WARNING)


class _ToServerLog(logging.Handler):
    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__()
        self._mailbox = mailbox

    def handle(self, record: logging.LogRecord) -> bool:
        # Without the handler's lock, which is a patched one.
        return self._mailbox.post(gevent.spawn, logger.handle, record)
