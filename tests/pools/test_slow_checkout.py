"""A checkout that waits too long: the warning, and whom it names."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
from gevent.event import Event
from support.drivers import Fake
from support.waiting import eventually

from puff_patch.pools import base


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setenv("PUFF_SLOW_CHECKOUT_MS", "30")
    driver = Fake()
    yield driver
    driver.close()


def hold_in_user_code(driver: Fake, pool: object, release: Event) -> None:
    connection = driver.take(pool)
    release.wait()  # HERE
    driver.give(pool, connection)


def here() -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"{__file__}:{next(n for n, line in enumerate(lines, 1) if line.endswith('# HERE'))}"


def test_a_slow_checkout_is_told_of_once_with_who_holds_the_connections(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "puff_patch.pools")
    pool, release = fake.make(max_size=2, timeout=10), Event()
    holders = [gevent.spawn(hold_in_user_code, fake, pool, release) for _ in range(2)]
    gevent.sleep(0.02)
    waiters = [gevent.spawn(fake.take, pool) for _ in range(2)]
    eventually(lambda: caplog.messages)
    gevent.sleep(0.05)
    [message] = caplog.messages
    first, *held = message.splitlines()
    assert f"pool {pool.name}: a checkout waits for 0." in first
    assert "2 of max_size=2 connections are in use, 2 requests wait" in first
    assert len(held) == 2
    for line in held:
        assert line.startswith("  held for 0.")
        assert "hold_in_user_code" in line
        assert here() in line

    # The next one comes when the time for it has: with the number of those that were not told.
    pool._slow_told_at -= 60
    third = gevent.spawn(fake.take, pool)
    eventually(lambda: len(caplog.messages) == 2)
    assert "1 more waited as long" in caplog.messages[1]
    release.set()
    gevent.joinall(holders)
    for waiter in (*waiters, third):
        fake.give(pool, waiter.get())
    assert not pool._leased


def test_a_fast_checkout_and_one_that_is_served_in_time_are_not_told_of(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "puff_patch.pools")
    pool, release = fake.make(max_size=1, timeout=10), Event()
    holder = gevent.spawn(hold_in_user_code, fake, pool, release)
    gevent.sleep(0.05)  # held for long, but nobody minds
    waiter = gevent.spawn(fake.take, pool)
    gevent.sleep(0)
    release.set()
    fake.give(pool, waiter.get())
    holder.join()
    assert caplog.messages == []


def test_zero_turns_it_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PUFF_SLOW_CHECKOUT_MS", "0")
    caplog.set_level(logging.WARNING, "puff_patch.pools")
    driver = Fake()
    pool = driver.make(max_size=1, timeout=0.1)
    connection = driver.take(pool)
    with pytest.raises(base.PoolTimeout, match="this very greenlet, which asks for another one"):
        driver.take(pool)
    driver.give(pool, connection)
    assert caplog.messages == []
    driver.close()


def test_a_time_out_names_the_longest_holder_and_a_dead_one(fake: Fake) -> None:
    pool, release = fake.make(max_size=2, timeout=0.06), Event()
    holder = gevent.spawn(hold_in_user_code, fake, pool, release)
    gevent.sleep(0.01)
    kept = gevent.spawn(fake.take, pool).get()
    with pytest.raises(base.PoolTimeout) as caught:
        fake.take(pool)
    told = str(caught.value)
    assert "held for 0." in told
    assert here() in told
    release.set()
    holder.join()
    del holder
    gc.collect()
    again = fake.take(pool)
    with pytest.raises(base.PoolTimeout, match="a greenlet that has ended"):
        fake.take(pool)
    fake.give(pool, again)
    fake.give(pool, kept)


def test_whoever_took_over_the_connection_of_another_pool_is_a_holder(fake: Fake) -> None:
    pool, other = fake.make(max_size=1, timeout=0.02), fake.make(max_size=1)
    slot = pool.checkout_from(other)
    assert slot.is_held_here()
    with pytest.raises(base.PoolTimeout, match=r"held for 0.* by this very greenlet"):
        pool.checkout()
    connection, slot.connection = slot.connection, None
    pool.checkin(slot, connection)
    assert not pool._leased
    assert not other._leased


def test_a_lease_keeps_no_greenlet_alive() -> None:
    driver = Fake()
    pool = driver.make(max_size=1)
    greenlet = gevent.spawn(lambda: pool.checkout())
    slot = greenlet.get()
    assert slot.holder() is greenlet
    del greenlet
    gevent.sleep(0)
    gc.collect()
    eventually(lambda: gc.collect() >= 0 and slot.holder() is None)
    driver.close()
