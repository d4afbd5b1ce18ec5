"""The pools behind one face, for the contract that all of them keep."""

from __future__ import annotations

import itertools
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import gevent
import psycopg
import psycopg2
import redis
import requests
from psycopg2 import _psycopg, extensions
from urllib3 import HTTPConnectionPool
from urllib3.exceptions import EmptyPoolError

from puff_patch.config import PoolOptions
from puff_patch.pools import base, http
from puff_patch.pools.base import Discard, Pool
from puff_patch.pools.postgres import PostgresPool
from puff_patch.pools.psycopg import PsycopgPool
from puff_patch.pools.redis import RedisPool
from puff_patch.pools.servers import ServerPool
from support.servers import CountingHTTPServer


class Driver:
    """One kind of pool.

    Sessions are what the server knows: their ids are compared, not Python objects, because the promise is about
    connections of the server.
    """

    name: str
    operational_error: type[Exception] = Exception

    def __init__(self) -> None:
        self.tag = f"puff-test-{uuid.uuid4().hex[:12]}"
        self.pools: list[Any] = []

    def make(self, **options: Any) -> Any:
        """A pool with these `PoolOptions`."""
        pool = self._make(PoolOptions(**options))
        self.pools.append(pool)
        return pool

    def _make(self, options: PoolOptions) -> Any:
        raise NotImplementedError

    def core(self, pool: Any) -> Pool[Any]:
        """The `Pool` inside."""
        return pool

    def take(self, pool: Any) -> Any:
        raise NotImplementedError

    def give(self, pool: Any, connection: Any) -> None:
        raise NotImplementedError

    def session(self, connection: Any) -> int:
        """Ask the server which session this is."""
        raise NotImplementedError

    def sessions(self) -> set[int]:
        """The sessions of this test that the server has open now."""
        raise NotImplementedError

    def end_session(self, session: int) -> None:
        """Have the server end a session."""
        raise NotImplementedError

    def close(self) -> None:
        for pool in self.pools:
            self.core(pool).close()


class FakeConnection:
    """A connection to a server that is a set of numbers."""

    _numbers = itertools.count(1)

    def __init__(self, server: set[int]) -> None:
        self.number = next(self._numbers)
        self.server = server
        server.add(self.number)


class FakePool(Pool[FakeConnection]):
    """A pool whose every step lets other greenlets run."""

    def __init__(self, options: PoolOptions, server: set[int]) -> None:
        self.server = server
        super().__init__("fake", options)

    def _connect(self) -> FakeConnection:
        gevent.sleep(0)
        return FakeConnection(self.server)

    def _reset(self, connection: FakeConnection) -> None:
        gevent.sleep(0)
        if connection.number not in self.server:
            raise Discard

    def _check(self, connection: FakeConnection) -> bool:
        return connection.number in self.server

    def _close(self, connection: FakeConnection) -> None:
        self.server.discard(connection.number)

    def _abandon(self, connection: FakeConnection) -> None:
        """Nothing to do."""


class Fake(Driver):
    name = "fake"
    operational_error = base.PoolError

    def __init__(self) -> None:
        super().__init__()
        self.server: set[int] = set()
        self._slots: dict[FakeConnection, base.Slot[FakeConnection]] = {}

    def _make(self, options: PoolOptions) -> FakePool:
        return FakePool(options, self.server)

    def take(self, pool: FakePool) -> FakeConnection:
        slot = pool.checkout()
        connection, slot.connection = slot.connection, None
        assert connection is not None
        self._slots[connection] = slot
        return connection

    def give(self, pool: FakePool, connection: FakeConnection) -> None:
        pool.checkin(self._slots.pop(connection), connection)

    def session(self, connection: FakeConnection) -> int:
        gevent.sleep(0)
        assert connection.number in self.server
        return connection.number

    def sessions(self) -> set[int]:
        return set(self.server)

    def end_session(self, session: int) -> None:
        self.server.discard(session)


class Postgres(Driver):
    name = "psycopg2"
    operational_error = psycopg2.OperationalError

    def __init__(self, url: str) -> None:
        super().__init__()
        self.dsn = extensions.make_dsn(url, application_name=self.tag)
        self.admin = _psycopg._connect(url)
        self.admin.autocommit = True

    def _make(self, options: PoolOptions) -> Any:
        return PostgresPool(self.dsn, options)

    def take(self, pool: Any) -> Any:
        return pool.lease()

    def give(self, pool: Any, connection: Any) -> None:
        connection.close()

    def session(self, connection: Any) -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return int(cursor.fetchone()[0])

    def sessions(self) -> set[int]:
        with self.admin.cursor() as cursor:
            cursor.execute("SELECT pid FROM pg_stat_activity WHERE application_name = %s", [self.tag])
            return {pid for (pid,) in cursor}

    def end_session(self, session: int) -> None:
        with self.admin.cursor() as cursor:
            # Waits until the session is gone.
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [session])

    def close(self) -> None:
        super().close()
        self.admin.close()


class Psycopg(Postgres):
    name = "psycopg"
    operational_error = psycopg.OperationalError

    def _make(self, options: PoolOptions) -> PsycopgPool:
        return PsycopgPool(self.dsn, options)


class Redis(Driver):
    name = "redis"
    operational_error = redis.exceptions.ConnectionError

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.admin = redis.Redis(connection_pool=redis.ConnectionPool.from_url(url, decode_responses=True))

    def _make(self, options: PoolOptions) -> RedisPool:
        pool: RedisPool = RedisPool.from_url(
            self.url, client_name=self.tag, max_connections=options.max_size, retry=None
        )
        # The face of redis-py's pool has no place for the others.
        pool._connections.options = options
        return pool

    def core(self, pool: RedisPool) -> Pool[Any]:
        return pool._connections

    def take(self, pool: RedisPool) -> Any:
        return pool.get_connection()

    def give(self, pool: RedisPool, connection: Any) -> None:
        pool.release(connection)

    def session(self, connection: Any) -> int:
        connection.send_command("CLIENT", "ID")
        return int(connection.read_response())

    def sessions(self) -> set[int]:
        return {int(client["id"]) for client in self.admin.client_list() if client["name"] == self.tag}

    def end_session(self, session: int) -> None:
        self.admin.client_kill_filter(_id=str(session))

    def close(self) -> None:
        super().close()
        self.admin.connection_pool.disconnect()


@dataclass
class Sql:
    """One of the two drivers of PostgreSQL, for what is the same with both."""

    module: ModuleType
    pool_class: type[ServerPool[Any]]
    is_busy: Callable[[Any], bool]
    url: str
    pools: list[ServerPool[Any]] = field(default_factory=list)

    def make_pool(self, setup: str | None = None, dsn: str = "", **options: Any) -> Any:
        """A pool of one, so that the next lease is the same session, unless ``max_size`` is given."""
        pool = self.pool_class(
            dsn or self.url, PoolOptions(**{"max_size": 1, "timeout": 5, **options}), setup=setup
        )
        self.pools.append(pool)
        return pool


class Http(Driver):
    name = "http"
    operational_error = requests.exceptions.ConnectionError

    def __init__(self, server: CountingHTTPServer) -> None:
        super().__init__()
        self.server = server

    def _make(self, options: PoolOptions) -> Any:
        pool = http._bounded(HTTPConnectionPool)("127.0.0.1", self.server.server_port)
        pool._connections.options = options
        return pool

    def core(self, pool: Any) -> Pool[Any]:
        core: Pool[Any] = pool._connections
        return core

    def take(self, pool: Any) -> Any:
        try:
            connection = pool._get_conn()
        except EmptyPoolError as error:
            raise error.__cause__ or error from None
        if connection.sock is None:
            connection.timeout = 10
            connection.connect()  # as urllib3 does before the first request
        return connection

    def give(self, pool: Any, connection: Any) -> None:
        pool._put_conn(connection)

    def session(self, connection: Any) -> int:
        try:
            connection.request("GET", "/session")
            response = connection.getresponse()
            # urllib3 2 has read it already; before, this was the standard library's.
            return int(response.data if hasattr(response, "data") else response.read())
        except OSError as error:
            connection.close()  # as urllib3 does
            raise requests.exceptions.ConnectionError from error

    def sessions(self) -> set[int]:
        return set(self.server.sessions)

    def end_session(self, session: int) -> None:
        self.server.sessions[session].shutdown(socket.SHUT_RDWR)


MakeDriver = Callable[[], Driver]
