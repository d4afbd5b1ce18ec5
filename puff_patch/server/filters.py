"""What stands between the front and every application, whatever its interface: filters.

A filter sees each HTTP request before an application does, and may answer it instead.  It sees the head of each
response, and
may have its body encoded.  It is asked in the hub for WSGI and in the asyncio thread for ASGI, so it must neither
block nor keep state that two threads would spoil.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from puff_patch.server.front import Exchange

Scope = dict[str, Any]
Headers = list[tuple[bytes, bytes]]
Responder = Callable[["Exchange"], object]
"""Answers a request instead of the application; runs on a greenlet, and may wait there."""


class Encoder(Protocol):
    """Changes the body of one response on its way out."""

    def feed(self, data: bytes) -> bytes:
        """Take a part of the body; return what can be sent of it by now, maybe nothing."""

    def finish(self) -> bytes:
        """Return what is left at the end of the body."""


class Filter:
    """One concern of the server's own; override what it needs."""

    def begin(self, scope: Scope) -> Responder | None:
        """Look at a request, and change its scope if need be; return who answers it, None for the application."""
        return None

    def head(self, scope: Scope, status: int, headers: Headers) -> Encoder | None:
        """Change the headers of a response in place; return what encodes its body, None to leave that alone.

        An encoder that changes the length must remove ``content-length``.
        """
        return None

    def end(self, scope: Scope, status: int, size: int) -> None:
        """Take note of the end of a response: its status, 0 if none was sent, and the bytes of its body."""


class Filters:
    """The filters of one server, asked in order for a request and in the opposite order for its response."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        self._filters = tuple(filters)
        self._outward = self._filters[::-1]

    def begin(self, scope: Scope) -> Responder | None:
        """See `Filter.begin`; the first that answers wins."""
        for one in self._filters:
            responder = one.begin(scope)
            if responder is not None:
                return responder
        return None

    def head(self, scope: Scope, status: int, headers: Headers) -> Encoder | None:
        """See `Filter.head`; of several encoders each takes what the one before it gives."""
        encoder: Encoder | None = None
        for one in self._outward:
            found = one.head(scope, status, headers)
            if found is not None:
                encoder = found if encoder is None else _Chain(encoder, found)
        return encoder

    def end(self, scope: Scope, status: int, size: int) -> None:
        """See `Filter.end`."""
        for one in self._outward:
            one.end(scope, status, size)


class _Chain:
    def __init__(self, first: Encoder, second: Encoder) -> None:
        self._first = first
        self._second = second

    def feed(self, data: bytes) -> bytes:
        return self._second.feed(self._first.feed(data))

    def finish(self) -> bytes:
        return self._second.feed(self._first.finish()) + self._second.finish()
