"""10,000 greenlets over a pool of ten: random use, kills, time-outs, and sessions that the server ends.

    python tests/soak/pool_soak.py psycopg2|psycopg|redis|requests [--seconds 60] [--greenlets 10000] [--seed N]

No wrong answer, no session state of somebody else, never an eleventh session (seen from another process), and at
the end every place is back, nothing is at work on the server, and neither memory nor open files have grown. Exits
with 0 if all of it held. The servers are those that puff_patch is configured for.
"""

# ruff: noqa: E402 - everything else is imported patched
from __future__ import annotations

import sys

import puff_patch

OBSERVING = "--observe" in sys.argv
if not OBSERVING:
    puff_patch.patch_all()

import argparse
import asyncio
import io
import os
import random
import select
import socket
import time
from collections.abc import Callable
from typing import Any

import gevent
import psycopg
import psycopg2
import redis
import requests
from psycopg2 import extensions
from soak import Soak, Workload, is_same

from puff_patch.config import current

STATE = """
    SELECT %s::text, pg_backend_pid(), current_setting('soak.mark', true), to_regclass('pg_temp.soak') IS NULL,
           (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'),
           (SELECT count(*) FROM pg_listening_channels()),
           (SELECT count(*) FROM pg_prepared_statements WHERE from_sql),
           (SELECT count(*) FROM pg_cursors WHERE name LIKE 'soak%%'),
           current_setting('transaction_isolation'), current_setting('transaction_read_only')
"""
CLEAN = (True, 0, 0, 0, 0, "read committed", "off")


class Psycopg2(Workload):
    """``psycopg2.connect``."""

    name = "psycopg2"

    expected = (psycopg2.OperationalError, psycopg2.InterfaceError)
    # Cancels come from the pool only, and must not be late.
    forbidden = (psycopg2.errors.QueryCanceled,)
    division_by_zero: type[Exception] = psycopg2.errors.DivisionByZero
    interface_error: type[Exception] = psycopg2.InterfaceError

    def __init__(self, tag: str, max_size: int) -> None:
        super().__init__(tag, max_size)
        url = current().postgres_url()
        self.dsn = extensions.make_dsn(url, application_name=tag)
        self.observer_dsn = extensions.make_dsn(url, application_name=f"{tag}-observer")
        self.admin = psycopg2.connect(extensions.make_dsn(url, application_name=f"{tag}-admin"), pool=False)
        self.admin.autocommit = True
        with self.admin.cursor() as cursor:
            cursor.execute(
                f"CREATE TABLE \"{tag}\" AS SELECT n AS id, 'row ' || n AS name FROM generate_series(1, 1000) n"
            )
            cursor.execute(f'ALTER TABLE "{tag}" ADD PRIMARY KEY (id)')

    def connect(self) -> Any:
        """A lease."""
        return psycopg2.connect(self.dsn, pool={"max_size": self.max_size})

    def make_serializable(self, connection: Any, *, read_only: bool) -> None:
        """Its next transactions."""
        connection.set_session(isolation_level="SERIALIZABLE", readonly=read_only)

    def block(self, connection: Any) -> Any:
        """What rolls back at an error."""
        return connection

    def copy_out(self, cursor: Any, query: str) -> str:
        """What COPY says of a query."""
        file = io.StringIO()
        cursor.copy_expert(f"COPY ({query}) TO stdout", file)
        return file.getvalue()

    def uses(self) -> list[Callable[[random.Random, str], None]]:
        return [
            *[self.one_row] * 6,
            self.many_rows,
            self.transaction,
            self.leave_state,
            self.leave_state,
            self.leave_cursor,
            self.fail,
            self.time_out,
            self.sleep,
            self.drop,
            self.copy,
            self.use_after_close,
        ]

    def enter(self, connection: Any, token: str) -> int:
        """The backend's pid; the session must be as new."""
        with connection.cursor() as cursor:
            cursor.execute(STATE, [token])
            answer, session, mark, *state = cursor.fetchone()
        is_same(answer, token, "the row")
        is_same((mark or "", *state), ("", *CLEAN), "the session's state")
        return int(session)

    def ask(self, connection: Any, token: str) -> None:
        """One round trip that must bring this token, and a row that must be the right one."""
        number = random.randrange(1, 1001)
        with connection.cursor() as cursor:
            cursor.execute(f'SELECT %s::text, name FROM "{self.tag}" WHERE id = %s', [token, number])
            is_same(cursor.fetchall(), [(token, f"row {number}")], "the row")

    def one_row(self, rng: random.Random, token: str) -> None:
        connection = self.connect()
        try:
            with self.alone(self.enter(connection, token), token):
                for _ in range(rng.randrange(3)):
                    self.ask(connection, token)
        finally:
            connection.close()

    def many_rows(self, rng: random.Random, token: str) -> None:
        count = rng.randrange(1000)
        connection = self.connect()
        try:
            with self.alone(self.enter(connection, token), token), connection.cursor() as cursor:
                cursor.execute("SELECT %s || '/' || n FROM generate_series(1, %s) n", [token, count])
                is_same(cursor.fetchall(), [(f"{token}/{n + 1}",) for n in range(count)], "the rows")
        finally:
            connection.close()

    def transaction(self, rng: random.Random, token: str) -> None:
        """Rolled back, committed, or left as it is."""
        connection = self.connect()
        try:
            with self.alone(self.enter(connection, token), token), connection.cursor() as cursor:
                # A lock that is held until the transaction's end.
                cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [rng.randrange(1 << 40)])
                cursor.execute("CREATE TEMPORARY TABLE soak ON COMMIT DROP AS SELECT %s::text AS token", [token])
                cursor.execute("SELECT token FROM pg_temp.soak")
                is_same(cursor.fetchall(), [(token,)], "the row")
                {0: connection.rollback, 1: connection.commit, 2: lambda: None}[rng.randrange(3)]()
        finally:
            connection.close()

    def leave_state(self, rng: random.Random, token: str) -> None:
        """All that a session may have, and must not keep."""
        connection = self.connect()
        try:
            with self.alone(self.enter(connection, token), token):
                connection.rollback()
                if rng.random() < 0.5:
                    self.make_serializable(connection, read_only=rng.random() < 0.5)
                connection.autocommit = True
                with connection.cursor() as cursor:
                    cursor.execute("SET soak.mark = 'theirs'")
                    cursor.execute("SELECT pg_try_advisory_lock(%s)", [rng.randrange(1 << 40)])
                    cursor.execute("LISTEN soak")
                    cursor.execute("PREPARE soak AS SELECT 1")
                    cursor.execute("SET default_transaction_read_only = off")
                    cursor.execute("CREATE TEMPORARY TABLE soak (n int)")
                    if rng.random() < 0.3:
                        cursor.execute("BEGIN")
                        cursor.execute("DECLARE soak_cursor CURSOR FOR SELECT generate_series(1, 1000)")
        finally:
            connection.close()

    def leave_cursor(self, rng: random.Random, token: str) -> None:
        """A server-side cursor that is read in part."""
        connection = self.connect()
        try:
            with self.alone(self.enter(connection, token), token):
                cursor = connection.cursor("soak_named")
                cursor.itersize = 10
                cursor.execute("SELECT %s || '/' || n FROM generate_series(1, 1000) n", [token])
                is_same(next(iter(cursor)), (f"{token}/1",), "the row")
                if rng.random() < 0.5:
                    cursor.close()
        finally:
            connection.close()

    def fail(self, rng: random.Random, token: str) -> None:
        connection = self.connect()
        try:
            with self.alone(self.enter(connection, token), token):
                try:
                    with self.block(connection), connection.cursor() as cursor:
                        cursor.execute("SELECT 1/0")
                except self.division_by_zero:
                    self.ask(connection, token)
        finally:
            connection.close()

    def time_out(self, rng: random.Random, token: str) -> None:
        """Give up in the queue, or in the midst of a query."""
        with gevent.Timeout(rng.choice([0.005, 0.05, 5]), False):
            connection = self.connect()
            try:
                with self.alone(self.enter(connection, token), token):
                    with gevent.Timeout(rng.random() * 0.02, False), connection.cursor() as cursor:
                        cursor.execute("SELECT pg_sleep(10)")
            finally:
                connection.close()

    def sleep(self, rng: random.Random, token: str) -> None:
        connection = self.connect()
        try:
            with self.alone(self.enter(connection, token), token), connection.cursor() as cursor:
                cursor.execute("SELECT %s::text, pg_sleep(%s)", [token, rng.random() * 0.02])
                is_same(cursor.fetchone()[0], token, "the row")
        finally:
            connection.close()

    def drop(self, rng: random.Random, token: str) -> None:
        """Not closed, only forgotten."""
        connection = self.connect()
        with self.alone(self.enter(connection, token), token):
            self.ask(connection, token)

    def copy(self, rng: random.Random, token: str) -> None:
        """With psycopg2 it runs in a native thread."""
        count = rng.randrange(1000)
        connection = self.connect()
        try:
            with self.alone(self.enter(connection, token), token), connection.cursor() as cursor:
                text = self.copy_out(cursor, f"SELECT '{token}/' || n FROM generate_series(1, {count}) n")
                is_same(text.split(), [f"{token}/{n + 1}" for n in range(count)], "the rows")
        finally:
            connection.close()

    def use_after_close(self, rng: random.Random, token: str) -> None:
        connection = self.connect()
        try:
            cursor = connection.cursor()
            with self.alone(self.enter(connection, token), token):
                self.ask(connection, token)
        finally:
            connection.close()
        for reach in (lambda: cursor.execute("SELECT 1"), connection.cursor, connection.commit):
            gevent.sleep(0)
            try:
                reach()
            except self.interface_error:
                continue
            raise AssertionError("a returned handle still works")

    def end_a_session(self, rng: random.Random) -> None:
        with self.admin.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s "
                "ORDER BY random() LIMIT 1",
                [self.tag],
            )

    def observer(self) -> list[str]:
        return [sys.executable, __file__, self.name, "--observe", self.observer_dsn, self.tag]

    def at_rest(self) -> str:
        with self.admin.cursor() as cursor:
            cursor.execute(
                "SELECT pid, state, left(query, 60), (SELECT count(*) FROM pg_locks l WHERE l.pid = a.pid) "
                "FROM pg_stat_activity a WHERE application_name = %s",
                [self.tag],
            )
            sessions = cursor.fetchall()
        busy = [session for session in sessions if session[1] != "idle" or session[3]]
        if len(sessions) > self.max_size or busy:
            return f"the server has {sessions}"
        return ""

    def take(self) -> Any:
        return self.connect()

    def give(self, lease: Any) -> None:
        lease.close()

    def stats(self) -> dict[str, int]:
        found = [stats for name, stats in puff_patch.stats().items() if name.startswith("postgres://")]
        return found[0] if found else {}

    def close(self) -> None:
        puff_patch.close_pools()
        with self.admin.cursor() as cursor:
            cursor.execute(f'DROP TABLE "{self.tag}"')
        self.admin.close()


class Psycopg(Psycopg2):
    """``psycopg.connect``."""

    name = "psycopg"
    expected = (psycopg.OperationalError,)
    forbidden = (psycopg.errors.QueryCanceled,)
    division_by_zero = psycopg.errors.DivisionByZero
    interface_error = psycopg.OperationalError

    def connect(self) -> Any:
        return psycopg.connect(self.dsn, pool={"max_size": self.max_size})

    def uses(self) -> list[Callable[[random.Random, str], None]]:
        return [*super().uses(), self.pipeline, self.read_a_stream, self.hang_up_on_another]

    def make_serializable(self, connection: Any, *, read_only: bool) -> None:
        connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        connection.read_only = read_only

    def block(self, connection: Any) -> Any:
        return connection.transaction()

    def copy_out(self, cursor: Any, query: str) -> str:
        with cursor.copy(f"COPY ({query}) TO stdout") as copy:
            return b"".join(copy).decode()

    def pipeline(self, rng: random.Random, token: str) -> None:
        connection = self.connect()
        try:
            with self.alone(self.enter(connection, token), token), connection.pipeline():
                cursors = [connection.execute("SELECT %s::text", [f"{token}/{n}"]) for n in range(5)]
                found = [cursor.fetchone()[0] for cursor in cursors[: rng.randrange(6)]]
                is_same(found, [f"{token}/{n}" for n in range(len(found))], "the rows")
        finally:
            connection.close()

    def read_a_stream(self, rng: random.Random, token: str) -> None:
        """Row by row, and not to its end."""
        connection = self.connect()
        try:
            with self.alone(self.enter(connection, token), token), connection.cursor() as cursor:
                rows = cursor.stream("SELECT %s::text || '/' || n FROM generate_series(1, 10000) n", [token])
                for number in range(1, rng.randrange(2, 20)):
                    is_same(next(rows), (f"{token}/{number}",), "the row")
                rows.close()
        finally:
            connection.close()

    def hang_up_on_another(self, rng: random.Random, token: str) -> None:
        """Close what another greenlet waits in."""
        connection = self.connect()
        try:
            with self.alone(self.enter(connection, token), token):
                asking = gevent.spawn(self.expect_the_end, connection, token, rng.randrange(100_000))
                gevent.sleep(rng.random() * 0.01)
        finally:
            connection.close()
        asking.get(timeout=30)

    def expect_the_end(self, connection: Any, token: str, count: int) -> None:
        """Ask for rows: all of them are right, or an error tells that the connection was closed."""
        try:
            cursor = connection.execute(
                "SELECT %s::text || '/' || n FROM generate_series(1, %s) n", [token, count]
            )
            rows = cursor.fetchall()
        except psycopg.OperationalError:  # also that its query was cancelled
            return
        is_same(rows, [(f"{token}/{n + 1}",) for n in range(count)], "the rows")


def observe_postgres(dsn: str, tag: str) -> None:
    """Count sessions, from a process that shares nothing with the one observed.

    The server looks at one session after the other, so one that ended meanwhile may be counted beside the one that
    took its place.  Those that began before the look are all there at its first moment.
    """
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    cursor = connection.cursor()
    print("watching", flush=True)
    most = 0
    while not select.select([sys.stdin], [], [], 0.002)[0]:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE application_name = %s AND backend_start < statement_timestamp()",
            [tag],
        )
        most = max(most, cursor.fetchone()[0])
    print(most)


class Redis(Workload):
    """A client of redis-py and the pool it makes."""

    expected = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, redis.exceptions.WatchError)

    def __init__(self, tag: str, max_size: int) -> None:
        # Subscriptions have connections beside those of commands.
        os.environ["PUFF_REDIS_BLOCKING_POOL_MAX_SIZE"] = str(max_size)
        super().__init__(tag, max_size, sessions=2 * max_size)
        self.url = current().redis_url()
        self.admin = redis.Redis(
            connection_pool=redis.ConnectionPool.from_url(
                self.url, decode_responses=True, client_name="soak-admin"
            )
        )
        self.client = redis.Redis.from_url(
            self.url, client_name=tag, max_connections=max_size, decode_responses=True, retry=None
        )
        self.script = self.client.register_script("return {KEYS[1], ARGV[1]}")

    def uses(self) -> list[Callable[[random.Random, str], None]]:
        return [
            *[self.set_and_get] * 5,
            self.pipeline,
            self.watch,
            self.lua,
            self.many_values,
            self.fail,
            self.time_out,
            self.subscribe,
            self.drop,
        ]

    def set_and_get(self, rng: random.Random, token: str) -> None:
        key = f"{self.tag}:{token}"
        is_same(self.client.set(key, token, ex=60), True, "SET")
        is_same(self.client.get(key), token, "GET")
        is_same(self.client.echo(token), token, "ECHO")
        is_same(self.client.delete(key), 1, "DEL")

    def pipeline(self, rng: random.Random, token: str) -> None:
        count = rng.randrange(50)
        with self.client.pipeline(transaction=rng.random() < 0.5) as pipe:
            for number in range(count):
                pipe.echo(f"{token}/{number}")
            is_same(pipe.execute(), [f"{token}/{number}" for number in range(count)], "the answers")

    def watch(self, rng: random.Random, token: str) -> None:
        """A connection is held over several commands."""
        key = f"{self.tag}:{token}"
        with self.client.pipeline() as pipe:
            pipe.watch(key)
            with self.alone(pipe.client_id(), token):
                is_same(pipe.get(key), None, "GET")
                gevent.sleep(rng.random() * 0.005)
                pipe.multi()
                pipe.set(key, token, ex=60)
                pipe.getdel(key)
                if rng.random() < 0.8:
                    is_same(pipe.execute(), [True, token], "the transaction")

    def lua(self, rng: random.Random, token: str) -> None:
        is_same(
            self.script(keys=[f"{self.tag}:{token}"], args=[token]), [f"{self.tag}:{token}", token], "the script"
        )

    def many_values(self, rng: random.Random, token: str) -> None:
        size = rng.randrange(100_000)
        is_same(self.client.echo(token * (size // len(token))), token * (size // len(token)), "ECHO")

    def fail(self, rng: random.Random, token: str) -> None:
        try:
            self.client.execute_command("NONSENSE")
        except redis.exceptions.ResponseError:
            is_same(self.client.echo(token), token, "ECHO")

    def time_out(self, rng: random.Random, token: str) -> None:
        """Give up in the queue, or while the server thinks."""
        with gevent.Timeout(rng.choice([0.005, 0.05, 5]), False):
            self.client.eval("for i = 1, 20000 do redis.sha1hex('x') end return 1", 0)

    def subscribe(self, rng: random.Random, token: str) -> None:
        with self.client.pubsub() as pubsub:
            pubsub.subscribe(f"{self.tag}:{token}")
            message = pubsub.get_message(timeout=1)
            if message is not None:
                is_same(message["channel"], f"{self.tag}:{token}", "the channel")

    def drop(self, rng: random.Random, token: str) -> None:
        """A pipeline that nobody resets."""
        pipe = self.client.pipeline()
        pipe.watch(f"{self.tag}:{token}")

    def end_a_session(self, rng: random.Random) -> None:
        sessions = [client["id"] for client in self.admin.client_list() if client["name"] == self.tag]
        if sessions:
            self.admin.client_kill_filter(_id=rng.choice(sessions))

    def observer(self) -> list[str]:
        return [sys.executable, __file__, "redis", "--observe", self.url, self.tag]

    def at_rest(self) -> str:
        sessions = [client for client in self.admin.client_list() if client["name"] == self.tag]
        busy = [
            client for client in sessions if set(client["flags"]) & set("xbP") or client.get("watch", "0") != "0"
        ]
        return f"the server has {busy or sessions}" if len(sessions) > self.most_sessions or busy else ""

    def take(self) -> Any:
        return self.client.connection_pool.get_connection()

    def give(self, lease: Any) -> None:
        self.client.connection_pool.release(lease)

    def stats(self) -> dict[str, int]:
        found: dict[str, int] = self.client.connection_pool.get_stats()
        return found

    def close(self) -> None:
        self.client.close()
        self.admin.close()
        self.admin.connection_pool.disconnect()


def observe_redis(url: str, tag: str) -> None:
    """As `observe_postgres`."""
    client = redis.Redis.from_url(url, decode_responses=True)
    print("watching", flush=True)
    most = 0
    while not select.select([sys.stdin], [], [], 0.002)[0]:
        most = max(most, sum(session["name"] == tag for session in client.client_list()))
    print(most)


class Requests(Workload):
    """``requests.get`` on the shared connections, to a server that hangs up whenever it likes."""

    expected = (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError)

    def __init__(self, tag: str, max_size: int) -> None:
        os.environ["PUFF_HTTP_POOL_MAX_SIZE"] = str(max_size)
        super().__init__(tag, max_size)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.session = requests.Session()

    def uses(self) -> list[Callable[[random.Random, str], None]]:
        return [
            *[self.get] * 5,
            self.slow,
            self.big,
            self.shared_session,
            self.hung_up_after,
            self.hung_up_within,
            self.time_out,
            self.read_in_part,
            self.drop,
        ]

    def get(self, rng: random.Random, token: str) -> None:
        is_same(requests.get(f"{self.url}/say/{token}", timeout=60).text, token, "the page")

    def slow(self, rng: random.Random, token: str) -> None:
        is_same(requests.get(f"{self.url}/nap/{token}", timeout=60).text, token, "the page")

    def big(self, rng: random.Random, token: str) -> None:
        is_same(requests.get(f"{self.url}/big/{token}", timeout=60).text, token * 10_000, "the page")

    def shared_session(self, rng: random.Random, token: str) -> None:
        is_same(self.session.get(f"{self.url}/say/{token}", timeout=60).text, token, "the page")

    def hung_up_after(self, rng: random.Random, token: str) -> None:
        is_same(requests.get(f"{self.url}/last/{token}", timeout=60).text, token, "the page")

    def hung_up_within(self, rng: random.Random, token: str) -> None:
        text = requests.get(f"{self.url}/half/{token}", timeout=60).text
        raise AssertionError(f"half a page passed for a whole one: {text!r}")

    def time_out(self, rng: random.Random, token: str) -> None:
        with gevent.Timeout(rng.choice([0.005, 0.05, 5]), False):
            requests.get(f"{self.url}/nap/{token}", timeout=60)

    def read_in_part(self, rng: random.Random, token: str) -> None:
        with requests.get(f"{self.url}/big/{token}", timeout=60, stream=True) as response:
            is_same(response.raw.read(len(token)), token.encode(), "the page")

    def drop(self, rng: random.Random, token: str) -> None:
        response = requests.get(f"{self.url}/big/{token}", timeout=60, stream=True)
        is_same(response.raw.read(len(token)), token.encode(), "the page")

    def end_a_session(self, rng: random.Random) -> None:
        """Nothing more: the server hangs up by itself, on one idle connection in a hundred."""

    def observer(self) -> list[str]:
        return [sys.executable, __file__, "requests", "--observe", str(self.port), self.tag]

    def at_rest(self) -> str:
        return ""

    def take(self) -> Any:
        return requests.get(f"{self.url}/big/lease", timeout=60, stream=True)

    def give(self, lease: Any) -> None:
        lease.close()

    def stats(self) -> dict[str, int]:
        return puff_patch.stats().get(self.url, {})

    def close(self) -> None:
        puff_patch.close_pools()


class HttpServer:
    """Speaks just enough HTTP, and knows how many connections its client has open.

    A connection that the client has closed is none, whatever is still to be read from it.  The kernel knows.
    """

    ESTABLISHED = 1  # in the first byte of Linux' struct tcp_info

    def __init__(self) -> None:
        self.most = 0
        self.rng = random.Random(0)
        self.open: set[Any] = set()

    async def serve(self, port: int) -> None:
        server = await asyncio.start_server(self.talk, "127.0.0.1", port, backlog=1024)
        print("watching", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        print(self.most, flush=True)
        server.close()
        os._exit(0)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(writer)
        self.most = max(self.most, sum(map(self.is_open, self.open)))
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                _, what, token = head.split(b" ", 2)[1].split(b"/")
                if what == b"nap":
                    await asyncio.sleep(self.rng.random() * 0.02)
                body = token * 10_000 if what == b"big" else token
                last = b"Connection: close\r\n" if what == b"last" and self.rng.random() < 0.5 else b""
                writer.write(b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n" % (last, len(body)))
                if what == b"half":
                    writer.write(body[: len(body) // 2])
                    break
                writer.write(body)
                await writer.drain()
                if what == b"last" or self.rng.random() < 0.01:
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has left
        finally:
            self.open.discard(writer)
            writer.close()

    def is_open(self, writer: asyncio.StreamWriter) -> bool:
        try:
            state = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        except OSError:  # closed here
            return False
        return bool(state[0] == self.ESTABLISHED)


def observe_requests(port: str, tag: str) -> None:
    """As `observe_postgres`, and be the server."""
    asyncio.run(HttpServer().serve(int(port)))


WORKLOADS: dict[str, type[Workload]] = {
    "psycopg2": Psycopg2,
    "psycopg": Psycopg,
    "redis": Redis,
    "requests": Requests,
}
OBSERVERS = {
    "psycopg2": observe_postgres,
    "psycopg": observe_postgres,
    "redis": observe_redis,
    "requests": observe_requests,
}


def main() -> int:
    """Run the soak of one driver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("driver", choices=WORKLOADS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--greenlets", type=int, default=10_000)
    parser.add_argument("--max-size", type=int, default=10)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--observe", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.observe:
        OBSERVERS[options.driver](*options.observe)
        return 0
    workload = WORKLOADS[options.driver](f"soak-{os.getpid()}", options.max_size)
    return Soak(workload, greenlets=options.greenlets, seconds=options.seconds, seed=options.seed).run()


if __name__ == "__main__":
    sys.exit(main())
