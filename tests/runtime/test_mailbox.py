"""The way from foreign threads into a hub."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import gevent
import pytest
from gevent import get_hub
from gevent.event import Event

from puff_patch.runtime import Mailbox


def in_threads(count: int, target: Callable[[int], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=target, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_one_for_each_hub() -> None:
    assert Mailbox.current() is Mailbox.current()
    others: list[Mailbox] = []

    def other(_: int) -> None:
        others.append(Mailbox.current())
        get_hub().destroy(destroy_loop=True)

    for thread in in_threads(1, other):
        thread.join(5)
    assert others
    assert others[0] is not Mailbox.current()


def test_posted_call_runs_in_the_hub_with_its_arguments() -> None:
    mailbox = Mailbox.current()
    done = Event()
    called: list[object] = []

    def call(*args: object) -> None:
        called.extend([gevent.getcurrent() is get_hub(), *args])
        done.set()

    with mailbox.hold():
        in_threads(1, lambda _: mailbox.post(call, 1, "two"))
        assert done.wait(5)
    assert called == [True, 1, "two"]


def test_many_threads_at_rate_lose_nothing_and_keep_their_order() -> None:
    mailbox = Mailbox.current()
    threads, seconds = 8, 2.0
    received: list[list[int]] = [[] for _ in range(threads)]
    posted = [0] * threads
    left = [threads]
    done = Event()
    end = time.monotonic() + seconds

    def finish() -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    def flood(number: int) -> None:
        append = received[number].append
        while time.monotonic() < end:
            for _ in range(50):
                assert mailbox.post(append, posted[number])
                posted[number] += 1
            time.sleep(0.0005)
        mailbox.post(finish)

    ticks = 0
    with mailbox.hold():
        started = in_threads(threads, flood)
        # The hub's own timers go on meanwhile.
        while not done.wait(0.01):
            ticks += 1
            assert ticks < 3000
    for thread in started:
        thread.join(5)
    assert sum(posted) > 10_000
    assert [len(numbers) for numbers in received] == posted
    assert all(numbers == list(range(len(numbers))) for numbers in received)
    assert ticks > 10


def test_failing_call_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox.current()
    errors: list[object] = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, kind, value, trace: errors.append(value))
    done = Event()

    def fail() -> None:
        raise LookupError("in the hub")

    mailbox.post(fail)
    mailbox.post(done.set)
    with mailbox.hold():
        assert done.wait(5)
    assert [str(error) for error in errors] == ["in the hub"]


def test_call_that_posts_again_leaves_timers_their_turn() -> None:
    mailbox = Mailbox.current()
    going = [True]

    def again() -> None:
        if going[0]:
            mailbox.post(again)

    mailbox.post(again)
    gevent.sleep(0.05)
    going[0] = False


def test_hub_that_is_gone() -> None:
    boxes: list[Mailbox] = []

    def other(_: int) -> None:
        boxes.append(Mailbox.current())
        get_hub().destroy(destroy_loop=True)

    for thread in in_threads(1, other):
        thread.join(5)
    called: list[int] = []
    assert boxes[0].post(called.append, 1) is False
    assert boxes[0].closed
    assert boxes[0].post(called.append, 2) is False
    assert not called


def test_new_hub_of_the_same_thread_gets_a_new_mailbox() -> None:
    results: list[bool] = []

    def other(_: int) -> None:
        first = Mailbox.current()
        get_hub().destroy(destroy_loop=True)
        second = Mailbox.current()
        done = Event()
        results.append(second is not first and second.post(done.set))
        with second.hold():
            results.append(bool(done.wait(5)))
        get_hub().destroy(destroy_loop=True)

    for thread in in_threads(1, other):
        thread.join(10)
    assert results == [True, True]


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


def test_idle_program_can_end() -> None:
    done = run(
        "import gevent; from puff_patch.runtime import Mailbox; Mailbox.current(); gevent.wait(); print('end')"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("end\n", "", 0)


def test_program_that_holds_waits_for_another_thread() -> None:
    done = run("""
from gevent import monkey; monkey.patch_all()
from gevent.event import Event
from puff_patch.runtime import Mailbox
start_new_thread = monkey.get_original("_thread", "start_new_thread")
sleep = monkey.get_original("time", "sleep")
mailbox, event = Mailbox.current(), Event()
start_new_thread(lambda: (sleep(0.3), mailbox.post(event.set)), ())
with mailbox.hold():
    event.wait()
print("woken")
try:
    Event().wait()
except BaseException as exc:
    print(type(exc).__name__)
""")
    assert done.stdout == "woken\nLoopExit\n", done.stderr


def test_works_in_a_forked_child() -> None:
    done = run("""
import os
from gevent import monkey; monkey.patch_all()
from gevent.event import Event
from puff_patch.runtime import Mailbox
import gevent
mailbox = Mailbox.current()
first = Event(); mailbox.post(first.set)
with mailbox.hold():
    first.wait()
pid = os.fork()
second = Event()
monkey.get_original("_thread", "start_new_thread")(mailbox.post, (second.set,))
with mailbox.hold():
    assert second.wait(5)
if pid:
    assert os.waitpid(pid, 0)[1] == 0
    print("both")
""")
    assert done.stdout == "both\n", done.stderr
