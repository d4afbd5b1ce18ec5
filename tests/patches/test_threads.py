"""What the hub's thread and the asyncio thread share: locks, logs, queues, events, threads, executors."""

from __future__ import annotations

from support.process import TICKER, run_python

HEAD = """
import puff_patch
puff_patch.patch_all()
import asyncio, logging, queue, threading
from concurrent.futures import ThreadPoolExecutor
import gevent
from gevent.monkey import get_original
from puff_patch.runtime import aio
native_sleep = get_original("time", "sleep")
def on_loop(coroutine):
    return gevent.spawn(aio.run_coroutine, coroutine)
def join(*greenlets):
    gevent.joinall(greenlets, timeout=30, raise_error=True)
    assert all(greenlet.ready() for greenlet in greenlets), greenlets
"""


def test_both_sides_log_at_a_rate() -> None:
    """With gevent's locks this stops within the first lines, for good."""
    run_python(
        HEAD
        + TICKER
        + """
lines = []
class Slow(logging.Handler):
    def emit(self, record):
        for _ in range(100):
            pass
        lines.append(self.format(record))
log = logging.getLogger("both")
log.propagate = False
log.setLevel(logging.INFO)
log.addHandler(Slow())
late = 0.0
async def tick():
    global late
    while True:
        began = time.monotonic()
        await asyncio.sleep(0.001)
        late = max(late, time.monotonic() - began)
async def loop_side():
    ticking = asyncio.create_task(tick())
    for number in range(10000):
        log.info("loop %d", number)
        if number % 10 == 0:
            await asyncio.sleep(0)
    ticking.cancel()
def hub_side():
    for number in range(5000):
        log.info("hub %d", number)
        if number % 10 == 0:
            gevent.sleep(0)
with Ticker() as ticker:
    join(on_loop(loop_side()), gevent.spawn(hub_side), gevent.spawn(hub_side))
assert len(lines) == 20000
assert ticker.count > 1  # a quick machine is done in a few turns
assert late < 3, late  # on a busy machine; with a fair lock it is milliseconds
"""
    )


def test_locks_that_greenlets_hold_while_they_wait() -> None:
    run_python(
        HEAD
        + TICKER
        + """
def greenlet(lock):
    for _ in range(40):
        with lock:
            inside.append(1)
            gevent.sleep(0.0001)
            assert inside.pop() and not inside
        gevent.sleep(0)
async def coroutine(lock):
    for number in range(400):
        with lock:
            assert not inside
        if number % 5 == 0:
            await asyncio.sleep(0)
for make in (threading.Lock, threading.RLock, threading.Condition, threading.Semaphore):
    inside, lock = [], make()
    with Ticker() as ticker:
        join(on_loop(coroutine(lock)), *(gevent.spawn(greenlet, lock) for _ in range(4)))
    assert ticker.count > 10
"""
    )


def test_events_queues_and_conditions_both_ways() -> None:
    run_python(
        HEAD
        + """
async def events():
    for number in range(300):
        there, back = threading.Event(), threading.Event()
        aio.run_on_greenlet(lambda: (gevent.sleep(0), there.set(), back.wait(5)))
        assert there.wait(5)
        back.set()
        if number % 10 == 0:
            await asyncio.sleep(0)
join(on_loop(events()))

for make in (lambda: queue.Queue(10), queue.SimpleQueue, queue.LifoQueue, queue.PriorityQueue):
    there, back = make(), make()
    async def echo():
        while (item := there.get(timeout=5)) is not None:
            back.put(-item)
    def ask():
        for number in range(1000):
            there.put(number)
            assert back.get(timeout=5) == -number
        there.put(None)
    join(on_loop(echo()), gevent.spawn(ask))
    for empty in (lambda: there.get(timeout=0.01), lambda: there.get(block=False), there.get_nowait):
        try:
            empty()
        except queue.Empty:
            continue
        raise AssertionError("not empty")
    assert there.empty() and there.qsize() == 0

barrier = threading.Barrier(2)
async def meet():
    for _ in range(100):
        barrier.wait(5)
join(on_loop(meet()), gevent.spawn(lambda: [barrier.wait(5) for _ in range(100)]))
"""
    )


def test_threads_and_executors_of_the_asyncio_thread() -> None:
    run_python(
        HEAD
        + """
def sync(number):
    assert gevent.get_hub().main_hub
    time.sleep(0.001)
    return number
async def threads():
    done = []
    # One that nobody waits for runs as well.
    threading.Thread(target=done.append, args=("alone",)).start()
    for number in range(50):
        thread = threading.Thread(target=lambda: done.append(sync(number)))
        thread.start()
        if number % 2:
            thread.join()
        else:
            thread.join(5)
        assert not thread.is_alive()
    slow = threading.Thread(target=time.sleep, args=(0.2,))
    slow.start()
    slow.join(0.01)
    assert slow.is_alive()
    assert done == ["alone", *range(50)]
    return slow
thread = gevent.spawn(lambda: aio.run_coroutine(threads())).get(timeout=20)
thread.join(5)
assert not thread.is_alive()

async def executors():
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(sync, range(100))) == list(range(100))
        futures = [asyncio.wrap_future(pool.submit(sync, number)) for number in range(100)]
        assert await asyncio.gather(*futures) == list(range(100))
        assert pool.submit(sync, 7).result(5) == 7
        assert await loop.run_in_executor(pool, sync, 8) == 8
    assert await loop.run_in_executor(None, sync, 9) == 9
    assert await asyncio.to_thread(sync, 10) == 10
join(on_loop(executors()))
"""
    )


def test_the_lock_itself() -> None:
    run_python(
        HEAD
        + """
from gevent.exceptions import BlockingSwitchOutError, LoopExit
def fails(kind, fn):
    try:
        fn()
    except kind:
        return True
lock = threading.Lock()
assert lock.acquire() and lock.locked() and "locked" in repr(lock)
assert not lock.acquire(False) and not lock.acquire(timeout=0.01) and not lock.acquire(timeout=0)
lock.release()
assert fails(RuntimeError, lock.release) and not lock.locked()
assert fails(ValueError, lambda: lock.acquire(False, 1)) and fails(ValueError, lambda: lock.acquire(timeout=-2))
assert fails(OverflowError, lambda: lock.acquire(timeout=1e20))

# Those who wait get it in order; one that is killed leaves it to the next.
lock.acquire()
order = []
def wait(name):
    with lock:
        order.append(name)
waiting = [gevent.spawn(wait, number) for number in range(5)]
gevent.sleep(0.01)
waiting[1].kill()
lock.release()
waiting[0].join(5)
gevent.joinall(waiting, timeout=5)
assert order == [0, 2, 3, 4] and not lock.locked(), order

# One that is killed when it has just been given the lock gives it back.
for _ in range(20):
    lock.acquire()
    first, second = gevent.spawn(wait, "first"), gevent.spawn(wait, "second")
    gevent.sleep(0)
    lock.release()
    assert lock.acquire(False)
    gevent.sleep(0)  # the first has been woken, too late
    lock.release()
    assert lock.locked()
    first.kill()
    second.join(5)
    assert second.ready() and not lock.locked()

# Who has been woken in vain once gets it next, whoever else is faster.
async def take():
    with lock:
        pass
lock.acquire()
taking = on_loop(take())
for _ in range(100):
    gevent.sleep(0.001)
    lock.release()
    if not lock.acquire(False):
        break
else:
    raise AssertionError("the asyncio thread starved")
join(taking)

# A callback of the hub waits for another thread's lock, and not for a greenlet's.
async def hold():
    with lock:
        held.set()
        native_sleep(0.1)
held = threading.Event()
holding = on_loop(hold())
held.wait()
outcome = []
def callback():
    outcome.append(lock.acquire(timeout=5) and lock.release())
gevent.get_hub().loop.run_callback(callback)
join(holding)
gevent.sleep(0)
assert outcome == [None], outcome
lock.acquire()
gevent.get_hub().loop.run_callback(lambda: outcome.append(fails(BlockingSwitchOutError, lock.acquire)))
gevent.sleep(0.01)
assert outcome[1:] == [True], outcome

# A child of a fork has fresh ones.
lock._at_fork_reinit()
assert lock.acquire(False)
lock.release()

# Where nobody could ever wake it, gevent says so.
assert aio.stop()
lock.acquire()
assert fails(LoopExit, lock.acquire)
"""
    )


def test_unpatching_gives_back_the_originals() -> None:
    run_python(
        """
import queue, threading, _thread
def names():
    return [threading.Lock, threading._allocate_lock, threading.Event, queue.SimpleQueue, queue.Queue,
            _thread.allocate_lock, _thread.start_new_thread, threading.RLock]
before = names()
import puff_patch
puff_patch.patch_all()
assert names()[0] is not before[0] and names()[3] is not before[3] and names()[6] is not before[6]
import gevent.thread
assert gevent.thread.LockType.__module__ == "gevent.thread"
puff_patch.unpatch_all()
assert names() == before
"""
    )
