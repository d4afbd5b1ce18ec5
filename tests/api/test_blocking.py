"""blocking, spawn_blocking and read_file_bytes: native threads while greenlets and event loops go on."""

from __future__ import annotations

from pathlib import Path

from support.process import RAISES, TICKER, run_python

HEAD = (
    RAISES
    + """
import puff_patch
puff_patch.patch_all()
import asyncio, contextvars, gevent, threading, traceback
from puff_patch import blocking, join_all, join_iter, read_file_bytes, spawn, spawn_blocking, sleep_ms, TaskKilled
from puff_patch.runtime import aio, native
from gevent.monkey import get_original
native_sleep = get_original("time", "sleep")
native_lock = get_original("_thread", "allocate_lock")
ident = get_original("_thread", "get_ident")
"""
)


def test_functions_run_in_a_bounded_number_of_native_threads() -> None:
    run_python(
        HEAD
        + TICKER
        + """
lock, running, most, threads = native_lock(), 0, 0, set()
@blocking
def work(n):
    '''Blocks, as a C library does.'''
    global running, most
    with lock:
        running += 1
        most = max(most, running)
        threads.add(ident())
    native_sleep(0.02)
    with lock:
        running -= 1
    return n
assert work.__doc__ == "Blocks, as a C library does."

with Ticker() as ticker:
    assert join_all([spawn(work, n) for n in range(100)], timeout=20) == list(range(100))
assert most == 8 and len(threads) == 8 == native.get_pool().size, (most, threads)
assert ident() not in threads
assert ticker.count >= 20, ticker.count  # 100 x 20 ms in 8 threads

variable = contextvars.ContextVar("variable", default=0)
@blocking
def context():
    seen = variable.get()
    variable.set(99)
    return seen
variable.set(5)
assert context() == 5 and variable.get() == 5

class Error(Exception):
    pass
class Thing:
    @blocking
    def fail(self, *, n):
        raise Error(n)
error = raises(Error, Thing().fail, n=3)
assert error.args == (3,) and "in fail" in "".join(traceback.format_exception(error))

# Threads that wait for threads of the pool: they wait for no place.
@blocking
def deep(n):
    return n if n == 0 else 1 + deep(n - 1)
@blocking
def wide(n):
    return spawn_blocking(deep, n).join()
assert join_all([spawn(wide, 3) for _ in range(30)], timeout=20) == [3] * 30
assert native.get_pool().size == 8

# What is patched works there, too, on that thread's own hub.
def patched():
    time.sleep(0.01)
    done = []
    thread = threading.Thread(target=done.append, args=(1,))
    thread.start()
    thread.join()
    return done, spawn(lambda: 2).join()
assert spawn_blocking(patched).join() == ([1], 2)

async def coroutine():
    pass
assert "coroutine function" in str(raises(TypeError, blocking, coroutine))
raises(TypeError, spawn_blocking, coroutine)
""",
        env={"PUFF_BLOCKING_THREADS": "8"},
    )


def test_time_outs_and_kills() -> None:
    run_python(
        HEAD
        + """
log, go = [], native_lock()
go.acquire()
def wait(n):
    with go:
        log.append(n)
    return n
first, second, third = [spawn_blocking(wait, n) for n in range(3)]
raises(TimeoutError, first.join, 0.01)
with gevent.Timeout(0.01, False):
    blocking(wait)(3)
    raise AssertionError
second.kill()  # it waits for the only thread, and now will not begin
raises(TaskKilled, second.join)
first.kill()  # it runs, and its result is dropped
raises(TaskKilled, first.join)
assert log == []
go.release()
assert third.join(5) == 2
assert log[:2] == [0, 2], log

async def main():
    go.acquire()
    try:
        await asyncio.wait_for(blocking(wait)(4), 0.02)
    except asyncio.TimeoutError:
        go.release()
        return
    raise AssertionError
asyncio.run(main())
assert list(join_iter([spawn_blocking(wait, 5)])) == [5]
assert log[2:] in ([3, 4, 5], [4, 5]), log
""",
        env={"PUFF_BLOCKING_THREADS": "1"},
    )


def test_event_loops_and_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\0contents" * 1000)
    run_python(
        HEAD
        + """
@blocking
def work(n):
    native_sleep(0.02)
    return n
async def main():
    ticks = 0
    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1
    ticker = asyncio.ensure_future(tick())
    assert await asyncio.gather(*(work(n) for n in range(40))) == list(range(40))
    assert await spawn_blocking(work, 7) == 7
    assert await read_file_bytes("file") == b"\\0contents" * 1000
    ticker.cancel()
    assert ticks > 10, ticks
asyncio.run(main())
aio.run_coroutine(main(), timeout=20)
assert len(read_file_bytes("file")) == 9000
raises(FileNotFoundError, read_file_bytes, "missing")

# A forked child has threads of its own.
pid = os.fork()
if pid == 0:
    os._exit(work(3))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
""",
        cwd=tmp_path,
    )


def test_threads_end_when_idle_and_leave_nothing_behind() -> None:
    run_python(
        HEAD
        + """
native._IDLE_SECONDS = 0.05
def work():
    time.sleep(0.001)  # on a hub
    threading.current_thread().name
    native_sleep(0.02)
before = len(os.listdir("/proc/self/task")), set(threading._active)
join_all([spawn_blocking(work) for _ in range(8)])
assert native.get_pool().size == 8
for _ in range(1000):
    if not native.get_pool().size and len(os.listdir("/proc/self/task")) == before[0]:
        break
    sleep_ms(5)
assert (len(os.listdir("/proc/self/task")), set(threading._active)) == before
assert spawn_blocking(int).join() == 0
"""
    )
