"""Compression of response bodies: zstd, brotli or gzip, as the client takes it and as it is installed."""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from puff_patch.server.filters.base import Encoder, Filter, Headers, Scope, add_vary, joined
from puff_patch.server.filters.negotiation import negotiate

# What comes out of it is known to shrink.  Not text/event-stream: each of its responses would hold a compressor's
# memory for hours, ten thousand of them gigabytes.
_COMPRESSIBLE = re.compile(
    rb"text/(?!event-stream\b)"
    rb"|application/(?:[\w.-]+\+)?(?:json|xml|yaml|javascript|ecmascript|graphql)\b"
    rb"|application/(?:x-)?(?:javascript|ndjson|jsonlines|json-seq|wasm|sql|toml|yaml|sh|tar)\b"
    rb"|application/(?:manifest\+json|vnd\.ms-fontobject|x-font-\w+|rtf|postscript|msgpack)\b"
    rb"|image/(?:svg\+xml|bmp|x-icon|vnd\.microsoft\.icon)\b"
    rb"|font/(?:ttf|otf|collection)\b|multipart/mixed\b",
    re.IGNORECASE,
)
_NO_TRANSFORM = re.compile(rb"(?:^|[,\s])no-transform(?:$|[,\s])", re.IGNORECASE)
# They say that the body is encoded, is a part, or what its bytes add up to.
_HINDRANCES = frozenset(
    [b"content-encoding", b"content-range", b"content-md5", b"content-digest", b"repr-digest", b"digest"]
)


@dataclass(frozen=True)
class CompressionOptions:
    """How response bodies are compressed.

    Args:
        encodings: those to choose from, the preferred one first; brotli and zstd only where they are installed
            (``pip install 'puff-patch[compression]'``).
        min_size: bytes below which a body of known length is left as it is.
        gzip_level: 1 (fast) to 9 (small).
        brotli_quality: 0 (fast) to 11 (small, and much too slow for this).
        zstd_level: 1 (fast) to 19 (small).
    """

    encodings: tuple[str, ...] = ("zstd", "br", "gzip")
    min_size: int = 512
    gzip_level: int = 4
    brotli_quality: int = 4
    zstd_level: int = 3

    def __post_init__(self) -> None:
        unknown = [name for name in self.encodings if name not in ("zstd", "br", "gzip")]
        if unknown or not self.encodings:
            raise ValueError(f'encodings must be some of "zstd", "br" and "gzip", not {self.encodings!r}')
        if self.min_size < 0:
            raise ValueError(f"min_size must not be negative, not {self.min_size}")
        for name, low, high in (("gzip_level", 1, 9), ("brotli_quality", 0, 11), ("zstd_level", 1, 19)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between {low} and {high}, not {getattr(self, name)}")


class Compression(Filter):
    """Compresses what is worth it; see :class:`CompressionOptions`.

    Attributes:
        encodings: those that are installed.
    """

    def __init__(self, options: CompressionOptions) -> None:
        makers = {
            "zstd": _zstd_maker(options.zstd_level),
            "br": _brotli_maker(options.brotli_quality),
            "gzip": _gzip_maker(options.gzip_level),
        }
        self._makers = {name: maker for name in options.encodings if (maker := makers[name]) is not None}
        self.encodings = tuple(self._makers)
        self._min_size = options.min_size

    def head(self, scope: Scope, status: int, headers: Headers) -> Encoder | None:
        if status in (204, 206):
            return None
        if status == 304:
            # As the response that it stands for; whether that was one of those compressed it does not say.
            add_vary(headers, b"Accept-Encoding")
            return None
        known_length = compressible = False
        for name, value in headers:
            lowered = name.lower()
            if lowered in _HINDRANCES:
                return None
            if lowered == b"content-length":
                known_length = True
                if int(value) < self._min_size:
                    return None
            elif lowered == b"content-type":
                compressible = _COMPRESSIBLE.match(value) is not None
            elif lowered == b"cache-control" and _NO_TRANSFORM.search(value):
                return None
        if not compressible:
            return None
        add_vary(headers, b"Accept-Encoding")
        encoding = negotiate(joined(scope["headers"], b"accept-encoding"), self.encodings)
        if encoding is None:
            return None
        kept = []
        for name, value in headers:
            lowered = name.lower()
            if lowered == b"etag" and not value.startswith(b"W/"):
                # The same to its readers, and not to the byte.
                kept.append((name, b"W/" + value))
            elif lowered not in (b"content-length", b"accept-ranges"):
                kept.append((name, value))
        kept.append((b"content-encoding", encoding.encode()))
        headers[:] = kept
        if scope["method"] == "HEAD":
            return None
        # A body whose length is not known is sent as it is made, and its reader must get each part of it at once.
        return _Compressor(*self._makers[encoding](), flush=not known_length)


_Maker = Callable[[], tuple[Callable[[bytes], bytes], Callable[[], bytes], Callable[[], bytes]]]
"""Makes the three functions of a new compressor: compress, flush what came, flush at the end."""


class _Compressor:
    __slots__ = ("_compress", "_finish", "_flush")

    def __init__(
        self,
        compress: Callable[[bytes], bytes],
        flush_part: Callable[[], bytes],
        finish: Callable[[], bytes],
        *,
        flush: bool,
    ) -> None:
        self._compress = compress
        self._flush = flush_part if flush else None
        self._finish = finish

    def feed(self, data: bytes) -> bytes:
        if self._flush is None:
            return self._compress(data)
        return self._compress(data) + self._flush()

    def finish(self) -> bytes:
        return self._finish()


def _gzip_maker(level: int) -> _Maker:
    def make() -> tuple[Callable[[bytes], bytes], Callable[[], bytes], Callable[[], bytes]]:
        made = zlib.compressobj(level, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        return made.compress, lambda: made.flush(zlib.Z_SYNC_FLUSH), made.flush

    return make


def _brotli_maker(quality: int) -> _Maker | None:
    try:
        brotli: Any = importlib.import_module("brotli")
    except ImportError:
        return None

    def make() -> tuple[Callable[[bytes], bytes], Callable[[], bytes], Callable[[], bytes]]:
        # A window of 256 KB: with the default one, each response that is sent slowly holds megabytes.
        made = brotli.Compressor(quality=quality, lgwin=18)
        return made.process, made.flush, made.finish

    return make


def _zstd_maker(level: int) -> _Maker | None:
    for name in ("compression.zstd", "backports.zstd"):  # from Python 3.14 on, before it
        try:
            zstd: Any = importlib.import_module(name)
            break
        except ImportError:
            continue
    else:
        return None
    parameter, compressor = zstd.CompressionParameter, zstd.ZstdCompressor
    # A window of 256 KB, as for brotli.
    options = {parameter.compression_level: level, parameter.window_log: 18}
    block = compressor.FLUSH_BLOCK

    def make() -> tuple[Callable[[bytes], bytes], Callable[[], bytes], Callable[[], bytes]]:
        made = compressor(options=options)
        return made.compress, lambda: made.flush(block), made.flush

    return make
