"""Native threads for what blocks and cannot be made cooperative: files, C libraries, computations.

There is a bounded number of them (``PUFF_BLOCKING_THREADS``); further calls wait in order.  They are no greenlets
and no `threading` threads: they start with the first call, end after a minute without one, and are not there in a
forked child.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gevent._hub_local import get_hub_if_exists
from gevent.monkey import get_original

from puff_patch.config import current
from puff_patch.runtime import aio
from puff_patch.runtime.calls import Outcome, Task
from puff_patch.runtime.futures import native_lock

T = TypeVar("T")

_start_new_thread: Callable[..., int] = get_original("_thread", "start_new_thread")
_native_ident: Callable[[], int] = get_original("_thread", "get_ident")

_IDLE_SECONDS = 60.0


class _Worker:
    """One thread while it has nothing to do."""

    __slots__ = ("wake", "work")

    def __init__(self) -> None:
        self.wake = native_lock()
        self.wake.acquire()
        self.work: Callable[[], object] | None = None


class NativePool:
    """Runs calls in native threads, the most recently used one first.

    Args:
        max_threads: how many calls run at a time; further ones wait in order.
    """

    def __init__(self, max_threads: int) -> None:
        self.max_threads = max_threads
        self._lock = native_lock()
        self._idle: list[_Worker] = []
        self._waiting: deque[Callable[[], object]] = deque()
        self._idents: set[int] = set()
        self._size = 0

    @property
    def size(self) -> int:
        """How many threads there are."""
        return self._size

    @property
    def waiting(self) -> int:
        """How many calls wait for a thread."""
        return len(self._waiting)

    def is_inside(self) -> bool:
        """Whether the caller is in one of the threads."""
        return _native_ident() in self._idents

    def submit(self, work: Callable[[], object]) -> None:
        """Have ``work``, which raises nothing, called in a thread; any thread may ask.

        What a thread of the pool itself asks for does not wait: it would wait for its own place.
        """
        with self._lock:
            if self._idle:
                worker = self._idle.pop()
                worker.work = work
                worker.wake.release()
                return
            if self._size >= self.max_threads and not self.is_inside():
                self._waiting.append(work)
                return
            self._size += 1
        try:
            _start_new_thread(self._run, (work,))
        except BaseException:
            with self._lock:
                self._size -= 1
            raise

    def _run(self, work: Callable[[], object] | None) -> None:
        # Signals are for the main thread: one that the kernel delivered here would not wake the hub.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        ident = _native_ident()
        self._idents.add(ident)
        worker = _Worker()
        try:
            while work is not None:
                work()
                work = self._next(worker)
        finally:
            self._idents.discard(ident)
            # What the calls have left of this thread: the stand-in that threading keeps, and gevent's hub.
            for known in (threading.get_ident(), ident):
                threading._active.pop(known, None)  # type: ignore[attr-defined]
            hub = get_hub_if_exists()
            if hub is not None:
                for close in _at_thread_end:
                    close()
                hub.destroy(destroy_loop=True)

    def _next(self, worker: _Worker) -> Callable[[], object] | None:
        with self._lock:
            if self._size > self.max_threads:
                self._size -= 1
                return None
            if self._waiting:
                return self._waiting.popleft()
            self._idle.append(worker)
        if not worker.wake.acquire(timeout=_IDLE_SECONDS):
            with self._lock:
                if worker in self._idle:
                    self._idle.remove(worker)
                    self._size -= 1
                    return None
            worker.wake.acquire()  # it was given work at the last moment
        work, worker.work = worker.work, None
        return work


# What closes what belongs to a thread's hub; a destroyed hub may be referred to for long.
_at_thread_end: dict[Callable[[], object], None] = {}


def at_thread_end(close: Callable[[], object]) -> None:
    """Have ``close``, which raises nothing, called in each of these threads that has a hub, before it ends."""
    _at_thread_end[close] = None


_pool: NativePool | None = None
_pool_lock = native_lock()
_fork_hooked = False


def get_pool() -> NativePool:
    """The pool of this process, made at the first call."""
    global _pool, _fork_hooked
    pool = _pool
    if pool is None:
        size = current().blocking_threads
        with _pool_lock:
            if not _fork_hooked:
                _fork_hooked = True
                os.register_at_fork(after_in_child=_forget)
            if _pool is None:
                _pool = NativePool(size)
            pool = _pool
    return pool


def _forget() -> None:
    global _pool, _pool_lock
    _pool = None
    _pool_lock = native_lock()


class _Call:
    """A function on its way to a thread, in the caller's context."""

    __slots__ = ("_call", "outcome")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.outcome = Outcome(fn)
        self._call = functools.partial(contextvars.copy_context().run, fn, *args, **kwargs)

    def run(self) -> None:
        outcome = self.outcome
        try:
            if not outcome.killed:
                outcome.finish(self._call(), None)
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            outcome.finish(None, error)
        finally:
            # The traceback refers to this frame: without the rest an outcome nobody holds is gone at once.
            del self, outcome


def spawn_blocking(fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Task[T]:
    """Run a function in a native thread, from a greenlet or an event loop.

    It runs in a copy of the caller's context.  At most ``PUFF_BLOCKING_THREADS`` (32) run at a time, further ones
    wait in order; what such a thread itself starts does not wait.

    Args:
        fn: the function; what it does must be fit for threads.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The task.  Its thread cannot be stopped: see `Task.kill`.

    Raises:
        TypeError: ``fn`` is a coroutine function, which would not run there.
    """
    if inspect.iscoroutinefunction(fn):
        raise TypeError(
            f"{fn.__qualname__} is a coroutine function: await it, there is nothing to wait for in a thread"
        )
    aio.get_home()  # not in the thread, if it asks
    call = _Call(fn, args, kwargs)
    get_pool().submit(call.run)
    return Task(call.outcome, call.outcome.kill)


def blocking(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: each call runs in a native thread while the calling greenlet waits and others run.

    Where an event loop is running, the call returns an awaitable.  Arguments, result, exceptions with their
    traceback and context variables are carried over; what the function sets of the latter stays its own.  Called
    in such a thread, the function just runs.  If the greenlet is killed, or its time is over, the function runs to
    its end and its result is dropped.

    Args:
        fn: a function or method; what it does must be fit for threads.

    Raises:
        TypeError: ``fn`` is a coroutine function.
    """
    if inspect.iscoroutinefunction(fn):
        raise TypeError(f"blocking() is for functions that block, and {fn.__qualname__} is a coroutine function")

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if get_pool().is_inside():
            return fn(*args, **kwargs)
        return spawn_blocking(fn, *args, **kwargs).join()

    return call


@blocking
def read_file_bytes(fn: str | os.PathLike[str]) -> Any:
    """The contents of a file, read in a native thread.

    Args:
        fn: its path.

    Returns:
        Bytes; where an event loop is running, an awaitable of them.

    Raises:
        OSError: it cannot be read.
    """
    return Path(fn).read_bytes()
