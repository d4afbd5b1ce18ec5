"""The watch over the hub: what it finds, what it leaves alone, and how it starts and ends."""

from __future__ import annotations

import pytest
from support.process import run_python

PRELUDE = """
import puff_patch
puff_patch.patch_all()
import logging, threading
import gevent
from gevent.monkey import get_original

class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []
        self.greenlets = []
    def emit(self, record):
        self.messages.append(record.getMessage())
        self.greenlets.append(gevent.getcurrent())

told = Records()
logging.getLogger("puff_patch.hub").addHandler(told)
blocking_sleep = get_original("time", "sleep")

def spin(seconds):
    limit = time.thread_time() + seconds  # of work, however busy the machine is
    while time.thread_time() < limit:
        pass

def soon(condition, seconds=10):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, (told.messages, puff_patch.hub_stats())
        gevent.sleep(0.01)
"""


def test_tells_what_blocked_the_hub_for_how_long_and_where() -> None:
    run_python(
        PRELUDE
        + """
from puff_patch.runtime import watch
watch._LONG = 60  # another test's matter
puff_patch.watch_hub(100)

def outer_function():
    spin(0.5)

def waits_in_c():
    blocking_sleep(0.5)

began = time.thread_time()
sum(range(3_000_000))
half_a_second = int(3_000_000 * 0.6 / (time.thread_time() - began))
def holds_the_gil():
    sum(range(half_a_second))  # nobody else runs meanwhile, the watch neither

for function, marks in (
    (outer_function, ["in spin", "in outer_function"]),
    (waits_in_c, ["in waits_in_c"]),
    (holds_the_gil, ["in holds_the_gil"]),
):
    before = puff_patch.hub_stats()
    gevent.spawn(function).join()
    soon(lambda: told.messages)
    [message] = told.messages
    told.messages.clear()
    assert message.startswith("the hub was blocked for "), message
    # Of a sleep on a starved machine less counts.
    assert (0.1 if function is waits_in_c else 0.3) < float(message.split()[5]) < 5, message
    for mark in marks:
        assert mark in message, message
    first_line = message.splitlines()[0]
    assert "<string>:" in first_line and marks[0] in first_line, message
    after = puff_patch.hub_stats()
    assert after["blocks_num"] == before["blocks_num"] + 1
    assert after["blocked_ms"] - before["blocked_ms"] > 100

# from the hub's thread, in a greenlet that may wait
assert all(isinstance(greenlet, gevent.Greenlet) for greenlet in told.greenlets), told.greenlets
# of one place once a minute, but counted each time
gevent.spawn(outer_function).join()
soon(lambda: puff_patch.hub_stats()["blocks_num"] == 4)
gevent.sleep(0.2)
assert told.messages == [], told.messages
"""
    )


def test_a_long_block_is_told_of_while_it_lasts_and_when_it_is_over() -> None:
    run_python(
        PRELUDE
        + """
from puff_patch.runtime import watch
watch._LONG = 0.6
puff_patch.watch_hub(100)
heard = []
def stuck():
    limit = time.monotonic() + 20
    while not told.messages and time.monotonic() < limit:
        blocking_sleep(0.01)
    heard.extend(told.messages)
gevent.spawn(stuck).join()
[early] = heard
assert "still is" in early and "in stuck" in early.splitlines()[0], early
soon(lambda: len(told.messages) == 2)
assert told.messages[1].startswith("the hub was blocked for "), told.messages
""",
    )


def test_says_nothing_of_an_idle_hub_or_of_many_short_turns() -> None:
    run_python(
        PRELUDE
        + """
from puff_patch.runtime import Mailbox, WarmPool
puff_patch.watch_hub(300)
gevent.sleep(0.7)  # idle
switches = 0
def turns():
    global switches
    limit = time.monotonic() + 1
    while time.monotonic() < limit:
        gevent.sleep(0)
        switches += 1
gevent.joinall([gevent.spawn(turns) for _ in range(10)])
assert switches > 10_000, switches

# One iteration of the loop that takes long, but in turns: other greenlets that become ready at the same time...
def turn():
    event.wait()
    spin(0.01)
event = gevent.event.Event()
greenlets = [gevent.spawn(turn) for _ in range(60)]
gevent.sleep(0.05)
event.set()
gevent.joinall(greenlets)

# ... and jobs of one warm greenlet, which the mailbox brings all at once.
pool, mailbox, done = WarmPool(), Mailbox.current(), []
def job():
    spin(0.01)
    done.append(gevent.getcurrent())
pool.submit(job)
soon(lambda: done)
for _ in range(60):
    mailbox.post(pool.submit, job)
soon(lambda: len(done) == 61)
assert len(set(done)) == 1
soon(lambda: puff_patch.hub_stats()["lag_num"] >= 1)
puff_patch.unwatch_hub()  # tells at once what there is to tell
assert told.messages == [], told.messages
assert puff_patch.hub_stats()["blocks_num"] == 0
"""
    )


def test_a_forked_child_is_watched_and_one_that_calls_exec_has_no_thread() -> None:
    run_python(
        PRELUDE
        + """
import subprocess
from puff_patch.runtime import watch
puff_patch.watch_hub(100)
read, write = os.pipe()
child = os.fork()
if child == 0:
    code = 1
    try:
        threads_at_once = len(os.listdir("/proc/self/task"))
        gevent.sleep(0.01)
        gevent.spawn(spin, 0.5).join()
        soon(lambda: told.messages)
        os.write(write, f"{threads_at_once} {told.messages[0]}".encode())
        assert puff_patch.hub_stats()["blocks_num"] == 1
        code = 0
    finally:
        os._exit(code)
_, status = os.waitpid(child, 0)  # cooperative
answer = os.read(read, 65536)
assert status == 0, status
threads_at_once, message = answer.decode().split(" ", 1)
assert threads_at_once == "1", answer
assert "in spin" in message, message
assert told.messages == [] and puff_patch.hub_stats()["watched"] == 1
assert subprocess.run(["true"], timeout=10).returncode == 0
"""
    )


@pytest.mark.parametrize("end", ["", "puff_patch.unwatch_hub()", "puff_patch.unpatch_all()", "sys.exit(0)"])
def test_ends_cleanly_and_tells_the_last_block_before_that(end: str) -> None:
    assert run_python(
        PRELUDE
        + f"""
import atexit
threads = len(os.listdir("/proc/self/task"))
@atexit.register
def at_last():  # after what is registered later
    assert len(told.messages) == 1 and "in spin" in told.messages[0], told.messages
    assert puff_patch.hub_stats()["watched"] == 0
    limit = time.monotonic() + 5
    while len(os.listdir("/proc/self/task")) > threads:
        assert time.monotonic() < limit
    sys.stdout.write("\\n@@true\\n")
puff_patch.watch_hub(100)
puff_patch.watch_hub(100)  # instead of the first
gevent.sleep(0.01)
assert len(os.listdir("/proc/self/task")) == threads + 1
gevent.spawn(spin, 0.3).join()
{end}
"""
    )


def test_the_environment_turns_it_on_and_off() -> None:
    show = "import puff_patch; puff_patch.patch_all(); report(puff_patch.hub_stats()['watched'])"
    assert run_python(show) == 0
    assert run_python(show, env={"PUFF_BLOCKED_HUB_MS": "200"}) == 1
    assert run_python(show, env={"PUFF_BLOCKED_HUB_MS": "0"}) == 0
    assert (
        run_python(show.replace("report", "puff_patch.watch_hub(); report"), env={"PUFF_BLOCKED_HUB_MS": "0"}) == 0
    )
