"""For the programs of these tests: what a process does with every pool, and the sessions it was given."""

from __future__ import annotations

import os
from typing import Any

import gevent
import psycopg2
import redis
import requests

POSTGRES_URL = os.environ["PUFF_DEFAULT_POSTGRES_URL"]
REDIS_URL = os.environ["PUFF_DEFAULT_REDIS_URL"]
HTTP_URL = os.environ.get("TEST_HTTP_URL")

client: Any = redis.Redis.from_url(REDIS_URL, max_connections=2)


def backend() -> int:
    """The PostgreSQL session of a lease."""
    connection = psycopg2.connect(POSTGRES_URL, pool={"max_size": 2})
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid(), pg_sleep(0.01)")
        found: int = cursor.fetchone()[0]
    connection.close()
    return found


def use(_: Any = None) -> tuple[int, list[int], int]:
    """Use the pools from greenlets at once: this process, its PostgreSQL sessions and a Redis session."""
    greenlets = [gevent.spawn(backend) for _ in range(4)]
    session = client.client_id()
    gevent.joinall(greenlets, raise_error=True)
    if HTTP_URL:
        assert requests.get(HTTP_URL, timeout=10).ok
    return os.getpid(), sorted({greenlet.value for greenlet in greenlets}), session


def share_nothing(*uses: Any) -> bool:
    """Whether no two processes among those that told of their `use` had the same session."""
    owners: dict[Any, int] = {}
    for process, backends, session in uses:
        for key in [*(("postgres", each) for each in backends), ("redis", session)]:
            if owners.setdefault(key, process) != process:
                return False
    return True
