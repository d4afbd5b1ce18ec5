"""How psycopg 3 waits in gevent: what stands for ``psycopg.waiting.wait`` and ``wait_conn``.

psycopg's own choice under gevent, ``wait_poll``, would do, were psycopg never imported before the standard library
is patched; this one is independent of that, and cheaper than gevent's imitation of ``poll``.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import gevent
from gevent.hub import Waiter
from gevent.monkey import get_original
from psycopg import errors

T = TypeVar("T")

_poll: Callable[[], Any] = get_original("select", "poll")
# Reading and writing; gevent's bits for them are psycopg's.
_BOTH = 3


def wait(
    gen: Generator[Any, Any, T], fileno: int, interval: float | None = 0.0, timeout: float | None = None
) -> T:
    """Stands for ``psycopg.waiting.wait``: drive a generator of psycopg's while other greenlets run.

    Args:
        gen: yields what to wait for, and is sent what is ready.
        fileno: the socket to wait for.
        interval: seconds after which to look whether the socket was closed by somebody else, again and again.
        timeout: seconds that all of it may take.
    """
    return _drive(gen, lambda state: (fileno, state), interval, timeout)


def wait_conn(
    gen: Generator[tuple[int, Any], Any, T], interval: float | None = 0.0, timeout: float | None = None
) -> T:
    """Stands for ``psycopg.waiting.wait_conn``: as `wait`, but the generator tells which socket it means."""
    try:
        return _drive(gen, _as_yielded, interval, timeout)
    finally:
        gen.close()  # what it had begun ends now, and not when somebody lets go of a traceback


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
    hub = gevent.get_hub()
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
            seconds = interval
            if deadline is not None:
                seconds = min(seconds, deadline - time.monotonic())
            ready = _ready(hub, watcher, seconds) if seconds > 0 else _ready_now(*target)
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
        timer.start(waiter.switch, 0, update=True)
        return waiter.get() & _BOTH
    finally:
        watcher.stop()
        timer.close()


def _ready_now(fileno: int, state: Any) -> int:
    """As `_ready`, without waiting for more than the turn of others."""
    gevent.sleep(0)
    poll = _poll()
    poll.register(fileno, (select.POLLIN if state & 1 else 0) | (select.POLLOUT if state & 2 else 0))
    events = poll.poll(0)
    if not events:
        return 0
    # Whatever is wrong with the socket, the driver finds out when it uses it.
    return ((events[0][1] & select.POLLIN and 1) | (events[0][1] & select.POLLOUT and 2)) or int(state)


def _check_open(fileno: int) -> None:
    try:
        os.fstat(fileno)
    except OSError as error:
        raise errors.OperationalError("connection socket closed") from error
