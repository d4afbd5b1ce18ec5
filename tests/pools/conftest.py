"""The drivers under contract."""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import psycopg
import psycopg2
import pytest
from psycopg2 import extensions
from support.drivers import Driver, Fake, Http, Postgres, Psycopg, Redis, Sql

from puff_patch.patches.base import Ledger
from puff_patch.patches.psycopg import make_cooperative
from puff_patch.patches.psycopg2 import wait_callback
from puff_patch.pools import libpq
from puff_patch.pools.postgres import PostgresPool
from puff_patch.pools.psycopg import PsycopgPool


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """No test of a pool may hang."""
    with gevent.Timeout(30):
        yield


@pytest.fixture
def cooperative_psycopg2() -> Iterator[None]:
    """psycopg2 waits in gevent, as it does after patch_all()."""
    extensions.set_wait_callback(wait_callback)
    yield
    extensions.set_wait_callback(None)


@pytest.fixture
def cooperative_psycopg() -> Iterator[None]:
    """psycopg 3 waits in gevent, as it does after patch_all()."""
    ledger = Ledger()
    make_cooperative(ledger)
    yield
    ledger.restore()


@pytest.fixture(params=["psycopg2", "psycopg"])
def sql(
    request: pytest.FixtureRequest, postgres_url: str, cooperative_psycopg2: None, cooperative_psycopg: None
) -> Iterator[Sql]:
    """Each of the drivers of PostgreSQL in turn."""
    if request.param == "psycopg2":
        made = Sql(psycopg2, PostgresPool, libpq.is_busy, postgres_url)
    else:
        active = psycopg.pq.TransactionStatus.ACTIVE
        made = Sql(
            psycopg,
            PsycopgPool,
            lambda connection: bool(connection.pgconn.transaction_status == active),
            postgres_url,
        )
    yield made
    for pool in made.pools:
        pool.close()


@pytest.fixture(params=["fake", "psycopg2", "psycopg", "redis", "http"])
def driver(
    request: pytest.FixtureRequest, cooperative_psycopg2: None, cooperative_psycopg: None
) -> Iterator[Driver]:
    """Each of the drivers in turn."""
    made: Driver
    if request.param == "fake":
        made = Fake()
    elif request.param == "psycopg2":
        made = Postgres(request.getfixturevalue("postgres_url"))
    elif request.param == "psycopg":
        made = Psycopg(request.getfixturevalue("postgres_url"))
    elif request.param == "http":
        made = Http(request.getfixturevalue("http_server"))
    else:
        made = Redis(request.getfixturevalue("redis_url"))
    yield made
    made.close()
