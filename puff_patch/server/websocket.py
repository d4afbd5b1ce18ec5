"""WebSockets for sync code: each runs its handler on a greenlet, which receives and sends as it likes.

See RFC 6455; the messages themselves go through `puff_patch.server.exchange_websocket`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from http.cookies import _unquote as unquote_cookie
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

import gevent
from gevent import GreenletExit

from puff_patch.runtime import WarmPool
from puff_patch.server.exchange import Exchange
from puff_patch.server.exchange_websocket import WebSocketClosed, WebSocketExchange, WebSocketTimeout

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from puff_patch.server.apps import WebSocketHandler
    from puff_patch.server.filters import Filters
    from puff_patch.server.options import ServerOptions

__all__ = ["WebSocket", "WebSocketClosed", "WebSocketTimeout", "WebSockets"]

logger = logging.getLogger("puff_patch.server")

_DEFAULT_PORTS = {"http": 80, "https": 443}
_PARAMETER = re.compile(r"\{([A-Za-z_]\w*)\}")


class WebSocket:
    """One WebSocket, as its handler sees it.

    The handler answers the handshake with :meth:`accept` or :meth:`refuse`; the first message received or sent
    accepts it, too.  When the handler returns, the WebSocket is closed with 1000, when it fails, with 1011.

    Any number of greenlets may send, and one at a time receive.  Iterating over it receives until it is closed; as
    a context manager it is closed at the end of the block.

    Attributes:
        path: the path of the URL, decoded.
        path_params: what stands in it for the parameters of the handler's path.
        query: the parameters of the query; of one that comes several times the last.
        query_string: the query as it came.
        headers: of the handshake by name in lower case; the values of one that comes several times joined by
            commas.
        cookies: by name.
        client: host and port of the client; ``("", 0)`` on a Unix socket.
        subprotocols: what the client offers, the one it likes best first.
        subprotocol: what was chosen of them; None without one.
        scope: the ASGI scope of the handshake, for what is not here.
    """

    __slots__ = ("__weakref__", "_exchange", "_going", "_released", "path_params", "subprotocol")

    def __init__(self, exchange: WebSocketExchange, path_params: Mapping[str, str]) -> None:
        self._exchange = exchange
        self._going = False
        self._released: Callable[[], object] | None = None
        self.path_params = path_params
        self.subprotocol: str | None = None

    def __repr__(self) -> str:
        state = "open" if not self.closed else f"closed {self._exchange.code}"
        return f"<WebSocket {self.path} {state}>"

    @property
    def scope(self) -> dict[str, Any]:
        return self._exchange.scope

    @property
    def path(self) -> str:
        path: str = self.scope["path"]
        return path

    @property
    def query_string(self) -> str:
        query: bytes = self.scope["query_string"]
        return query.decode("latin-1")

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.query_string, keep_blank_values=True))

    @property
    def headers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for raw_name, raw_value in self.scope["headers"]:
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
            found[name] = f"{found[name]}, {value}" if name in found else value
        return found

    @property
    def cookies(self) -> dict[str, str]:
        found = {}
        for raw_name, raw_value in self.scope["headers"]:
            if raw_name == b"cookie":
                for pair in raw_value.decode("latin-1").split(";"):
                    name, equals, value = pair.strip().partition("=")
                    if equals and name not in found:
                        found[name] = unquote_cookie(value)
        return found

    @property
    def client(self) -> tuple[str, int]:
        host, port = self.scope["client"]
        return host, int(port or 0)

    @property
    def subprotocols(self) -> list[str]:
        offered: list[str] = self.scope["subprotocols"]
        return offered

    @property
    def accepted(self) -> bool:
        """Whether the handshake was answered with yes."""
        return self._exchange.status == 101

    @property
    def closed(self) -> bool:
        """Whether either side has closed it, or it was refused."""
        return self._exchange.code is not None

    @property
    def close_code(self) -> int | None:
        """Why it is closed, see `WebSocketClosed`; None while it is open."""
        return self._exchange.code

    @property
    def close_reason(self) -> str:
        """The same in words."""
        return self._exchange.reason

    def accept(self, subprotocol: str | None = None) -> None:
        """Answer the handshake with yes; do nothing if that is done.

        Args:
            subprotocol: one of ``subprotocols``; None for none.

        Raises:
            ValueError: the client does not offer the subprotocol.
            WebSocketClosed: it was refused, or the client is gone.
        """
        exchange = self._exchange
        if exchange.code is not None:
            raise WebSocketClosed(exchange.code, exchange.reason)
        if exchange.status:
            return
        if subprotocol is not None and subprotocol not in self.subprotocols:
            raise ValueError(f"the client offers no subprotocol {subprotocol!r}, but {self.subprotocols}")
        if self._going:
            self.refuse(503)
            raise WebSocketClosed(1001, "the server stops")
        self.subprotocol = subprotocol
        exchange.accept(subprotocol)

    def refuse(self, status: int = 403, body: str | bytes = "", headers: Iterable[tuple[str, str]] = ()) -> None:
        """Answer the handshake with a plain HTTP response instead.

        Args:
            status: the status code, 400 to 599 in general.
            body: the body, a text or bytes; the phrase of the status by default.
            headers: names and values.

        Raises:
            RuntimeError: the handshake is answered already.
            ValueError: a header is malformed.
        """
        if self._exchange.status:
            raise RuntimeError("the handshake is answered already: close() ends an accepted WebSocket")
        wire = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        _refuse(self._exchange, status, body, wire)

    def receive(self, timeout: float | None = None) -> str | bytes:
        """Return the next message: str if it is text, bytes if it is binary.

        Args:
            timeout: seconds to wait at most; None waits until it is closed.

        Raises:
            WebSocketClosed: it is closed, and every message that came before has been received.
            WebSocketTimeout: nothing came in time; it is still open.
        """
        if not self._exchange.status:
            self.accept()
        if self._released is not None and not self._exchange.has_message:
            self._released()
        return self._exchange.receive(timeout)

    def receive_text(self, timeout: float | None = None) -> str:
        """Return the next message, which must be text; see `receive`.

        Raises:
            WebSocketClosed: it is closed, or the message was binary, and it is closed with 1003 for that.
            WebSocketTimeout: nothing came in time.
        """
        message = self.receive(timeout)
        if isinstance(message, str):
            return message
        raise self._unwanted(1003, "only text is taken here")

    def receive_bytes(self, timeout: float | None = None) -> bytes:
        """Return the next message, which must be binary; see `receive`.

        Raises:
            WebSocketClosed: it is closed, or the message was text, and it is closed with 1003 for that.
            WebSocketTimeout: nothing came in time.
        """
        message = self.receive(timeout)
        if isinstance(message, bytes):
            return message
        raise self._unwanted(1003, "only binary messages are taken here")

    def receive_json(self, timeout: float | None = None) -> Any:
        """Return the value of the next message, which must be JSON, as text or binary; see `receive`.

        Raises:
            WebSocketClosed: it is closed, or the message was no JSON, and it is closed with 1007 for that.
            WebSocketTimeout: nothing came in time.
        """
        message = self.receive(timeout)
        try:
            return json.loads(message)
        except (ValueError, RecursionError):
            raise self._unwanted(1007, "the message is no JSON") from None

    def send(self, message: str | bytes, timeout: float | None = None) -> None:
        """Send a message, in one piece whoever else sends.

        It returns at once, and the message is sent in the background, unless 64 KiB wait already for a client that
        is too slow to take them: then this waits.

        Args:
            message: a str is sent as text, anything bytes-like as binary.
            timeout: seconds to wait at most, 0 not at all; None waits for the server's ``client_timeout`` and then
                cuts the connection.

        Raises:
            WebSocketClosed: it is closed.
            WebSocketTimeout: ``timeout`` is over; the message is not sent, and the WebSocket still open.
            TypeError: it is neither a str nor bytes-like.
            UnicodeEncodeError: half a surrogate pair is no text.
        """
        if not isinstance(message, (str, bytes)):
            if not isinstance(message, (bytearray, memoryview)):
                raise TypeError(f"a message is str or bytes, not {type(message).__name__}")
            message = bytes(message)
        if not self._exchange.status:
            self.accept()
        self._exchange.send(message, timeout)

    def send_json(self, value: Any, timeout: float | None = None) -> None:
        """Send a value as JSON in a text message; see `send`."""
        self.send(json.dumps(value, separators=(",", ":"), ensure_ascii=False), timeout)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close it after what was sent so far, in the background; refuse it with 403 if it was not accepted.

        Do nothing if it is closed.  Whoever is receiving or sending gets `WebSocketClosed`.

        Args:
            code: 1000, 1001, 1003, 1007 to 1014, or 3000 to 4999 for codes of one's own; see RFC 6455, 7.4.
            reason: a word on it, up to 123 bytes of UTF-8.

        Raises:
            ValueError: the code may not be sent, or the reason is too long.
        """
        if not (code in (1000, 1001, 1002, 1003) or 1007 <= code <= 1014 or 3000 <= code <= 4999):
            raise ValueError(f"{code} is no code that can be sent: take 1000, or 3000 to 4999 for one of your own")
        if len(reason.encode()) > 123:
            raise ValueError("the reason may have 123 bytes at the most")
        if self._exchange.status:
            self._exchange.close(code, reason)
        elif not self.closed:
            self.refuse()

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called, on a greenlet of its own, once this is closed by either side.

        It is for a handler that waits for something else than its client: to end that wait.
        """
        self._exchange.on_close(callback)

    def on_wait(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called whenever a receive is going to wait: to give back what waits for nothing.

        A WebSocket may be idle for hours; a database connection should not.
        """
        self._released = callback

    def __iter__(self) -> Iterator[str | bytes]:
        while True:
            try:
                yield self.receive()
            except WebSocketClosed:
                return

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(1000 if kind is None else 1011)

    def _unwanted(self, code: int, reason: str) -> WebSocketClosed:
        self.close(code, reason)
        return WebSocketClosed(self._exchange.code or code, self._exchange.reason)

    def _go_away(self) -> None:
        self._going = True
        if self.accepted:
            self.close(1001, "the server stops")


class WebSockets:
    """The WebSockets of a server: checks each handshake and runs its handler on a warm greenlet.

    Args:
        handlers: by path; ``{name}`` in a path stands for any one segment of it, see ``WebSocket.path_params``.
        options: those of the server.
        filters: those of the server; each sees a handshake as a request of GET.
        limit: how many may be open at a time, if that is less than ``max_websockets``.

    Raises:
        ValueError: two parameters of a path have one name, or a brace stands where there is no parameter.
    """

    def __init__(
        self,
        handlers: Mapping[str, WebSocketHandler],
        options: ServerOptions,
        filters: Filters | None = None,
        *,
        limit: int | None = None,
    ) -> None:
        patterns = [path for path in handlers if "{" in path or "}" in path]
        self._patterns = [(_pattern(path), handlers[path]) for path in patterns]
        self._handlers = {path: handler for path, handler in handlers.items() if path not in patterns}
        self._options = options
        self._filters = filters
        self._pool = WarmPool(limit or options.max_websockets, name="websocket")
        self._open: set[WebSocket] = set()
        self._closing = False

    @property
    def running(self) -> int:
        """How many handlers run."""
        return len(self._open)

    def find(self, scope: dict[str, Any]) -> tuple[WebSocketHandler, dict[str, str]] | None:
        """Return whose path a scope has, with the parameters in it; None if nobody's."""
        raw: bytes = scope["raw_path"]
        handler = self._handlers.get(unquote(raw.decode("latin-1")))
        if handler is not None:
            return handler, {}
        for pattern, handler in self._patterns:
            match = pattern.fullmatch(raw.decode("latin-1"))
            if match is not None:
                return handler, {name: unquote(value) for name, value in match.groupdict().items()}
        return None

    def begin(self, exchange: WebSocketExchange, handler: WebSocketHandler, path_params: dict[str, str]) -> None:
        """Take a handshake: run its handler, or refuse it.  Call it in the hub."""
        if self._is_answered(exchange):
            return
        scope = exchange.scope
        if sum(name == b"host" for name, _ in scope["headers"]) != 1 or not _header(scope, b"host"):
            gevent.spawn(self._answer, exchange, _refuse, exchange, 400)
        elif self._closing or len(self._open) >= self._pool.max_greenlets:
            gevent.spawn(self._answer, exchange, _refuse, exchange, 503)
        elif not self._is_welcome(scope):
            gevent.spawn(self._answer, exchange, self._refuse_origin, exchange)
        else:
            websocket = WebSocket(exchange, path_params)
            self._open.add(websocket)
            self._pool.submit(self._run, websocket, handler)

    def refuse(self, exchange: WebSocketExchange, status: int = 404) -> None:
        """Refuse a handshake that no handler is for."""
        if not self._is_answered(exchange):
            gevent.spawn(self._answer, exchange, _refuse, exchange, status)

    def go_away(self) -> None:
        """Close every WebSocket with 1001, refuse further ones with 503; their handlers go on to their end."""
        self._closing = True
        for websocket in list(self._open):
            websocket._go_away()

    def kill(self, timeout: float) -> int:
        """Raise GreenletExit in every handler that still runs; return how many that were.

        Args:
            timeout: seconds to wait at most.
        """
        return self._pool.kill(timeout)

    def close(self) -> None:
        """End what is kept for further WebSockets, after the last one."""
        self._pool.close()

    def _is_answered(self, exchange: WebSocketExchange) -> bool:
        """Show a handshake to the filters; say whether one of them answers it."""
        # It is a request of GET, and filters look at requests.
        exchange.scope["method"] = "GET"
        responder = None if self._filters is None else self._filters.begin(exchange.scope)
        if responder is not None:
            gevent.spawn(self._answer, exchange, responder, exchange)
        return responder is not None

    def _is_welcome(self, scope: dict[str, Any]) -> bool:
        """Whether a handshake comes from a web site that may, or from no browser."""
        origin, host = _header(scope, b"origin"), _header(scope, b"host")
        if not origin:
            return not self._options.websocket_require_origin
        allowed = self._options.websocket_origins
        return origin in allowed or "*" in allowed or _same_host(origin, host)

    def _refuse_origin(self, exchange: WebSocketExchange) -> None:
        origin, host = _header(exchange.scope, b"origin"), _header(exchange.scope, b"host")
        if origin:
            logger.warning("Refused a WebSocket of origin %r to host %r: see websocket_origins", origin, host)
        body = "This origin may not open a WebSocket here.\n" if origin else "The header Origin is missing.\n"
        _refuse(exchange, 403, body)

    def _run(self, websocket: WebSocket, handler: WebSocketHandler) -> None:
        exchange = websocket._exchange
        try:
            handler(websocket)
        except WebSocketClosed:
            if not websocket.closed:
                self._fail(websocket)  # of another WebSocket
        except GreenletExit:
            self._end(websocket, 1001 if self._closing else 1011, 503)
            raise
        except BaseException:  # noqa: BLE001 - logged with its traceback; one handler must not end the server
            self._fail(websocket)
        else:
            self._end(websocket, 1000, 403)
        finally:
            self._open.discard(websocket)
            self._release(exchange)

    def _answer(self, exchange: WebSocketExchange, responder: Callable[..., object], *args: Any) -> None:
        try:
            responder(*args)
        finally:
            self._release(exchange)

    def _fail(self, websocket: WebSocket) -> None:
        logger.exception("The WebSocket %s failed", websocket.path)
        self._end(websocket, 1011, 500)

    def _end(self, websocket: WebSocket, code: int, status: int) -> None:
        if websocket.accepted:
            websocket.close(code)
        elif not websocket.closed:
            _refuse(websocket._exchange, status)

    def _release(self, exchange: WebSocketExchange) -> None:
        try:
            exchange.release()
        finally:
            if self._filters is not None:
                self._filters.end(exchange.scope, exchange.status, 0)


def no_application(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """A WSGI application for servers that serve WebSockets only."""
    start_response("404 Not Found", [("Content-Type", "text/plain")])
    return [b"Not Found\n"]


def upgrade_required(exchange: Exchange) -> None:
    """Answer a plain request for the path of a WebSocket."""
    headers = [(b"upgrade", b"websocket"), (b"content-type", b"text/plain")]
    exchange.respond(426, headers, b"" if exchange.scope["method"] == "HEAD" else b"A WebSocket is served here.\n")


def _header(scope: dict[str, Any], wanted: bytes) -> str:
    for name, value in scope["headers"]:
        if name == wanted:
            text: str = value.decode("latin-1")
            return text
    return ""


def _refuse(
    exchange: WebSocketExchange,
    status: int,
    body: str | bytes = "",
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    wire = list(headers)
    if not body and status in HTTPStatus._value2member_map_:
        body = HTTPStatus(status).phrase + "\n"
    if not any(name == b"content-type" for name, _ in wire):
        wire.append((b"content-type", b"text/plain; charset=utf-8"))
    exchange.respond(status, wire, body.encode() if isinstance(body, str) else body)


def _pattern(path: str) -> re.Pattern[str]:
    parts = _PARAMETER.split(path)
    # Texts and names take turns.
    texts, names = parts[::2], parts[1::2]
    if len(set(names)) < len(names) or any(brace in text for brace in "{}" for text in texts):
        raise ValueError(f"the path of a WebSocket is like /chat/{{room}}, unlike {path!r}")
    return re.compile(
        "".join(f"(?P<{part}>[^/]+)" if index % 2 else re.escape(part) for index, part in enumerate(parts))
    )


def _same_host(origin: str, host: str) -> bool:
    """Whether a web site's origin is the host that it has sent its request to."""
    try:
        site = urlsplit(origin)
        default = _DEFAULT_PORTS.get(site.scheme)
        own = urlsplit(f"//{host}")
        return bool(site.hostname) and (site.hostname, site.port or default) == (own.hostname, own.port or default)
    except ValueError:
        return False
