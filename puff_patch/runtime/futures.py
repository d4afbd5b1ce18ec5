"""Futures and executors between greenlets and native threads.

Those of `concurrent.futures` use locks, and gevent's locks, which a patched program has in their place, wake
a waiter in another thread with a call that races (see `puff_patch.runtime.mailbox`).  These cross threads
through mailboxes alone: any thread may submit and complete, and whoever waits does so cooperatively.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import gevent
from gevent import getcurrent
from gevent.hub import Waiter
from gevent.monkey import get_original

from puff_patch.runtime.greenlets import WarmPool
from puff_patch.runtime.mailbox import Mailbox

if TYPE_CHECKING:
    _Future = Future[Any]
else:
    _Future = Future

native_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")
native_rlock: Callable[[], Any] = get_original("_thread", "RLock")

# Seconds that what a killed greenlet waits for may take to end.
_GRACE = 5.0
# For gevent.Timeout, whose types do not know that False means to end the block silently.
_SILENT: Any = False


class HubFuture(_Future):
    """A `concurrent.futures.Future` that any thread may complete and greenlets wait for cooperatively."""

    def __init__(self) -> None:
        # Not super().__init__(): it makes the lock that this class is there to avoid.
        self._condition = _Gate()  # type: ignore[assignment]
        self._state = "PENDING"
        self._result = None
        self._exception = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Any] = []

    def result(self, timeout: float | None = None) -> Any:
        """As that of `concurrent.futures.Future`."""
        self._await(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As that of `concurrent.futures.Future`."""
        self._await(timeout)
        return super().exception(0)

    def _await(self, timeout: float | None) -> None:
        if self.done():
            return
        mailbox = Mailbox.current()
        waiter: Waiter[None] = Waiter()

        def wake(_: object) -> None:
            mailbox.post(waiter.switch, None)

        self.add_done_callback(wake)
        try:
            with mailbox.hold(), gevent.Timeout(timeout, _SILENT):
                waiter.get()
        finally:
            with contextlib.suppress(ValueError):
                self._done_callbacks.remove(wake)


class _Gate:
    """What a future uses of its condition: a lock held for moments.  Nobody ever waits on it."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = native_rlock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def acquire(self) -> bool:
        taken: bool = self._lock.acquire()
        return taken

    def release(self) -> None:
        self._lock.release()

    def notify_all(self) -> None:
        pass

    def wait(self, timeout: float | None = None) -> bool:
        return False


class _Work:
    """A call and the future of its outcome."""

    __slots__ = ("args", "fn", "future", "kwargs")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.future = HubFuture()
        self.fn = fn
        self.args = args
        self.kwargs = kwargs

    def run(self) -> BaseException | None:
        """Call, and complete the future.

        Returns:
            What may have been meant for the greenlet itself: that it is killed, or out of time.
        """
        __traceback_hide__ = True
        if not self.future.set_running_or_notify_cancel():
            return None
        try:
            result = self.fn(*self.args, **self.kwargs)
        except BaseException as error:  # noqa: BLE001 - raised again where the future is waited for
            self.future.set_exception(error)
            return error if isinstance(error, (gevent.GreenletExit, gevent.Timeout)) else None
        self.future.set_result(result)
        return None

    def run_or_exit(self) -> None:
        """As `run`, for a greenlet of our own, which ends if it is killed."""
        interruption = self.run()
        if isinstance(interruption, gevent.GreenletExit):
            raise interruption


class HubExecutor(ThreadPoolExecutor):
    """Runs each call on a warm greenlet of one hub, whichever thread it comes from.

    There is no limit on how many run at a time: calls may wait for one another, and what they use (the pools)
    has limits of its own.  A `ThreadPoolExecutor`, because asyncio takes nothing else as its default executor.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        # Not super().__init__(): there are no threads, nor their locks.
        self._mailbox = mailbox
        self._max_workers = sys.maxsize
        self._shutdown = False
        self._unfinished: set[HubFuture] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As that of `concurrent.futures.Executor`."""
        if self._shutdown:
            raise RuntimeError("cannot schedule new futures after shutdown")
        work = _Work(fn, args, kwargs)
        self._unfinished.add(work.future)
        work.future.add_done_callback(self._unfinished.discard)
        _post(self._mailbox, start_warm, work.run_or_exit)
        return work.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As that of `concurrent.futures.Executor`."""
        self._shutdown = True
        unfinished = list(self._unfinished)
        if cancel_futures:
            for future in unfinished:
                future.cancel()
        if wait:
            for future in unfinished:
                with contextlib.suppress(BaseException):
                    future.exception()


class SerialExecutor(Executor):
    """Runs calls one after the other on one and the same greenlet: what a pool of one thread is elsewhere."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._lane = _Lane(mailbox)
        self._pid = os.getpid()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As that of `concurrent.futures.Executor`."""
        work = _Work(fn, args, kwargs)
        if self._lane.closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self._lane.add(work)
        return work.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As that of `concurrent.futures.Executor`."""
        lane = self._lane
        if cancel_futures:
            for work in list(lane.waiting):
                work.future.cancel()
        lane.close()
        if wait:
            lane.ended.result()

    def is_inherited(self) -> bool:
        """Whether it was made before a fork: what it waited for then has happened in the parent."""
        return self._pid != os.getpid()

    @property
    def mailbox(self) -> Mailbox:
        """That of the hub whose greenlet it is."""
        return self._lane.mailbox

    @property
    def ended(self) -> HubFuture:
        """Done once everything submitted has run, after `shutdown`."""
        return self._lane.ended

    def __del__(self) -> None:
        self._lane.close()


class _Lane:
    """The greenlet of a `SerialExecutor`.  It does not refer to the executor, which may just be dropped."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self._running = False
        self._parked: Waiter[None] | None = None
        self.waiting: deque[_Work] = deque()
        self.closed = False
        self.ended = HubFuture()

    def add(self, work: _Work) -> None:
        self.waiting.append(work)
        _post(self.mailbox, self._wake)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if not self.mailbox.post(self._wake):
                self.ended.set_result(None)

    def _wake(self) -> None:
        # In the hub.
        parked, self._parked = self._parked, None
        if parked is not None:
            parked.switch(None)
        elif not self._running and (self.waiting or not self.closed):
            self._running = True
            start_warm(self._run)
        elif not self._running and not self.ended.done():
            self.ended.set_result(None)

    def _run(self) -> None:
        try:
            while True:
                while self.waiting:
                    self.waiting.popleft().run_or_exit()
                if self.closed:
                    return
                self._parked = Waiter()
                self._parked.get()
        finally:
            self._running = False
            self._parked = None
            self.mailbox.post(self._wake)


class CurrentGreenletExecutor(Executor):
    """Runs calls on the greenlet that made it, while that one waits in `run_until_future`.

    Args:
        outer: the executor that takes calls once this one no longer does.
    """

    def __init__(self, outer: CurrentGreenletExecutor | None = None) -> None:
        self._mailbox = Mailbox.current()
        self._greenlet = getcurrent()
        self._outer = outer
        self._lock = native_lock()
        self._works: deque[_Work] = deque()
        self._closed = False
        self._waiter: Waiter[None] | None = None
        #: Called if the waiting greenlet is killed or runs out of time; it should make the future be done soon.
        self.on_interrupt: Callable[[], object] | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As that of `concurrent.futures.Executor`; any thread may call it, but not the executor's own greenlet.

        Raises:
            RuntimeError: it is called there, or nobody waits any more.
        """
        if getcurrent() is self._greenlet:
            raise RuntimeError("You cannot submit onto CurrentThreadExecutor from its own thread")
        work = _Work(fn, args, kwargs)
        executor: CurrentGreenletExecutor | None = self
        while executor is not None:
            with executor._lock:
                if not executor._closed:
                    executor._works.append(work)
                    executor._mailbox.post_or_call(executor._wake)
                    return work.future
            executor = executor._outer
        raise RuntimeError("CurrentThreadExecutor already quit or is broken")

    def run_until_future(self, future: Future[Any]) -> None:
        """Do what is submitted until ``future`` is done.

        If the greenlet is killed or runs out of time meanwhile, ``on_interrupt`` is called, and the interruption
        is raised once the future is done, after five seconds, or at the next interruption.
        """
        if getcurrent() is not self._greenlet:
            raise RuntimeError("You cannot run CurrentThreadExecutor from a different thread")
        future.add_done_callback(self._finish)
        with self._mailbox.hold():
            try:
                self._serve()
            except BaseException:
                if self.on_interrupt is not None:
                    self.on_interrupt()
                    with gevent.Timeout(_GRACE, _SILENT):
                        self._serve()
                raise
            finally:
                self._close()

    def _serve(self) -> None:
        while True:
            with self._lock:
                work = self._works.popleft() if self._works else None
                if work is None and self._closed:
                    return
                if work is None:
                    # Set before the lock is let go: who appends next has _wake find it.
                    waiter = self._waiter = Waiter()
            if work is not None:
                interruption = work.run()
                if interruption is not None:
                    raise interruption
                continue
            try:
                waiter.get()
            finally:
                self._waiter = None

    def _finish(self, future: object) -> None:
        # In any thread.
        with self._lock:
            self._closed = True
        self._mailbox.post_or_call(self._wake)

    def _wake(self) -> None:
        # In the hub's thread.
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            gevent.get_hub().loop.run_callback(waiter.switch, None)

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            left, self._works = self._works, deque()
        for work in left:
            work.future.cancel()


def start_warm(fn: Callable[..., object], *args: Any) -> None:
    """In the hub: run ``fn(*args)`` on a warm greenlet of it, without a limit on how many there are."""
    hub: Any = gevent.get_hub()
    pool: WarmPool | None = getattr(hub, "_puff_warm", None)
    if pool is None:
        pool = hub._puff_warm = WarmPool(sys.maxsize, name="puff asyncio")
    pool.submit(fn, *args)


def _post(mailbox: Mailbox, fn: Callable[..., object], *args: Any) -> None:
    if not mailbox.post(fn, *args):
        raise RuntimeError("the hub whose greenlets run this is gone: its thread has ended")
