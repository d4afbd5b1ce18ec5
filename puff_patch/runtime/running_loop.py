"""A running event loop belongs to the greenlet that runs it, not to its whole thread.

asyncio notes the running loop (and the interpreter the hooks of asynchronous generators) by native thread.  While
a greenlet runs a loop, a trace function takes both along at each switch of greenlets, so that other greenlets of
the thread neither see the loop nor are kept from running one of their own.  Threads whose greenlets run no
loop have no trace function.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import greenlet
from gevent.monkey import get_original

_native_ident: Callable[[], int] = get_original("_thread", "get_ident")
_get_running_loop = asyncio._get_running_loop
_set_running_loop = asyncio._set_running_loop

# By native thread.
_tracers: dict[int, _Tracer] = {}


class _Tracer:
    """The trace function of one thread."""

    def __init__(self) -> None:
        self._loops = 0
        self._kept: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()
        self._previous: Any = None

    def enter(self) -> None:
        """A greenlet of this thread runs a loop from now on."""
        self._loops += 1
        if self._loops == 1 and greenlet.gettrace() != self.trace:
            self._previous = greenlet.settrace(self.trace)

    def leave(self) -> None:
        """It no longer does."""
        self._loops -= 1
        # One that came after us refers to us; then we stay, and do nothing.
        if not self._loops and greenlet.gettrace() == self.trace:
            greenlet.settrace(self._previous)
            self._previous = None

    def trace(self, event: str, args: Any) -> None:
        """Called in the greenlet that has been switched to."""
        if self._previous is not None:
            self._previous(event, args)
        origin, target = args
        kept = self._kept
        loop = _get_running_loop()
        if loop is not None:
            kept[origin] = loop, sys.get_asyncgen_hooks()
            _set_running_loop(None)
            sys.set_asyncgen_hooks(None, None)
        if kept:
            state = kept.pop(target, None)
            if state is not None:
                _set_running_loop(state[0])
                sys.set_asyncgen_hooks(*state[1])


def _tracer() -> _Tracer:
    return _tracers.setdefault(_native_ident(), _Tracer())


@contextmanager
def owned_by_greenlet() -> Iterator[None]:
    """Within the block, in which a loop is run, the loop is running for the current greenlet only."""
    tracer = _tracer()
    tracer.enter()
    try:
        yield
    finally:
        tracer.leave()


@contextmanager
def suspended() -> Iterator[None]:
    """Within the block, in which a loop waits, no loop is running, so that nothing need be traced for this one."""
    tracer = _tracer()
    loop, hooks = _get_running_loop(), sys.get_asyncgen_hooks()
    _set_running_loop(None)
    sys.set_asyncgen_hooks(None, None)
    tracer.leave()
    try:
        yield
    finally:
        tracer.enter()
        _set_running_loop(loop)
        sys.set_asyncgen_hooks(*hooks)
