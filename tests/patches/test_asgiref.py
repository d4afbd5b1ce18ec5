"""asgiref between greenlets and event loops."""

from __future__ import annotations

from support.process import run_python

PATCHED = """
import puff_patch
puff_patch.patch_all()
import asyncio, contextvars, gevent, threading
from asgiref.local import Local
from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext, async_to_sync, sync_to_async
from gevent.monkey import get_original
native_ident = get_original("_thread", "get_ident")
"""


def test_a_thousand_chains_of_four_levels_at_once() -> None:
    run_python(
        PATCHED
        + """
variable, local = contextvars.ContextVar("variable"), Local()
levels = [[] for _ in range(1000)]

def pause():
    assert asyncio._get_running_loop() is None
    time.sleep(0.001)
    assert asyncio._get_running_loop() is None

@sync_to_async
def four(n):
    pause()
    assert local.n == n
    levels[n].append(gevent.getcurrent())
    variable.set(variable.get() + 1)
    return n

@async_to_sync
async def three(n):
    await asyncio.sleep(0.001)
    variable.set(variable.get() + 1)
    return await four(n)

@sync_to_async
def two(n):
    pause()
    levels[n].append(gevent.getcurrent())
    variable.set(variable.get() + 1)
    return three(n)

@async_to_sync
async def one(n):
    loop = asyncio.get_running_loop()
    variable.set(variable.get() + 1)
    await asyncio.to_thread(pause)
    await sync_to_async(pause, thread_sensitive=False)()
    result = await two(n)
    assert asyncio.get_running_loop() is loop
    return result

def call(n):
    variable.set(10 * n)
    local.n = n
    assert one(n) == n
    assert variable.get() == 10 * n + 4
    # thread-sensitive code runs in the greenlet that waits at the top
    assert levels[n] == [gevent.getcurrent()] * 2

def watch():
    while True:
        assert asyncio._get_running_loop() is None
        gevent.sleep(0)
watcher = gevent.spawn(watch)
with gevent.Timeout(50):
    gevent.joinall([gevent.spawn(call, n) for n in range(1000)], raise_error=True)
assert not watcher.dead
levels[7].clear()
call(7)  # and in the main greenlet, as manage.py does
""",
        timeout=90,
    )


def test_calls_do_not_wait_for_one_another() -> None:
    """Each call has a loop of its own, as without patches: one that blocks its loop holds up nobody else."""
    elapsed, ticks = run_python(
        PATCHED
        + """
async def block():
    time.sleep(0.2)
ticks = []
def tick():
    while True:
        ticks.append(1)
        gevent.sleep(0.01)
ticker = gevent.spawn(tick)
async_to_sync(block)()
del ticks[:]
begun = time.monotonic()
greenlets = [gevent.spawn(async_to_sync(block)) for _ in range(20)]
gevent.joinall(greenlets, raise_error=True)
report([time.monotonic() - begun, len(ticks)])
"""
    )
    assert elapsed < 2
    assert ticks >= 8


def test_errors_interruptions_and_leftovers() -> None:
    run_python(
        PATCHED
        + """
import traceback
seen = []
def fail():
    raise LookupError("on purpose")
async def fail_below():
    await sync_to_async(fail)()
try:
    async_to_sync(fail_below)()
except LookupError as error:
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names.index("fail_below") < names.index("fail"), names

# A greenlet that is killed or runs out of time cancels its coroutine, and helps it to clean up.
def clean_up():
    seen.append(gevent.getcurrent())
async def long():
    try:
        await asyncio.sleep(60)
    finally:
        await sync_to_async(clean_up)()
me = gevent.getcurrent()
try:
    with gevent.Timeout(0.05) as limit:
        async_to_sync(long)()
except gevent.Timeout as error:
    assert error is limit
victim = gevent.spawn(async_to_sync(long))
gevent.sleep(0.05)
victim.kill(timeout=5)
assert victim.dead and seen == [me, victim], seen

# ... also while it runs code below the coroutine.
async def below():
    try:
        await sync_to_async(gevent.sleep)(60)
    except BaseException as error:
        seen.append(type(error))
        raise
del seen[:]
victim = gevent.spawn(async_to_sync(below))
gevent.sleep(0.05)
victim.kill(timeout=5)
assert victim.dead and len(seen) == 1, seen

# asyncio's own cancellation: the function runs to its end, as in a thread.
async def limited():
    try:
        await asyncio.wait_for(sync_to_async(gevent.sleep)(0.1), 0.01)
    except asyncio.TimeoutError:
        return "timeout"
assert async_to_sync(limited)() == "timeout"

# At the end of a call its leftovers are cancelled, as asyncio.run does; the loop is as new for the next.
ends = []
async def background():
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        ends.append(1)
        raise
async def numbers():
    try:
        yield 1
    finally:
        ends.append(2)
async def leave():
    asyncio.create_task(background())
    async for _ in numbers():
        break
    await asyncio.sleep(0)
for _ in range(3):
    async_to_sync(leave)()
with gevent.Timeout(5):
    while sorted(ends) != [1] * 3 + [2] * 3:
        gevent.sleep(0.001)

# Once all loops are idle, nothing is traced any more.
import greenlet
with gevent.Timeout(5):
    while greenlet.gettrace() is not None:
        gevent.sleep(0.001)

# What a call sets on its loop is not there for the next.
async def spoil():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(print)
    loop.set_task_factory(None)
    return loop
async def look():
    loop = asyncio.get_running_loop()
    assert loop.get_exception_handler() is None and loop.get_task_factory() is not None
    return loop
first = async_to_sync(spoil)()
gevent.sleep(0.01)
assert async_to_sync(look)() is first
"""
    )


def test_who_runs_where() -> None:
    run_python(
        PATCHED
        + """
# On the loop that a greenlet came from, whichever that is.
def back():
    return async_to_sync(which)()
async def which():
    return asyncio.get_running_loop()
async def main():
    loop = asyncio.get_running_loop()
    assert await sync_to_async(back)() is loop
    assert await sync_to_async(back, thread_sensitive=False)() is loop
    # outside of any call thread-sensitive code has one greenlet, one after the other
    order, workers = [], set()
    def step(n):
        order.append(n)
        workers.add(gevent.getcurrent())
        time.sleep(0.005)
        order.append(n)
    async def fresh(n):
        await sync_to_async(step)(n)
    await asyncio.gather(*[asyncio.create_task(fresh(n)) for n in range(5)])
    assert order == [n for n in range(5) for _ in "ab"] and len(workers) == 1
    # and one for each context
    async def request(n):
        async with ThreadSensitiveContext():
            workers = [await sync_to_async(gevent.getcurrent)() for _ in range(3)]
            assert len(set(workers)) == 1
            await sync_to_async(time.sleep)(0.05)
            assert await sync_to_async(gevent.getcurrent)() is workers[0]
            return workers[0]
    begun = loop.time()
    assert len(set(await asyncio.gather(*map(request, range(20))))) == 20
    assert loop.time() - begun < 0.9
    try:
        async_to_sync(which)()
    except RuntimeError as error:
        assert "just await the async function directly" in str(error)
    else:
        raise AssertionError
from puff_patch.runtime import aio
for run in (asyncio.run, aio.run_coroutine):
    run(main())
async_to_sync(which)()
assert not vars(SyncToAsync.threadlocal), "a greenlet remembers a loop that is over"

# Loops of their own when asked.
loops = {async_to_sync(which, force_new_loop=True)() for _ in range(2)}
assert len(loops) == 2 and all(loop.is_closed() for loop in loops)

# A native thread, whose hub is another.
found = []
def native():
    async def main():
        await asyncio.sleep(0.01)
        return await sync_to_async(native_ident)()
    found.append(async_to_sync(main)() == native_ident())
get_original("_thread", "start_new_thread")(native, ())
with gevent.Timeout(10):
    while not found:
        gevent.sleep(0.01)
assert found == [True]

# A child has loops of its own.
child = os.fork()
if not child:
    async def again():
        await asyncio.sleep(0.001)
        return await sync_to_async(os.getpid)()
    os._exit(0 if async_to_sync(again)() == os.getpid() else 1)
assert os.waitpid(child, 0)[1] == 0

# What asgiref says of its functions holds.
import inspect
from asgiref.sync import iscoroutinefunction
assert iscoroutinefunction(sync_to_async(os.getpid)) and isinstance(async_to_sync(which), AsyncToSync)
assert not iscoroutinefunction(async_to_sync(which))
assert isinstance(AsyncToSync.executors, Local)
"""
    )


def test_functions_taken_before_patching_work_too() -> None:
    run_python(
        """
from asgiref.sync import async_to_sync, sync_to_async
import asyncio
@async_to_sync
async def call(n):
    await asyncio.sleep(0.05)
    return await double(n)
@sync_to_async
def double(n):
    return 2 * n
import puff_patch
puff_patch.patch_all()
import gevent
begun = time.monotonic()
greenlets = [gevent.spawn(call, n) for n in range(50)]
gevent.joinall(greenlets, raise_error=True)
assert [greenlet.value for greenlet in greenlets] == [2 * n for n in range(50)]
assert time.monotonic() - begun < 2
"""
    )
