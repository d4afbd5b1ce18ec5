"""HTTP for plain programs: ``global_http_client`` and ``named_client(name)``, by httpx.

Every request waits in a greenlet and returns an awaitable where an event loop is running.  The client keeps its
connections, HTTP/1.1 and HTTP/2, up to a bound; it keeps no cookies.  It needs ``pip install 'puff-patch[http]'``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gevent
from gevent.local import local
from gevent.monkey import get_original

from puff_patch import json as puff_json
from puff_patch.config import HttpClientOptions, current
from puff_patch.runtime import native
from puff_patch.runtime.calls import at_once, either_way

if TYPE_CHECKING:
    import httpx

_MAX_REDIRECTS = 10
# Seconds that an idle connection is kept; servers give up theirs after five or more.
_KEEPALIVE_EXPIRY = 60.0
# What may be asked for twice without harm.
_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})


class Headers(Mapping[str, bytes]):
    """The headers of a response: bytes by name, in any case; several of one name are joined by commas."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self.raw = [(name.decode("latin-1").lower(), value) for name, value in raw]

    def getlist(self, name: str) -> list[bytes]:
        """All values of one name."""
        name = name.lower()
        return [value for known, value in self.raw if known == name]

    def __getitem__(self, name: str) -> bytes:
        values = self.getlist(name)
        if not values:
            raise KeyError(name)
        return b", ".join(values)

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.raw))

    def __len__(self) -> int:
        return len(dict(self.raw))

    def __repr__(self) -> str:
        return f"Headers({dict(self)})"


class HttpResponse:
    """A response, read whole.

    Attributes:
        status: the status code; ``status_code`` is the same.
        headers: see `Headers`.
        content: the body.
        url: what was asked for, after redirections.
        http_version: ``HTTP/1.1`` or ``HTTP/2``.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status: int = response.status_code
        self.status_code: int = response.status_code
        self.headers = Headers(response.headers.raw)
        self.content: bytes = response.content
        self.url = str(response.url)
        self.http_version: str = response.http_version

    @property
    def ok(self) -> bool:
        """Whether the status is below 400."""
        return self.status < 400

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies that it sets, by name."""
        from http.cookies import CookieError, SimpleCookie

        found: dict[str, str] = {}
        for value in self.headers.getlist("set-cookie"):
            with contextlib.suppress(CookieError):
                found.update(
                    (name, morsel.value) for name, morsel in SimpleCookie(value.decode("latin-1")).items()
                )
        return found

    def header(self, header_name: str) -> bytes | None:
        """One header, or None."""
        return self.headers.get(header_name)

    @at_once
    def body(self) -> Any:
        """The body; an awaitable where an event loop is running, as are the next two.  See also `content`."""
        return self.content

    @at_once
    def text(self) -> Any:
        """The body as text, in the character set of its Content-Type, else UTF-8."""
        return self._response.text

    @at_once
    def json(self) -> Any:
        """The body parsed as JSON.

        Raises:
            puff_patch.json.JSONDecodeError: it is not JSON.
        """
        return puff_json.loadb(self.content)

    def raise_for_status(self) -> HttpResponse:
        """This response, if its status is below 400.

        Raises:
            httpx.HTTPStatusError: it is not.
        """
        if not self.ok:
            self._response.raise_for_status()
        return self

    def __repr__(self) -> str:
        return f"<HttpResponse {self.status} {self.url}>"


class HttpClient:
    """An HTTP client with its own options and connections.

    Args:
        name: which of the configured clients (``[[http_client]]`` in puff.toml).
        options: its options; by default those configured for ``name``.
    """

    def __init__(self, name: str = "default", options: HttpClientOptions | None = None) -> None:
        self.name = name
        self._options = options

    @property
    def settings(self) -> HttpClientOptions:
        """How it is set up, read from the configuration at the first request."""
        if self._options is None:
            self._options = current().http_client(self.name)
        return self._options

    def client(self) -> httpx.Client:
        """httpx's client in this thread, for what is not here (streams, say); for greenlets only."""
        clients = _clients_of_hub()
        client = clients.get(self)
        if client is None:
            client = clients[self] = _new_client(self.settings)
            native.at_thread_end(close_clients)
        return client

    @either_way
    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str | bytes] | None = None,
        json: Any = None,
        body: bytes | str | None = None,
        data: Mapping[str, Any] | None = None,
        files: Any = None,
        timeout_ms: float | None = None,
        *,
        query: Any = None,
        timeout: float | None = None,
        body_bytes: bytes | None = None,
        follow_redirects: bool = True,
    ) -> Any:
        """Send a request and read its response.

        Args:
            method: ``GET``, ``POST``, ...
            url: absolute, or relative to the option ``base_url``.
            headers: its headers, as str or bytes.
            json: to be sent as JSON, by `puff_patch.json`.
            body: to be sent as it is; ``body_bytes`` is the same.
            data: to be sent as a form.
            files: to be sent as a multipart form: ``{name: contents}`` or ``{name: (file name, contents)}``, the
                contents str, bytes or a file.
            timeout_ms: milliseconds that all of it may take, by default the option ``timeout``.
            query: parameters for the URL, as a mapping or pairs.
            timeout: as ``timeout_ms``, in seconds.
            body_bytes: see ``body``.
            follow_redirects: whether a redirection, of which there may be ten, is followed.

        Returns:
            A `HttpResponse`, whatever its status.

        Raises:
            httpx.TimeoutException: the time is over.
            httpx.HTTPError: there is no response for another reason.
            ValueError: more than one of ``json``, ``body`` and ``data`` or ``files``.
        """
        content: Any = body if body is not None else body_bytes
        if sum(given for given in (json is not None, content is not None, bool(data or files))) > 1:
            raise ValueError("a request has one body: json, body, or data and files")
        sent = {**(headers or {})}
        if json is not None:
            content = puff_json.dumpb(json)
            if not any(name.lower() == "content-type" for name in sent):
                sent["content-type"] = "application/json"
        seconds = timeout_ms / 1000 if timeout_ms is not None else timeout or self.settings.timeout
        send = functools.partial(
            self._send,
            self.client(),
            method.upper(),
            url,
            headers=sent,
            content=content,
            data=data,
            files=files,
            params=query,
            follow_redirects=follow_redirects,
        )
        expired = gevent.Timeout(seconds)
        try:
            with expired:
                return send(seconds)
        except gevent.Timeout as error:
            if error is not expired:
                raise
            stream = _current.stream
            if stream is not None and stream.silence() >= self.settings.timeout:
                stream.close()  # it is dead, and HTTP/2 would send others the same way
            httpx = _httpx()
            raise httpx.ReadTimeout(
                f"{method.upper()} {url}: no response within {seconds:g} seconds; give it more with timeout_ms, "
                "or all requests of the client with its option timeout"
            ) from None

    def _send(self, client: httpx.Client, method: str, url: str, seconds: float, **options: Any) -> HttpResponse:
        httpx = _httpx()
        # The whole has its own limit; httpx's are for a connection that has died without telling.
        patience = max(seconds, self.settings.timeout)
        limits = httpx.Timeout(patience, connect=min(seconds, self.settings.connect_timeout), pool=None)
        repeatable = method in _REPEATABLE and not options["files"]
        while True:
            _current.stream, _current.reused = None, False
            try:
                return HttpResponse(client.request(method, url, timeout=limits, **options))
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                # A connection that was kept may have been closed by its server while the request was on its way.
                if not repeatable or not _current.reused:
                    raise
                repeatable = False

    def json(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str | bytes] | None = None,
        json: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """Send JSON; as `request`, but with ``timeout`` in milliseconds."""
        return self.request(method, url, headers, json, timeout_ms=timeout)

    def get(self, url: str, **kwargs: Any) -> Any:
        """`request` with GET."""
        return self.request("GET", url, **kwargs)

    def post(self, url: str, **kwargs: Any) -> Any:
        """`request` with POST."""
        return self.request("POST", url, **kwargs)

    def put(self, url: str, **kwargs: Any) -> Any:
        """`request` with PUT."""
        return self.request("PUT", url, **kwargs)

    def patch(self, url: str, **kwargs: Any) -> Any:
        """`request` with PATCH."""
        return self.request("PATCH", url, **kwargs)

    def delete(self, url: str, **kwargs: Any) -> Any:
        """`request` with DELETE."""
        return self.request("DELETE", url, **kwargs)

    def head(self, url: str, **kwargs: Any) -> Any:
        """`request` with HEAD."""
        return self.request("HEAD", url, **kwargs)

    def options(self, url: str, **kwargs: Any) -> Any:
        """`request` with OPTIONS."""
        return self.request("OPTIONS", url, **kwargs)

    def __repr__(self) -> str:
        return f"<HttpClient {self.name}>"


def _httpx() -> ModuleType:
    try:
        import httpx
    except ImportError as error:
        raise ImportError("the HTTP client needs httpx: pip install 'puff-patch[http]'") from error
    return httpx


def _new_client(options: HttpClientOptions) -> httpx.Client:
    library = _httpx()
    client: httpx.Client = library.Client(
        http1=not options.http2_prior_knowledge,
        http2=options.http2 or options.http2_prior_knowledge,
        headers={"user-agent": options.user_agent} if options.user_agent else None,
        base_url=options.base_url,
        limits=library.Limits(
            max_connections=options.max_connections,
            max_keepalive_connections=options.max_keepalive,
            keepalive_expiry=_KEEPALIVE_EXPIRY,
        ),
        max_redirects=_MAX_REDIRECTS,
        # One client serves everybody: it must not bring one's cookies to another's request.
        cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),
    )
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, library.HTTPTransport):
            _adapt(transport._pool)
    return client


# What httpcore leaves to be done for greenlets and for HTTP/2.


class _Current(local):
    #: What this greenlet's request last went over, and whether it had served others before.
    stream: Any = None
    reused = False


_current = _Current()


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
                connection = _interruptible(pool.create_connection(origin))
                kept.append(connection)
            request.assign_to_connection(connection)
        return closing

    pool._assign_requests_to_connections = assign_requests_to_connections


def _interruptible(connection: Any) -> Any:
    """The same connection; if it turns out to be one of HTTP/2, whoever waits for a stream may be interrupted."""
    plain, interruptible = _connection_classes()
    if type(connection) is plain:
        connection.__class__ = interruptible
        connection._connection = None
    return connection


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


# Sockets belong to a hub, so each has its own client of a name; a forked child makes new ones.
_inherited: list[object] = []


def _clients_of_hub() -> dict[HttpClient, httpx.Client]:
    hub: Any = gevent.get_hub()
    pid, clients = getattr(hub, "_puff_http", (0, {}))
    if pid != os.getpid():
        _inherited.append(clients)  # neither used nor closed: the parent uses the same connections
        clients = {}
        hub._puff_http = os.getpid(), clients
    return clients


def close_clients() -> None:
    """Close the connections of this thread's clients; they go on with new ones."""
    clients = _clients_of_hub()
    while clients:
        _, client = clients.popitem()
        client.close()


#: The client ``default``.
global_http_client = HttpClient()


@functools.cache
def named_client(name: str = "default") -> HttpClient:
    """A client by its name; it connects with its first request.

    Args:
        name: which of the configured clients (``[[http_client]]`` in puff.toml).
    """
    return global_http_client if name == "default" else HttpClient(name)
