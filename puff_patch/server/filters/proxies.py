"""Trusted proxies: what they say of the client they speak for, and silence for everybody else who says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from puff_patch.server.filters.base import Filter, Headers, Responder, Scope, header, joined

FORWARDED_HEADERS = (
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-forwarded-port",
)
"""The headers that can be believed."""

_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::\d{1,5})?")
_PORT = re.compile(rb":\d{1,5}$")
_SCHEMES = {b"http": "http", b"https": "https", b"ws": "http", b"wss": "https"}
_DEFAULT_PORTS = {"http": b"80", "https": b"443"}
# RFC 7239, section 4: name=value, the value a token or a quoted string, then ";" or the element's end.
_PAIR = re.compile(rb"""[ \t]*([!#$%&'*+.^_`|~0-9A-Za-z-]+)=("(?:[^"\\]|\\.)*"|[^\s;"]*)[ \t]*(?:;|$)""")

_Address = tuple[str, str]
_Hop = dict[bytes, bytes]


class TrustedProxies(Filter):
    """Sets the client, the scheme and the host of requests that come from trusted proxies.

    The client is the rightmost address that is not a trusted proxy's, for each proxy adds to the right the address
    it was called from.  From other peers the headers of proxies are removed.

    Sets ``puff.trusted`` in the scope of a request whose peer is trusted, and ``puff.peer`` to the peer where the
    client is another one.

    Args:
        peers: addresses and networks (``10.0.0.0/8``) of proxies, ``unix`` for peers of a Unix socket, ``*`` for
            every peer.
        headers: the headers that these proxies set themselves, of `FORWARDED_HEADERS`.  One that they hand on as a
            client sent it must not be believed.

    Raises:
        ValueError: one of them is nothing of the kind.
    """

    def __init__(self, peers: Sequence[str], headers: Sequence[str]) -> None:
        unknown = [name for name in headers if name.lower() not in FORWARDED_HEADERS]
        if unknown:
            raise ValueError(f"proxy_headers may name {', '.join(FORWARDED_HEADERS)}, not {', '.join(unknown)}")
        self._believed = frozenset(name.lower().encode() for name in headers)
        self._everybody = "*" in peers
        self._unix = "unix" in peers or self._everybody
        try:
            self._networks = [ip_network(peer, strict=False) for peer in peers if peer not in ("*", "unix")]
        except ValueError as exc:
            raise ValueError(
                f"trusted_proxies takes IP addresses, networks such as '10.0.0.0/8', 'unix' and '*': {exc}"
            ) from None
        self._is_trusted = lru_cache(4096)(self._find_trust)

    def begin(self, scope: Scope) -> Responder | None:
        peer = scope["client"][0]
        headers: Headers = scope["headers"]
        if not (self._is_trusted(peer) if peer else self._unix):
            if any(_is_of_proxies(name) for name, _ in headers):
                scope["headers"] = [pair for pair in headers if not _is_of_proxies(pair[0])]
            return None
        scope["puff.trusted"] = True
        hops = self._hops(headers)
        client: _Address | None = None
        used: _Hop = {}
        for hop in reversed(hops):
            # The hop's proxy is trusted; so what it says is believed, but for the address of a client unknown.
            used = hop
            address = _address(hop.get(b"for", b""))
            if address is None:
                break
            client = address
            if not self._is_trusted(address[0]):
                break
        if client is not None:
            scope["puff.peer"] = scope["client"]
            scope["client"] = client
        self._apply(scope, used)
        return None

    def _find_trust(self, host: str) -> bool:
        if self._everybody:
            return True
        address = _ip(host)
        return address is not None and any(address in network for network in self._networks)

    def _hops(self, headers: Headers) -> list[_Hop]:
        """What each proxy on the way said, the last one last."""
        if b"forwarded" in self._believed and header(headers, b"forwarded") is not None:
            return _parse_forwarded([value for name, value in headers if name == b"forwarded"])
        lists = {
            key: [part.strip() for part in value.split(b",")]
            for key in (b"for", b"proto", b"host", b"port")
            if (name := b"x-forwarded-" + key) in self._believed and (value := joined(headers, name)) is not None
        }
        length = max((len(values) for key, values in lists.items() if key == b"for"), default=1)
        hops: list[_Hop] = [{} for _ in range(length if lists else 0)]
        for key, values in lists.items():
            for back in range(1, len(hops) + 1):
                # A proxy that sets one value and appends nothing means it for the whole way.
                at = back if back <= len(values) else len(values)
                hops[-back][key] = values[-at]
        return hops

    def _apply(self, scope: Scope, hop: _Hop) -> None:
        scheme = _SCHEMES.get(hop.get(b"proto", b"").lower())
        if scheme is not None:
            scope["scheme"] = scheme
        host, port = hop.get(b"host", b""), hop.get(b"port", b"")
        if not _HOST.fullmatch(host):
            host = b""
        if port.isdigit() and len(port) <= 5 and 0 < int(port) <= 65535:
            host = _PORT.sub(b"", host or header(scope["headers"], b"host") or b"")
            if host and port != _DEFAULT_PORTS.get(scope["scheme"]):
                host += b":" + port
        if host:
            scope["headers"] = [(b"host", host), *(pair for pair in scope["headers"] if pair[0] != b"host")]


def _is_of_proxies(name: bytes) -> bool:
    return name[:12] == b"x-forwarded-" or name == b"forwarded" or name == b"x-real-ip"


def _ip(text: str) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(text)
    except ValueError:
        return None
    # An IPv4 client of a socket that listens on "::".
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found


def _address(node: bytes) -> _Address | None:
    """Address and port ("0" if unknown) of a node such as ``1.2.3.4``, ``1.2.3.4:80``, ``2001:db8::1``,
    ``[2001:db8::1]:80``; None for anything else, such as ``unknown``."""
    text = node.decode("latin-1")
    port = ""
    if text.startswith("["):
        text, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
    found = _ip(text)
    if found is None:
        return None
    return str(found), port if port.isdecimal() and len(port) <= 5 else "0"


def _parse_forwarded(lines: Sequence[bytes]) -> list[_Hop]:
    """The elements of Forwarded, up to one that is malformed, from the right.

    Not from the left, where a client could open a quoted string that swallows what proxies add.
    """
    hops: list[_Hop] = []
    for element in reversed(b",".join(lines).split(b",")):
        hop: _Hop = {}
        at = 0
        while at < len(element):
            match = _PAIR.match(element, at)
            if match is None:
                return hops
            name, value = match.groups()
            hop[name.lower()] = re.sub(rb"\\(.)", rb"\1", value[1:-1]) if value.startswith(b'"') else value
            at = match.end()
        hops.insert(0, hop)
    return hops
