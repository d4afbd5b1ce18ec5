"""Which requests no application gets to see, whatever its interface: too many, too large, or of no sense."""

from __future__ import annotations

from collections.abc import Sized

from puff_patch.server.filters import Headers, Scope
from puff_patch.server.headers import CLOSE
from puff_patch.server.options import ServerOptions

Refusal = tuple[int, Headers, bytes]
"""The arguments of `Exchange.respond`: status, headers, body."""

_NAMES = {
    400: b"Bad Request",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    413: b"Content Too Large",
    503: b"Service Unavailable",
}
# After these nobody knows where on the connection the next request would begin, or it is not worth waiting for.
_LAST = frozenset({400, 408, 413})
_RETRY_AFTER = (b"retry-after", b"1")


def refusal(scope: Scope, status: int, *more: tuple[bytes, bytes]) -> Refusal:
    """Return an answer of the server's own.

    Args:
        scope: of the request.
        status: one of 400, 405, 408, 413, 503.
        more: further headers.
    """
    body = _NAMES[status] + b"\n"
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body)), *more]
    if status in _LAST and scope["http_version"] != "2":
        headers.append(CLOSE)
    return status, headers, body


class Admission:
    """Looks at each request before it costs anything. It uses no lock and may be asked in any thread.

    Args:
        options: ``max_greenlets``, ``max_queued`` and ``max_body_size`` are read.
        active: the requests that are not over, this one among them.
    """

    def __init__(self, options: ServerOptions, active: Sized) -> None:
        self._active = active
        self._most = options.max_greenlets + options.max_queued
        self._max_body_size = options.max_body_size

    def check(self, scope: Scope) -> Refusal | None:
        """Return the answer to a request that no application should see, None for all others."""
        if len(self._active) > self._most:
            return refusal(scope, 503, _RETRY_AFTER)
        if not scope["raw_path"].startswith(b"/"):
            if scope["method"] == "CONNECT":
                return refusal(scope, 405)
            # "OPTIONS *" is about the server as a whole: a ping (RFC 9110, 9.3.7).
            return (200, [(b"content-length", b"0")], b"") if scope["method"] == "OPTIONS" else refusal(scope, 400)
        hosts = 0
        for name, value in scope["headers"]:
            if name == b"host":
                hosts += 1
                # Whoever stands before us might have gone by the other one (RFC 9112, 3.2). The front makes up an
                # empty one where there is none, which only HTTP/1.0 may leave out.
                if hosts > 1 or (not value and scope["http_version"] == "1.1"):
                    return refusal(scope, 400)
            elif (
                name == b"content-length" and self._max_body_size is not None and int(value) > self._max_body_size
            ):
                return refusal(scope, 413)
        return None
