"""Event loops that greenlets run."""

from __future__ import annotations

import signal
import subprocess
import sys

from support.process import run_python

PATCHED = """
import puff_patch
puff_patch.patch_all()
import asyncio, gevent, signal, subprocess, threading
"""


def test_loops_in_many_greenlets_at_once() -> None:
    run_python(
        PATCHED
        + """
closed = []
async def numbers(n):
    try:
        for number in range(n):
            await asyncio.sleep(0.001)
            yield number
    finally:
        closed.append(n)

async def serve(port):
    async def answer(reader, writer):
        writer.write((await reader.readline()).upper())
        await writer.drain()
        writer.close()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port.set_result(server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()

async def main(n):
    loop = asyncio.get_running_loop()
    time.sleep(0.002)  # blocks this loop, and nothing else
    assert asyncio.get_running_loop() is loop
    assert [number async for number in numbers(3)] == [0, 1, 2]
    async for _ in numbers(100 + n):
        break  # asyncio.run closes it, on this loop
    # more at once than asyncio's own executor has threads
    barrier = threading.Barrier(60)
    await asyncio.gather(*[asyncio.to_thread(barrier.wait, 10) for _ in range(60)])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello\\n")
    assert await reader.readline() == b"HELLO\\n"
    writer.close()
    await writer.wait_closed()
    assert (await loop.getaddrinfo("127.0.0.1", 80))[0][4] == ("127.0.0.1", 80)
    return n

from concurrent.futures import Future
ready = Future()
server = gevent.spawn(asyncio.run, serve(ready))
port = ready.result(10)

def watch():
    while True:
        assert asyncio._get_running_loop() is None and sys.get_asyncgen_hooks() == (None, None)
        gevent.sleep(0)
watcher = gevent.spawn(watch)
greenlets = [gevent.spawn(asyncio.run, main(n)) for n in range(20)]
assert asyncio.run(main(99)) == 99
gevent.joinall(greenlets, timeout=20, raise_error=True)
assert [greenlet.value for greenlet in greenlets] == list(range(20))
assert sorted(closed)[21:] == [*range(100, 120), 199]
assert not watcher.dead
watcher.kill()
server.kill()
import greenlet
assert greenlet.gettrace() is None

# Within one greenlet it is as ever.
async def nested():
    coroutine = asyncio.sleep(0)
    try:
        asyncio.run(coroutine)
    except RuntimeError as error:
        assert "cannot be called from a running event loop" in str(error)
        coroutine.close()
        return True
assert asyncio.run(nested())
""",
    )


def test_the_loop_of_a_thread_is_a_greenlets_own() -> None:
    run_python(
        PATCHED
        + """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
policy = asyncio.get_event_loop_policy()
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
def look():
    try:
        return policy.get_event_loop()
    except RuntimeError:
        return None
assert policy.get_event_loop() is loop
assert gevent.spawn(look).get(timeout=5) is None
assert loop.run_until_complete(asyncio.sleep(0.001, 7)) == 7
assert loop.run_until_complete(asyncio.sleep(0.001, 8)) == 8
# and another thread's greenlets reach it, or wait for it
async def echo(value):
    await asyncio.sleep(0.001)
    return value
def ask():
    return asyncio.run_coroutine_threadsafe(echo("asked"), loop).result(5)
asker = gevent.spawn(ask)
asker.link(lambda _: loop.call_soon_threadsafe(loop.stop))
loop.run_forever()
assert asker.get(timeout=5) == "asked"
from puff_patch.runtime import aio
assert asyncio.run_coroutine_threadsafe(echo(1), aio.get_thread().loop).result(5) == 1
asyncio.set_event_loop(None)
loop.close()
"""
    )


def test_children_of_loops_and_of_greenlets() -> None:
    run_python(
        PATCHED
        + """
from asgiref.sync import async_to_sync
async def child(code):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-S", "-c", f"print(input()); raise SystemExit({code})", stdin=-1, stdout=-1
    )
    answer, _ = await process.communicate(b"hello\\n")
    assert answer == b"hello\\n"
    return process.returncode
for code in (3, 4):
    assert asyncio.run(child(code)) == code
    assert subprocess.run([sys.executable, "-S", "-c", f"raise SystemExit({code})"]).returncode == code
    assert async_to_sync(child)(code + 2) == code + 2
"""
    )


def test_uvloop_where_the_program_asks_for_it_is_cooperative() -> None:
    run_python(
        PATCHED
        + """
import uvloop, warnings
async def main():
    ticks = []
    gevent.spawn(ticks.append, 1)
    assert await asyncio.to_thread(lambda: threading.current_thread() is not threading.main_thread())
    return ticks
assert uvloop.run(main()) == [1]
warnings.simplefilter("ignore", DeprecationWarning)
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
assert asyncio.run(main()) == [1]
asyncio.set_event_loop_policy(None)
"""
    )


def test_signals_reach_a_loop_in_the_main_greenlet() -> None:
    """As a server started by hand: SIGTERM through add_signal_handler, then Ctrl-C."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-uc",
            PATCHED
            + """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs beside itself ignore it
async def main():
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    print("ready", flush=True)
    await terminated.wait()
    # from within the wait: Python 3.10 raises KeyboardInterrupt wherever it is
    asyncio.get_running_loop().call_later(0.05, print, "terminated")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        print("cancelled", flush=True)
        raise
try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted", flush=True)
""",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "terminated\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert out == "cancelled\ninterrupted\n"
    assert process.returncode == 0, err
