"""The server never has a connection more than the pool may have, also while one takes the place of another."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import gevent
import psycopg
import psycopg2
import pytest
from psycopg2 import _psycopg, extensions
from support.drivers import Sql
from support.servers import PostgresProxy
from support.waiting import eventually

from puff_patch.pools.farewell import Farewells

# Of psycopg 3, for a lease that is dropped.
pytestmark = pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")

TAG = f"puff-farewell-{uuid.uuid4().hex[:8]}"


class LateProxy(PostgresProxy):
    """Passes a query with a certain word on only after a while, and what other connections say at once."""

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if b"pg_sleep(30)" in data:
                    time.sleep(0.2)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return


@pytest.fixture
def pool(sql: Sql) -> Any:
    return sql.make_pool(dsn=extensions.make_dsn(sql.url, application_name=TAG), timeout=10)


@pytest.fixture
def admin(postgres_url: str) -> Iterator[Any]:
    connection = _psycopg._connect(postgres_url)
    connection.autocommit = True
    yield connection
    connection.close()


def interrupt_a_query(pool: Any, admin: Any) -> None:
    connection = pool.lease()
    with gevent.Timeout(0.002, False), connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(30)")
    connection.close()


def interrupt_a_long_answer(pool: Any, admin: Any) -> None:
    """The server is stuck in writing it."""
    connection = pool.lease()
    cursor = connection.cursor()
    asking = gevent.spawn(cursor.execute, "SELECT repeat('x', 1000) FROM generate_series(1, 200000)")
    gevent.sleep(0.002)
    asking.kill()
    connection.close()


def close_under_another_greenlet(pool: Any, admin: Any) -> None:
    connection = pool.lease()
    query = "SELECT repeat('x', 1000), pg_sleep(0.0001) FROM generate_series(1, 20000)"

    def ask() -> None:
        with connection.cursor() as cursor:
            cursor.execute(query)

    asking = gevent.spawn(ask)
    gevent.sleep(0.005)
    connection.close()
    with pytest.raises((psycopg2.Error, psycopg.Error), match=r"closed|cancel"):
        asking.get(timeout=5)


def leave_a_named_cursor(pool: Any, admin: Any) -> None:
    connection = pool.lease()
    cursor = connection.cursor("open")
    cursor.execute("SELECT 1")
    connection.close()


def drop_it(pool: Any, admin: Any) -> None:
    pool.lease()


def hold_the_handle(pool: Any, admin: Any) -> None:
    connection = pool.lease()
    connection.close()
    pool.lease().close()


def interrupt_the_connecting(pool: Any, admin: Any) -> None:
    pool.drain()
    connecting = gevent.spawn(pool.lease)
    gevent.sleep(0.003)
    connecting.kill()


def have_the_server_end_it(pool: Any, admin: Any) -> None:
    connection = pool.lease()
    with admin.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [connection.info.backend_pid])
    connection.close()


@pytest.mark.parametrize(
    "end",
    [
        interrupt_a_query,
        interrupt_a_long_answer,
        close_under_another_greenlet,
        leave_a_named_cursor,
        drop_it,
        hold_the_handle,
        interrupt_the_connecting,
        have_the_server_end_it,
    ],
)
def test_a_connection_is_gone_at_the_server_before_another_takes_its_place(
    pool: Any, admin: Any, end: Callable[[Any, Any], None]
) -> None:
    seen = set()
    started = time.monotonic()
    for _ in range(15):
        end(pool, admin)
        connection = pool.lease()
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [TAG])
            seen.add(cursor.fetchone())
        connection.close()
        del cursor, connection
    assert seen == {(1,)}
    assert time.monotonic() - started < 5, "a server that ends at once is not waited for"


def test_a_connection_is_followed_though_a_greenlet_reads_from_it() -> None:
    farewells = Farewells()
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)  # as those of libpq are
        farewells.follow(here.fileno())
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            there.send(b"x")
            with suppress(BlockingIOError):
                here.recv(100)
        assert len(farewells) == 1
        there.close()
        eventually(lambda: len(farewells) == 0, 2, "the follower sees the end")


def test_a_cancel_that_overtakes_its_query_is_sent_again(sql: Sql, admin: Any) -> None:
    proxy = LateProxy(sql.url)
    pool = sql.make_pool(dsn=extensions.make_dsn(proxy.dsn, application_name=f"{TAG}-late"))
    try:
        connection = pool.lease()
        with gevent.Timeout(0.01, False), connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(30)")
        connection.close()
        sleeping = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{TAG}-late'"

        def count() -> int:
            with admin.cursor() as cursor:
                cursor.execute(sleeping)
                return int(cursor.fetchone()[0])

        eventually(lambda: count() == 0, 5, "the server stops")
        pool.lease().close()
    finally:
        pool.close()
        proxy.close()


def test_a_server_that_does_not_let_go_is_not_waited_for_long(sql: Sql) -> None:
    proxy = PostgresProxy(sql.url)
    pool = sql.make_pool(dsn=proxy.dsn, timeout=10)
    try:
        connection = pool.lease()
        proxy.silent.set()
        with gevent.Timeout(0.05, False), connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        connection.close()
        del connection, cursor
        proxy.silent.clear()
        started = time.monotonic()
        pool.lease().close()
        assert time.monotonic() - started < 4
    finally:
        pool.close()
        proxy.close()
