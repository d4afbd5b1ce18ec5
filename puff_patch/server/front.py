"""The seam to Granian, the HTTP front written in Rust. No other module touches Granian.

Granian parses HTTP on its own threads and calls a ``CallbackScheduler`` for each request. It expects asyncio
behind it; here a hub stands there instead: the request goes through the hub's mailbox, and what Granian
wants an event loop for are only ``call_soon`` and ``call_soon_threadsafe``. The ASGI seam is used, and not
RSGI or WSGI, because only it streams with backpressure in both directions.

All of this is internal to Granian, so the version is checked and ``tests/server/test_front.py`` holds the
contract. Message formats: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable
from importlib import metadata
from typing import Any

import gevent
from gevent import get_hub
from gevent.event import Event
from gevent.hub import Waiter

from puff_patch.runtime import Mailbox
from puff_patch.server.admission import refusal
from puff_patch.server.connections import IdleCutter, accepted_at, is_connected, peer_of, reset_all
from puff_patch.server.filters import Encoder, Filters
from puff_patch.server.listener import Listener, open_nowhere
from puff_patch.server.options import ServerError
from puff_patch.server.tls import TLS

TESTED_VERSIONS = ((2, 8, 7), (2, 9))
"""Granian from the first version on, below the second. Before 2.8.7 a response that failed midway looked whole."""

logger = logging.getLogger("puff_patch.server")

# Sends in a row that did not wait, after which other greenlets get a turn.
_SENDS_PER_TURN = 16
# Bytes of a request body kept while nobody reads it and we only watch for the client leaving.
_LOOKAHEAD = 256 * 1024
_PEER_CHECK_SECONDS = 1.0
# Bytes of a whole body that are encoded at a time.
_ENCODED_PIECE = 64 * 1024
# Seconds between two pieces. With 0 the greenlet goes on for 5 ms before the hub looks for new requests, and a
# tenth as many of them are answered meanwhile.
_ENCODING_TURN = 1e-5
# How much of a request body that the application did not want is taken from the client all the same.
_DISCARD_BYTES = 32 * 1024 * 1024
_DISCARD_SECONDS = 5.0


# How often one looks whether there are files left, and how many must be.
_FILES_SECONDS = 0.5
_SPARE_FILES = 16
# How much longer than its time-out an idle connection may last, as a share of it.
_IDLE_SLACK = 0.25
# Messages taken from the client of a WebSocket ahead of its handler, besides _LOOKAHEAD; TCP holds up the rest.
_AHEAD_MESSAGES = 16
# Bytes that wait to be sent to the client of a WebSocket, from which on senders wait, and what each message counts
# besides its own.
_BEHIND = 64 * 1024
_MESSAGE_SIZE = 64
# The same while stopping: Python's h2, for one, never answers the PING of a farewell, and the front waits for it.
_STOP_IDLE_SECONDS = 5.0


class ClientDisconnected(ConnectionError):
    """The client closed the connection before the request or its response was complete."""


class _ClientTooSlow(ClientDisconnected):
    """The client sent nothing for too long."""


class BodyTooLarge(OSError):
    """The body of a request is larger than the server takes; the client has got its 413."""


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


def _forbid_backtraces() -> None:
    """Have Rust's errors be made without a backtrace, whatever ``RUST_BACKTRACE`` asks for.

    For one Rust walks down the C stack, and where a greenlet's part of that ends there is no way further: the
    process crashes.  Rust looks at this once, at the first error.
    """
    os.environ["RUST_LIB_BACKTRACE"] = "0"


class Front:
    """Granian serving HTTP on a listener, in threads of its own, for the hub of the calling thread.

    Args:
        listener: the listening socket; the front accepts on a duplicate, so closing it stays with the caller.
        on_request: called in the hub with each request; it must not block.
        http: ``"1"``, ``"2"`` or ``"auto"``.
        max_connections: connections open at a time; further ones are not accepted until one closes.
        client_timeout: seconds that a client may leave a request waiting for it.
        idle_timeout: seconds that a connection may be without a request.
        max_head_size: bytes of a request's line and headers.
        max_body_size: bytes of a request's body, None for no limit.
        http2_max_concurrent_streams: requests open at a time on one HTTP/2 connection.
        tls: serve TLS with these files.
        filters: what every response goes through.
        on_websocket: called in the hub with each handshake of a WebSocket; it must not block.  None turns
            WebSockets off: their handshakes then are plain requests.
        websocket_max_size: bytes of a message of a WebSocket's client; one with more closes it.

    Attributes:
        active: the clients' host and port of what is not over, requests and whatever else has a connection in use,
            each under a key of its own; connections of others are closed when they are idle.
        websockets: the same of WebSockets, which are no requests.

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
        idle_timeout: float = 75.0,
        max_head_size: int = 64 * 1024,
        max_body_size: int | None = None,
        http2_max_concurrent_streams: int = 128,
        tls: TLS | None = None,
        filters: Filters | None = None,
        on_websocket: Callable[[WebSocketExchange], object] | None = None,
        websocket_max_size: int = 1024 * 1024,
    ) -> None:
        version = check_version()
        _forbid_backtraces()
        try:
            granian: Any = importlib.import_module("granian._granian")
            settings: Any = importlib.import_module("granian.http")
            self._signal = granian.WorkerSignal()
            scheduler_type, worker_type = granian.CallbackScheduler, granian.ASGIWorker
            holder_type = granian.SocketHolder
            http1 = settings.HTTP1Settings(
                # Counted from the end of the last response.
                header_read_timeout=max(1, int(idle_timeout * 1000)),
                max_buffer_size=max_head_size,
            )
            http2 = settings.HTTP2Settings(
                max_concurrent_streams=http2_max_concurrent_streams, max_headers_size=max_head_size
            )
        except (ImportError, AttributeError, TypeError) as exc:
            raise ServerError(f"Granian {version} is installed, but its seam is not as tested: {exc}") from exc

        self._mailbox = mailbox = Mailbox.current()
        self._loop = _Loop(mailbox)
        self._end: int | str = listener.path or listener.address[1]
        self._on_request = on_request
        self._client_timeout = client_timeout
        self._idle_timeout = idle_timeout
        self._max_body_size = max_body_size
        self._filters = filters
        self._on_websocket = on_websocket
        self._websocket_max_size = websocket_max_size
        self._listener = listener
        self._listening = listener.dup_fd()
        self._has_tls = tls is not None
        self._keepers: list[gevent.Greenlet[..., None]] = []
        self.active: dict[int, tuple[str, str]] = {}
        self.websockets: dict[int, tuple[str, str]] = {}
        self._stopped = Event()
        self._signal.add_cb(lambda: mailbox.post(self._stopped.set))

        accept = self._accept
        post = mailbox.post

        def schedule(watcher: Any) -> None:
            # In a thread of Granian's, which ignores what this returns and cannot take an exception.
            post(accept, watcher)

        # The arguments after the loop serve asyncio tasks, which there are none of.
        self._scheduler = scheduler_type(self._loop, None, None, None, None)
        self._scheduler._schedule_fn = schedule
        self._worker = worker_type(
            1,  # worker_id
            (None, holder_type(self._listening, listener.path is not None, listener.backlog)),
            None,  # ipc
            1,  # threads
            512,  # blocking_threads
            1,  # py_threads
            30,  # py_threads_idle_timeout
            max_connections,  # backpressure
            http,
            None if http == "2" else http1,
            None if http == "1" else http2,
            on_websocket is not None,  # websockets
            None,  # static files
            *_tls_arguments(tls),
            (None, None),  # metrics
        )
        self._serve = getattr(self._worker, "serve_mtr" if listener.path is None else "serve_mtr_uds")

    def start(self) -> None:
        """Begin to accept connections."""
        _redirect_log(self._mailbox)
        self._serve(self._scheduler, self._loop, self._signal)
        if isinstance(self._end, int):
            self._keepers.append(gevent.spawn(self._cut_idle, self._end, self._idle_timeout))
        if self._has_tls:
            self._keepers.append(gevent.spawn(self._mind_files))

    def stop_accepting(self) -> None:
        """Leave new connections to the other processes that accept from the same socket; those there are go on."""
        gevent.killall(self._keepers, block=False)  # one of them would undo this
        with contextlib.closing(open_nowhere()) as nowhere:
            # The front accepts from this number, and finds from now on that there is nobody.
            os.dup2(nowhere.fileno(), self._listening, inheritable=False)

    def stop(self) -> None:
        """Accept no more, close idle connections, let the others finish their request. Returns at once."""
        # First, for afterwards the number that Granian accepts from may be another's.
        gevent.killall(self._keepers, block=False)
        get_hub().loop.run_callback(self._signal.set)
        if isinstance(self._end, int):
            gevent.spawn(self._cut_idle, self._end, min(self._idle_timeout, _STOP_IDLE_SECONDS))

    def wait_stopped(self, timeout: float | None = None) -> bool:
        """Wait until every connection is closed and Granian's threads have ended, after :meth:`stop`.

        Args:
            timeout: seconds to wait at most; None waits for good.

        Returns:
            False if the time ran out.
        """
        return bool(self._stopped.wait(timeout))

    def has_connections(self) -> bool:
        """Whether any client is connected; True where it cannot be told."""
        return not os.path.isdir("/proc/self/fd") or any(True for _ in accepted_at(self._end))

    def reset_connections(self) -> int:
        """Reset every client's connection, whatever it is doing.

        Returns:
            How many there were.
        """
        return reset_all(self._end)

    def _accept(self, watcher: Any) -> None:
        if self._on_websocket is not None and watcher.scope["type"] == "websocket":
            websocket = WebSocketExchange(watcher, self._client_timeout, self._websocket_max_size, self.websockets)
            try:
                self._on_websocket(websocket)
            except BaseException:
                websocket.cut("the server failed")
                raise
            return
        exchange = Exchange(watcher, self._client_timeout, self._filters, self.active, self._max_body_size)
        try:
            self._on_request(exchange)
        except BaseException:
            # The hub reports it.
            exchange.abort()
            exchange.release()
            raise

    def _cut_idle(self, port: int, seconds: float) -> None:
        """Close connections that are idle for so long, again and again.

        Granian does so with those of HTTP/1, but not before it knows that they are, and not over HTTP/2; and it
        never gives up on a client that takes nothing of a response that is whole already.
        """

        def in_use() -> set[tuple[str, int]]:
            # In one step, for they come and go in other threads, too.
            clients = [*list(self.active.values()), *list(self.websockets.values())]
            return {peer_of(client) for client in clients}

        cutter = IdleCutter(port, seconds, in_use)
        while not self._stopped.wait(seconds * _IDLE_SLACK):
            with contextlib.suppress(OSError):  # there is no file left to look with
                cutter.run(pause=lambda: gevent.sleep(0.001))

    def _mind_files(self) -> None:
        """Accept nothing while this process has no files left.

        With TLS Granian counts connections after their handshake only. When there is no file left for the next, it
        does nothing but try again, and does not even give up on the handshakes that hold the files: for good.
        """
        with contextlib.closing(open_nowhere()) as nowhere, contextlib.closing(_Reserve()) as reserve:
            while True:
                if reserve.fill():
                    gevent.sleep(_FILES_SECONDS)
                    continue
                logger.warning("No files are left to this process: new connections wait. See ulimit -n.")
                # Granian accepts from this number, and finds nobody there; but for that it needs a free file.
                os.dup2(nowhere.fileno(), self._listening, inheritable=False)
                reserve.close()
                gevent.sleep(_FILES_SECONDS)
                while not reserve.fill():
                    reserve.close()
                    gevent.sleep(_FILES_SECONDS)
                os.dup2(self._listener.fileno(), self._listening, inheritable=False)
                self._listener.nudge()


class _Loop:
    """The two methods Granian uses of an asyncio event loop."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._run_callback = get_hub().loop.run_callback

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> None:
        """Called in the hub's own thread."""
        self._run_callback(callback, *args)

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Any = None) -> None:
        """Called in a thread of Granian's."""
        self._mailbox.post(callback, *args)


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
        self._inbound: _Inbound | None = None
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
            if self._unwaited >= _SENDS_PER_TURN:
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
        except _ClientTooSlow as exc:
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
        left = _DISCARD_BYTES
        limit = gevent.Timeout(_DISCARD_SECONDS)
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
    def inbound(self) -> _Inbound:
        """The receiving side, made when first needed: most requests have no body."""
        inbound = self._inbound
        if inbound is None:
            inbound = self._inbound = _Inbound(self._proto, self._peer, self._timeout)
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
            raise ValueError(f"the response has a malformed header: {_malformed(headers) or exc}") from None
        self._status = status


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
        malformed = _malformed(headers)
        if malformed:
            raise ValueError(f"the response has a malformed header: {malformed}")
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
        if self._unwaited >= _SENDS_PER_TURN:
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
            if not self._behind:
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
                while self._behind:
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
            if now - self._checked > _PEER_CHECK_SECONDS:
                if self._checked and not is_connected(self._peer):
                    self.cut("the client closed the connection")
                self._checked = now

    def _ask(self) -> None:
        """Have the next message fetched if there is room for it: also the news that the client is gone is one."""
        if (
            self._pending is None
            and self.code is None
            and len(self._ahead) < _AHEAD_MESSAGES
            and self._ahead_size < _LOOKAHEAD
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


class _Inbound:
    """What comes from one request's client: the body in parts, and the news that the client is gone."""

    __slots__ = (
        "_checked",
        "_client",
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
                    limit = _ClientTooSlow(f"the client sent nothing for {self._timeout:g} seconds")
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
        pending.add_done_callback(self._on_done)

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


class _Reserve:
    """Files kept open, to have some when there are no others left."""

    def __init__(self) -> None:
        self._held: list[int] = []

    def fill(self) -> bool:
        """Have them all; return False if there is none left besides."""
        try:
            while len(self._held) < _SPARE_FILES:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as exc:
            if exc.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            return False
        return True

    def close(self) -> None:
        """Give them back."""
        while self._held:
            os.close(self._held.pop())


def _tls_arguments(tls: TLS | None) -> tuple[Any, ...]:
    """Return the arguments of Granian's worker about TLS."""
    if tls is None:
        return False, None, None, None, "tls1.3", None, [], False
    return (
        True,
        tls.certfile,
        tls.keyfile,
        None,  # password
        f"tls{tls.min_version}",
        tls.ca_certs,
        [],
        tls.client_auth_required,
    )


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
