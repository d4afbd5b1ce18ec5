"""A WebSocket over the front, for greenlets: part of the seam to Granian, see `front`."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import gevent
from gevent import get_hub
from gevent.hub import Waiter

from puff_patch.server.connections import is_connected
from puff_patch.server.exchange import LOOKAHEAD, PEER_CHECK_SECONDS, SENDS_PER_TURN, malformed

# Messages taken from the client of a WebSocket ahead of its handler, besides LOOKAHEAD; TCP holds up the rest.
_AHEAD_MESSAGES = 16
# Bytes that wait to be sent to the client of a WebSocket, from which on senders wait, and what each message counts
# besides its own.
_BEHIND = 64 * 1024
_MESSAGE_SIZE = 64


class WebSocketClosed(ConnectionError):
    """The WebSocket is closed, by either side.

    Attributes:
        code: why, see RFC 6455, 7.4.1: what either side said, 1005 if the client said nothing or its connection
            was lost, 1006 if the connection was cut here.
        reason: the same in words; what a client says in words does not get through the front.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"the WebSocket is closed ({code}{f': {reason}' if reason else ''})")
        self.code = code
        self.reason = reason


class WebSocketTimeout(TimeoutError):
    """Nothing came, or nothing could be sent, within the seconds given; the WebSocket is still open."""


class WebSocketExchange:
    """One WebSocket: its handshake, then messages in both directions until either side closes it.

    The methods that wait do so cooperatively: call them in a greenlet, not in the hub.  One greenlet at a time may
    receive while any number send.  Granian answers pings by itself; it can send none, and it does not tell a
    connection lost, or a malformed frame, from a close without a code.

    Attributes:
        scope: the ASGI connection scope.
        status: what the handshake was answered with, 101 if the WebSocket was accepted; 0 until then.
        code: why it is closed; None until it is.
        reason: the same in words.
    """

    __slots__ = (
        "_ahead",
        "_ahead_size",
        "_behind",
        "_behind_size",
        "_checked",
        "_closing",
        "_farewells",
        "_hooked",
        "_max_size",
        "_opened",
        "_peer",
        "_pending",
        "_proto",
        "_receiver",
        "_senders",
        "_sent",
        "_timeout",
        "_unwaited",
        "_watcher",
        "code",
        "reason",
        "scope",
        "status",
    )

    def __init__(self, watcher: Any, timeout: float, max_size: int, opened: dict[int, tuple[str, str]]) -> None:
        self._watcher = watcher
        # The scope is everybody's to change.
        self._peer: tuple[str, str] = watcher.scope["client"]
        self._opened = opened
        opened[id(self)] = self._peer
        self._proto = watcher.proto
        self._timeout = timeout
        self._max_size = max_size
        self._ahead: list[str | bytes] = []
        self._ahead_size = 0
        # What waits to be sent.
        self._behind: deque[str | bytes] | None = None
        self._behind_size = 0
        # What is under way in Granian, as futures: a receive, the accept or the last send, the close.
        self._pending: Any = None
        self._sent: Any = None
        self._closing: Any = None
        # Who waits for it.
        self._receiver: Waiter[None] | None = None
        self._senders: list[Waiter[None]] | None = None
        self._farewells: list[Callable[[], object]] | None = None
        self._hooked = False
        self._unwaited = 0
        self._checked = 0.0
        self.status = 0
        self.code: int | None = None
        self.reason = ""
        self.scope: dict[str, Any] = watcher.scope

    def accept(self, subprotocol: str | None = None) -> None:
        """Answer the handshake: messages may now go either way.

        Args:
            subprotocol: one of those that the client offers.  (Granian sends no headers with it.)

        Raises:
            WebSocketClosed: the client is gone.
        """
        # Granian's first message, which says that there is a client, is always there.
        next(self._proto.receive().__await__(), None)
        self.status = 101
        self._sent = accepting = self._proto.send({"type": "websocket.accept", "subprotocol": subprotocol})
        self._ask()
        while self.code is None and not accepting.done():
            self._wait_for_room(None)
        self._raise_if_closed()

    def respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Refuse the handshake with a plain response.  Never waits.

        Args:
            status: the status code, 200 to 999.
            headers: names in lower case and values.
            body: the whole body.

        Raises:
            ValueError: a header is malformed; then nothing was sent.
        """
        fault = malformed(headers)
        if fault:
            raise ValueError(f"the response has a malformed header: {fault}")
        send = self._proto.send
        send({"type": "websocket.http.response.start", "status": status, "headers": headers})
        send({"type": "websocket.http.response.body", "body": body, "more_body": False})
        self.status, self.code, self.reason = status, 1006, f"refused with {status}"

    @property
    def has_message(self) -> bool:
        """Whether a message is there to be received without waiting."""
        return bool(self._ahead)

    def receive(self, timeout: float | None = None) -> str | bytes:
        """Return the next message, str for text and bytes for binary.

        Args:
            timeout: seconds to wait at most; None waits for good.

        Raises:
            WebSocketClosed: it is closed, and every message that came before is received.
            WebSocketTimeout: nothing came in time.
        """
        while not self._ahead:
            self._raise_if_closed()
            if self._receiver is not None:
                raise RuntimeError("another greenlet is receiving from this WebSocket")
            self._receiver = Waiter()
            try:
                _wait_at_most(self._receiver, timeout, "came")
            finally:
                self._receiver = None
        message = self._ahead.pop(0)
        self._ahead_size -= len(message)
        self._ask()
        return message

    def send(self, message: str | bytes, timeout: float | None = None) -> None:
        """Send a message, behind those that the client has yet to take; wait while these are many.

        Args:
            message: str is sent as text, bytes as binary.
            timeout: seconds to wait at most, 0 not at all; None waits as long as the front is told to wait for
                clients, then cuts the connection.

        Raises:
            WebSocketClosed: it is closed.
            WebSocketTimeout: ``timeout`` is over, and the message is not sent.
            UnicodeEncodeError: half a surrogate pair is no text.
        """
        if isinstance(message, str) and not message.isascii():
            message.encode()  # Granian would not say what is wrong with it
        self._unwaited += 1
        if self._unwaited >= SENDS_PER_TURN:
            self._unwaited = 0
            gevent.sleep(0)
        self._check_peer()
        while self.code is None and self._behind_size >= _BEHIND:
            self._wait_for_room(timeout)
        self._raise_if_closed()
        if not self._behind and (self._sent is None or self._sent.done()):
            self._put(message)
            return
        if self._behind is None:
            self._behind = deque()
        self._behind.append(message)
        self._behind_size += len(message) + _MESSAGE_SIZE
        self._hook()

    def close(self, code: int, reason: str = "") -> None:
        """Close it, after what was sent so far; do nothing if it is closed.  Never waits.

        Args:
            code: 1000 to 4999.
            reason: up to 123 bytes of UTF-8.
        """
        if self.code is None:
            self.code = code
            self.reason = reason
            self._ahead.clear()
            if self._is_sending:
                self._hook()  # the close must not overtake what is under way
            else:
                self._begin_close()
            get_hub().loop.run_callback(self._wake)

    def release(self) -> None:
        """Let go of the connection: the last thing done with a WebSocket.

        If it was closed here, wait until the client is told, or has left us waiting for too long.
        """
        if self._watcher is None:
            return
        try:
            with contextlib.suppress(WebSocketTimeout):
                while self._is_sending and self._closing is None:
                    self._wait_for_room(self._timeout)
                if self._closing is not None and not self._closing.done():
                    waiter: Waiter[Any] = Waiter()
                    self._closing.add_done_callback(waiter.switch)
                    _wait_at_most(waiter, self._timeout, "was taken")
        finally:
            self._drop()

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called on a greenlet once it is closed, by either side."""
        self._farewells = [*(self._farewells or ()), callback]
        if self.code is not None:
            get_hub().loop.run_callback(self._wake)

    def cut(self, reason: str) -> None:
        """Close the connection at once, with nothing said to the client."""
        if self.code is None:
            self.code = 1006
            self.reason = reason
            get_hub().loop.run_callback(self._wake)
        self._drop()

    @property
    def _is_sending(self) -> bool:
        return bool(self._behind) or not (self._sent is None or self._sent.done())

    def _wait_for_room(self, timeout: float | None) -> None:
        """Wait until what is under way to the client is sent, or it is closed."""
        if timeout == 0:
            raise WebSocketTimeout("the client is too slow: it has yet to take the messages before this one")
        waiter: Waiter[None] = Waiter()
        self._senders = [*(self._senders or ()), waiter]
        self._hook()
        try:
            _wait_at_most(waiter, self._timeout if timeout is None else timeout, "was taken")
        except WebSocketTimeout:
            if timeout is not None:
                raise
            self.cut(f"the client took nothing for {self._timeout:g} seconds")

    def _put(self, message: str | bytes) -> None:
        text, data = (message, None) if isinstance(message, str) else (None, message)
        # With both keys, for with one alone Granian takes what it cannot encode for nothing.
        sent = self._proto.send({"type": "websocket.send", "text": text, "bytes": data})
        # What it gives for a connection that it knows to be gone is no future.
        self._sent = sent if hasattr(sent, "done") else None

    def _hook(self) -> None:
        """Have `_on_sent` called when what is under way is sent.  Granian takes one callback."""
        if not self._hooked:
            self._hooked = True
            if self._sent is None:
                get_hub().loop.run_callback(self._on_sent, None)
            else:
                self._sent.add_done_callback(self._on_sent)

    def _on_sent(self, pending: Any) -> None:
        # In the hub.
        self._hooked = False
        if pending is not self._sent:
            # Something else was sent since then.
            if self._behind or self._senders:
                self._hook()
            return
        if self._behind:
            message = self._behind.popleft()
            self._behind_size -= len(message) + _MESSAGE_SIZE
            self._put(message)
            if self._behind:
                self._hook()
        if not self._behind:
            self._behind = None
            if self.code is not None and self._closing is None:
                self._begin_close()
        if self._behind_size < _BEHIND:
            self._wake_senders()

    def _raise_if_closed(self) -> None:
        if self.code is not None:
            raise WebSocketClosed(self.code, self.reason)

    def _check_peer(self) -> None:
        """Look at the socket itself now and then while unread messages hide from us that the client is gone."""
        if self._pending is None and self.code is None and self._peer[0]:
            now = time.monotonic()
            if now - self._checked > PEER_CHECK_SECONDS:
                if self._checked and not is_connected(self._peer):
                    self.cut("the client closed the connection")
                self._checked = now

    def _ask(self) -> None:
        """Have the next message fetched if there is room for it: also the news that the client is gone is one."""
        if (
            self._pending is None
            and self.code is None
            and len(self._ahead) < _AHEAD_MESSAGES
            and self._ahead_size < LOOKAHEAD
        ):
            self._pending = pending = self._proto.receive()
            pending.add_done_callback(self._on_message)

    def _on_message(self, pending: Any) -> None:
        # In the hub.
        if pending is not self._pending:
            return
        self._pending = None
        message = pending.result()
        if message["type"] == "websocket.disconnect":
            if self.code is None:
                self.code = message["code"]
            # Only now does Granian send what answers the client's close.  Ours is sent if there was none but a
            # frame that it could not read.
            self._forget_behind()
            self._begin_close(1002)
        elif self.code is None:
            text = message.get("text")
            data: str | bytes = message["bytes"] if text is None else text
            if _larger(data, self._max_size):
                self.code, self.reason = 1009, f"the message has more than {self._max_size} bytes"
                self._forget_behind()
                self._begin_close()
            else:
                self._ahead.append(data)
                self._ahead_size += len(data)
                self._ask()
        self._wake()

    def _wake(self) -> None:
        if self._receiver is not None:
            self._receiver.switch(None)
        if self.code is not None:
            self._wake_senders()
            farewells, self._farewells = self._farewells, None
            for callback in farewells or ():
                gevent.spawn(callback)

    def _wake_senders(self) -> None:
        senders, self._senders = self._senders, None
        for waiter in senders or ():
            waiter.switch(None)

    def _forget_behind(self) -> None:
        self._behind = None
        self._behind_size = 0

    def _begin_close(self, code: int | None = None) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            # It holds what the close needs.
            pending.cancel()
        if self._proto is not None and self.status == 101 and self._closing is None:
            message = {"type": "websocket.close", "code": code or self.code, "reason": self.reason}
            self._closing = self._proto.send(message)

    def _drop(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is None:
            return
        self._opened.pop(id(self), None)
        self._forget_behind()
        # Done first: what is still under way keeps the transport from it, for it would wait for the client.  Then
        # the transport falls with the last reference.
        watcher.done()
        for pending in (self._pending, self._sent, self._closing):
            if pending is not None:
                pending.cancel()
        self._pending = self._sent = self._closing = self._proto = None


def _wait_at_most(waiter: Waiter[Any], seconds: float | None, what: str) -> None:
    if seconds is None:
        waiter.get()
        return
    with gevent.Timeout(seconds, WebSocketTimeout(f"nothing {what} for {seconds:g} seconds")):
        waiter.get()


def _larger(message: str | bytes, size: int) -> bool:
    if len(message) > size:
        return True
    # A character takes four bytes at the most.
    return isinstance(message, str) and len(message) * 4 > size and len(message.encode()) > size
