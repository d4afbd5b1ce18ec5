"""For the subprocesses of the tests: a patched Django without a project."""

from __future__ import annotations

import os
from typing import Any

POSTGRES_URL = os.environ["PUFF_DEFAULT_POSTGRES_URL"]
REDIS_URL = os.environ["PUFF_DEFAULT_REDIS_URL"]


def database(engine: str, **settings: Any) -> dict[str, Any]:
    """One entry of DATABASES: the test server is spelt out only for Django's own backend, which must have it."""
    entry: dict[str, Any] = {"ENGINE": engine, **settings}
    if engine == "django.db.backends.postgresql":
        from psycopg2.extensions import parse_dsn

        names = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
        entry = {**{names[key]: value for key, value in parse_dsn(POSTGRES_URL).items()}, **entry}
    return entry


def setup(databases: dict[str, Any] | None = None, caches: dict[str, Any] | None = None, **more: Any) -> None:
    import django
    from django.conf import settings

    for alias in databases or {}:
        os.environ.setdefault(f"PUFF_{alias.upper()}_POSTGRES_URL", POSTGRES_URL)
    chosen: dict[str, Any] = {"DATABASES": databases or {}, "USE_TZ": True, **more}
    if caches:
        chosen["CACHES"] = caches
    settings.configure(**chosen)
    django.setup()


def ask(sql: str, using: str = "default", *args: Any) -> Any:
    """The first column of the first row."""
    from django.db import connections

    with connections[using].cursor() as cursor:
        cursor.execute(sql, args)
        return cursor.fetchone()[0]


class Server:
    """What the server says of this test's connections."""

    def __init__(self, tag: str) -> None:
        import psycopg2

        self.tag = tag
        self._connection = psycopg2.connect(POSTGRES_URL, pool=False)
        self._connection.autocommit = True
        self.most = 0

    def sessions(self) -> int:
        with self._connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [self.tag])
            found: int = cursor.fetchone()[0]
        self.most = max(self.most, found)
        return found

    def end_sessions(self) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s", [self.tag]
            )

    def watch(self) -> None:
        """Run as a greenlet."""
        import gevent

        while True:
            self.sessions()
            gevent.sleep(0.005)
