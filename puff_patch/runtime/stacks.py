"""Stacks of greenlets and threads, and which line of the user's own code they are at.

A stack is a list of frames, the innermost first.  It must be taken in one go: from Python 3.12 on ``f_back`` of a
frame reads memory of the C stack, which a greenlet that is switched out in the meantime has moved elsewhere, and
the process may crash.  So the two functions that take one do it all within a single call of a C function
(``list.extend``), during which nobody else gets the GIL.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, chain, repeat, starmap
from operator import attrgetter, itemgetter
from types import FrameType
from typing import Any

from greenlet import greenlet

_PACKAGES = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def thread_stack(ident: int) -> list[FrameType]:
    """The stack of a running thread of this process; empty if it runs no Python code.

    Args:
        ident: the thread's native ``_thread.get_ident()``.
    """
    return _taken(map(itemgetter(ident), starmap(sys._current_frames, [()])))


def greenlet_stack(which: greenlet) -> list[FrameType]:
    """The stack of a greenlet that is switched out; empty if it runs (in another thread, then) or has ended."""
    return _taken(map(attrgetter("gr_frame"), [which]))


def _taken(innermost: Iterator[Any]) -> list[Any]:
    stack: list[Any] = []
    # getattr(getattr(innermost, "f_back"), "f_back") ... until it fails, for None has no such attribute.
    with contextlib.suppress(AttributeError, KeyError):
        stack.extend(accumulate(chain(innermost, repeat("f_back")), getattr))
    return stack[:-1] if stack and stack[-1] is None else stack


@cache
def _is_library(filename: str) -> bool:
    """Whether code in this file is not the user's own: the standard library, installed packages, and ours."""
    if filename.startswith("<frozen"):
        return True
    paths = sysconfig.get_paths()
    roots = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots |= {os.path.join(_PACKAGES, name) for name in ("puff_patch", "django_backend")}
    return filename.startswith(tuple(root + os.sep for root in roots))


def user_frame(stack: Sequence[FrameType]) -> int | None:
    """The index of the innermost frame of the user's own code; None if there is none."""
    return next((i for i, frame in enumerate(stack) if not _is_library(frame.f_code.co_filename)), None)


def describe(stack: Sequence[FrameType]) -> str:
    """Where a stack is, in a line: ``/srv/shop/views.py:42 in checkout (inside requests.api.get)``."""
    if not stack:
        return "C code called by no Python code"
    index = user_frame(stack)
    if index is None:
        # Nothing of the user's, as with a parked greenlet.
        return f"{_name(stack[0])}, line {stack[0].f_lineno}, with no code of yours on the stack"
    at = stack[index]
    inside = f" (inside {_name(stack[index - 1])})" if index else ""
    return f"{at.f_code.co_filename}:{at.f_lineno} in {at.f_code.co_name}{inside}"


def _name(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}"
