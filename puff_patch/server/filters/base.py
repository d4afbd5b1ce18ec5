"""What stands between the front and every application, whatever its interface: filters.

A filter sees each HTTP request before an application does, and may answer it instead.  It sees the head of each
response, and may have its body encoded.  It is asked in the hub for WSGI and in the asyncio thread for ASGI, so it
must neither block nor keep state that two threads would spoil.

What a filter finds out about a request stands in its scope, under names that begin with ``puff.``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from puff_patch.server.headers import CLOSE

if TYPE_CHECKING:
    from puff_patch.server.exchange import Exchange

logger = logging.getLogger("puff_patch.server")

Scope = dict[str, Any]
Headers = list[tuple[bytes, bytes]]
Responder = Callable[["Exchange"], object]
"""Answers a request instead of the application; runs on a greenlet, and may wait there."""


@dataclass(frozen=True)
class Answer:
    """A `Responder` whose response is known already.

    Args:
        status: the status code.
        headers: names in lower case and values, without the length.
        body: the whole body.
        urgent: answer in the hub, at once, whatever waits for a greenlet.  No filter may wait at its end then.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    urgent: bool = False

    @classmethod
    def text(cls, status: int, text: str, *headers: tuple[bytes, bytes]) -> Answer:
        """A line of text for people."""
        return cls(status, ((b"content-type", b"text/plain; charset=utf-8"), *headers), f"{text}\n".encode())

    def __call__(self, exchange: Exchange) -> None:
        """Send it."""
        headers = [*self.headers, (b"content-length", b"%d" % len(self.body))]
        exchange.respond(self.status, headers, b"" if exchange.scope["method"] == "HEAD" else self.body)


@dataclass
class Life:
    """How far the life of a server has come; the server writes it and filters read it."""

    started: bool = False
    stopping: bool = False


class Encoder(Protocol):
    """Changes the body of one response on its way out.

    To compress takes time: feed it pieces of no more than 64 KB, and let others have a turn in between.
    """

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

        An encoder that changes the length must remove ``content-length``.  It is asked again, with other headers,
        where a response turns out to be malformed before any of it was sent.
        """
        return None

    def end(self, scope: Scope, status: int, size: int) -> None:
        """Take note of the end of a response: its status, 0 if none was sent, and the bytes of its body.

        It is called for every request, also for one that a filter before this one has answered.
        """


class Filters:
    """The filters of one server, asked in order for a request and in the opposite order for its response.

    Args:
        filters: the first is the nearest to the client.
        life: the server's; while it stops, each response over HTTP/1 asks its client to close the connection.
    """

    def __init__(self, filters: Sequence[Filter], life: Life | None = None) -> None:
        self._life = life or Life()
        # Only those that override a method are asked.
        self._begin = tuple(one.begin for one in filters if type(one).begin is not Filter.begin)
        self._head = tuple(one.head for one in reversed(filters) if type(one).head is not Filter.head)
        self._end = tuple(one.end for one in reversed(filters) if type(one).end is not Filter.end)

    def begin(self, scope: Scope) -> Responder | None:
        """See `Filter.begin`; the first that answers wins.  One that fails is answered with a 500."""
        for begin in self._begin:
            try:
                responder = begin(scope)
            except Exception:
                logger.exception("A filter failed at the beginning of %s %s", scope["method"], scope["path"])
                return Answer.text(500, "Internal Server Error")
            if responder is not None:
                return responder
        return None

    def head(self, scope: Scope, status: int, headers: Headers) -> Encoder | None:
        """See `Filter.head`; of several encoders each takes what the one before it gives."""
        encoder: Encoder | None = None
        for head in self._head:
            found = head(scope, status, headers)
            if found is not None:
                encoder = found if encoder is None else _Chain(encoder, found)
        if self._life.stopping and scope["http_version"] != "2" and CLOSE not in headers:
            headers.append(CLOSE)
        return encoder

    def end(self, scope: Scope, status: int, size: int) -> None:
        """See `Filter.end`.  One that fails is logged, and the others hear of the end all the same."""
        for end in self._end:
            try:
                end(scope, status, size)
            except Exception:
                logger.exception("A filter failed at the end of %s %s", scope["method"], scope["path"])


class _Chain:
    def __init__(self, first: Encoder, second: Encoder) -> None:
        self._first = first
        self._second = second

    def feed(self, data: bytes) -> bytes:
        return self._second.feed(self._first.feed(data))

    def finish(self) -> bytes:
        return self._second.feed(self._first.finish()) + self._second.finish()


def header(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The value of a header, None if there is none; of several lines the first."""
    for found, value in headers:
        if found == name:
            return value
    return None


def joined(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The value of a header that is a list, which may come in several lines; None if there is none."""
    values = [value for found, value in headers if found == name]
    return b", ".join(values) if values else None


def add_vary(headers: Headers, name: bytes) -> None:
    """Say that a response depends on a header of the request."""
    lowered = name.lower()
    for found, value in headers:
        if found == b"vary" and any(part.strip().lower() in (lowered, b"*") for part in value.split(b",")):
            return
    headers.append((b"vary", name))
