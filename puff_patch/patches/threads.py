"""Threads: what of gevent's patch holds within one native thread only, and there are several.

The asyncio thread runs beside the hub, and both use what the standard library protects with locks: logging,
queues, executors, ``threading`` itself.  So locks and ``queue.SimpleQueue`` are those of
`puff_patch.runtime.locks`, ``Event`` and ``Queue`` those of the standard library on top of them, and a thread that
is started in the asyncio thread, where no hub would ever run it, is a greenlet of the hub.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from puff_patch.patches.base import Ledger

# Seconds that the asyncio thread waits for the hub to start a thread.
_START_SECONDS = 30.0


@contextlib.contextmanager
def our_locks() -> Iterator[None]:
    """Have gevent's patch, within the block, put our lock where it would put its own."""
    import gevent.thread  # type: ignore[import-not-found]
    import gevent.threading  # type: ignore[import-not-found]

    from puff_patch.runtime.locks import Lock

    theirs = gevent.thread.LockType
    names = [
        (module, name)
        for module in (gevent.thread, gevent.threading)
        for name, value in vars(module).items()
        if value is theirs
    ]
    for module, name in names:
        setattr(module, name, Lock)
    try:
        yield
    finally:
        for module, name in names:
            setattr(module, name, theirs)


def make_thread_safe(owners: list[Any], ledger: Ledger) -> None:
    """After gevent's patch.

    Args:
        owners: the modules that it has written to.
        ledger: keeps the originals.
    """
    import queue

    import gevent.event
    import gevent.queue
    import gevent.thread
    from gevent.monkey import get_original

    from puff_patch.runtime.locks import Lock, SimpleQueue

    replacements: dict[int, Any] = {
        # Where somebody else has called gevent's patch before.
        id(gevent.thread.LockType): Lock,
        id(gevent.event.Event): get_original("threading", "Event"),
        id(gevent.thread.start_new_thread): _started_in_hub(gevent.thread.start_new_thread),
    }
    for name in ("Queue", "PriorityQueue", "LifoQueue"):
        replacements[id(getattr(gevent.queue, name))] = get_original("queue", name)
    ledger.replace(queue, "SimpleQueue", SimpleQueue)
    joinable = getattr(gevent.thread, "start_joinable_thread", None)
    if joinable is not None:
        replacements[id(joinable)] = _started_in_hub(joinable)
        handle = gevent.thread._ThreadHandle
        ledger.replace(handle, "join", _joined_from_anywhere(handle.join))
    for owner in owners:
        for name, value in list(vars(owner).items()):
            replacement = replacements.get(id(value))
            if replacement is not None:
                ledger.replace(owner, name, replacement)


def _is_foreign() -> bool:
    from puff_patch.runtime.locks import _native_ident, native_threads

    return _native_ident() in native_threads


def _started_in_hub(start: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(start)
    def start_in_hub(*args: Any, **kwargs: Any) -> Any:
        return _call_in_hub(start, *args, **kwargs) if _is_foreign() else start(*args, **kwargs)

    return start_in_hub


def _joined_from_anywhere(join: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(join)
    def join_from_anywhere(self: Any, timeout: float = -1) -> Any:
        greenlet = self._get_greenlet() if _is_foreign() else None
        if greenlet is None or not hasattr(greenlet, "rawlink"):
            return join(self, timeout)
        from puff_patch.runtime.locks import native_lock

        ended = native_lock()
        ended.acquire()
        _call_in_hub(greenlet.rawlink, lambda _: ended.release())
        ended.acquire(True, -1 if timeout is None or timeout < 0 else timeout)
        return None

    return join_from_anywhere


def _call_in_hub(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call in the home hub what takes no time there, and wait for it natively."""
    from puff_patch.runtime import aio
    from puff_patch.runtime.locks import native_lock

    done = native_lock()
    done.acquire()
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread
            outcome.append(None)
            outcome.append(error)
        finally:
            done.release()

    if not aio.get_home().post(run) or not done.acquire(True, _START_SECONDS):
        raise RuntimeError("can't start new thread: the hub that would run it is gone or blocked")
    if len(outcome) > 1:
        raise outcome[1]
    return outcome[0]
