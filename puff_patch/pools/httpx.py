"""Clients of httpx whose connections may be used by any number of greenlets, and interrupted.

httpx's pool is httpcore's, which is written for threads: nobody is interrupted there.  What it leaves to be done
for greenlets, and for many requests on one HTTP/2 connection, is done here, by way of its internals.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Hashable
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gevent
from gevent._hub_local import get_hub_if_exists
from gevent.local import local
from gevent.monkey import get_original

from puff_patch.config import HttpClientOptions
from puff_patch.runtime import native

if TYPE_CHECKING:
    import httpx

_MAX_REDIRECTS = 10
# Seconds that an idle connection is kept; servers give up theirs after five or more.
_KEEPALIVE_EXPIRY = 60.0


def library() -> ModuleType:
    """httpx.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import httpx
    except ImportError as error:
        raise ImportError("the HTTP client needs httpx: pip install 'puff-patch[http]'") from error
    return httpx


def _new_client(options: HttpClientOptions) -> httpx.Client:
    found = library()
    client: httpx.Client = found.Client(
        http1=not options.http2_prior_knowledge,
        http2=options.http2 or options.http2_prior_knowledge,
        headers={"user-agent": options.user_agent} if options.user_agent else None,
        base_url=options.base_url,
        limits=found.Limits(
            max_connections=options.max_connections,
            max_keepalive_connections=options.max_keepalive,
            keepalive_expiry=_KEEPALIVE_EXPIRY,
        ),
        max_redirects=_MAX_REDIRECTS,
        # One client serves everybody: it must not bring one's cookies to another's request.
        cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),
    )
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, found.HTTPTransport):
            _adapt(transport._pool)
    return client


class _Current(local):
    #: What this greenlet's request last went over, and whether it had served others before.
    stream: Any = None
    reused = False


_current = _Current()


def begin_request() -> None:
    """This greenlet's next request goes over another connection, as far as is known."""
    _current.stream, _current.reused = None, False


def went_over_kept_connection() -> bool:
    """Whether this greenlet's request went over a connection that had served others before."""
    return _current.reused


def give_up_request(patience: float) -> None:
    """This greenlet's request got no response in time.

    Args:
        patience: seconds of silence after which its connection is taken for dead, and closed: HTTP/2 would send
            others the same way.
    """
    stream = _current.stream
    if stream is not None and stream.silence() >= patience:
        stream.close()


def _adapt(pool: Any) -> None:
    """Have a pool of httpcore look after its connections without waiting, and without looking at each for each.

    httpcore's own sees an HTTP/2 connection's end only when a request fails, and takes connections in use for kept
    ones, so that near its limits it closes what it needs next.
    """
    pool._network_backend = _backend()

    def assign_requests_to_connections() -> list[Any]:
        kept, closing, idle = [], [], 0
        for connection in pool._connections:
            if connection.is_closed():
                # httpcore thinks so, too, if one of several that wait for it to connect is interrupted.
                if any(request.connection is connection for request in pool._requests):
                    kept.append(connection)
                continue
            ended = _has_ended(connection)
            if not connection.is_idle():
                if ended:
                    connection._connection._connection_error = True  # what is under way may yet end well
                kept.append(connection)
            elif ended or connection.has_expired() or idle >= pool._max_keepalive_connections:
                closing.append(connection)
            else:
                idle += 1
                kept.append(connection)
        pool._connections = kept
        for request in [request for request in pool._requests if request.is_queued()]:
            origin = request.request.url.origin
            for connection in kept:
                if connection.can_handle_request(origin) and connection.is_available():
                    break
            else:
                if len(kept) >= pool._max_connections:
                    spare = next((connection for connection in kept if connection.is_idle()), None)
                    if spare is None:
                        continue
                    kept.remove(spare)
                    closing.append(spare)
                connection = pool.create_connection(origin)
                if pool._http2:
                    _make_interruptible(connection)
                kept.append(connection)
            request.assign_to_connection(connection)
        return closing

    pool._assign_requests_to_connections = assign_requests_to_connections


def _make_interruptible(connection: Any) -> None:
    """If a connection turns out to be one of HTTP/2, whoever waits there may be interrupted."""
    plain, interruptible = _connection_classes()
    if type(connection) is plain:
        connection.__class__ = interruptible
        connection._connection = None


@functools.cache
def _connection_classes() -> tuple[Any, Any]:
    from gevent.lock import RLock, Semaphore
    from h2.errors import ErrorCodes
    from h2.events import DataReceived
    from h2.exceptions import ProtocolError
    from httpcore._sync.connection import HTTPConnection
    from httpcore._sync.http2 import HTTP2Connection

    class Http2(HTTP2Connection):
        _received = 0
        _writes_later: Any = None

        def _read_incoming_data(self, request: Any) -> Any:
            events = super()._read_incoming_data(request)
            self._received += 1
            return events

        def _receive_events(self, request: Any, stream_id: int | None = None) -> None:
            if stream_id is not None:
                super()._receive_events(request, stream_id)
                return
            # Somebody may send no more before the server allows it.  httpcore has it read when its turn has come,
            # even if what it waits for has come before, and then everybody waits for what never comes.
            before = self._received
            with self._read_lock:
                if self._received != before:
                    return
                self._writes_later = gevent.getcurrent()  # others must be able to read meanwhile
                try:
                    super()._receive_events(request)
                finally:
                    self._writes_later = None
            self._write_outgoing_data(request)

        def _write_outgoing_data(self, request: Any) -> None:
            if self._writes_later is not gevent.getcurrent():
                super()._write_outgoing_data(request)

        @property
        def _max_streams_semaphore(self) -> Any:
            return vars(self)["semaphore"]

        @_max_streams_semaphore.setter
        def _max_streams_semaphore(self, semaphore: Any) -> None:
            # threading's, of Python code, loses count if an exception comes to a greenlet that waits in it.
            vars(self)["semaphore"] = Semaphore(semaphore._semaphore._value)

        def _response_closed(self, stream_id: int) -> None:
            # What is given up, the server is told of, so that it sends no more of it; and what has come of it must
            # not count for ever against what the server may send to others.
            state = self._h2_state
            stream = state.streams.get(stream_id)
            if stream is not None and not stream.closed:
                with contextlib.suppress(ProtocolError):  # the connection has ended
                    for event in self._events.get(stream_id, ()):
                        if isinstance(event, DataReceived) and event.flow_controlled_length:
                            state.acknowledge_received_data(event.flow_controlled_length, stream_id)
                    state.reset_stream(stream_id, ErrorCodes.CANCEL)
            super()._response_closed(stream_id)

    class Connection(HTTPConnection):
        @property
        def _connection(self) -> Any:
            return vars(self)["connection"]

        @_connection.setter
        def _connection(self, connection: Any) -> None:
            if type(connection) is HTTP2Connection:
                connection.__class__ = Http2
                connection._read_lock = RLock()  # type: ignore[assignment]
            vars(self)["connection"] = connection

    return HTTPConnection, Connection


def _has_ended(connection: Any) -> bool:
    """Whether it is one of HTTP/2 whose server has closed it; of HTTP/1.1 httpcore sees it."""
    inner: Any = getattr(connection, "_connection", None)
    if not hasattr(inner, "_h2_state"):
        return False
    stream = inner._network_stream
    return isinstance(stream, _stream_class()) and _polled(stream._sock, _poll()[2])


@functools.cache
def _poll() -> tuple[Callable[[], Any], int, int]:
    import select

    # gevent's would look at each idle connection by way of the hub.
    return get_original("select", "poll"), select.POLLIN, getattr(select, "POLLRDHUP", 0) | select.POLLHUP


def _polled(sock: Any, events: int) -> bool:
    descriptor = sock.fileno()
    if descriptor < 0:
        return True
    poll = _poll()[0]()
    poll.register(descriptor, events)
    return bool(poll.poll(0))


@functools.cache
def _stream_class() -> Any:
    from httpcore._backends.sync import SyncStream

    class Stream(SyncStream):
        """A connection that knows how long it has been silent, and is never left in the middle of a frame."""

        _requests = 0
        _asked_at: float | None = None

        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            data: bytes = super().read(max_bytes, timeout)
            self._asked_at = None
            return data

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            if _current.stream is not self:
                _current.stream, _current.reused = self, self._requests > 0
                self._requests += 1
            if buffer and self._asked_at is None:
                self._asked_at = time.monotonic()
            try:
                super().write(buffer, timeout)
            except BaseException:
                self.close()  # what is lost of it was perhaps another request's
                raise

        def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: Any = None) -> Any:
            try:
                stream = super().start_tls(ssl_context, server_hostname, timeout)
            except BaseException:
                self.close()
                raise
            return Stream(stream._sock) if type(stream) is SyncStream else stream

        def get_extra_info(self, info: str) -> Any:
            if info == "is_readable":
                return _polled(self._sock, _poll()[1])
            return super().get_extra_info(info)

        def silence(self) -> float:
            """For how many seconds nothing has come though something was sent."""
            return 0.0 if self._asked_at is None else time.monotonic() - self._asked_at

    return Stream


@functools.cache
def _backend() -> Any:
    from httpcore._backends.sync import SyncBackend

    class Backend(SyncBackend):
        def connect_tcp(self, *args: Any, **kwargs: Any) -> Any:
            stream: Any = super().connect_tcp(*args, **kwargs)
            return _stream_class()(stream._sock)

        def connect_unix_socket(self, *args: Any, **kwargs: Any) -> Any:
            stream: Any = super().connect_unix_socket(*args, **kwargs)
            return _stream_class()(stream._sock)

    return Backend()


# Sockets belong to a hub, so each has clients of its own.
_inherited: list[object] = []


def client_of_hub(key: Hashable, options: HttpClientOptions) -> httpx.Client:
    """The client of this thread's hub under a key; made at the first call, also after a fork.

    Raises:
        ImportError: httpx is not installed.
    """
    hub: Any = gevent.get_hub()
    clients: dict[Hashable, httpx.Client]
    pid, clients = getattr(hub, "_puff_http", (0, {}))
    if pid != os.getpid():
        _inherited.append(clients)  # neither used nor closed: the parent uses the same connections
        clients = {}
        hub._puff_http = os.getpid(), clients
    client: httpx.Client | None = clients.get(key)
    if client is None:
        client = clients[key] = _new_client(options)
        native.at_thread_end(close_clients)
    return client


def close_clients() -> None:
    """Close the clients of this thread's hub; others take their place when they are needed."""
    hub = get_hub_if_exists()
    pid, clients = getattr(hub, "_puff_http", (0, {}))
    while clients and pid == os.getpid():
        clients.popitem()[1].close()
