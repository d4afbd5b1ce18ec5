"""Event loops that live in a hub: cheap to keep, one for each call that needs one.

An `asyncio.run` of its own for each call of ``async_to_sync`` costs a thread, a loop and its file descriptors.
Here the loops stay: each runs in a greenlet, parked while nobody leases it, and has no descriptors, since
whatever wakes it is in the same thread.  A lease is exclusive, so that, as with loops of their own, calls never
wait for one another's coroutines, even for one that blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import gevent
from gevent.selectors import GeventSelector

from puff_patch.runtime.futures import start_warm
from puff_patch.runtime.mailbox import Mailbox
from puff_patch.runtime.running_loop import owned_by_greenlet, suspended

_KEEP_IDLE = 64
# Rounds of the loop in which there was always something to do, after which other greenlets get a turn.
_ROUNDS_PER_TURN = 16


class _Selector(GeventSelector):
    """gevent's selector, which lets a busy loop do some rounds between two looks at the hub."""

    _ready: Any

    def __init__(self) -> None:
        super().__init__()
        self._rounds = 0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout <= 0 and self._rounds < _ROUNDS_PER_TURN and not self._ready.is_set():
            self._rounds += 1
            return []
        self._rounds = 0
        with suspended():
            return super().select(timeout)

    def wake(self) -> None:
        """In the hub's thread: end the `select`."""
        self._ready.set()


class HubLoop(asyncio.SelectorEventLoop):
    """An event loop that runs in a greenlet of the hub of the thread that makes it."""

    def __init__(self) -> None:
        self._home = Mailbox.current()
        self._tasks: set[asyncio.Task[Any]] = set()
        super().__init__(_Selector())
        self.set_task_factory(_make_task)

    def _make_self_pipe(self) -> None:
        self._ssock = self._csock = None

    def _close_self_pipe(self) -> None:
        pass

    def _write_to_self(self) -> None:
        if not self.is_closed():
            self._home.post_or_call(self._selector.wake)  # type: ignore[attr-defined]

    def add_signal_handler(self, *_: Any) -> None:  # type: ignore[override]
        """As in every thread but the main one.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("signal handlers can be added to the event loop of the main thread only")

    def reset(self) -> None:
        """Forget what a call may have set."""
        self.set_debug(_is_debug_mode())
        self.set_exception_handler(None)
        self.set_task_factory(_make_task)

    async def _end_call(self) -> None:
        """What `asyncio.run` does at its end."""
        left = list(self._tasks - {asyncio.current_task()})
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for task in left:
            if not task.cancelled() and (error := task.exception()) is not None:
                self.call_exception_handler(
                    {"message": "unhandled exception during shutdown", "exception": error, "task": task}
                )
        if self._asyncgens:  # type: ignore[attr-defined]
            await self.shutdown_asyncgens()
            self._asyncgens_shutdown_called = False


_is_debug_mode: Any = asyncio.coroutines._is_debug_mode  # type: ignore[attr-defined]


def _make_task(loop: Any, coroutine: Any, **kwargs: Any) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **kwargs)
    loop._tasks.add(task)
    task.add_done_callback(loop._tasks.discard)
    return task


class LoopPool:
    """The loops of one hub."""

    def __init__(self) -> None:
        self._idle: list[HubLoop] = []

    @classmethod
    def current(cls) -> LoopPool:
        """That of the calling thread's hub."""
        hub: Any = gevent.get_hub()
        pool: LoopPool | None = getattr(hub, "_puff_loops", None)
        if pool is None:
            pool = hub._puff_loops = cls()
        return pool

    def lease(self) -> HubLoop:
        """A running loop for one call."""
        while self._idle:
            loop = self._idle.pop()
            if not loop.is_closed() and not loop._stopping:  # type: ignore[attr-defined]
                return loop
        loop = HubLoop()
        gevent.get_hub().loop.run_callback(start_warm, self._run, loop)
        return loop

    def give_back(self, loop: HubLoop) -> None:
        """Have the loop's leftovers cancelled, then keep it for the next call."""
        if loop._tasks or loop._asyncgens:  # type: ignore[attr-defined]
            loop.call_soon_threadsafe(lambda: loop.create_task(self._end(loop)))
        else:
            self._keep(loop)

    async def _end(self, loop: HubLoop) -> None:
        await loop._end_call()
        loop.call_soon(self._keep, loop)

    def _keep(self, loop: HubLoop) -> None:
        if len(self._idle) < _KEEP_IDLE:
            loop.reset()
            self._idle.append(loop)
        else:
            loop.call_soon_threadsafe(loop.stop)

    def close(self) -> None:
        """End the idle loops; the others end when they are given back."""
        idle, self._idle = self._idle, []
        for loop in idle:
            loop.call_soon_threadsafe(loop.stop)

    @staticmethod
    def _run(loop: HubLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            with owned_by_greenlet():
                loop.run_forever()
        finally:
            asyncio.set_event_loop(None)
            loop.close()


class LoopCall:
    """One task on a loop, started and cancelled from outside of it.

    Args:
        loop: the loop.
    """

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._task: asyncio.Task[Any] | None = None

    def start(self, awaitable: Awaitable[Any]) -> None:
        """Have the task made, in the caller's context.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._loop.call_soon_threadsafe(self._start, awaitable)

    def cancel(self) -> None:
        """Cancel the task; it gets to its first ``await`` all the same."""
        self._loop.call_soon_threadsafe(self._cancel)

    def _start(self, awaitable: Awaitable[Any]) -> None:
        self._task = self._loop.create_task(awaitable)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
