"""anyio's threads, from every kind of loop."""

from __future__ import annotations

from support.process import run_python


def test_threads_are_greenlets_and_keep_anyios_rules() -> None:
    run_python("""
        import puff_patch
        puff_patch.patch_all()
        import asyncio, contextvars, gevent
        import anyio, anyio.from_thread, anyio.to_thread
        from asgiref.sync import async_to_sync
        from gevent.monkey import get_original
        from puff_patch.runtime import aio
        main_thread = get_original("_thread", "get_ident")()
        variable = contextvars.ContextVar("variable")

        async def double(n):
            await anyio.sleep(0.005)
            return 2 * n

        def work(n):
            assert get_original("_thread", "get_ident")() == main_thread
            assert asyncio._get_running_loop() is None
            assert variable.get() == n
            gevent.sleep(0.005)
            assert anyio.from_thread.run_sync(asyncio.get_running_loop) is loops[-1]
            return anyio.from_thread.run(double, n)

        def fail():
            raise LookupError("on purpose")

        def give_up():
            while True:
                gevent.sleep(0.001)
                anyio.from_thread.check_cancelled()

        loops = []
        async def main():
            loops.append(asyncio.get_running_loop())
            results = []
            async def one(n):
                variable.set(n)
                results.append(await anyio.to_thread.run_sync(work, n))
            async with anyio.create_task_group() as group:
                for n in range(100):
                    group.start_soon(one, n)
            assert sorted(results) == [2 * n for n in range(100)]

            busy = most = 0
            def count():
                nonlocal busy, most
                busy += 1
                most = max(most, busy)
                gevent.sleep(0.005)
                busy -= 1
            limiter = anyio.CapacityLimiter(2)
            async with anyio.create_task_group() as group:
                for n in range(8):
                    group.start_soon(lambda: anyio.to_thread.run_sync(count, limiter=limiter))
            assert (busy, most) == (0, 2)
            async with anyio.create_task_group() as group:
                for n in range(60):
                    group.start_soon(anyio.to_thread.run_sync, count)
            assert most <= 40, "the default limiter"

            try:
                await anyio.to_thread.run_sync(fail)
            except LookupError:
                pass
            with anyio.move_on_after(0.02) as scope:
                await anyio.to_thread.run_sync(gevent.sleep, 30, abandon_on_cancel=True)
            assert scope.cancelled_caught
            with anyio.move_on_after(0.02) as scope:
                await anyio.to_thread.run_sync(give_up)
            assert scope.cancelled_caught

        with gevent.Timeout(20):
            anyio.run(main)
            async_to_sync(main)()
            aio.run_coroutine(main())
            with anyio.from_thread.start_blocking_portal() as portal:
                portal.call(main)
        assert len(set(map(id, loops))) == 4
    """)


def test_workers_on_the_asyncio_thread_are_kept() -> None:
    """They belong to the task at the root of the loop; without one each call would search all tasks for it."""
    run_python(
        """
import puff_patch
puff_patch.patch_all()
import asyncio, gevent
import anyio, anyio.to_thread
from anyio._backends import _asyncio as backend
from puff_patch.runtime import aio
async def one():
    await anyio.to_thread.run_sync(time.sleep, 0.001)
async def workers():
    return backend._threadpool_workers.get()
def request():
    aio.run_coroutine(one())
for _ in range(3):
    gevent.joinall([gevent.spawn(request) for _ in range(20)], raise_error=True)
kept = aio.run_coroutine(workers())
assert 0 < len(kept) <= 20, len(kept)
assert {worker.root_task.get_coro().__qualname__ for worker in kept} == {"AsyncioThread._main"}
assert aio.stop()
"""
    )
