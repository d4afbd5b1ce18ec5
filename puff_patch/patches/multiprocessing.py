"""multiprocessing: pipes, queues, locks and pools between processes wait cooperatively; a part of ``sockets``.

gevent leaves this library alone, but the threads it starts (a ``Pool`` has three) are greenlets once the standard
library is patched: the first of them that reads from a pipe would stop all the others for ever.  Replaces
``Connection._recv`` and ``_send``, and what acquires a ``SemLock``.  And as threads do not survive a fork, neither
do greenlets in a child that multiprocessing forks.
"""

from __future__ import annotations

import functools
import gc
import os
import select
import sys
import time
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Ledger

# Seconds between two attempts to get a lock that another process holds: doubled from the first to the second.
_FIRST, _MOST = 0.0005, 0.02
_READ, _WRITE = 1, 2


#: Whose import `apply` waits for.
MODULES = ("multiprocessing.connection", "multiprocessing.synchronize")


def apply(ledger: Ledger, module: ModuleType) -> None:
    """Replace what waits in the freshly imported module, one of `MODULES`."""
    if module.__name__ == "multiprocessing.connection":
        _apply_connection(ledger, module.Connection, module.util)
    else:
        _apply_semaphores(ledger, module.SemLock)


def _apply_connection(ledger: Ledger, connection_class: Any, util: Any) -> None:
    from gevent.monkey import get_original

    receive, send = connection_class._recv, connection_class._send
    finalizing, cooperative_close, native_close = sys.is_finalizing, os.close, get_original("os", "close")

    @functools.wraps(receive)
    def _recv(self: Any, size: int, read: Any = _read) -> Any:
        return receive(self, size, read)

    @functools.wraps(send)
    def _send(self: Any, buf: Any, write: Any = _write) -> None:
        send(self, buf, write)

    def _close(self: Any) -> None:
        # gevent's needs its own module, which may be gone when the last connections of a program are collected.
        (native_close if finalizing() else cooperative_close)(self._handle)

    ledger.replace(connection_class, "_recv", _recv)
    ledger.replace(connection_class, "_send", _send)
    ledger.replace(connection_class, "_close", _close)
    hook = _ForkHook()
    util.register_after_fork(hook, _ForkHook.leave_greenlets_behind)
    ledger.on_restore(hook.forget)


def _apply_semaphores(ledger: Ledger, lock_class: Any) -> None:
    make_methods = lock_class._make_methods

    @functools.wraps(make_methods)
    def _make_methods(self: Any) -> None:
        make_methods(self)
        self.acquire = functools.partial(_acquire, self._semlock)

    def __enter__(self: Any) -> Any:
        return self.acquire()

    ledger.replace(lock_class, "_make_methods", _make_methods)
    ledger.replace(lock_class, "__enter__", __enter__)


class _ForkHook:
    """Called in the children that multiprocessing forks."""

    def __init__(self) -> None:
        self._active = True

    def forget(self) -> None:
        self._active = False

    def leave_greenlets_behind(self) -> None:
        """Forget the parent's greenlets: they would go on here with the parent's sockets."""
        from gevent import getcurrent
        from gevent._hub_local import get_hub_if_exists
        from greenlet import greenlet

        hub: Any = get_hub_if_exists()
        if not self._active or hub is None:
            return
        # One that is garbage collected would be woken to end, and close what the parent uses.
        _left_behind.extend(each for each in gc.get_objects() if isinstance(each, greenlet))
        here, main = getcurrent(), hub.parent
        if here is not main:
            # The hub ends into its parent, which must be us.
            here.parent, hub.parent = main, here
        # Their native threads are the parent's.
        hub._threadpool = hub._resolver = None
        hub.destroy(destroy_loop=True)  # the next one to wait makes a new one


_left_behind: list[Any] = []


def _wait(handle: int, events: int) -> None:
    from gevent import get_hub

    watcher = get_hub().loop.io(handle, events)
    try:
        get_hub().wait(watcher)
    finally:
        watcher.close()


def _read(handle: int, size: int) -> bytes:
    _wait(handle, _READ)
    return os.read(handle, size)


def _write(handle: int, data: Any) -> int:
    # The descriptor blocks, and is shared with other processes: only as much as surely fits into a pipe.
    _wait(handle, _WRITE)
    return os.write(handle, data[: select.PIPE_BUF])


def _acquire(semaphore: Any, block: bool = True, timeout: float | None = None) -> bool:
    """Stands for ``SemLock.acquire``: nobody tells a process that a semaphore is free, so it asks again."""
    if semaphore.acquire(False):
        return True
    if not block:
        return False
    import gevent

    deadline = None if timeout is None else time.monotonic() + timeout
    pause = _FIRST
    while not semaphore.acquire(False):
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            pause = min(pause, left)
        gevent.sleep(pause)
        pause = min(pause * 2, _MOST)
    return True
