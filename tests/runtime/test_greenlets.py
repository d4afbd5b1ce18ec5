"""Warm greenlets."""

from __future__ import annotations

import contextvars
import gc
import weakref
from collections.abc import Iterator

import gevent
import pytest
from gevent import get_hub, getcurrent
from gevent.event import Event
from gevent.local import local

from puff_patch.runtime import WarmPool
from puff_patch.runtime.greenlets import _KEEP_IDLE


@pytest.fixture
def pool() -> Iterator[WarmPool]:
    made = WarmPool(4)
    yield made
    made.kill()
    made.close()
    assert made.size == 0


def settle() -> None:
    """Let everything run that can."""
    for _ in range(5):
        gevent.sleep(0)


def test_most_recently_used_greenlet_is_taken_first(pool: WarmPool) -> None:
    ran: list[object] = []

    def job() -> None:
        ran.append(getcurrent())
        gevent.sleep(0)

    pool.submit(job)
    pool.submit(job)
    settle()
    assert pool.size == 2
    assert pool.running == 0
    assert ran[0] is not ran[1]
    pool.submit(job)
    settle()
    assert ran[2] is ran[1]
    assert pool.size == 2


def test_greenlet_locals_stay_and_context_variables_do_not(pool: WarmPool) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    kept = local()
    found: list[tuple[str, str]] = []

    def job(name: str) -> None:
        found.append((variable.get(), getattr(kept, "value", "unset")))
        variable.set(name)
        kept.value = name
        gevent.sleep(0)
        assert variable.get() == name

    for name in ("first", "second", "third"):
        pool.submit(job, name)
        settle()
    assert found == [("unset", "unset"), ("unset", "first"), ("unset", "second")]


def test_context_is_that_of_the_pool() -> None:
    variable = contextvars.ContextVar("base", default="unset")
    token = variable.set("of the pool")
    pool = WarmPool(1)
    variable.reset(token)
    found: list[str] = []
    pool.submit(lambda: found.append(variable.get()))
    settle()
    pool.close()
    assert found == ["of the pool"]


def test_jobs_beyond_the_limit_wait_in_order(pool: WarmPool) -> None:
    gate = Event()
    began: list[int] = []

    def job(number: int) -> None:
        began.append(number)
        gate.wait()

    for number in range(10):
        pool.submit(job, number)
    settle()
    assert began == [0, 1, 2, 3]
    assert (pool.size, pool.running, pool.waiting) == (4, 4, 6)
    gate.set()
    settle()
    assert began == list(range(10))
    assert (pool.size, pool.running, pool.waiting) == (4, 0, 0)


def test_jobs_from_the_hub_start_at_once(pool: WarmPool) -> None:
    ran: list[str] = []
    pool.submit(ran.append, "makes a greenlet")
    settle()

    def in_hub() -> None:
        pool.submit(ran.append, "job")
        ran.append("hub")

    get_hub().loop.run_callback(in_hub)
    settle()
    assert ran[1:] == ["job", "hub"]


def test_failing_job_is_reported_and_the_greenlet_stays(pool: WarmPool, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[object] = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, kind, value, trace: errors.append(value))

    def job() -> None:
        raise LookupError("job failed")

    pool.submit(job)
    settle()
    pool.submit(job)
    settle()
    assert [str(error) for error in errors] == ["job failed", "job failed"]
    assert pool.size == 1


def test_killed_greenlet_is_replaced(pool: WarmPool) -> None:
    gate = Event()
    running: list[gevent.Greenlet[..., None]] = []

    def job() -> None:
        running.append(getcurrent())  # type: ignore[arg-type]
        gate.wait()

    for _ in range(5):
        pool.submit(job)
    settle()
    assert pool.waiting == 1
    running[0].kill()
    settle()
    assert len(running) == 5
    assert pool.size == 4
    gate.set()
    settle()
    # One that is killed while it is idle is not given a job.
    running[1].kill()
    ran: list[int] = []
    for number in range(4):
        pool.submit(ran.append, number)
    settle()
    assert ran == [0, 1, 2, 3]


def test_kill_ends_running_jobs_and_drops_waiting_ones(pool: WarmPool) -> None:
    ended: list[str] = []

    def job() -> None:
        try:
            Event().wait()
        finally:
            ended.append("unwound")

    for _ in range(6):
        pool.submit(job)
    settle()
    pool.submit(job)
    assert pool.kill() == 6
    assert ended == ["unwound"] * 4


def test_kill_before_a_job_started(pool: WarmPool) -> None:
    ran: list[int] = []
    pool._start((ran.append, (1,)))
    assert pool.kill() == 1
    assert pool.size == 0
    assert not ran


def test_idle_greenlet_keeps_nothing_of_its_job_alive(pool: WarmPool) -> None:
    class Request:
        pass

    request = Request()
    reference = weakref.ref(request)
    pool.submit(lambda value: None, request)
    settle()
    del request
    gc.collect()
    assert reference() is None


def test_greenlets_of_a_burst_end_when_they_were_idle_for_long() -> None:
    pool = WarmPool(100)
    gate = Event()
    for _ in range(50):
        pool.submit(gate.wait)
    settle()
    gate.set()
    settle()
    assert pool.size == 50
    pool._trim()
    settle()
    # They were needed within the last while.
    assert pool.size == 50
    pool._trim()
    settle()
    assert pool.size == _KEEP_IDLE
    pool.close()


def test_limit_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        WarmPool(0)
