"""anyio (and so Starlette, FastAPI, httpx): its worker threads are greenlets, from any event loop.

Replaces of its asyncio backend ``WorkerThread``, so that limiters, cancel scopes and tokens stay anyio's own, and
the ``Future`` in which a worker waits for the loop.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch

_BACKEND = "anyio._backends._asyncio"


class AnyioPatch(Patch):
    """anyio's threads on greenlets."""

    name = "anyio"
    modules = (_BACKEND, "anyio.from_thread")
    requires = ("anyio", (4, 4))

    def apply(self, module: ModuleType) -> None:
        """Replace the threads and what they wait for."""
        from puff_patch.runtime.futures import HubFuture

        self.ledger.replace(module, "Future", HubFuture, alias=True)
        if module.__name__ == _BACKEND:
            self.ledger.replace(module, "WorkerThread", _worker_class(module), alias=True)


def _worker_class(backend: ModuleType) -> Any:
    from puff_patch.runtime.aio import run_on_greenlet, runs_greenlets

    thread_class = backend.WorkerThread

    class WorkerGreenlet:
        """What anyio needs of a worker thread; each call runs on a warm greenlet."""

        MAX_IDLE_TIME = thread_class.MAX_IDLE_TIME

        def __new__(cls, root_task: Any, workers: Any, idle_workers: Any) -> Any:
            if runs_greenlets(root_task._loop):
                return super().__new__(cls)
            return thread_class(root_task, workers, idle_workers)

        def __init__(self, root_task: Any, workers: Any, idle_workers: Any) -> None:
            self.root_task = root_task
            self.workers = workers
            self.idle_workers = idle_workers
            self.loop = root_task._loop
            self.idle_since = self.loop.time()
            self.stopping = False
            self.queue = self

        _report_result = thread_class._report_result

        def start(self) -> None:
            pass

        def stop(self, task: Any = None) -> None:
            self.stopping = True
            self.workers.discard(self)
            if self in self.idle_workers:
                self.idle_workers.remove(self)

        def put_nowait(self, item: Any) -> None:
            """Stands for the thread's queue."""
            run_on_greenlet(self._work, *item)

        def _work(self, context: Any, func: Any, args: Any, future: Any, cancel_scope: Any) -> None:
            result = error = None
            with backend.claim_worker_thread(backend.AsyncIOBackend, self.loop):
                if not future.cancelled():
                    backend.threadlocals.current_cancel_scope = cancel_scope
                    try:
                        result = context.run(func, *args)
                    except BaseException as raised:  # noqa: BLE001 - raised again in the task
                        error = raised
                    finally:
                        del backend.threadlocals.current_cancel_scope
            if not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self._report_result, future, result, error)

    return WorkerGreenlet


PATCH = AnyioPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
