"""multiprocessing works as unpatched, lets greenlets run, and no process has another's session."""

from __future__ import annotations

import pytest
from processes.conftest import Program

CHILDREN = """
import concurrent.futures, multiprocessing, sys
import gevent
from worker import share_nothing, use

def tick(ticks):
    while True:
        ticks.append(1)
        gevent.sleep(0.005)

def send(pipe):
    pipe.send(use())
    pipe.close()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ticks = []
    gevent.spawn(tick, ticks)
    uses = [use()] if "used before" in sys.argv else []
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(there,))
    process.start()
    there.close()
    uses.append(here.recv())
    process.join(20)
    assert process.exitcode == 0, process.exitcode
    with context.Pool(2) as pool:
        uses += pool.map(use, range(4), chunksize=1)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        uses += executor.map(use, range(4))
    uses += [use(), use()]
    assert share_nothing(*uses), uses
    assert len({process for process, *_ in uses}) >= 4, uses
    assert len(ticks) > 10, ticks
    print("whole")
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_have_sessions_of_their_own(program: Program, method: str) -> None:
    assert program(CHILDREN, method, "used before") == "whole\n"


def test_pools_that_are_first_used_in_children(program: Program) -> None:
    assert program(CHILDREN, "fork") == "whole\n"


def test_a_queue_and_its_locks_let_greenlets_run(program: Program) -> None:
    """Two greenlets that wait for one queue, and one for a lock that another process holds."""
    told = program("""
        import multiprocessing
        import gevent

        def produce(queue, lock, ready, go):
            with lock:
                ready.set()
                go.wait(20)
                for number in range(20):
                    queue.put("x" * 100_000 + str(number))

        if __name__ == "__main__":
            context = multiprocessing.get_context("fork")
            queue, lock, ready, go = context.Queue(), context.Lock(), context.Event(), context.Event()
            process = context.Process(target=produce, args=(queue, lock, ready, go))
            process.start()
            assert ready.wait(20)
            assert not lock.acquire(False)
            assert not lock.acquire(True, 0.02)
            consumers = [gevent.spawn(lambda: [queue.get() for _ in range(10)]) for _ in range(2)]
            holder = gevent.spawn(lock.acquire)
            gevent.sleep(0.05)
            assert not holder.ready()
            go.set()
            gevent.joinall([*consumers, holder], timeout=20, raise_error=True)
            found = sorted(int(text.lstrip("x")) for consumer in consumers for text in consumer.value)
            assert found == list(range(20)), found
            lock.release()
            process.join(20)
            print(process.exitcode)
    """)
    assert told == "0\n"


def test_a_child_that_ends_before_its_parent_looks_is_joined(program: Program) -> None:
    told = program("""
        import multiprocessing, os, time
        from gevent.monkey import get_original
        import gevent.os

        fork = gevent.os.fork_gevent

        def slowly():
            pid = fork()
            if pid:
                get_original("time", "sleep")(0.1)  # the child is dead by then
            return pid

        gevent.os.fork_and_watch.__defaults__ = (None, None, False, slowly)
        process = multiprocessing.get_context("fork").Process(target=len, args=("",))
        process.start()
        started = time.monotonic()
        process.join(10)
        print(process.exitcode, time.monotonic() - started < 5)

        reader, writer = os.pipe()
        gevent.spawn_later(0.01, os.close, writer)
        with gevent.Timeout(5):
            gevent.os.tp_read(reader, 1)
            print("the end is seen")
    """)
    assert told == "0 True\nthe end is seen\n"
