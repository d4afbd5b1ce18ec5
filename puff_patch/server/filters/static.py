"""Files of folders: static files and uploads, with validators, ranges and compressed neighbours.

A file is looked up when it is asked for, so new ones are seen at once.  Looking up and reading what the kernel has
in memory takes microseconds and is done on the greenlet; a block that would have to come from a disk is read in a
native thread.
"""

from __future__ import annotations

import mimetypes
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING

from gevent import get_hub

from puff_patch.server.filters.base import Answer, Filter, Headers, Responder, Scope, add_vary, header, joined
from puff_patch.server.filters.negotiation import negotiate

if TYPE_CHECKING:
    from puff_patch.server.exchange import Exchange

# Each block costs a trip to the front.
_BLOCK = 64 * 1024
# Each block from a disk costs a trip to a thread as well, and the kernel reads ahead.
_DISK_BLOCK = 256 * 1024
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
_NEIGHBOURS = {"zstd": ".zst", "br": ".br", "gzip": ".gz"}
_RANGE = re.compile(rb"bytes=[ \t]*(\d{0,18})-(\d{0,18})[ \t]*")
_ALLOW = (b"allow", b"GET, HEAD")
_NOT_FOUND = Answer.text(404, "Not Found")
_NOT_ALLOWED = Answer.text(405, "Method Not Allowed", _ALLOW)

# Beside those that Python knows.
_TYPES = {
    ".avif": "image/avif",
    ".gz": "application/gzip",
    ".ico": "image/x-icon",
    ".js": "text/javascript",
    ".jsonl": "application/jsonl",
    ".map": "application/json",
    ".md": "text/markdown",
    ".mjs": "text/javascript",
    ".otf": "font/otf",
    ".toml": "application/toml",
    ".ttf": "font/ttf",
    ".wasm": "application/wasm",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}


@dataclass(frozen=True)
class StaticFiles:
    """A folder whose files are served below a path.

    Args:
        prefix: where they are found, such as ``/static/``.
        folder: the folder; symbolic links that lead out of it are not followed, and names that begin with a dot
            not served (but for ``.well-known``).
        max_age: seconds that browsers and caches may keep a file without asking.
        immutable: a regular expression that is found in the names of files that never change: they may be kept
            for ever. The default knows the hashes that Django's ManifestStaticFilesStorage and bundlers put in.
        index: the file that stands for a folder, such as ``index.html``; none if empty.
        fallthrough: leave what is no file there to the application, and do not answer it with a 404.
    """

    prefix: str
    folder: str
    max_age: int = 60
    immutable: str = r"[.-](?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{12,64}\.[^/]*$"
    index: str = ""
    fallthrough: bool = False

    def __post_init__(self) -> None:
        if not self.prefix.startswith("/"):
            raise ValueError(f"the prefix of static files begins with '/', unlike {self.prefix!r}")
        if self.max_age < 0:
            raise ValueError(f"max_age must not be negative, not {self.max_age}")
        if "/" in self.index:
            raise ValueError(f"index must be the name of a file, not {self.index!r}")
        try:
            re.compile(self.immutable)
        except re.error as exc:
            raise ValueError(f"immutable is no regular expression: {exc}") from None


class Static(Filter):
    """Answers requests for files of several folders.

    Args:
        mounts: the folders; of several prefixes of a path the longest counts.

    Raises:
        ValueError: a folder does not exist.
    """

    def __init__(self, mounts: tuple[StaticFiles, ...]) -> None:
        # Not the system's own table, which differs from one machine to the next.
        types = mimetypes.MimeTypes().types_map[True] | _TYPES
        self._folders = sorted(
            (_Folder(options, types) for options in mounts), key=lambda folder: -len(folder.prefix)
        )
        self._prefixes = tuple(folder.prefix for folder in self._folders)

    def begin(self, scope: Scope) -> Responder | None:
        path: str = scope["path"]
        if not path.startswith(self._prefixes):
            return None
        folder = next(folder for folder in self._folders if path.startswith(folder.prefix))
        return folder.responder(scope, path[len(folder.prefix) :])


class _Folder:
    def __init__(self, options: StaticFiles, types: dict[str, str]) -> None:
        self._types = types
        self.prefix = options.prefix if options.prefix.endswith("/") else options.prefix + "/"
        self._folder = os.path.abspath(options.folder)
        if not os.path.isdir(self._folder):
            raise ValueError(f"the folder of static files at {self.prefix} does not exist: {self._folder}")
        self._root = os.path.realpath(self._folder)
        self._index = options.index
        self._fallthrough = options.fallthrough
        self._immutable = re.compile(options.immutable) if options.immutable else None
        self._cache_control = b"public, max-age=%d" % options.max_age

    def responder(self, scope: Scope, relative: str) -> Responder | None:
        """Who answers a request for a path below the prefix; None for the application."""
        if scope["method"] not in ("GET", "HEAD"):
            return None if self._fallthrough else _NOT_ALLOWED
        path = self._path(relative)
        if path is None:
            return None if self._fallthrough else _NOT_FOUND
        if self._fallthrough and not os.path.isfile(path) and not (self._index and os.path.isdir(path)):
            return None
        return partial(self._answer, path)

    def _path(self, relative: str) -> str | None:
        """The file's path, None if there can be no such file."""
        if "\0" in relative:
            return None
        *folders, name = relative.split("/")
        for part in (*folders, name) if name else folders:
            if not part or (part[0] == "." and part != ".well-known"):
                return None
        if not name:
            if not self._index:
                return None
            name = self._index
        return os.path.join(self._folder, *folders, name)

    def _answer(self, path: str, exchange: Exchange) -> None:
        scope = exchange.scope
        found = self._open(path)
        if found is None:
            if self._index and not path.endswith("/" + self._index) and os.path.isdir(path):
                # Relative links of the index need the slash.
                query = scope["query_string"]
                target = scope["raw_path"] + (b"/?" + query if query else b"/")
                Answer.text(301, "Moved Permanently", (b"location", target))(exchange)
            else:
                _NOT_FOUND(exchange)
            return
        headers: Headers = [
            (b"content-type", self._content_type(path)),
            (b"cache-control", self._control(path)),
            # What users upload must not become a script by what is in it.
            (b"x-content-type-options", b"nosniff"),
        ]
        wanted = header(scope["headers"], b"range") if scope["method"] == "GET" else None
        if wanted is None:
            found = self._encoded(path, found, scope, headers)
        else:
            headers.append((b"vary", b"Accept-Encoding"))
        try:
            _send(exchange, found, headers, wanted)
        finally:
            found.close()

    def _encoded(self, path: str, found: _File, scope: Scope, headers: Headers) -> _File:
        """The file, or the neighbour that holds it compressed in a way the client likes."""
        neighbours = tuple(name for name, suffix in _NEIGHBOURS.items() if os.path.exists(path + suffix))
        if not neighbours:
            return found
        add_vary(headers, b"Accept-Encoding")
        encoding = negotiate(joined(scope["headers"], b"accept-encoding"), neighbours)
        neighbour = self._open(path + _NEIGHBOURS[encoding]) if encoding else None
        if encoding is None or neighbour is None:
            return found
        headers.append((b"content-encoding", encoding.encode()))
        found.close()
        return neighbour

    def _content_type(self, path: str) -> bytes:
        kind = self._types.get(os.path.splitext(path)[1].lower(), "application/octet-stream")
        is_text = kind.startswith("text/") or kind in ("application/json", "application/manifest+json")
        return (f"{kind}; charset=utf-8" if is_text else kind).encode()

    def _control(self, path: str) -> bytes:
        if self._immutable is not None and self._immutable.search(os.path.basename(path)):
            return b"public, max-age=31536000, immutable"
        return self._cache_control

    def _open(self, path: str) -> _File | None:
        try:
            # Without O_NONBLOCK, to open a named pipe would wait for who writes into it.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError):  # also a name that is too long, or that no file can have
            return None
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and self._is_inside(fd, path):
                return _File(fd, status.st_size, status.st_mtime_ns)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _is_inside(self, fd: int, path: str) -> bool:
        """Whether an open file is truly in the folder, wherever symbolic links have led."""
        try:
            real = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # not on Linux
            real = os.path.realpath(path)
        if real.startswith(self._root + os.sep):
            return True
        # The folder itself may be a link that was put elsewhere: so do some deploy.
        self._root = os.path.realpath(self._folder)
        return real.startswith(self._root + os.sep)


class _File:
    """An open file, its size and when it was changed."""

    __slots__ = ("_fd", "_nowait", "etag", "mtime", "size")

    def __init__(self, fd: int, size: int, mtime_ns: int) -> None:
        self._fd = fd
        self._nowait = bool(_NOWAIT)
        self.size = size
        self.mtime = mtime_ns // 1_000_000_000
        self.etag = b'"%x-%x"' % (mtime_ns, size)

    def blocks(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``end``, not included.

        Raises:
            OSError: the file cannot be read, or has become shorter.
        """
        while start < end:
            block = self._read(start, end - start)
            if not block:
                raise OSError("a static file became shorter while it was sent")
            yield block
            start += len(block)

    def close(self) -> None:
        os.close(self._fd)

    def _read(self, start: int, size: int) -> bytes:
        if self._nowait:
            buffer = bytearray(min(size, _BLOCK))
            try:
                got = os.preadv(self._fd, [buffer], start, _NOWAIT)
            except BlockingIOError:
                pass
            except OSError:
                # Of a file system that cannot tell.
                self._nowait = False
            else:
                return bytes(buffer if got == len(buffer) else buffer[:got])
        # A duplicate: if this greenlet is killed, ours is closed while the thread reads, and its number another's.
        fd = os.dup(self._fd)
        return get_hub().threadpool.apply(_pread, (fd, min(size, _DISK_BLOCK), start))


def _pread(fd: int, size: int, start: int) -> bytes:
    try:
        return os.pread(fd, size, start)
    finally:
        os.close(fd)


def _send(exchange: Exchange, found: _File, headers: Headers, wanted: bytes | None) -> None:
    """Answer with an open file, or with what of it is wanted and not known yet."""
    asked = exchange.scope["headers"]
    modified = formatdate(found.mtime, usegmt=True).encode()
    headers += [(b"etag", found.etag), (b"last-modified", modified), (b"accept-ranges", b"bytes")]
    if _is_known(asked, found, modified):
        kept = (b"cache-control", b"etag", b"last-modified", b"vary")
        exchange.respond(304, [pair for pair in headers if pair[0] in kept], b"")
        return
    status, start, end = 200, 0, found.size
    if wanted is not None and header(asked, b"if-range") in (None, found.etag, modified):
        part = _part(wanted, found.size)
        if part == (0, 0):
            headers = [(b"content-range", b"bytes */%d" % found.size), (b"content-length", b"0")]
            exchange.respond(416, headers, b"")
            return
        if part is not None:
            status, (start, end) = 206, part
            headers.append((b"content-range", b"bytes %d-%d/%d" % (start, end - 1, found.size)))
    headers.append((b"content-length", b"%d" % (end - start)))
    if exchange.scope["method"] == "HEAD" or start == end:
        exchange.respond(status, headers, b"")
        return
    blocks = found.blocks(start, end)
    if end - start <= _BLOCK:
        exchange.respond(status, headers, b"".join(blocks))
        return
    exchange.start(status, headers)
    for block in blocks:
        exchange.send(block)
    exchange.end()


def _is_known(asked: Headers, found: _File, modified: bytes) -> bool:
    """Whether the client has the file as it is (RFC 9110, 13.2.2)."""
    tags = joined(asked, b"if-none-match")
    if tags is not None:
        return any(tag.strip().removeprefix(b"W/") in (found.etag, b"*") for tag in tags.split(b","))
    since = header(asked, b"if-modified-since")
    if since is None:
        return False
    if since == modified:
        return True
    try:
        return found.mtime <= parsedate_to_datetime(since.decode("latin-1")).timestamp()
    except (ValueError, TypeError, OverflowError):
        return False


def _part(wanted: bytes, size: int) -> tuple[int, int] | None:
    """Where the wanted part begins and ends; None for the whole file, (0, 0) if there is no such part.

    Several parts at once are answered with the whole file, as the standard allows.
    """
    match = _RANGE.fullmatch(wanted)
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        last = int(match[2])
        return (max(0, size - last), size) if last and size else (0, 0)
    start = int(match[1])
    if match[2] and int(match[2]) < start:
        return None
    if start >= size:
        return 0, 0
    return start, min(size, int(match[2]) + 1) if match[2] else size
