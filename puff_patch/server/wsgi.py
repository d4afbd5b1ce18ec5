"""WSGI on the front: one request of the front's, run through a WSGI application. See PEP 3333."""

from __future__ import annotations

import io
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from gevent import GreenletExit

from puff_patch.server.body import RequestBody
from puff_patch.server.exchange import BodyTooLarge, ClientDisconnected, Exchange
from puff_patch.server.headers import CLOSE, ERROR_BODY, HOP_BY_HOP

if TYPE_CHECKING:
    from _typeshed import OptExcInfo, SupportsRead
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

logger = logging.getLogger("puff_patch.server")

# A body that is wholly in memory goes to the front in one piece up to here, which frees the greenlet at once;
# a longer one goes in pieces, as the client takes them, so that slow clients do not fill the memory.
_WHOLE_BODY = 1024 * 1024
_PIECE = 64 * 1024
_FILE_BLOCK = 64 * 1024

_LIST_ITERATORS: tuple[type, ...] = (type(iter([])), type(iter(())))

_NOTHING_SENT, _PART_SENT, _WHOLE_SENT = "nothing sent", "part sent", "whole sent"

# Header names as environ keys and on the wire; None for one to leave out. Clients and applications choose
# the names, so the tables stop growing at a size no honest set of names reaches.
_TABLE_SIZE = 1024
_environ_keys: dict[bytes, str | None] = {
    b"content-type": "CONTENT_TYPE",
    b"content-length": "CONTENT_LENGTH",
}
_wire_names: dict[str, bytes | None] = {}


class WSGIHandler:
    """Runs a WSGI application for the front's requests; call it with an exchange, in a greenlet.

    Args:
        app: the application.
        address: host and port the server listens on, ``("", 0)`` for a Unix socket.
        multiprocess: whether other processes run the application as well.

    Attributes:
        closing: set it to have every further HTTP/1 response ask the client to close its connection.
        http2_running: how many requests of HTTP/2 run now.
        http1_begun: how many requests of HTTP/1 have begun so far.
    """

    def __init__(self, app: WSGIApplication, address: tuple[str, int], *, multiprocess: bool = False) -> None:
        self.app = app
        self.closing = False
        self.http2_running = 0
        self.http1_begun = 0
        host, port = address
        if host in ("", "0.0.0.0", "::"):
            host = socket.gethostname()
        self._environ: WSGIEnvironment = {
            "SCRIPT_NAME": "",
            "SERVER_NAME": host,
            "SERVER_PORT": str(port or 80),
            "SERVER_SOFTWARE": f"puff_patch/{metadata.version('puff-patch')}",
            "GATEWAY_INTERFACE": "CGI/1.1",
            "wsgi.version": (1, 0),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": multiprocess,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,
            "wsgi.file_wrapper": FileWrapper,
        }

    def __call__(self, exchange: Exchange) -> None:
        """Run one request to its end. Nothing but ``GreenletExit`` comes out of it."""
        scope = exchange.scope
        http2 = scope["http_version"] == "2"
        if http2:
            self.http2_running += 1
        else:
            self.http1_begun += 1
        response = _Response(self, exchange)
        try:
            environ = self._build_environ(exchange)
            body = environ["wsgi.input"]
            try:
                response.run(self.app, environ)
            except BodyTooLarge:
                logger.debug("The body of %s %s is too large", scope["method"], scope["path"])
            if type(body) is RequestBody and not body.ended and exchange.is_client_sending:
                exchange.discard_request()
        except ClientDisconnected:
            # Nobody is there to tell; the front cleans up.
            exchange.abort()
            logger.debug("The client left during %s %s", scope["method"], scope["path"])
        except GreenletExit:
            exchange.abort()
            raise
        except BaseException:  # noqa: BLE001 - logged with its traceback; one request must not end the server
            response.fail(scope)
        finally:
            exchange.release()
            if http2:
                self.http2_running -= 1

    def _build_environ(self, exchange: Exchange) -> WSGIEnvironment:
        scope = exchange.scope
        environ = self._environ.copy()
        path: bytes = scope["raw_path"]
        # PEP 3333: bytes as latin-1 "unicode strings". The scope's own "path" is decoded as UTF-8, with loss.
        environ["PATH_INFO"] = (unquote_to_bytes(path) if b"%" in path else path).decode("latin-1")
        environ["QUERY_STRING"] = scope["query_string"].decode("latin-1")
        environ["REQUEST_METHOD"] = scope["method"]
        environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = scope["client"]
        version = scope["http_version"]
        environ["SERVER_PROTOCOL"] = (
            "HTTP/1.1" if version == "1.1" else "HTTP/2.0" if version == "2" else "HTTP/1.0"
        )
        environ["wsgi.url_scheme"] = scheme = scope["scheme"]
        if scheme == "https":
            environ["HTTPS"] = "on"
        keys = _environ_keys
        for name, value in scope["headers"]:
            try:
                key = keys[name]
            except KeyError:
                key = _environ_key(name)
            if key is None:
                continue
            text = value.decode("latin-1")
            if key in environ:
                text = _joined(key, environ[key], text)
            environ[key] = text
        if not environ.get("HTTP_HOST", "-"):
            # The front adds an empty one to a request of HTTP/1.0 that has none.
            del environ["HTTP_HOST"]
        length = environ.get("CONTENT_LENGTH")
        if length:
            environ["wsgi.input"] = RequestBody(exchange.receive, int(length))
        elif version == "2" or "HTTP_TRANSFER_ENCODING" in environ:
            # HTTP/2 does not say beforehand whether there is a body.
            environ["wsgi.input"] = RequestBody(exchange.receive)
        else:
            environ["wsgi.input"] = io.BytesIO()
        return environ


class _Response:
    """The answer to one request, from ``start_response`` to the last byte."""

    __slots__ = ("_bodyless", "_exchange", "_handler", "_head", "_headers", "_length", "_state", "_status", "sent")

    def __init__(self, handler: WSGIHandler, exchange: Exchange) -> None:
        self._handler = handler
        self._exchange = exchange
        self._head = head = exchange.scope["method"] == "HEAD"
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._length: int | None = None
        self._bodyless = head
        self._state = _NOTHING_SENT
        self.sent = 0

    def run(self, app: WSGIApplication, environ: WSGIEnvironment) -> None:
        """Call the application and send what it returns."""
        result = app(environ, self.start_response)
        try:
            iterator = iter(result)
            if type(iterator) in _LIST_ITERATORS and self._state is _NOTHING_SENT:
                self._send_list(list(iterator))
            else:
                for part in iterator:
                    self.write(part)
                    if self._bodyless and self._state is _WHOLE_SENT:
                        break
            self._finish()
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        """PEP 3333's ``start_response``."""
        if exc_info is not None:
            try:
                if self._state is not _NOTHING_SENT and exc_info[1] is not None:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # no reference cycle through the traceback
        elif self._status:
            raise AssertionError("start_response was called a second time without exc_info")
        code = int(status[:3])
        if not 200 <= code <= 999:
            raise ValueError(f"not a status that an application can send: {status!r}")
        length: int | None = None
        last = self._handler.closing
        wire: list[tuple[bytes, bytes]] = []
        for name, value in headers:
            try:
                encoded = _wire_names[name]
            except KeyError:
                encoded = _wire_name(name)
            if encoded is None:
                last = last or (name.lower() == "connection" and value.lower() == "close")
                continue
            if encoded == b"content-length":
                if length is not None and length != int(value):
                    raise ValueError(f"two different values of Content-Length: {length} and {value}")
                length = int(value)
                continue
            wire.append((encoded, value.encode("latin-1")))
        self._bodyless = self._head or code in (204, 304)
        if length is not None and code != 204:
            if length < 0:
                raise ValueError(f"Content-Length is negative: {length}")
            wire.append((b"content-length", b"%d" % length))
        if last and self._exchange.scope["http_version"] != "2":
            wire.append(CLOSE)
        self._status = code
        self._headers = wire
        self._length = length
        return self.write

    def write(self, data: bytes) -> None:
        """Send a part of the body: PEP 3333's ``write()``, and what each part of an iterable goes through."""
        if not isinstance(data, bytes):
            raise TypeError(f"a WSGI application must give bytes as its body, not {type(data).__name__}")
        size = len(data)
        if not size:
            return
        if self._state is _NOTHING_SENT:
            self._check_status()
            if self._bodyless:
                self._respond(b"")
                return
            if self._length == size <= _WHOLE_BODY:
                self._respond(data)
                return
        elif self._bodyless:
            return
        if self._length is not None and self.sent + size > self._length:
            raise ValueError(f"the body is longer than its Content-Length of {self._length} bytes")
        if self._state is _NOTHING_SENT:
            self._exchange.start(self._status, self._headers)
            self._state = _PART_SENT
        for at in range(0, size, _PIECE):
            self._exchange.send(data if size <= _PIECE else data[at : at + _PIECE])
            self.sent += min(_PIECE, size - at)

    def fail(self, scope: dict[str, Any]) -> None:
        """Log the exception being handled; answer with a 500, or cut the connection where it is too late."""
        method, path = scope["method"], scope["path"]
        if self._state is _WHOLE_SENT:
            logger.exception("%s %s failed after its response was sent", method, path)
        elif self._state is _PART_SENT:
            logger.exception("%s %s failed amid its response, which was cut", method, path)
            self._exchange.abort()
        else:
            logger.exception("%s %s failed", method, path)
            body = b"" if self._head else ERROR_BODY
            headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(ERROR_BODY))]
            if self._handler.closing and scope["http_version"] != "2":
                headers.append(CLOSE)
            self._status, self._headers = 500, headers
            try:
                self._respond(body)
            except Exception:
                logger.exception("%s %s: its error could not be told", method, path)
                self._exchange.abort()

    def _send_list(self, parts: list[bytes]) -> None:
        """Send a body that is all there: its length is known, and it needs no waiting."""
        self._check_status()
        for part in parts:
            if not isinstance(part, bytes):
                raise TypeError(f"a WSGI application must give bytes as its body, not {type(part).__name__}")
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        if self._bodyless:
            if self._head and self._length is None and size:
                self._headers.append((b"content-length", b"%d" % size))
            self._respond(b"")
            return
        if self._length is None:
            self._length = size
            self._headers.append((b"content-length", b"%d" % size))
        elif self._length != size:
            raise ValueError(f"the body has {size} bytes, and its Content-Length says {self._length}")
        if size <= _WHOLE_BODY:
            self._respond(parts[0] if len(parts) == 1 else b"".join(parts))
        else:
            for part in parts:
                self.write(part)

    def _finish(self) -> None:
        if self._state is _WHOLE_SENT:
            return
        self._check_status()
        if self._length is not None and self._length != self.sent and not self._bodyless:
            raise ValueError(f"the body has {self.sent} bytes, and its Content-Length says {self._length}")
        if self._state is _NOTHING_SENT:
            self._respond(b"")
        else:
            self._exchange.end()
            self._state = _WHOLE_SENT

    def _respond(self, body: bytes) -> None:
        self._exchange.respond(self._status, self._headers, body)
        self._state = _WHOLE_SENT
        self.sent = len(body)

    def _check_status(self) -> None:
        if not self._status:
            raise AssertionError("the application did not call start_response before its body")


class FileWrapper:
    """``wsgi.file_wrapper``: a file as an iterable of blocks, closed with the response.

    Args:
        file: anything with ``read(size)``.
        block_size: bytes a block; small ones are made larger, for each block costs a trip to the front.
    """

    def __init__(self, file: SupportsRead[bytes], block_size: int = _FILE_BLOCK) -> None:
        self.file = file
        self.block_size = max(block_size, _FILE_BLOCK)

    def __iter__(self) -> Iterator[bytes]:
        read = self.file.read
        while block := read(self.block_size):
            yield block

    def close(self) -> None:
        """Close the file, if it can be closed."""
        close = getattr(self.file, "close", None)
        if close is not None:
            close()


def _environ_key(name: bytes) -> str | None:
    key = None
    # X_User and X-User would be one and the same key: a client could forge what a proxy sets.
    if b"_" not in name:
        key = "HTTP_" + name.decode("latin-1").upper().replace("-", "_")
    if len(_environ_keys) < _TABLE_SIZE:
        _environ_keys[name] = key
    return key


def _wire_name(name: str) -> bytes | None:
    if not isinstance(name, str):
        raise TypeError(f"a header's name must be str, not {type(name).__name__}")
    encoded: bytes | None = name.lower().encode("latin-1")
    if encoded in HOP_BY_HOP:
        encoded = None
    if len(_wire_names) < _TABLE_SIZE:
        _wire_names[name] = encoded
    return encoded


def _joined(key: str, first: str, second: str) -> str:
    """Return the value of a header that came twice."""
    if key in ("CONTENT_LENGTH", "CONTENT_TYPE"):
        return first  # the front has made sure that lengths agree
    # HTTP/2 splits cookies for compression (RFC 9113, 8.2.3); all else is a list (RFC 9110, 5.3).
    return f"{first}; {second}" if key == "HTTP_COOKIE" else f"{first},{second}"
