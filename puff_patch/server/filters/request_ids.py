"""Request ids: one name for a request in the logs of everybody it passes."""

from __future__ import annotations

import re
from uuid import uuid4

from puff_patch.server.filters.base import Encoder, Filter, Headers, Responder, Scope, header

_HEADER = b"x-request-id"
# What is safe in a log line, a URL and another header, and long enough for every kind of id in use.
_VALID = re.compile(rb"[A-Za-z0-9._~+/=:@-]{1,128}")


class RequestIds(Filter):
    """Gives each request an id, or takes that of a trusted proxy (see `TrustedProxies`).

    The application finds it as the request header ``X-Request-ID``, whoever sent what; the response has the same
    header; it stands as ``puff.request_id`` in the scope and so in the access log.
    """

    def begin(self, scope: Scope) -> Responder | None:
        headers: Headers = scope["headers"]
        value = header(headers, _HEADER)
        if value is None:
            made = uuid4().hex
            headers.append((_HEADER, made.encode()))
        elif "puff.trusted" in scope and _VALID.fullmatch(value):
            made = value.decode()
        else:
            made = uuid4().hex
            scope["headers"] = [pair for pair in headers if pair[0] != _HEADER]
            scope["headers"].append((_HEADER, made.encode()))
        scope["puff.request_id"] = made
        return None

    def head(self, scope: Scope, status: int, headers: Headers) -> Encoder | None:
        made = scope.get("puff.request_id")
        if made is not None and header(headers, _HEADER) is None:
            headers.append((_HEADER, made.encode()))
        return None
