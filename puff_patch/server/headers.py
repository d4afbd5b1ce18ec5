"""What WSGI and ASGI responses have in common in their headers."""

from __future__ import annotations

# Meaningful between two neighbours only, so the front's and not the application's (RFC 9110, 7.6.1).
HOP_BY_HOP = frozenset(
    [b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"]
) | {b"te", b"trailer", b"trailers", b"transfer-encoding", b"upgrade"}

CLOSE = (b"connection", b"close")
"""Asks a client of HTTP/1 to close its connection after the response."""

ERROR_BODY = b"Internal Server Error\n"
