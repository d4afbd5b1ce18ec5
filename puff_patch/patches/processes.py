"""Processes: what gevent's patch of the standard library leaves out, or leaves to chance.

* multiprocessing's pipes and locks block the whole hub. A `multiprocessing.Pool` then waits for ever: the threads
  that hand out its work and gather the results are greenlets of one thread. Replaced are ``Connection._send`` and
  ``_recv``, and of ``SemLock`` (the base of every lock, semaphore, condition and queue) ``_make_methods`` and
  ``__enter__``.
* gevent's ``os.close`` closes when the loop next wakes, and nothing wakes it: a pipe's reader may wait for its end
  for as long as the writer's loop is idle. Here it is woken.
* gevent's ``os.fork`` sees to SIGCHLD after the fork; the end of a child that is faster goes unseen, and whoever
  waits for it waits for ever. Here it is before.
* Threads do not survive a fork, greenlets do: a child would go on with what its parent was doing, on the parent's
  sockets, whenever it waits. In the children that multiprocessing forks they are left behind.
"""

from __future__ import annotations

import functools
import gc
import os
import select
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Ledger

# What a pipe that is ready to be written to takes without waiting (Linux: a page).
_CHUNK = 4096
# Seconds between looks at a lock: nothing tells when another process lets go of it.
_FIRST_LOOK, _LAST_LOOK = 0.0005, 0.01


def make_reliable(ledger: Ledger) -> None:
    """After gevent's patch."""
    import gevent
    from gevent._hub_local import get_hub_if_exists
    from gevent.os import fork_gevent

    deferred_close = os.close

    @functools.wraps(deferred_close)
    def close(fd: int) -> None:
        deferred_close(fd)
        hub = get_hub_if_exists()
        if hub is not None and hub.loop is not None:
            # A callback would not do: it is run before the loop waits, and what closes after.
            timer = hub.loop.timer(0, ref=False)
            timer.start(timer.close)

    ledger.replace(os, "close", close)
    fork_and_watch = os.fork

    @functools.wraps(fork_and_watch)
    def fork(*args: Any, **kwargs: Any) -> int:
        loop = gevent.get_hub().loop
        if not loop.default:
            return fork_gevent()  # only the main thread can watch children
        loop.install_sigchld()
        return fork_and_watch(*args, **kwargs)

    ledger.replace(os, "fork", fork)


def make_pipes_cooperative(module: ModuleType, ledger: Ledger) -> None:
    """In a freshly imported ``multiprocessing.connection``."""
    from gevent.monkey import get_original

    connection_class = module.Connection
    finalizing, cooperative_close, native_close = sys.is_finalizing, os.close, get_original("os", "close")
    # The functions that read and write are default arguments there.
    send, receive = connection_class._send, connection_class._recv

    @functools.wraps(send)
    def _send(self: Any, buf: Any, write: Any = _write) -> Any:
        return send(self, buf, write)

    @functools.wraps(receive)
    def _recv(self: Any, size: int, read: Any = _read) -> Any:
        return receive(self, size, read)

    def _close(self: Any) -> None:
        # gevent's needs its own module, which may be gone when the last connections of a program are collected.
        (native_close if finalizing() else cooperative_close)(self._handle)

    ledger.replace(connection_class, "_send", _send)
    ledger.replace(connection_class, "_recv", _recv)
    ledger.replace(connection_class, "_close", _close)
    hook = _ForkHook()
    module.util.register_after_fork(hook, _ForkHook.leave_greenlets_behind)
    ledger.on_restore(hook.forget)


def make_locks_cooperative(module: ModuleType, ledger: Ledger) -> None:
    """In a freshly imported ``multiprocessing.synchronize``."""
    lock_class = module.SemLock
    make_methods = lock_class._make_methods

    @functools.wraps(make_methods)
    def _make_methods(self: Any) -> None:
        make_methods(self)
        self.acquire = functools.partial(_acquire, self._semlock.acquire)

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
        """Let none of the parent's greenlets go on here."""
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


def _read(descriptor: int, size: int) -> bytes:
    _wait_until_ready(descriptor, select.POLLIN)
    return os.read(descriptor, size)


def _write(descriptor: int, data: Any) -> int:
    _wait_until_ready(descriptor, select.POLLOUT)
    return os.write(descriptor, data[:_CHUNK])


def _wait_until_ready(descriptor: int, event: int) -> None:
    from gevent.monkey import get_original

    poll: Any = get_original("select", "poll")()
    poll.register(descriptor, event)
    if poll.poll(0):
        return
    import gevent

    hub = gevent.get_hub()
    watcher = hub.loop.io(descriptor, 1 if event == select.POLLIN else 2)
    try:
        hub.wait(watcher)
    finally:
        watcher.close()


def _acquire(acquire: Callable[[bool], bool], block: bool = True, timeout: float | None = None) -> bool:
    import gevent

    if acquire(False):
        return True
    if not block:
        return False
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = _FIRST_LOOK
    while deadline is None or (left := deadline - time.monotonic()) > 0:
        gevent.sleep(pause if deadline is None else min(pause, left))
        if acquire(False):
            return True
        pause = min(pause * 2, _LAST_LOOK)
    return False
