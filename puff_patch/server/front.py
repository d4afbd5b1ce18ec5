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
import importlib
import logging
import os
import re
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import gevent
from gevent import get_hub
from gevent.event import Event
from gevent.hub import Waiter

from puff_patch.runtime import Mailbox
from puff_patch.server.connections import accepted_at, is_connected, reset_all
from puff_patch.server.filters import Encoder, Filters
from puff_patch.server.listener import Listener, open_nowhere
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


class Front:
    """Granian serving HTTP on a listener, in threads of its own, for the hub of the calling thread.

    Args:
        listener: the listening socket; the front accepts on a duplicate, so closing it stays with the caller.
        on_request: called in the hub with each request; it must not block.
        http: ``"1"``, ``"2"`` or ``"auto"``.
        max_connections: connections open at a time; further ones are not accepted until one closes.
        client_timeout: seconds that a client may leave a request waiting for it.
        filters: what every response goes through.

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
        self._listening = listener.dup_fd()
        self._on_request = on_request
        self._client_timeout = client_timeout
        self._filters = filters
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
            None if http == "2" else settings.HTTP1Settings(),
            None if http == "1" else settings.HTTP2Settings(),
            False,  # websockets
            None,  # static files
            *(False, None, None, None, "1.3", None, [], False),  # TLS
            (None, None),  # metrics
        )
        self._serve = getattr(self._worker, "serve_mtr" if listener.path is None else "serve_mtr_uds")

    def start(self) -> None:
        """Begin to accept connections."""
        _redirect_log(self._mailbox)
        self._serve(self._scheduler, self._loop, self._signal)

    def stop_accepting(self) -> None:
        """Leave new connections to the other processes that accept from the same socket; those there are go on."""
        with contextlib.closing(open_nowhere()) as nowhere:
            # The front accepts from this number, and finds from now on that there is nobody.
            os.dup2(nowhere.fileno(), self._listening, inheritable=False)

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
        self._on_request(Exchange(watcher, self._client_timeout, self._filters))


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
