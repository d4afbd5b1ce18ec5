"""Requests and WebSockets over the front, for the asyncio thread: part of the seam to Granian, see `front`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections import deque
from typing import Any

from puff_patch.server.exchange import (
    DISCARD_BYTES,
    DISCARD_SECONDS,
    SENDS_PER_TURN,
    ClientDisconnected,
    Exchange,
    Inbound,
)
from puff_patch.server.filters import Encoder, Filters

logger = logging.getLogger("puff_patch.server")

# Seconds after which one begins to listen for the client leaving: most requests are over by then, and a question
# to the front costs more than a timer.
_LISTEN_AFTER = 0.05
_FILE_PIECE = 256 * 1024


class AsyncExchange(Exchange):
    """The same for the asyncio thread: call it in the event loop.

    Attributes:
        broken: a part of the response was lost, so it cannot be completed.
    """

    __slots__ = ("_loop", "broken", "streams_at_once")

    _inbound: _AsyncInbound | None

    def __init__(
        self,
        watcher: Any,
        loop: Any,
        timeout: float,
        filters: Filters | None,
        active: dict[int, tuple[str, str]],
        max_body_size: int | None = None,
    ) -> None:
        super().__init__(watcher, timeout, filters, active, max_body_size)
        self._loop = loop
        self.broken = False
        self.streams_at_once = False

    def for_greenlet(self) -> Exchange:
        """The same request for a greenlet; this one must not be used any more."""
        return Exchange(self._watcher, self._timeout, self._filters, self._active, self._body_left)

    async def receive_message(self) -> dict[str, Any]:
        """The next ``http.request`` or ``http.disconnect``; nothing is lost if the caller is cancelled.

        Raises:
            BodyTooLarge: there is more of the body than the server takes; the client has its answer.
        """
        if self._proto is None or self.refused:
            return {"type": "http.disconnect"}
        message = await self.inbound.receive_message()
        if message["type"] == "http.request":
            self.count(message["body"])
        elif not self.inbound.ended:
            # Its client is gone, too slow, or sends what cannot be read; then this is what it gets to see.
            self._refuse(408 if self.inbound.too_slow else 400)
        return message

    async def send_part(self, data: bytes) -> None:
        """As `send`.

        Raises:
            ClientDisconnected: the client is gone.
        """
        inbound = self.inbound
        if inbound.client_gone or self.broken or self.refused:
            raise ClientDisconnected("the client closed the connection")
        if self._encoder is not None:
            data = self._encoder.feed(data)
            await asyncio.sleep(0)
            if not data:
                return
        self._sent += len(data)
        pending = next(self._proto.send({"type": "http.response.body", "body": data, "more_body": True}), None)
        if pending is not None:
            self._unwaited = 0
            self.broken = True
            await _settled(self._loop, pending, self._timeout)
            self.broken = False
        else:
            self._unwaited += 1
            if self._unwaited >= SENDS_PER_TURN:
                self._unwaited = 0
                await asyncio.sleep(0)
        inbound.check_peer()
        if inbound.client_gone:
            raise ClientDisconnected("the client closed the connection")

    async def send_file(self, path: str) -> None:
        """Send a file as the whole body begun with `start`; the front reads it."""
        if self._encoder is None and not self.streams_at_once:
            self._sent += os.stat(path).st_size
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
        if self.is_client_sending:
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
            inbound = self._inbound = _AsyncInbound(self._proto, self.scope, self._peer, self._timeout, self._loop)
        return inbound

    def _encode(self, encoder: Encoder, body: bytes) -> bytes:
        # In one go: the caller does not wait, and longer ones come in parts.
        return encoder.feed(body) + encoder.finish()

    def _send_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        super()._send_head(status, headers)
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
        "_key",
        "_loop",
        "_messages",
        "_open",
        "_pending",
        "_proto",
        "_timeout",
        "_waiters",
        "_watcher",
        "code",
        "scope",
    )

    def __init__(self, watcher: Any, loop: Any, timeout: float, opened: dict[int, tuple[str, str]]) -> None:
        self._watcher = watcher
        self._key = id(watcher)
        self._open = opened
        opened[self._key] = watcher.scope["client"]
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
        self._open.pop(self._key, None)

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


class _AsyncInbound(Inbound):
    """The same for the asyncio thread."""

    __slots__ = ("_left", "_loop", "_over", "_timer", "_told_end", "_waiters", "too_slow")

    def __init__(
        self, proto: Any, scope: dict[str, Any], peer: tuple[str, str], timeout: float, loop: Any
    ) -> None:
        super().__init__(proto, peer, timeout)
        self._loop = loop
        self._context = loop.call_soon_threadsafe
        self._waiters: list[asyncio.Future[None]] = []
        self._timer: Any = None
        self._over = False
        self._told_end = False
        self.too_slow = False
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
                self.client_gone = self.too_slow = True  # one who sends nothing for that long is as good as gone

    @property
    def ended(self) -> bool:
        """Whether the body is all there, or the response is over."""
        return self._ended or self._over

    async def discard(self) -> None:
        """Read and forget what is left, within limits."""
        left = DISCARD_BYTES
        until = time.monotonic() + DISCARD_SECONDS
        while not (self._ended or self.client_gone) and left > 0 and (seconds := until - time.monotonic()) > 0:
            self._ask()
            if self._pending is not None and not await _news(self._loop, self._waiters, seconds):
                return
            left -= self._parts_size
            self._parts.clear()
            self._parts_size = 0

    def watch(self) -> None:
        """As that of `Inbound`, from a little later on."""
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
