"""The seam to Granian, the HTTP front written in Rust. No other module touches Granian.

Granian parses HTTP on its own threads and calls a ``CallbackScheduler`` for each request. It expects asyncio
behind it; here a hub stands there instead: the request goes through the hub's mailbox, and what Granian
wants an event loop for are only ``call_soon`` and ``call_soon_threadsafe``. The ASGI seam is used, and not
RSGI or WSGI, because only it streams with backpressure in both directions.

A request for an ASGI application goes from Granian's thread straight to the loop of the asyncio thread, and so do
the futures awaited there: see `AsyncioSide` and `_Loop`. What is said to Granian of one request stands in
`exchange`, `exchange_async` and `exchange_websocket`.

All of this is internal to Granian, so the version is checked and ``tests/server/test_front.py`` holds the
contract. Message formats: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import importlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import gevent
from gevent import get_hub
from gevent.event import Event

from puff_patch.runtime import Mailbox
from puff_patch.server.connections import IdleCutter, accepted_at, peer_of, reset_all
from puff_patch.server.exchange import Exchange
from puff_patch.server.exchange_async import AsyncExchange, AsyncWebSocket
from puff_patch.server.exchange_websocket import WebSocketExchange
from puff_patch.server.filters import Filters
from puff_patch.server.listener import Listener, open_nowhere
from puff_patch.server.options import ServerError
from puff_patch.server.tls import TLS

TESTED_VERSIONS = ((2, 8, 7), (2, 9))
"""Granian from the first version on, below the second. Before 2.8.7 a response that failed midway looked whole."""

logger = logging.getLogger("puff_patch.server")


# How often one looks whether there are files left, and how many must be.
_FILES_SECONDS = 0.5
_SPARE_FILES = 16
# How much longer than its time-out an idle connection may last, as a share of it.
_IDLE_SLACK = 0.25
# The same while stopping: Python's h2, for one, never answers the PING of a farewell, and the front waits for it.
_STOP_IDLE_SECONDS = 5.0


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
        idle_timeout: seconds that a connection may be without a request.
        max_head_size: bytes of a request's line and headers.
        max_body_size: bytes of a request's body, None for no limit.
        http2_max_concurrent_streams: requests open at a time on one HTTP/2 connection.
        tls: serve TLS with these files.
        filters: what every response goes through.
        on_websocket: called in the hub with each handshake of a WebSocket; it must not block.  None turns
            WebSockets off: their handshakes then are plain requests.
        websocket_max_size: bytes of a message of a WebSocket's client; one with more closes it.
        asgi: the side of the ASGI application, if there is one.

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
        asgi: AsyncioSide | None = None,
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
        self._asgi = asgi
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
        self._scheduler._schedule_fn = schedule if asgi is None else self._schedule_on_either(asgi, schedule)
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
            on_websocket is not None or asgi is not None,  # websockets
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
            asgi.on_websocket(AsyncWebSocket(watcher, asgi.loop, self._client_timeout, self.websockets))
        else:
            asgi.on_request(
                AsyncExchange(
                    watcher, asgi.loop, self._client_timeout, self._filters, self.active, self._max_body_size
                )
            )

    def _accept(self, watcher: Any) -> None:
        if watcher.scope["type"] == "websocket":
            assert self._on_websocket is not None
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
