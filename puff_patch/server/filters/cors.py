"""CORS: which other sites' scripts may use this one (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from puff_patch.server.filters.base import (
    Answer,
    Encoder,
    Filter,
    Headers,
    Responder,
    Scope,
    add_vary,
    header,
    joined,
)

_ALL_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
# What a browser lets scripts set without asking (CORS-safelisted request headers).
_SAFE_HEADERS = ("accept", "accept-language", "content-language", "content-type")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", re.IGNORECASE)


@dataclass(frozen=True)
class CorsOptions:
    """Which other origins may use this server from a browser, and how.

    Args:
        allow_origins: origins such as ``https://app.example.com``; ``*`` for every one.
        allow_origin_regex: a regular expression that the whole of an allowed origin matches.
        allow_methods: methods that scripts may use; ``*`` for every usual one.
        allow_headers: request headers that scripts may set; ``*`` for every one.
        allow_credentials: let browsers send cookies along; not with the origin ``*``.
        expose_headers: response headers that scripts may read.
        max_age: seconds that browsers may keep the answer to a preflight.
    """

    allow_origins: tuple[str, ...] = ()
    allow_origin_regex: str = ""
    allow_methods: tuple[str, ...] = ("GET", "HEAD", "POST")
    allow_headers: tuple[str, ...] = ()
    allow_credentials: bool = False
    expose_headers: tuple[str, ...] = ()
    max_age: int = 600

    def __post_init__(self) -> None:
        for name in ("allow_origins", "allow_methods", "allow_headers", "expose_headers"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a list of strings, not {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for origin in self.allow_origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"an origin is a scheme, a host and maybe a port, such as 'https://app.example.com', "
                    f"not {origin!r}"
                )
        if self.allow_credentials and "*" in self.allow_origins:
            raise ValueError(
                "allow_credentials with the origin '*' would let every site act as the user who visits it: "
                "name the origins"
            )
        try:
            re.compile(self.allow_origin_regex)
        except re.error as exc:
            raise ValueError(f"allow_origin_regex is no regular expression: {exc}") from None
        if self.max_age < 0:
            raise ValueError(f"max_age must not be negative, not {self.max_age}")


class Cors(Filter):
    """Answers preflights, and tells browsers which responses scripts of other origins may read.

    Args:
        options: see :class:`CorsOptions`.
    """

    def __init__(self, options: CorsOptions) -> None:
        self._options = options
        self._all = "*" in options.allow_origins
        self._origins = frozenset(origin.lower().encode() for origin in options.allow_origins)
        self._pattern = re.compile(options.allow_origin_regex) if options.allow_origin_regex else None
        self._methods = frozenset(_ALL_METHODS if "*" in options.allow_methods else options.allow_methods)
        self._all_headers = "*" in options.allow_headers
        self._headers = frozenset([*_SAFE_HEADERS, *(name.lower() for name in options.allow_headers)])
        self._common: list[tuple[bytes, bytes]] = []
        if options.allow_credentials:
            self._common.append((b"access-control-allow-credentials", b"true"))
        self._exposed: list[tuple[bytes, bytes]] = []
        if options.expose_headers:
            self._exposed.append((b"access-control-expose-headers", ", ".join(options.expose_headers).encode()))

    def begin(self, scope: Scope) -> Responder | None:
        if scope["method"] != "OPTIONS":
            return None
        method = header(scope["headers"], b"access-control-request-method")
        origin = header(scope["headers"], b"origin")
        if method is None or origin is None:
            return None
        wanted = joined(scope["headers"], b"access-control-request-headers") or b""
        names = [name.strip().lower() for name in wanted.decode("latin-1").split(",") if name.strip()]
        wrong = [
            what
            for what, is_wrong in (
                ("origin", not self._allows(origin)),
                ("method", method.decode("latin-1") not in self._methods),
                ("headers", not self._all_headers and any(name not in self._headers for name in names)),
            )
            if is_wrong
        ]
        answer_headers = [
            (b"access-control-allow-methods", ", ".join(sorted(self._methods)).encode()),
            (b"access-control-max-age", b"%d" % self._options.max_age),
        ]
        if not self._all_headers:
            answer_headers.append((b"access-control-allow-headers", ", ".join(sorted(self._headers)).encode()))
        elif wanted:
            answer_headers.append((b"access-control-allow-headers", wanted))
        answer_headers.append((b"vary", b"Access-Control-Request-Headers"))
        # What is common to all responses comes with head().
        if wrong:
            return Answer.text(400, "Disallowed CORS " + ", ".join(wrong), *answer_headers)
        return Answer.text(200, "OK", *answer_headers)

    def head(self, scope: Scope, status: int, headers: Headers) -> Encoder | None:
        if not self._all:
            # Without an Origin, too: caches must not show that response to who has one.
            add_vary(headers, b"Origin")
        origin = header(scope["headers"], b"origin")
        if origin is None:
            return None
        mine = [*self._common, *self._exposed]
        if self._all:
            mine.append((b"access-control-allow-origin", b"*"))
        elif self._allows(origin):
            mine.append((b"access-control-allow-origin", origin))
        else:
            mine = []
        # An application's own would make two of one, and browsers refuse that.
        headers[:] = [
            (name, value)
            for name, value in headers
            if name not in (b"access-control-allow-origin", b"access-control-allow-credentials")
        ]
        headers += mine
        return None

    def _allows(self, origin: bytes) -> bool:
        if self._all or origin.lower() in self._origins:
            return True
        return self._pattern is not None and self._pattern.fullmatch(origin.decode("latin-1")) is not None
