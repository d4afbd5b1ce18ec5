"""The drivers under contract."""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import pytest
from psycopg2 import extensions
from support.drivers import Driver, Fake, Http, Postgres, Redis

from puff_patch.patches.psycopg2 import wait_callback


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


@pytest.fixture(params=["fake", "psycopg2", "redis", "http"])
def driver(request: pytest.FixtureRequest, cooperative_psycopg2: None) -> Iterator[Driver]:
    """Each of the drivers in turn."""
    made: Driver
    if request.param == "fake":
        made = Fake()
    elif request.param == "psycopg2":
        made = Postgres(request.getfixturevalue("postgres_url"))
    elif request.param == "http":
        made = Http(request.getfixturevalue("http_server"))
    else:
        made = Redis(request.getfixturevalue("redis_url"))
    yield made
    made.close()
