"""One request over the front and its response, for greenlets: part of the seam to Granian, see `front`."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import gevent
from gevent.hub import Waiter

from puff_patch.server.admission import refusal
from puff_patch.server.connections import is_connected
from puff_patch.server.filters import Encoder, Filters

# Sends in a row that did not wait, after which other greenlets get a turn.
SENDS_PER_TURN = 16
# Bytes of a request body kept while nobody reads it and we only watch for the client leaving.
LOOKAHEAD = 256 * 1024
PEER_CHECK_SECONDS = 1.0
# How much of a request body that the application did not want is taken from the client all the same.
DISCARD_BYTES = 32 * 1024 * 1024
DISCARD_SECONDS = 5.0
# Bytes of a whole body that are encoded at a time.
_ENCODED_PIECE = 64 * 1024
# Seconds between two pieces. With 0 the greenlet goes on for 5 ms before the hub looks for new requests, and a
# tenth as many of them are answered meanwhile.
_ENCODING_TURN = 1e-5


class ClientDisconnected(ConnectionError):
    """The client closed the connection before the request or its response was complete."""


class ClientTooSlow(ClientDisconnected):
    """The client sent nothing for too long."""


class BodyTooLarge(OSError):
    """The body of a request is larger than the server takes; the client has got its 413."""


class Exchange:
    """One request and its response.

    The methods that wait do so cooperatively: call them in a greenlet, not in the hub.

    Attributes:
        scope: the ASGI connection scope.
        refused: the status of an answer of our own that was sent because the body is too large, too slow or
            malformed; 0 if none was. Whatever the application sends after that is dropped.
    """

    __slots__ = (
        "_active",
        "_body_left",
        "_encoder",
        "_filters",
        "_inbound",
        "_key",
        "_peer",
        "_proto",
        "_sent",
        "_status",
        "_timeout",
        "_unwaited",
        "_watcher",
        "refused",
        "scope",
    )

    def __init__(
        self,
        watcher: Any,
        timeout: float,
        filters: Filters | None,
        active: dict[int, tuple[str, str]],
        max_body_size: int | None = None,
    ) -> None:
        self._watcher = watcher
        self._filters = filters
        self._encoder: Encoder | None = None
        self._proto = watcher.proto
        self._timeout = timeout
        self._inbound: Inbound | None = None
        self._unwaited = 0
        self._body_left = max_body_size
        self._status = 0
        self._sent = 0
        self.refused = 0
        self.scope: dict[str, Any] = watcher.scope
        # The scope is everybody's to change; its client may be that for which a trusted proxy speaks.
        self._peer: tuple[str, str] = self.scope.get("puff.peer") or self.scope["client"]
        # The same for every exchange made of one request, and no other's until this one is over.
        self._key = id(watcher)
        self._active = active
        active[self._key] = self._peer

    def respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a whole response. Waits for nobody, but gives others a turn while a long body is encoded.

        Args:
            status: the status code, 200 to 999.
            headers: names in lower case and values. Without a content-length, the body's length is sent.
            body: the whole body.

        Raises:
            ValueError: a header is malformed; then nothing was sent.
        """
        if self.refused:
            return
        send = self._proto.send
        self._filter_head(status, headers)
        if self._encoder is not None:
            body = self._encode(self._encoder, body)
        self._send_head(status, headers)
        self._sent = len(body)
        send({"type": "http.response.body", "body": body, "more_body": False})

    def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin a response whose body follows in :meth:`send`, and watch for the client leaving.

        The head goes out with the first part of the body.

        Raises:
            ValueError: a header is malformed; then nothing was sent.
        """
        if self.refused:
            return
        self._filter_head(status, headers)
        self._send_head(status, headers)
        self.inbound.watch()

    def send(self, data: bytes) -> None:
        """Send a part of the body, and wait while the client is slower than we are.

        Raises:
            ClientDisconnected: the client is gone.
        """
        inbound = self.inbound
        if inbound.client_gone or self.refused:
            raise ClientDisconnected("the client closed the connection")
        if self._encoder is not None:
            data = self._encoder.feed(data)
            gevent.sleep(_ENCODING_TURN)
            if not data:
                return
        self._sent += len(data)
        pending = next(self._proto.send({"type": "http.response.body", "body": data, "more_body": True}), None)
        if pending is not None:
            self._unwaited = 0
            _wait(pending, self._timeout)
        else:
            self._unwaited += 1
            if self._unwaited >= SENDS_PER_TURN:
                self._unwaited = 0
                gevent.sleep(0)
        inbound.check_peer()
        if inbound.client_gone:
            raise ClientDisconnected("the client closed the connection")

    def end(self) -> None:
        """End the body begun with :meth:`start`."""
        if self.refused:
            return
        last = b"" if self._encoder is None else self._encoder.finish()
        self._sent += len(last)
        self._proto.send({"type": "http.response.body", "body": last, "more_body": False})
        self.inbound.unwatch()

    def receive(self) -> bytes:
        """Return the next part of the request body, b"" at its end.

        Raises:
            ClientDisconnected: the client is gone before the end or sent nothing for too long, the body is
                malformed, or the request is over.
            BodyTooLarge: there is more of it than the server takes.

        A client that is there still has its answer by then (413, 408, 400), or the response that had begun is cut.
        """
        if self._proto is None:
            raise ClientDisconnected("the request is over: its body cannot be read any more")
        if self.refused:
            raise ClientDisconnected(
                f"the request was answered with {self.refused}: its body cannot be read any more"
            )
        try:
            return self.count(self.inbound.receive())
        except ClientTooSlow as exc:
            self._refuse(408)
            raise ClientDisconnected(str(exc)) from None
        except ClientDisconnected:
            # Or its body is malformed, which looks the same from here; then this is what it gets to see.
            self._refuse(400)
            raise

    def count(self, part: bytes) -> bytes:
        """Return a part of the request body that was received.

        Raises:
            BodyTooLarge: with it the body is larger than the server takes; see `receive`.
        """
        if self._body_left is not None:
            self._body_left -= len(part)
            if self._body_left < 0:
                self._refuse(413)
                raise BodyTooLarge("the request body is larger than max_body_size")
        return part

    @property
    def is_client_sending(self) -> bool:
        """Whether a body may come unasked (Expect asks), to be heard out so that the client sees its response.

        Over HTTP/1 it would be in the way of the next request; over HTTP/2 the front resets a stream whose body it
        has not wholly read, and clients (curl) then forget the response.
        """
        names = {name for name, value in self.scope["headers"] if value != b"0"}
        if not names.isdisjoint({b"content-length", b"transfer-encoding"}):
            return b"expect" not in names
        # HTTP/2 need not say beforehand that there is one.
        return self.scope["http_version"] == "2" and self.scope["method"] not in ("GET", "HEAD")

    def discard_request(self) -> None:
        """Read and forget what is left of the request body, within limits, after the response was sent.

        A client that is still sending would otherwise be reset, and many then never read the response.
        """
        left = DISCARD_BYTES
        limit = gevent.Timeout(DISCARD_SECONDS)
        try:
            with limit, contextlib.suppress(ClientDisconnected):
                while left > 0 and (part := self.inbound.receive()):
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
        self.forget()
        if self._filters is not None:
            self._filters.end(self.scope, self._status, self._sent)

    def forget(self) -> None:
        """Count no more as a request that is not over."""
        self._active.pop(self._key, None)

    def abort(self) -> None:
        """Give up: a 500 if nothing was sent, else a cut that no client can take for a whole response.

        Over HTTP/1 the connection is cut, over HTTP/2 the stream is reset.
        """
        if self.refused:
            return
        if self.scope["http_version"] == "1" and self._peer[0]:
            # Of HTTP/1.0 (nginx speaks it to its upstreams), where a body may just end with the connection.
            is_connected(self._peer, reset=True)
        self.inbound.unwatch()
        self._watcher.done()

    @property
    def inbound(self) -> Inbound:
        """The receiving side, made when first needed: most requests have no body."""
        inbound = self._inbound
        if inbound is None:
            inbound = self._inbound = Inbound(self._proto, self._peer, self._timeout)
        return inbound

    def _refuse(self, status: int) -> None:
        """Answer for the application, or cut its response if that has begun."""
        if self._status:
            self.abort()
        else:
            self.respond(*refusal(self.scope, status))
        self.refused = status

    def _encode(self, encoder: Encoder, body: bytes) -> bytes:
        """Encode a whole body, a long one without holding the hub."""
        parts = []
        for at in range(0, len(body), _ENCODED_PIECE):
            if at:
                gevent.sleep(_ENCODING_TURN)
            parts.append(encoder.feed(body[at : at + _ENCODED_PIECE]))
        parts.append(encoder.finish())
        return b"".join(parts)

    def _filter_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if self._filters is not None:
            self._encoder = self._filters.head(self.scope, status, headers)

    def _send_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        try:
            self._proto.send({"type": "http.response.start", "status": status, "headers": headers})
        except RuntimeError as exc:
            raise ValueError(f"the response has a malformed header: {malformed(headers) or exc}") from None
        self._status = status


class Inbound:
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
        # How Granian says that it is done: in the hub, see `front`.
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
                    limit = ClientTooSlow(f"the client sent nothing for {self._timeout:g} seconds")
                    with gevent.Timeout(self._timeout, limit):
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
            if now - self._checked > PEER_CHECK_SECONDS:
                self._checked = now
                self.client_gone = not is_connected(self._client)

    def _ask(self) -> None:
        if self._pending is not None or self.client_gone or self._parts_size >= LOOKAHEAD:
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


def _wait(pending: Any, timeout: float) -> None:
    """Wait for a future of Granian's."""
    waiter: Waiter[Any] = Waiter()
    pending.add_done_callback(waiter.switch)
    try:
        gone = ClientDisconnected(f"the client took nothing of the response for {timeout:g} seconds")
        with gevent.Timeout(timeout, gone):
            waiter.get()
    except BaseException:
        pending.cancel()
        raise
    pending.result()


def malformed(headers: list[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if not name or any(byte <= 32 or byte >= 127 or byte in b'"(),/:;<=>?@[\\]{}' for byte in name):
            return repr(name)
        if any((byte < 32 and byte != 9) or byte == 127 for byte in value):
            return f"{name!r}: {value!r}"
    return ""
