"""The asyncio thread, and the way there and back."""

from __future__ import annotations

import pytest
from support.process import run_python

HEAD = """
import sys
LOOP = {loop!r}
if LOOP == "asyncio":
    sys.modules["uvloop"] = None  # as if it were not installed
import puff_patch
if {patched!r}:
    puff_patch.patch_all()
import asyncio, contextvars, gevent, signal, traceback
from gevent.monkey import get_original
from puff_patch.runtime import aio
native_sleep = get_original("time", "sleep")
main_thread = get_original("_thread", "get_ident")()
def where():
    return "main" if get_original("_thread", "get_ident")() == main_thread else "other"
"""


@pytest.mark.parametrize(
    ("loop", "patched"),
    [("uvloop", True), ("asyncio", True), ("uvloop", False)],
    ids=["uvloop", "asyncio", "unpatched"],
)
def test_there_and_back(loop: str, patched: bool) -> None:
    run_python(
        HEAD.format(loop=loop, patched=patched)
        + """
variable = contextvars.ContextVar("variable", default=0)

# Contexts, results and threads, both ways, many at once.
def in_greenlet(n):
    gevent.sleep(0.01)
    assert asyncio._get_running_loop() is None and where() == "main"
    assert variable.get() == n + 1
    return 2 * n
async def on_loop(n):
    assert where() == "other"
    assert variable.get() == n
    variable.set(n + 1)
    await asyncio.sleep(0.01)
    return await aio.run_on_hub(in_greenlet, n)
def call(n):
    variable.set(n)
    assert aio.run_coroutine(on_loop(n)) == 2 * n
    assert variable.get() == n + 1
greenlets = [gevent.spawn(call, n) for n in range(300)]
gevent.joinall(greenlets, timeout=20, raise_error=True)
assert all(greenlet.successful() for greenlet in greenlets)
assert ("uvloop" in type(aio.get_thread().loop).__mro__[2].__module__) == (LOOP == "uvloop")

# A context of one's own.
context = contextvars.copy_context()
async def change():
    variable.set(variable.get() + 5)
aio.run_coroutine(change(), context=context)
assert (variable.get(), context[variable]) == (0, 5)

# What it set is there even if the loop's thread gets no further, for a while, than to say that it is done.
class Slow(aio.HubFuture):
    def set_result(self, result):
        super().set_result(result)
        native_sleep(0.1)
quick, aio.HubFuture = aio.HubFuture, Slow
aio.run_coroutine(change())
assert variable.get() == 5
aio.HubFuture = quick
variable.set(0)

# Errors arrive with where they come from.
def fail():
    raise LookupError("on purpose")
async def fail_below():
    await aio.run_on_hub(fail)
try:
    aio.run_coroutine(fail_below())
except LookupError as error:
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names.index("fail_below") < names.index("fail"), names

# Interruptions cancel the coroutine.
ends = []
async def long():
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(0.01)
        ends.append("cancelled")
        raise
try:
    with gevent.Timeout(0.05):
        aio.run_coroutine(long())
except gevent.Timeout:
    ends.append("timeout")
victim = gevent.spawn(aio.run_coroutine, long())
gevent.sleep(0.05)
victim.kill(timeout=5)
try:
    aio.run_coroutine(long(), timeout=0.05)
except TimeoutError as error:
    assert "0.05 s" in str(error)
    ends.append("out of time")
assert ends == ["cancelled", "timeout", "cancelled", "cancelled", "out of time"], ends

# A cancelled task lets go of its function, which runs to its end; one that has not begun never does.
ran = []
def work():
    ran.append("began")
    gevent.sleep(0.05)
    ran.append("ended")
async def let_go():
    try:
        await asyncio.wait_for(aio.run_on_hub(work), 0.02)
    except asyncio.TimeoutError:
        return "let go"
assert aio.run_coroutine(let_go()) == "let go" and ran == ["began"]
gevent.sleep(0.1)
assert ran == ["began", "ended"]

# The default executor is the greenlets, and other executors work.
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(2)
async def executors():
    loop = asyncio.get_running_loop()
    assert await asyncio.to_thread(where) == "main"
    assert await loop.run_in_executor(None, where) == "main"
    # two at a time, as asked
    begun = loop.time()
    await asyncio.gather(*[loop.run_in_executor(pool, time.sleep, 0.02) for _ in range(4)])
    assert loop.time() - begun > 0.035
    return (await loop.getaddrinfo("127.0.0.1", 80))[0][4]
assert aio.run_coroutine(executors()) == ("127.0.0.1", 80)
pool.shutdown()

# What cannot work says so.
async def nested():
    aio.run_coroutine(asyncio.sleep(0))
async def subprocesses():
    await asyncio.create_subprocess_exec("true")
for coroutine, error_class, hint in (
    (nested(), RuntimeError, "await the coroutine instead"),
    (subprocesses(), NotImplementedError, "asyncio.to_thread(subprocess.run"),
):
    try:
        aio.run_coroutine(coroutine)
    except error_class as error:
        assert hint in str(error), error
    else:
        raise AssertionError(hint)

# The end, and another beginning.
assert aio.stop() and aio.stop()
assert aio.run_coroutine(on_loop(0)) == 0
"""
    )


def test_the_thread_is_its_own() -> None:
    run_python(
        HEAD.format(loop="uvloop", patched=True)
        + """
# Signals wake the main thread only, and no hub is made where the loop runs.
async def look():
    from gevent._hub_local import get_hub_if_exists
    return get_hub_if_exists(), signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
assert aio.run_coroutine(look()) == (None, True)

# From a native thread, too.
found = []
def native():
    found.append(aio.run_coroutine(asyncio.sleep(0.01, "native")))
get_original("_thread", "start_new_thread")(native, ())
with gevent.Timeout(10):
    while not found:
        gevent.sleep(0.01)
assert found == ["native"]

# A forked child has one of its own, while its parent's goes on.
async def pid():
    return os.getpid(), await aio.run_on_hub(os.getpid)
busy = gevent.spawn(aio.run_coroutine, asyncio.sleep(0.3, "undisturbed"))
gevent.sleep(0.05)
child = os.fork()
if not child:
    os._exit(0 if aio.run_coroutine(pid(), timeout=10) == (os.getpid(), os.getpid()) else 1)
assert os.waitpid(child, 0)[1] == 0
assert busy.get(timeout=10) == "undisturbed"
assert aio.run_coroutine(pid()) == (os.getpid(), os.getpid())
"""
    )


def test_what_traces_threads_traces_the_asyncio_thread():
    """Coverage and debuggers say so by `threading.settrace`."""
    run_python(
        """
        import puff_patch
        puff_patch.patch_all()
        import threading
        from puff_patch.runtime.aio import run_coroutine
        seen = set()
        def trace(frame, event, arg):
            seen.add(frame.f_code.co_name)
        async def traced():
            pass
        threading.settrace(trace)
        run_coroutine(traced())
        assert "traced" in seen
        """
    )
