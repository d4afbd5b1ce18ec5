"""How psycopg 3 waits in gevent: what stands for ``psycopg.waiting.wait`` and ``wait_conn``.

psycopg's own choice under gevent, ``wait_poll``, would do, were psycopg never imported before the standard library
is patched; this one is independent of that, and cheaper than gevent's imitation of ``poll``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from gevent import get_hub
from gevent.hub import Waiter
from psycopg import errors

T = TypeVar("T")

# Seconds between looks at whether the socket was closed meanwhile, if the caller does not say.
_INTERVAL = 0.1
# Reading and writing; gevent's bits for them are psycopg's.
_BOTH = 3


def wait(
    gen: Generator[Any, Any, T], fileno: int, interval: float | None = 0.0, timeout: float | None = None
) -> T:
    """Stands for ``psycopg.waiting.wait``: drive a generator of psycopg's while other greenlets run.

    Args:
        gen: yields what to wait for, and is sent what is ready.
        fileno: the socket to wait for.
        interval: seconds between looks at whether the socket was closed by somebody else.
        timeout: seconds that all of it may take.
    """
    return _drive(gen, lambda state: (fileno, state), interval, timeout)


def wait_conn(
    gen: Generator[tuple[int, Any], Any, T], interval: float | None = 0.0, timeout: float | None = None
) -> T:
    """Stands for ``psycopg.waiting.wait_conn``: as `wait`, but the generator tells which socket it means."""
    return _drive(gen, _as_yielded, interval, timeout)


def _as_yielded(yielded: tuple[int, Any]) -> tuple[int, Any]:
    return yielded


def _drive(
    gen: Generator[Any, Any, T],
    target_of: Callable[[Any], tuple[int, Any]],
    interval: float | None,
    timeout: float | None,
) -> T:
    if interval is None:
        raise ValueError("indefinite wait not supported anymore")
    deadline = None if timeout is None else time.monotonic() + timeout
    hub = get_hub()
    watcher: Any = None
    watched: tuple[int, Any] | None = None
    try:
        yielded = next(gen)
        while True:
            target = target_of(yielded)
            if target != watched:
                if watcher is not None:
                    watcher.close()
                watcher, watched = hub.loop.io(target[0], int(target[1])), target
            patience = interval or _INTERVAL
            if deadline is not None:
                patience = max(0.0, min(patience, deadline - time.monotonic()))
            ready = _ready(hub, watcher, patience)
            if ready:
                yielded = gen.send(ready)
            else:
                _check_open(target[0])
                gen.send(0)
            if deadline is not None and time.monotonic() >= deadline:
                raise errors._WaitTimeout("wait timeout expired")
    except StopIteration as end:
        value: T = end.value
        return value
    finally:
        if watcher is not None:
            watcher.close()


def _ready(hub: Any, watcher: Any, seconds: float) -> int:
    """Which of reading and writing can be done; 0 if nothing happened in time."""
    waiter: Waiter[int] = Waiter(hub)
    timer = hub.loop.timer(seconds)
    watcher.start(waiter.switch, pass_events=True)
    try:
        timer.start(waiter.switch, 0)
        return waiter.get() & _BOTH
    finally:
        watcher.stop()
        timer.close()


def _check_open(fileno: int) -> None:
    try:
        os.fstat(fileno)
    except OSError as error:
        raise errors.OperationalError("connection socket closed") from error
