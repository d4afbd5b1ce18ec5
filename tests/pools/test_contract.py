"""What every pool keeps, whatever is pooled."""

from __future__ import annotations

import random
import sys
import threading
import time
from typing import Any

import gevent
import pytest
from gevent.event import Event
from support.drivers import Driver, Fake
from support.waiting import eventually

from puff_patch.pools import base
from puff_patch.pools.base import Pool

PSYCOPG_POOL_KEYS = {
    "pool_min",
    "pool_max",
    "pool_size",
    "pool_available",
    "requests_waiting",
    "requests_num",
    "requests_queued",
    "requests_wait_ms",
    "requests_errors",
    "usage_ms",
    "returns_bad",
    "connections_num",
    "connections_ms",
    "connections_errors",
    "connections_lost",
}


class Gate:
    """Stands before a step of a pool: says who arrived, holds them until opened, may fail them."""

    def __init__(self, pool: Pool[Any], step: str) -> None:
        self.arrived = Event()
        self.opened = Event()
        self.error: Exception | None = None
        original = getattr(pool, step)

        def gated(*args: Any) -> Any:
            self.arrived.set()
            self.opened.wait()
            if self.error is not None:
                raise self.error
            return original(*args)

        setattr(pool, step, gated)


def waiting(pool: Pool[Any], number: int) -> None:
    """Wait until so many requests queue."""
    eventually(lambda: pool.get_stats()["requests_waiting"] == number, what=f"{number} requests wait")


def idle(pool: Pool[Any], number: int) -> None:
    """Wait until so many connections are idle, and clean."""
    eventually(lambda: len(pool._clean) == number and not pool._dirty and not pool._janitors, what=repr(pool))


def is_whole(driver: Driver, pool: Any) -> None:
    """Nothing is leased, and as many as promised can be leased at once again."""
    core = driver.core(pool)
    eventually(lambda: core.get_stats()["pool_size"] == core.get_stats()["pool_available"], what=repr(core))
    assert core.get_stats()["requests_waiting"] == 0
    size = core.options.max_size
    with gevent.Timeout(10):
        leases = [driver.take(pool) for _ in range(size)]
    assert len({driver.session(lease) for lease in leases}) == size
    while leases:
        driver.give(pool, leases.pop())


def skip_without_reset(core: Pool[Any]) -> None:
    if not core.needs_reset:
        pytest.skip("there is nothing to reset")


def test_the_one_returned_last_is_the_next_where_there_is_nothing_to_reset(driver: Driver) -> None:
    pool = driver.make(max_size=3)
    if driver.core(pool).needs_reset:
        pytest.skip("one that is clean comes first")
    leases = [driver.take(pool) for _ in range(3)]
    last = driver.session(leases[1])
    for number in (0, 2, 1):
        driver.give(pool, leases[number])
    del leases
    for _ in range(3):
        connection = driver.take(pool)
        assert driver.session(connection) == last
        driver.give(pool, connection)


def test_never_more_than_max_size(driver: Driver) -> None:
    pool = driver.make(max_size=5)
    held, most, seen = 0, 0, set()

    def work() -> None:
        nonlocal held, most
        connection = driver.take(pool)
        held += 1
        most = max(most, held)
        seen.add(driver.session(connection))
        gevent.sleep(random.choice([0, 0, 0.002]))
        held -= 1
        driver.give(pool, connection)

    workers = [gevent.spawn(work) for _ in range(200)]
    while not all(worker.dead for worker in workers):
        assert len(driver.sessions()) <= 5
        gevent.sleep(0.01)
    gevent.joinall(workers, raise_error=True)
    assert most == 5
    assert len(seen) == 5, "the same five served all"
    is_whole(driver, pool)


def test_waiters_are_served_first_come_first_served(driver: Driver) -> None:
    pool = driver.make(max_size=1)
    first = driver.take(pool)
    served = []

    def work(number: int) -> None:
        connection = driver.take(pool)
        served.append(number)
        gevent.sleep(0)
        driver.give(pool, connection)

    workers = []
    for number in range(20):
        workers.append(gevent.spawn(work, number))
        waiting(driver.core(pool), number + 1)
    driver.give(pool, first)
    del first
    gevent.joinall(workers, raise_error=True)
    assert served == list(range(20))


def test_a_newcomer_does_not_overtake_those_who_wait(driver: Driver) -> None:
    pool = driver.make(max_size=1)
    first = driver.take(pool)
    order = []

    def patient() -> None:
        connection = driver.take(pool)
        order.append("patient")
        driver.give(pool, connection)

    worker = gevent.spawn(patient)
    waiting(driver.core(pool), 1)
    driver.give(pool, first)
    del first
    connection = driver.take(pool)  # no switch since the return
    order.append("newcomer")
    driver.give(pool, connection)
    worker.join()
    assert order == ["patient", "newcomer"]


def test_a_time_out_says_which_pool_how_large_and_what_to_do(driver: Driver) -> None:
    pool = driver.make(max_size=2, timeout=0.05)
    core = driver.core(pool)
    leases = [driver.take(pool), driver.take(pool)]
    started = time.monotonic()
    with pytest.raises(base.PoolTimeout) as raised:
        driver.take(pool)
    assert 0.05 <= time.monotonic() - started < 2
    assert isinstance(raised.value, driver.operational_error)
    assert type(raised.value) is core.PoolTimeout
    message = str(raised.value)
    assert core.name in message
    assert "2 (max_size)" in message
    assert core.how_to_grow in message
    assert "0.05 s" in message
    while leases:
        driver.give(pool, leases.pop())
    is_whole(driver, pool)
    assert core.get_stats()["requests_errors"] == 1


@pytest.mark.parametrize("patience", [0, 1e-6])
def test_no_patience_is_a_time_out_at_once(driver: Driver, patience: float) -> None:
    core = driver.core(driver.make(max_size=1))
    slot = core.checkout(timeout=patience)
    with pytest.raises(base.PoolTimeout):
        core.checkout(timeout=patience)
    connection, slot.connection = slot.connection, None
    core.checkin(slot, connection)


def test_endless_patience(driver: Driver) -> None:
    pool = driver.make(max_size=1, timeout=float("inf"))
    first = driver.take(pool)
    worker = gevent.spawn(driver.take, pool)
    waiting(driver.core(pool), 1)
    driver.give(pool, first)
    driver.give(pool, worker.get(timeout=5))


def test_max_waiting(driver: Driver) -> None:
    pool = driver.make(max_size=1, max_waiting=2)
    first = driver.take(pool)
    workers = [gevent.spawn(driver.take, pool) for _ in range(2)]
    waiting(driver.core(pool), 2)
    with pytest.raises(base.TooManyRequests, match="max_waiting=2") as raised:
        driver.take(pool)
    assert isinstance(raised.value, driver.operational_error)
    driver.give(pool, first)
    del first
    driver.give(pool, workers[0].get())
    driver.give(pool, workers[1].get())
    del workers
    is_whole(driver, pool)


def test_close_wakes_those_who_wait(driver: Driver) -> None:
    pool = driver.make(max_size=1)
    core = driver.core(pool)
    lease = driver.take(pool)
    worker = gevent.spawn(driver.take, pool)
    waiting(core, 1)
    core.close()
    with pytest.raises(base.PoolClosed) as raised:
        worker.get(timeout=5)
    assert isinstance(raised.value, driver.operational_error)
    assert core.name in str(raised.value)
    with pytest.raises(base.PoolClosed):
        driver.take(pool)
    # A lease survives the closing, and nothing survives its return.
    session = driver.session(lease)
    eventually(lambda: driver.sessions() == {session})  # a server may be slow to notice a new one
    driver.give(pool, lease)
    del lease
    eventually(lambda: not driver.sessions())
    assert core.get_stats()["pool_size"] == 0


def test_a_failed_connect_frees_its_place_and_wakes_the_next(driver: Driver) -> None:
    pool = driver.make(max_size=1)
    core = driver.core(pool)
    gate = Gate(core, "_connect")
    gate.error = driver.operational_error("no such host")
    failing = gevent.spawn(driver.take, pool)
    gate.arrived.wait()
    waiter = gevent.spawn(driver.take, pool)
    waiting(core, 1)
    gate.opened.set()
    with pytest.raises(driver.operational_error, match="no such host"):
        failing.get(timeout=5)
    with pytest.raises(driver.operational_error, match="no such host"):
        waiter.get(timeout=5)
    assert core.get_stats()["pool_size"] == 0
    assert core.get_stats()["connections_errors"] == 2
    gate.error = None
    is_whole(driver, pool)


def test_a_failing_refill_wakes_those_who_wait(driver: Driver) -> None:
    pool = driver.make(min_size=1, max_size=1)
    core = driver.core(pool)
    gate = Gate(core, "_connect")
    gate.error = driver.operational_error("no such host")
    core.open()
    gate.arrived.wait()
    waiter = gevent.spawn(driver.take, pool)
    waiting(core, 1)
    gate.opened.set()
    with pytest.raises(driver.operational_error, match="no such host"):
        waiter.get(timeout=5)


@pytest.mark.parametrize("how", ["kill", "timeout"])
def test_a_waiter_that_gives_up_loses_nothing(driver: Driver, how: str) -> None:
    pool = driver.make(max_size=1)
    first = driver.take(pool)

    def impatient() -> None:
        with gevent.Timeout(0.01, False):
            driver.give(pool, driver.take(pool))

    waiter = gevent.spawn(driver.take, pool) if how == "kill" else gevent.spawn(impatient)
    waiting(driver.core(pool), 1)
    if how == "kill":
        waiter.kill()
    waiter.join()
    waiting(driver.core(pool), 0)
    driver.give(pool, first)
    del first
    is_whole(driver, pool)


def test_a_waiter_killed_in_the_moment_it_is_served(driver: Driver) -> None:
    pool = driver.make(max_size=1)
    first = driver.take(pool)
    waiter = gevent.spawn(driver.take, pool)
    waiting(driver.core(pool), 1)
    second = gevent.spawn(lambda: driver.give(pool, driver.take(pool)))
    waiting(driver.core(pool), 2)
    waiter.kill(block=False)
    driver.give(pool, first)  # the waiter has it, but has not run yet: first it will be killed
    del first
    second.get(timeout=5)
    is_whole(driver, pool)


@pytest.mark.parametrize("step", ["_connect", "_reset"])
def test_killed_while_connecting_or_resetting(driver: Driver, step: str) -> None:
    pool = driver.make(max_size=1)
    core = driver.core(pool)
    if step == "_reset":
        skip_without_reset(core)
        driver.give(pool, driver.take(pool))  # dirty: the next one resets it, before the janitor runs
    gate = Gate(core, step)
    worker = gevent.spawn(driver.take, pool)
    if step == "_reset":
        core._janitors = 99  # no janitor takes it first
    gate.arrived.wait(5)
    waiter = gevent.spawn(lambda: driver.give(pool, driver.take(pool)))
    waiting(core, 1)
    worker.kill()
    gate.opened.set()
    waiter.get(timeout=5)
    core._janitors = 0
    is_whole(driver, pool)
    assert len(driver.sessions()) == 1


def test_a_connection_that_cannot_be_reset_is_replaced(driver: Driver) -> None:
    pool = driver.make(max_size=1)
    core = driver.core(pool)
    skip_without_reset(core)
    connection = driver.take(pool)
    old = driver.session(connection)
    gate = Gate(core, "_reset")
    gate.error = driver.operational_error("the server is gone")
    gate.opened.set()
    driver.give(pool, connection)
    del connection
    connection = driver.take(pool)
    assert driver.session(connection) != old
    driver.give(pool, connection)
    assert core.get_stats()["returns_bad"] == 1


def test_an_idle_connection_that_the_server_ended_is_replaced(driver: Driver) -> None:
    pool = driver.make(max_size=3)
    core = driver.core(pool)
    leases = [driver.take(pool) for _ in range(3)]
    sessions = [driver.session(lease) for lease in leases]
    while leases:
        driver.give(pool, leases.pop())
    idle(core, 3)
    for session in sessions:
        driver.end_session(session)
    eventually(lambda: not driver.sessions() & set(sessions))
    connection = driver.take(pool)
    assert driver.session(connection) not in sessions
    driver.give(pool, connection)
    del connection
    is_whole(driver, pool)
    assert core.get_stats()["connections_lost"] == 3


def test_a_leased_connection_that_the_server_ended_is_replaced(driver: Driver) -> None:
    if driver.name == "fake":
        pytest.skip("its connections do not notice")
    pool = driver.make(max_size=1)
    connection = driver.take(pool)
    old = driver.session(connection)
    driver.end_session(old)
    with pytest.raises(driver.operational_error):
        driver.session(connection)
    driver.give(pool, connection)
    del connection
    is_whole(driver, pool)
    assert old not in driver.sessions()


def test_many_ended_sessions_do_not_wear_the_pool_out(driver: Driver) -> None:
    """Every replaced connection counts once, not for ever."""
    pool = driver.make(max_size=2)
    for _ in range(5):
        connection = driver.take(pool)
        session = driver.session(connection)
        driver.give(pool, connection)
        del connection
        idle(driver.core(pool), len(driver.core(pool)._clean) + len(driver.core(pool)._dirty))
        driver.end_session(session)
        eventually(lambda gone=session: gone not in driver.sessions())
    is_whole(driver, pool)


def test_max_lifetime(driver: Driver) -> None:
    pool = driver.make(max_size=1, max_lifetime=0.05)
    connection = driver.take(pool)
    old = driver.session(connection)
    driver.give(pool, connection)  # too young to go
    del connection
    gevent.sleep(0.06)
    connection = driver.take(pool)
    second = driver.session(connection)
    assert second != old
    gevent.sleep(0.06)
    driver.give(pool, connection)  # too old to be kept
    del connection
    eventually(lambda: not driver.sessions())
    is_whole(driver, pool)


def test_idle_connections_are_closed_down_to_min_size(driver: Driver) -> None:
    pool = driver.make(min_size=1, max_size=4, max_idle=0.05)
    core = driver.core(pool)
    leases = [driver.take(pool) for _ in range(4)]
    while leases:
        driver.give(pool, leases.pop())
    assert core.get_stats()["pool_size"] == 4
    eventually(lambda: core.get_stats()["pool_size"] == 1)
    eventually(lambda: len(driver.sessions()) == 1)
    gevent.sleep(0.12)
    assert core.get_stats()["pool_size"] == 1
    is_whole(driver, pool)


def test_min_size_is_opened_and_refilled(driver: Driver) -> None:
    if driver.name == "http":
        pytest.skip("has no min_size: urllib3 connects when it has a request")
    pool = driver.make(min_size=2, max_size=4)
    core = driver.core(pool)
    core.open()
    idle(core, 2)
    assert len(driver.sessions()) == 2
    connection = driver.take(pool)
    driver.end_session(driver.session(connection))
    slot_is_bad = driver.name == "fake"  # it does not notice by itself
    if not slot_is_bad:
        with pytest.raises(driver.operational_error):
            driver.session(connection)
    driver.give(pool, connection)
    del connection
    idle(core, 2)
    eventually(lambda: len(driver.sessions()) == 2)


def test_refilling_goes_on_after_failures(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REFILL_FIRST", 0.01)
    pool = driver.make(min_size=2, max_size=4)
    core = driver.core(pool)
    gate = Gate(core, "_connect")
    gate.error = driver.operational_error("not yet")
    gate.opened.set()
    core.open()
    eventually(lambda: core.get_stats()["connections_errors"] >= 2)
    gate.error = None
    idle(core, 2)


def test_drain_replaces_idle_and_leased_ones(driver: Driver) -> None:
    pool = driver.make(max_size=3)
    core = driver.core(pool)
    leases = [driver.take(pool) for _ in range(3)]
    old = {driver.session(lease) for lease in leases}
    driver.give(pool, leases.pop())
    driver.give(pool, leases.pop())
    idle(core, 2)
    core.drain()
    eventually(lambda: len(driver.sessions()) == 1)
    assert driver.session(leases[0]) in old, "a lease is not disturbed"
    driver.give(pool, leases.pop())
    eventually(lambda: not driver.sessions())
    is_whole(driver, pool)
    assert not driver.sessions() & old


@pytest.mark.parametrize("end", ["close", "drain"])
def test_no_connection_escapes_the_end_while_the_janitor_has_it(driver: Driver, end: str) -> None:
    pool = driver.make(max_size=1)
    core = driver.core(pool)
    skip_without_reset(core)
    connection = driver.take(pool)
    old = driver.session(connection)
    gate = Gate(core, "_reset")
    driver.give(pool, connection)
    del connection
    gate.arrived.wait()
    getattr(core, end)()
    gate.opened.set()
    eventually(lambda: old not in driver.sessions())
    assert core.get_stats()["pool_size"] == 0


def test_no_connection_escapes_a_close_while_it_is_opened(driver: Driver) -> None:
    pool = driver.make(min_size=1, max_size=1)
    core = driver.core(pool)
    gate = Gate(core, "_connect")
    core.open()
    gate.arrived.wait()
    core.close()
    gate.opened.set()
    eventually(lambda: core.get_stats()["pool_size"] == 0)
    eventually(lambda: not driver.sessions())


def test_statistics_have_the_keys_of_psycopg_pool(driver: Driver) -> None:
    pool = driver.make(max_size=2)
    core = driver.core(pool)
    assert set(core.get_stats()) == PSYCOPG_POOL_KEYS
    first, second = driver.take(pool), driver.take(pool)
    waiter = gevent.spawn(driver.take, pool)
    waiting(core, 1)
    gevent.sleep(0.01)
    driver.give(pool, first)
    driver.give(pool, second)
    del first, second
    driver.give(pool, waiter.get())
    del waiter
    idle(core, 2)
    stats = core.get_stats()
    assert {key: stats[key] for key in ("pool_min", "pool_max", "pool_size", "pool_available")} == {
        "pool_min": 0,
        "pool_max": 2,
        "pool_size": 2,
        "pool_available": 2,
    }
    assert stats["requests_num"] == 3
    assert stats["requests_queued"] == 1
    assert stats["connections_num"] == 2
    assert 10 <= stats["requests_wait_ms"] < 5000
    assert stats["usage_ms"] >= 20
    assert all(isinstance(value, int) for value in stats.values())

    assert core.pop_stats() == stats
    after = core.get_stats()
    gauges = ("pool_min", "pool_max", "pool_size", "pool_available", "requests_waiting")
    assert after == {key: stats[key] if key in gauges else 0 for key in stats}
    driver.give(pool, driver.take(pool))
    assert core.get_stats()["requests_num"] == 1


@pytest.mark.parametrize("end", ["checkin", "checkin_broken", "reclaim"])
def test_a_lease_counts_once_however_it_ends(end: str) -> None:
    driver = Fake()
    pool = driver.make(max_size=1)
    slot = pool.checkout()
    connection, slot.connection = slot.connection, None
    slot.leased_at -= 100
    getattr(pool, end)(*((slot, connection) if end == "checkin" else (slot,)))
    assert 100_000 <= pool.get_stats()["usage_ms"] < 150_000
    assert not pool._leased
    driver.close()


def test_statistics_lose_nothing_among_threads() -> None:
    pool = Fake().make(max_size=4)
    threads, rounds, popped = 8, 500, []
    done = threading.Event()

    def use() -> None:
        for _ in range(rounds):
            slot = pool.checkout()
            pool.checkin(slot, slot.connection)

    def pop() -> None:
        while not done.is_set():
            popped.append(pool.pop_stats()["requests_num"])
            assert base.all_pools()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        users = [threading.Thread(target=use) for _ in range(threads)]
        popper = threading.Thread(target=pop)
        for thread in (*users, popper):
            thread.start()
        for thread in users:
            thread.join(60)
        done.set()
        popper.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert sum(popped) + pool.get_stats()["requests_num"] == threads * rounds


def test_what_is_counted_while_statistics_are_popped_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Fake().make(max_size=1)
    read = pool.get_stats

    def read_and_use() -> dict[str, int]:
        stats = read()
        slot = pool.checkout()  # as another thread might
        pool.checkin(slot, slot.connection)
        return stats

    monkeypatch.setattr(pool, "get_stats", read_and_use)
    assert pool.pop_stats()["requests_num"] == 0
    assert read()["requests_num"] == 1


def test_names_of_pools_are_unique_and_come_back() -> None:
    first, second = Fake().make(), Fake().make()
    assert {first.name, second.name} <= {pool.name for pool in base.all_pools()}
    assert first.name != second.name
    first.close()
    assert Fake().make().name == first.name


def test_two_pools_of_one_server_have_two_names(driver: Driver) -> None:
    names = {driver.core(driver.make()).name for _ in range(3)}
    assert len(names) == 3


def test_real_threads_share_a_pool(driver: Driver) -> None:
    """Threads of the threadpool, threads of the interpreter and greenlets, all at once."""
    pool = driver.make(max_size=3, timeout=20)
    core = driver.core(pool)
    lock = threading.Lock()
    held, most, failures = 0, 0, []

    def work() -> None:
        nonlocal held, most
        try:
            for _ in range(20):
                connection = driver.take(pool)
                with lock:
                    held += 1
                    most = max(most, held)
                driver.session(connection)
                with lock:
                    held -= 1
                driver.give(pool, connection)
                del connection
        except BaseException as error:  # noqa: BLE001  shown below
            failures.append(error)
        finally:
            hub = gevent.get_hub()
            if not hub.main_hub:
                hub.destroy(destroy_loop=True)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    greenlets = [gevent.spawn(work) for _ in range(5)]
    pooled = [gevent.get_hub().threadpool.spawn(work) for _ in range(2)]
    gevent.joinall([*greenlets, *pooled])
    for thread in threads:
        eventually(lambda thread=thread: not thread.is_alive(), 20)
    assert not failures
    assert most <= 3
    is_whole(driver, pool)
    assert core.get_stats()["connections_num"] <= 6


def test_a_return_in_a_thread_that_ends_leaves_no_work_behind(driver: Driver) -> None:
    """The thread's hub dies with it; the pool's background work must not have been in it."""
    pool = driver.make(max_size=2, max_idle=0.2)
    core = driver.core(pool)
    driver.give(pool, driver.take(pool))
    core.drain()
    failures = []

    def work() -> None:
        try:
            driver.give(pool, driver.take(pool))
        except BaseException as error:  # noqa: BLE001  shown below
            failures.append(error)
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: not thread.is_alive())
    assert not failures
    idle(core, 1)
    eventually(lambda: core.get_stats()["pool_size"] == 0, what="it is pruned")


def test_a_thread_that_ended_while_its_greenlets_waited_keeps_nothing() -> None:
    driver = Fake()
    pool = driver.make(max_size=1, timeout=5)
    connection = driver.take(pool)
    ended = []

    def work() -> None:
        waiter = gevent.spawn(driver.take, pool)
        while not pool.get_stats()["requests_waiting"]:
            gevent.sleep(0)
        ended.append(waiter)
        gevent.get_hub().destroy(destroy_loop=True)

    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: ended and not thread.is_alive())
    last = gevent.spawn(driver.take, pool)
    waiting(pool, 2)
    driver.give(pool, connection)
    driver.give(pool, last.get(timeout=2))
    driver.close()


@pytest.mark.parametrize("deed", ["give", "take"])
def test_a_finalizer_that_uses_the_pool_may_run_anywhere(driver: Driver, deed: str) -> None:
    """`__del__` methods run wherever the garbage collector strikes, also in the midst of a checkout."""
    pool = driver.make(max_size=2)
    core = driver.core(pool)
    for lease in [driver.take(pool), driver.take(pool)]:
        driver.give(pool, lease)
    del lease
    idle(core, 2)
    holder = [driver.take(pool)] if deed == "give" else []
    is_free = core._is_free
    done = []

    def collector_strikes(slot: Any) -> bool:
        free = is_free(slot)  # called while the pool's lock is held
        if not done:
            done.append(True)
            if deed == "give":
                driver.give(pool, holder.pop())
            else:
                holder.append(driver.take(pool))
        return free

    core._is_free = collector_strikes  # type: ignore[method-assign]
    connection = driver.take(pool)
    assert done
    driver.give(pool, connection)
    del connection
    while holder:
        driver.give(pool, holder.pop())
    is_whole(driver, pool)
