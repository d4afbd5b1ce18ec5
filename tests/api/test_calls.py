"""spawn, join_all, join_iter, sleep_ms, wrap_async and global_state, for greenlets and event loops alike."""

from __future__ import annotations

import pytest
from support.process import RAISES, TICKER, run_python

HEAD = (
    RAISES
    + """
import puff_patch
puff_patch.patch_all()
import asyncio, contextvars, gevent, threading, traceback
from puff_patch import join_all, join_iter, sleep_ms, spawn, wrap_async, TaskKilled
from puff_patch.runtime import aio
from gevent.monkey import get_original
native_thread = get_original("_thread", "start_new_thread")
def double(n):
    sleep_ms(n)
    return 2 * n
def fail(n):
    sleep_ms(n)
    raise LookupError(n)
"""
)
# The same coroutine on a loop that a greenlet runs, on one of async_to_sync, and on the asyncio thread.
LOOPS = """
from asgiref.sync import async_to_sync
def on_each_loop(main):
    asyncio.run(main())
    async_to_sync(main)()
    aio.run_coroutine(main(), timeout=20)
"""


def test_greenlets() -> None:
    run_python(
        HEAD
        + TICKER
        + """
variable = contextvars.ContextVar("variable", default=0)
variable.set(7)
task = spawn(lambda n, *, m: (n, m, variable.get()), 1, m=2)
assert not task.finished and task.result is None
variable.set(8)
assert task.join() == task.get() == task.result == (1, 2, 7)
assert task.finished and task.ready() and task.successful() and task.exception is None

with Ticker() as ticker:
    assert join_all([spawn(double, n) for n in (30, 10, 20)]) == [60, 20, 40]
    assert list(join_iter([spawn(double, n) for n in (60, 5, 30)])) == [10, 60, 120]
assert ticker.count >= 10, ticker.count
# gevent's own greenlets, too; what has ended already; nothing
old = spawn(double, 1)
old.join()
assert list(join_iter([gevent.spawn(double, 20), old])) == [2, 40]
assert join_all([]) == [] == list(join_iter([]))
raises(TypeError, join_all, [1])

# Errors come with where they come from; those of one task are not another's.
task = spawn(fail, 5)
error = raises(LookupError, task.join)
assert "in fail" in "".join(traceback.format_exception(error))
assert task.exception is error and not task.successful()
others = [spawn(double, 60), spawn(fail, 5), spawn(double, 20)]
started = time.monotonic()
assert raises(LookupError, join_all, others).args == (5,)
assert time.monotonic() - started < 0.05, "it waited for the others"
results = join_iter(others)
assert raises(LookupError, next, results)
assert list(results) == [40, 120]

# Time-outs: the task goes on.
slow = spawn(double, 60)
assert "double did not end within 0.01 seconds" in str(raises(TimeoutError, slow.join, 0.01))
assert "1 tasks did not end" in str(raises(TimeoutError, join_all, [slow], timeout=0.01))
raises(TimeoutError, next, join_iter([slow], timeout=0))
raises(TimeoutError, slow.get, block=False)
with gevent.Timeout(0.01, False):
    slow.join()
    raise AssertionError("it should still run")
assert slow.join(5) == 120
def own_timeout():
    raise TimeoutError("mine")
assert str(raises(TimeoutError, spawn(own_timeout).join, 5)) == "mine"

# join_iter goes on after its time is over, and loses nothing.
results = join_iter([spawn(double, 40)], timeout=0.01)
raises(TimeoutError, next, results)
sleep_ms(60)
assert next(results) == 80

# Kill: before it has begun, while it runs, after its end.
log = []
def cleaned_up():
    try:
        log.append("begun")
        sleep_ms(10_000)
    finally:
        log.append("ended")
task = spawn(cleaned_up)
task.kill()
assert log == [] and "cleaned_up was killed" in str(raises(TaskKilled, task.join))
task = spawn(cleaned_up)
sleep_ms(5)
waiting = gevent.spawn(raises, TaskKilled, task.join)
task.kill(timeout=5)
assert log == ["begun", "ended"] and task.finished
assert isinstance(waiting.get(), TaskKilled)
old.kill()
assert old.join() == 2
# Who waits may be killed; the task goes on.
task = spawn(double, 30)
waiting = gevent.spawn(task.join)
sleep_ms(5)
waiting.kill()
assert task.join() == 60

raises(ValueError, sleep_ms, -1)
# A thousand at once.
assert join_all([spawn(double, 1) for _ in range(1000)], timeout=20) == [2] * 1000
"""
    )


def test_event_loops() -> None:
    run_python(
        HEAD
        + LOOPS
        + """
variable = contextvars.ContextVar("variable", default=0)
main_thread = get_original("_thread", "get_ident")()
def look():
    assert asyncio._get_running_loop() is None
    assert get_original("_thread", "get_ident")() == main_thread
    sleep_ms(1)
    return variable.get()
async def refuses(kind, awaitable):
    try:
        value = await awaitable
    except kind as error:
        return error
    raise AssertionError(value)
log = []
def cleaned_up():
    try:
        log.append("begun")
        sleep_ms(10_000)
    finally:
        log.append("ended")
async def ended():
    for _ in range(1000):
        if log[-1] == "ended":
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it was not killed")

async def main():
    variable.set(9)
    assert await spawn(look) == 9
    task = spawn(double, 5)
    assert await task.join() == 10 == await task.get() == await task
    assert await sleep_ms(1) is None
    assert await join_all([spawn(double, n) for n in (20, 5)]) == [40, 10]
    found = []
    async for result in join_iter([spawn(double, n) for n in (40, 5, 20)], timeout=5):
        found.append(result)
    assert found == [10, 40, 80]
    error = await refuses(LookupError, spawn(fail, 1))
    assert "in fail" in "".join(traceback.format_exception(error))
    await refuses(LookupError, join_all([spawn(double, 5), spawn(fail, 1)]))
    # Time-outs: the task goes on.
    slow = spawn(double, 60)
    await refuses(TimeoutError, slow.join(0.01))
    await refuses(TimeoutError, join_all([slow], timeout=0.01))
    results = join_iter([slow], timeout=0.01)
    await refuses(TimeoutError, results.__anext__())
    assert await slow == 120
    assert await results.__anext__() == 120
    # Cancelling what awaits kills the task.
    log.append("")
    await refuses(asyncio.TimeoutError, asyncio.wait_for(spawn(cleaned_up), 0.05))
    await ended()
    task = spawn(cleaned_up)
    await asyncio.sleep(0.05)
    await task.kill(timeout=5)
    assert log[-1] == "ended"
    await refuses(TaskKilled, task.join())
    # They are no different from other awaitables.
    assert await asyncio.gather(sleep_ms(1), spawn(double, 1)) == [None, 2]
    assert await asyncio.gather(*(spawn(double, 1) for _ in range(300))) == [2] * 300
on_each_loop(main)
"""
    )


def test_what_calls_back() -> None:
    run_python(
        HEAD
        + LOOPS
        + """
class State:
    '''As an extension does it: it begins in a thread of its own and calls back there.'''
    def answer(self, ret, *args):
        native_thread(ret, args)
state = puff_patch.global_state
assert "set_global_state" in str(raises(AttributeError, getattr, state, "answer"))
state.counter = 1
assert state.counter == 1
puff_patch.set_global_state(State())
state.more = 5
assert state.more == 5 and not hasattr(state, "counter")

assert wrap_async(lambda r: state.answer(r, 1, None)) == 1
assert wrap_async(lambda r: state.answer(r, 1), wrap_return=str) == "1"
assert wrap_async(lambda r: r()) is None
error = LookupError()
assert raises(LookupError, wrap_async, lambda r: state.answer(r, None, error)) is error
raises(ValueError, wrap_async, lambda r: state.answer(r, "x"), wrap_return=int)
raises(ZeroDivisionError, wrap_async, lambda r: 1 / 0)
kept = []
tasks = [wrap_async(kept.append, join=False) for _ in range(3)]
results = join_iter(tasks)
for n in (2, 0, 1):
    kept[n](n)
assert list(results) == [2, 0, 1] and join_all(tasks) == [0, 1, 2]
assert "already" in str(raises(RuntimeError, kept[0], 5))
# A killed one may call back later, which nobody wants to know any more.
task = wrap_async(kept.append, join=False)
task.kill()
raises(TaskKilled, task.join)
kept[-1](1)
with gevent.Timeout(0.02, False):
    wrap_async(lambda r: None)
    raise AssertionError

async def main():
    assert await wrap_async(lambda r: state.answer(r, 1, None)) == 1
    many = [wrap_async(lambda r, n=n: state.answer(r, n)) for n in range(50)]
    assert await asyncio.gather(*many) == list(range(50))
    try:
        await wrap_async(lambda r: state.answer(r, None, LookupError()))
    except LookupError:
        return
    raise AssertionError
on_each_loop(main)
"""
    )


def test_an_exception_that_nobody_looks_at_is_logged() -> None:
    run_python(
        HEAD
        + """
import logging
logged = []
class Handler(logging.Handler):
    def emit(self, record):
        logged.append((record.getMessage(), record.exc_info[0]))
logging.getLogger("puff_patch.tasks").addHandler(Handler())
spawn(fail, 1)
sleep_ms(20)
assert logged == [("nobody has looked at the exception of fail", LookupError)], logged
# One that somebody has seen is not, nor that of a killed one.
task = spawn(fail, 1)
raises(LookupError, task.join)
spawn(double, 1000).kill()
seen = spawn(fail, 1)
sleep_ms(20)
assert seen.exception.args == (1,)
del task, seen
import gc
gc.collect()
assert len(logged) == 1, logged
"""
    )


@pytest.mark.parametrize("call", ["spawn(double, 5)", "join_all([spawn(double, 5)])", "sleep_ms(5)"])
def test_without_patches_event_loops_work_as_well(call: str) -> None:
    run_python(
        HEAD.replace("puff_patch.patch_all()", "")
        + f"""
async def main():
    return await {call}
assert asyncio.run(main()) in (10, [10], None)
assert spawn(double, 5).join() == 10
"""
    )
