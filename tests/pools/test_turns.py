"""Greenlets share a psycopg2 connection as threads do: one at a time, each its own answer, nobody stuck."""

from __future__ import annotations

import pytest
from support.process import run_python

PATCHED = """
import puff_patch; puff_patch.patch_all()
import io, threading, gevent, psycopg2
from psycopg2 import extensions
gevent.get_hub().NOT_ERROR += (psycopg2.Error,)  # asked for below, not to be printed
connection = psycopg2.connect(os.environ["PUFF_DEFAULT_POSTGRES_URL"], pool=POOL)
def ask(sql, *args, name=None):
    with connection.cursor(name) as cursor:
        cursor.execute(sql, args)
        return cursor.fetchone()[0]
def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never came"
        gevent.sleep(0.002)
def is_busy():
    return connection.info.transaction_status == extensions.TRANSACTION_STATUS_ACTIVE
"""


@pytest.fixture(params=[True, False], ids=["leased", "own connection"])
def run(request, services):
    def run(code: str):
        return run_python(PATCHED.replace("POOL", repr(request.param)) + code, env=services.env(), timeout=30)

    return run


def test_many_threads_on_one_connection(run) -> None:
    """Queries, server-side cursors, COPY, large objects and the ends of transactions, all at once."""
    run(
        """
wrong = []
def work(number):
    for turn in range(5):
        mine = number * 1000 + turn
        if ask("SELECT %s::int FROM pg_sleep(0.001)", mine) != mine:
            wrong.append(("execute", mine))
        out = io.StringIO()
        with connection.cursor() as cursor:
            cursor.copy_expert(f"COPY (SELECT {mine}) TO STDOUT", out)
        if out.getvalue() != f"{mine}\\n":
            wrong.append(("copy", mine))
        if number % 4 == 0:
            connection.set_client_encoding("UTF8")
            connection.commit()
        elif number % 4 == 1:
            connection.rollback()
threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, wrong
connection.rollback()
def fetch(name):
    cursor = connection.cursor(name)
    cursor.itersize = 2
    cursor.execute("SELECT %s::text || n FROM generate_series(1, 9) n", (name,))
    found = [row for (row,) in cursor]
    cursor.close()
    return found == [f"{name}{n}" for n in range(1, 10)]
names = [gevent.spawn(fetch, f"cursor{n}") for n in range(8)]
oids = [gevent.spawn(lambda: connection.lobject(0, "wb").write(b"x" * 10000)) for n in range(8)]
gevent.joinall(names + oids, raise_error=True)
assert all(name.value for name in names)
connection.close()
"""
    )


def test_native_threads_share_a_connection_with_greenlets(run) -> None:
    run(
        """
from gevent.threadpool import ThreadPool
def work(number):
    return all(ask("SELECT %s", number + turn) == number + turn for turn in range(20))
threads = ThreadPool(3)
tasks = [threads.spawn(work, 1000 * n) for n in range(3)] + [gevent.spawn(work, 1000 * n) for n in range(3, 6)]
assert all(task.get() for task in tasks)
threads.kill()
"""
    )


def test_turns_come_in_the_order_of_asking_and_an_idle_loop_leaves_them(run) -> None:
    run(
        """
done = []
def keep_asking():
    while not done:
        ask("SELECT 1")
def keep_committing():
    while not done:
        connection.commit()
loops = [threading.Thread(target=loop) for loop in (keep_asking, keep_committing)]
for loop in loops:
    loop.start()
for number in range(50):
    assert ask("SELECT %s", number) == number
done.append(True)
for loop in loops:
    loop.join()
"""
    )


def test_a_greenlet_killed_in_the_queue_or_at_work_holds_up_nobody(run) -> None:
    run(
        """
worker = gevent.spawn(ask, "SELECT pg_sleep(0.5)::text")
wait_for(is_busy)
impatient = gevent.spawn(ask, "SELECT 1")
patient = gevent.spawn(ask, "SELECT 2")
gevent.sleep(0.01)
impatient.kill()
assert isinstance(impatient.value, gevent.GreenletExit)
assert worker.get(timeout=10) == "" and patient.get(timeout=10) == 2
worker = gevent.spawn(ask, "SELECT pg_sleep(30)")
wait_for(is_busy)
waiting = gevent.spawn(ask, "SELECT 3")
gevent.sleep(0.01)
worker.kill()
try:
    waiting.get(timeout=5)
except psycopg2.InterfaceError as error:
    assert "closed" in str(error)
else:
    raise AssertionError("psycopg2 has closed the connection")
"""
    )


def test_who_waits_while_the_connection_is_closed_is_told(run) -> None:
    run(
        """
worker = gevent.spawn(ask, "SELECT pg_sleep(0.3)::text")
wait_for(is_busy)
waiting = [gevent.spawn(ask, "SELECT 1"), gevent.spawn(connection.commit)]
gevent.sleep(0.01)
gevent.spawn(connection.close)
for greenlet in waiting:
    try:
        greenlet.get(timeout=5)
    except (psycopg2.InterfaceError, psycopg2.OperationalError):
        pass
gevent.joinall([worker], timeout=5)
assert worker.dead and connection.closed
"""
    )
