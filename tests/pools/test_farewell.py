"""The server never has a connection more than the pool may have, also while one takes the place of another."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import psycopg
import psycopg2
import pytest
from psycopg2 import _psycopg, extensions
from support.servers import PostgresProxy
from support.waiting import eventually

from puff_patch.config import PoolOptions
from puff_patch.pools.postgres import PostgresPool
from puff_patch.pools.psycopg import PsycopgPool

pytestmark = [
    pytest.mark.usefixtures("cooperative_psycopg2", "cooperative_psycopg"),
    pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning"),
]

AnyPool = PostgresPool | PsycopgPool

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


@pytest.fixture(params=[PostgresPool, PsycopgPool])
def pool(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[AnyPool]:
    made: AnyPool = request.param(
        extensions.make_dsn(postgres_url, application_name=TAG), PoolOptions(max_size=1, timeout=10)
    )
    yield made
    made.close()


@pytest.fixture
def admin(postgres_url: str) -> Iterator[Any]:
    connection = _psycopg._connect(postgres_url)
    connection.autocommit = True
    yield connection
    connection.close()


def interrupt_a_query(pool: AnyPool, admin: Any) -> None:
    connection = pool.lease()
    with gevent.Timeout(0.002, False), connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(30)")
    connection.close()


def interrupt_a_long_answer(pool: AnyPool, admin: Any) -> None:
    """The server is stuck in writing it."""
    connection = pool.lease()
    cursor = connection.cursor()
    asking = gevent.spawn(cursor.execute, "SELECT repeat('x', 1000) FROM generate_series(1, 200000)")
    gevent.sleep(0.002)
    asking.kill()
    connection.close()


def leave_a_named_cursor(pool: AnyPool, admin: Any) -> None:
    connection = pool.lease()
    cursor = connection.cursor("open")
    cursor.execute("SELECT 1")
    connection.close()


def drop_it(pool: AnyPool, admin: Any) -> None:
    pool.lease()


def hold_the_handle(pool: AnyPool, admin: Any) -> None:
    connection = pool.lease()
    connection.close()
    pool.lease().close()


def interrupt_the_connecting(pool: AnyPool, admin: Any) -> None:
    pool.drain()
    connecting = gevent.spawn(pool.lease)
    gevent.sleep(0.003)
    connecting.kill()


def return_it_in_use(pool: AnyPool, admin: Any) -> None:
    connection = pool.lease()
    asking = gevent.spawn(connection.cursor().execute, "SELECT pg_sleep(30)")
    gevent.sleep(0.002)
    connection.close()
    asking.join(5)
    assert isinstance(asking.exception, (psycopg2.Error, psycopg.Error))


def have_the_server_end_it(pool: AnyPool, admin: Any) -> None:
    connection = pool.lease()
    with admin.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [connection.info.backend_pid])
    connection.close()


@pytest.mark.parametrize(
    "end",
    [
        interrupt_a_query,
        interrupt_a_long_answer,
        leave_a_named_cursor,
        drop_it,
        hold_the_handle,
        interrupt_the_connecting,
        return_it_in_use,
        have_the_server_end_it,
    ],
)
def test_a_connection_is_gone_at_the_server_before_another_takes_its_place(
    pool: AnyPool, admin: Any, end: Callable[[AnyPool, Any], None]
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


def test_a_cancel_that_overtakes_its_query_is_sent_again(postgres_url: str, admin: Any) -> None:
    proxy = LateProxy(postgres_url)
    pool = PostgresPool(extensions.make_dsn(proxy.dsn, application_name=f"{TAG}-late"), PoolOptions(max_size=1))
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


def test_a_server_that_does_not_let_go_is_not_waited_for_long(postgres_url: str) -> None:
    proxy = PostgresProxy(postgres_url)
    pool = PostgresPool(proxy.dsn, PoolOptions(max_size=1, timeout=10))
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
