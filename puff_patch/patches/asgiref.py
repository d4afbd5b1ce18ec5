"""asgiref: ``async_to_sync`` and ``sync_to_async`` between greenlets and event loops.

asgiref's own logic stays: who runs in which "thread" (here: greenlet), what nests in what, contexts, exceptions,
cancellation.  Replaced is what it stands on: ``AsyncToSync.__call__`` leases a loop of the hub where it would
start a thread with a new one; ``CurrentThreadExecutor``, ``ThreadPoolExecutor``, ``Future`` and
``SyncToAsync.single_thread_executor`` are greenlets, also for the asyncio thread; `Local` gets a lock that may be
held in both.  On an event loop that blocks the hub (nothing but asgiref is patched) asgiref keeps to threads.
"""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch


class AsgirefPatch(Patch):
    """asgiref across greenlets and event loops."""

    name = "asgiref"
    modules = ("asgiref.local", "asgiref.sync")
    requires = ("asgiref", (3, 12))

    def apply(self, module: ModuleType) -> None:
        """Replace what asgiref's classes stand on."""
        if module.__name__ == "asgiref.local":
            self._apply_local(module)
        else:
            self._apply_sync(module)

    def _apply_local(self, module: ModuleType) -> None:
        from puff_patch.runtime.futures import native_rlock

        # A Local is shared between the hub's thread and the asyncio thread.  Its lock is held for moments, and
        # never over a switch of greenlets.
        self.ledger.replace(module, "threading", _Threading(RLock=native_rlock), alias=True)

    def _apply_sync(self, module: ModuleType) -> None:
        from gevent.local import local

        from puff_patch.runtime.futures import CurrentGreenletExecutor, HubFuture

        async_to_sync, sync_to_async = module.AsyncToSync, module.SyncToAsync
        replace = self.ledger.replace
        replace(module, "CurrentThreadExecutor", CurrentGreenletExecutor, alias=True)
        replace(module, "Future", HubFuture, alias=True)
        replace(module, "ThreadPoolExecutor", _OneThread, alias=True)
        replace(sync_to_async, "single_thread_executor", _OneThread(max_workers=1))
        replace(sync_to_async, "threadlocal", local())
        replace(sync_to_async, "thread_handler", _own_threadlocal(sync_to_async))
        replace(async_to_sync, "__call__", _call_on_hub_loop(async_to_sync, sync_to_async.threadlocal))
        replace(module.ThreadSensitiveContext, "__aexit__", _leave_context(module))
        self.ledger.on_restore(_close_loops)


class _Threading:
    """The threading module, but for some names."""

    def __init__(self, **names: Any) -> None:
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


class _OneThread(Executor):
    """Stands for ``ThreadPoolExecutor(max_workers=1)``: one greenlet, or a thread if a loop blocks the hub."""

    #: For the asyncio thread's loop, see `puff_patch.runtime.aio`.
    runs_on_hub = True

    def __init__(self, max_workers: int = 1) -> None:
        self._greenlet: Any = None
        self._thread: Executor | None = None

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As that of `concurrent.futures.Executor`."""
        from puff_patch.runtime import aio
        from puff_patch.runtime.futures import SerialExecutor

        if not aio.waits_cooperatively():
            if self._thread is None:
                self._thread = ThreadPoolExecutor(max_workers=1)
            return self._thread.submit(fn, *args, **kwargs)
        if self._greenlet is None or self._greenlet.mailbox.closed or self._greenlet.is_inherited():
            self._greenlet = SerialExecutor(aio.get_mailbox())
        return self._greenlet.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As that of `concurrent.futures.Executor`."""
        for executor in (self._greenlet, self._thread):
            if executor is not None:
                executor.shutdown(wait, cancel_futures=cancel_futures)

    async def leave(self) -> None:
        """Shut down what there is of greenlets, without blocking the loop."""
        import asyncio

        executor, self._greenlet = self._greenlet, None
        if executor is not None:
            executor.shutdown(wait=False)
            await asyncio.wrap_future(executor.ended)


def _own_threadlocal(sync_to_async: Any) -> Any:
    """``SyncToAsync.thread_handler`` that leaves no trace: greenlets are used again, and by others."""
    original = sync_to_async.thread_handler

    @functools.wraps(original)
    def thread_handler(self: Any, *args: Any, **kwargs: Any) -> Any:
        __traceback_hide__ = True
        names = vars(self.threadlocal)
        before = dict(names)
        try:
            return original(self, *args, **kwargs)
        finally:
            names.clear()
            names.update(before)

    return thread_handler


def _call_on_hub_loop(async_to_sync: Any, threadlocal: Any) -> Any:
    """``AsyncToSync.__call__`` that has a main event loop unless there is one."""
    import asyncio

    from puff_patch.runtime.hub_loop import LoopPool

    original = async_to_sync.__call__
    single_thread = getattr(async_to_sync, "async_single_thread_context", None)

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        __traceback_hide__ = True
        if (
            self.force_new_loop
            or asyncio._get_running_loop() is not None
            or (single_thread is not None and single_thread.get(None) is not None)
        ):
            return original(self, *args, **kwargs)
        names = vars(threadlocal)
        before = dict(names)
        loop: Any = before.get("main_event_loop")
        # A greenlet below another loop's sync_to_async goes back to that one.
        outermost = loop is None or before.get("main_event_loop_pid") != os.getpid() or loop.is_closed()
        pool = LoopPool.current() if outermost else None
        if pool is not None:
            loop = pool.lease()
        call = _Call(async_to_sync, loop)
        names["main_event_loop"] = call
        names["main_event_loop_pid"] = os.getpid()
        if outermost:
            names.pop("task_context", None)
        try:
            return original(self, *args, **kwargs)
        finally:
            names.clear()
            names.update(before)
            if pool is not None:
                pool.give_back(loop)

    return __call__


class _Call:
    """Stands for the main event loop in one ``AsyncToSync.__call__``, to be able to cancel what that starts."""

    def __init__(self, async_to_sync: Any, loop: Any) -> None:
        from puff_patch.runtime.hub_loop import LoopCall

        self._async_to_sync = async_to_sync
        self._call = LoopCall(loop)
        self.create_task = loop.create_task

    def call_soon_threadsafe(self, create_task: Any, awaitable: Any) -> None:
        """The only call that asgiref makes."""
        self._async_to_sync.executors.current.on_interrupt = self._call.cancel
        self._call.start(awaitable)


def _leave_context(module: ModuleType) -> Any:
    """``ThreadSensitiveContext.__aexit__`` that waits for its executor without starting a thread for it."""
    original = module.ThreadSensitiveContext.__aexit__
    executors = module.SyncToAsync.context_to_thread_executor

    @functools.wraps(original)
    async def __aexit__(self: Any, exc: Any, value: Any, tb: Any) -> Any:
        executor = executors.get(self) if self.token else None
        if isinstance(executor, _OneThread):
            await executor.leave()
        return await original(self, exc, value, tb)

    return __aexit__


def _close_loops() -> None:
    from puff_patch.runtime.hub_loop import LoopPool

    LoopPool.current().close()


PATCH = AsgirefPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
