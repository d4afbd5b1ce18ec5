"""``wsgi.input``: a request body read from the connection as the application asks for it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class RequestBody(io.BufferedIOBase):
    """A file-like view of a request body that holds no more than the part it received last.

    ``read(n)`` waits for n bytes or the end, as a file does; ``read1`` returns what is there. Reading raises
    :class:`puff_patch.server.ClientDisconnected`, an ``OSError``, when the client leaves before the end.

    Args:
        receive: waits for and returns the next part of the body, b"" at its end.
        length: bytes of the whole body; None if that is not known. It spares waiting for the end.

    Attributes:
        ended: the end of the body has been reached.
    """

    def __init__(self, receive: Callable[[], bytes], length: int | None = None) -> None:
        super().__init__()
        self._receive = receive
        self._left = -1 if length is None else length
        self._part = b""
        self._at = 0
        self.ended = length == 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        """Return up to ``size`` bytes, fewer only at the end; everything if it is None or negative."""
        if size is None or size < 0:
            return b"".join(self._rest())
        if len(self._part) - self._at >= size:
            return self._cut(size)
        parts = []
        while size > 0 and self._fill():
            part = self._cut(size)
            size -= len(part)
            parts.append(part)
        return b"".join(parts)

    def read1(self, size: int = -1) -> bytes:
        """Return what is there, waiting only if that is nothing, and at most ``size`` bytes of it."""
        if not self._fill():
            return b""
        return self._cut(len(self._part) if size < 0 else size)

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read into ``buffer`` and return how many bytes that was."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readinto1(self, buffer: WriteableBuffer) -> int:
        """Read what is there into ``buffer`` and return how many bytes that was."""
        view = memoryview(buffer).cast("B")
        data = self.read1(len(view))
        view[: len(data)] = data
        return len(data)

    def readline(self, size: int | None = -1) -> bytes:
        """Return a line with its end, or up to ``size`` bytes of it; b"" at the end of the body."""
        left = -1 if size is None or size < 0 else size
        parts = []
        while left != 0 and self._fill():
            found = self._part.find(b"\n", self._at)
            length = (found + 1 if found >= 0 else len(self._part)) - self._at
            if left >= 0:
                length = min(length, left)
                left -= length
            part = self._cut(length)
            parts.append(part)
            if part.endswith(b"\n"):
                break
        return b"".join(parts)

    def _rest(self) -> Iterable[bytes]:
        while self._fill():
            yield self._cut(len(self._part))

    def _fill(self) -> bool:
        """Have at least one byte at hand; False at the end of the body."""
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if self._at < len(self._part):
            return True
        self._part = b""
        self._at = 0
        if self.ended:
            return False
        self._part = self._receive()
        self._left -= len(self._part)
        self.ended = not self._part or self._left == 0
        return bool(self._part)

    def _cut(self, size: int) -> bytes:
        part = self._part[self._at : self._at + size]
        self._at += len(part)
        return part
