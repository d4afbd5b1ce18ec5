"""connect, global_postgres and named_client, for greenlets and event loops alike."""

from __future__ import annotations

import pytest
from support.process import RAISES, TICKER, run_python

from puff_patch.postgres import _numbered

HEAD = (
    RAISES
    + """
import puff_patch
puff_patch.patch_all()
import asyncio, gevent
from puff_patch import join_all, postgres, spawn
from puff_patch.postgres import connect, global_postgres, named_client
from puff_patch.runtime import aio
global_postgres.execute("DROP TABLE IF EXISTS api_t")
global_postgres.execute("CREATE TABLE api_t (n int, t text)")
"""
)


def test_greenlets(services) -> None:
    run_python(
        HEAD
        + TICKER
        + """
assert list(puff_patch.stats()), "it is not pooled"
connection = connect()
cursor = connection.cursor()
assert cursor.rowcount == -1 and cursor.description is None and not connection.closed
assert cursor.execute("INSERT INTO api_t VALUES (%s, %s), (2, 'b')", [1, "a"]) == 2
assert cursor.executemany("INSERT INTO api_t VALUES ($1, $2)", [(3, "c"), (4, "d")]) == 2
assert cursor.executemany("DELETE FROM api_t WHERE n = %(n)s", [{"n": 8}, {"n": 9}]) == 0
assert global_postgres.query("SELECT count(*) FROM api_t") == [(0,)]
connection.commit()
cursor.execute("SELECT n, t FROM api_t ORDER BY n")
assert cursor.rowcount == 4 and [column.name for column in cursor.description] == ["n", "t"]
assert cursor.fetchone() == (1, "a") and cursor.fetchmany() == [(2, "b")]
assert cursor.fetchmany(1) == [(3, "c")] and cursor.fetchall() == [(4, "d")] and cursor.fetchone() is None
cursor.execute("SELECT $1::text || ' $2 %', $2::int", ["x", 5])
assert list(cursor) == [("x $2 %", 5)]
assert cursor.mogrify("%s", [1]) == b"1" and cursor.query.startswith(b"SELECT 'x'")
cursor.execute("DELETE FROM api_t")
connection.rollback()
pid = connection.get_backend_pid()
connection.close()
assert connection.closed
late = connection.cursor()
for closed in (connection.commit, connection.rollback, cursor.fetchone, lambda: late.execute("SELECT 1")):
    assert "already closed" in str(raises(postgres.InterfaceError, closed))
del cursor, connection, late

# A context manager ends the transaction and gives the connection back.
with connect() as connection, connection.cursor() as cursor:
    cursor.execute("DELETE FROM api_t WHERE n = 4")
def fail():
    with connect() as connection:
        connection.cursor().execute("DELETE FROM api_t")
        raise LookupError
raises(LookupError, fail)
assert global_postgres.query("SELECT n FROM api_t ORDER BY n") == [(1,), (2,), (3,)]
assert global_postgres.execute("UPDATE api_t SET t = %(t)s WHERE n = 1", {"t": "z"}) == 1
with connect(autocommit=True) as connection:
    assert connection.autocommit
    connection.cursor().execute("DELETE FROM api_t WHERE n = 3")
    assert global_postgres.query("SELECT count(*) FROM api_t") == [(2,)]
    connection.set_autocommit(False)
    with connection.cursor("named") as named:
        named.execute("SELECT generate_series(1, 5)")
        assert named.fetchmany(2) == [(1,), (2,)] and named.fetchall() == [(3,), (4,), (5,)]

# DB-API
assert (postgres.apilevel, postgres.paramstyle) == ("2.0", "pyformat")
assert issubclass(postgres.IntegrityError, postgres.Error) and connect().Error is postgres.Error
error = raises(postgres.ProgrammingError, global_postgres.query, "SELECT * FROM api_missing")
assert error.pgcode == "42P01"

with Ticker() as ticker:
    join_all([spawn(global_postgres.query, "SELECT pg_sleep(0.05)") for _ in range(20)], timeout=20)
assert ticker.count >= 10, ticker.count
assert max(pool["pool_size"] for pool in puff_patch.stats().values()) <= 5
with gevent.Timeout(0.05, False):
    global_postgres.query("SELECT pg_sleep(10)")
    raise AssertionError
assert named_client("audit").query("SHOW application_name") == [("audit",)]
assert connect(dbname="audit").cursor().execute("SELECT 1") == 1
assert connect(os.environ["PUFF_AUDIT_POSTGRES_URL"]).get_parameter_status("application_name") == "audit"

# What GraphQL lends: it is not ours to close.
import psycopg2
lent = psycopg2.connect(os.environ["PUFF_DEFAULT_POSTGRES_URL"])
postgres.set_connection_override(lent)
with connect() as connection:
    connection.cursor().execute("CREATE TEMP TABLE api_lent ()")
assert connect().get_backend_pid() == lent.get_backend_pid() and not lent.closed
postgres.set_connection_override(None)
assert connect().get_backend_pid() != lent.get_backend_pid()
""",
        env={
            **services.env(),
            "PUFF_POSTGRES_POOL_MAX_SIZE": "5",
            "PUFF_AUDIT_POSTGRES_URL": f"{services.postgres}{'&' if '?' in services.postgres else '?'}"
            "application_name=audit",
        },
    )


def test_event_loops(services) -> None:
    run_python(
        HEAD
        + """
async def main():
    connection = connect()
    cursor = connection.cursor()
    assert await cursor.execute("INSERT INTO api_t VALUES (%s, 'a'), (2, 'b')", [1]) == 2
    await connection.commit()
    await cursor.execute("SELECT n FROM api_t ORDER BY n")
    assert cursor.rowcount == 2
    assert await cursor.fetchone() == (1,) and await cursor.fetchmany(5) == [(2,)]
    assert await cursor.fetchall() == []
    await cursor.close()
    await connection.close()
    async with connect() as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT n FROM api_t ORDER BY n")
        assert [row async for row in cursor] == [(1,), (2,)]
        await cursor.execute("DELETE FROM api_t")
    try:
        async with connect() as connection:
            await connection.cursor().execute("INSERT INTO api_t VALUES (9, 'x')")
            raise LookupError
    except LookupError:
        pass
    assert await global_postgres.query("SELECT * FROM api_t") == []
    query = global_postgres.query
    found = await asyncio.gather(*(query("SELECT $1::int, pg_sleep(0.01)", [n]) for n in range(50)))
    assert [rows[0][0] for rows in found] == list(range(50))
    try:
        await asyncio.wait_for(global_postgres.query("SELECT pg_sleep(10)"), 0.05)
        raise AssertionError
    except asyncio.TimeoutError:
        pass
    try:
        await global_postgres.query("SELECT * FROM api_missing")
        raise AssertionError
    except postgres.ProgrammingError:
        pass
    assert "async with" in str(raises(TypeError, connect().__enter__))
asyncio.run(main())
aio.run_coroutine(main(), timeout=20)
# Every lease came back: those of what was cancelled, too.
for _ in range(200):
    if all(pool["requests_waiting"] == 0 and pool["pool_available"] == pool["pool_size"]
           for pool in puff_patch.stats().values()):
        break
    gevent.sleep(0.02)
else:
    raise AssertionError(puff_patch.stats())
""",
        env={**services.env(), "PUFF_POSTGRES_POOL_MAX_SIZE": "5"},
    )


@pytest.mark.parametrize(
    ("query", "translated"),
    [
        ("SELECT $1, $2", "SELECT %(p1)s, %(p2)s"),
        ("SELECT $2 || '$1 %' || \"$1\", 5 % $1", "SELECT %(p2)s || '$1 %%' || \"$1\", 5 %% %(p1)s"),
        ("SELECT $1::int[] -- $2\n /* $2 */, E'\\'$1'", "SELECT %(p1)s::int[] -- $2\n /* $2 */, E'\\'$1'"),
        ("SELECT $$ $1 $$, $a$ '$1 $a$, $1", "SELECT $$ $1 $$, $a$ '$1 $a$, %(p1)s"),
        ("SELECT a$1 FROM t WHERE b = '$1'", None),
        ("SELECT %s, '$1'", None),
    ],
)
def test_numbered_parameters(query: str, translated: str | None) -> None:
    if translated is None:
        assert _numbered(query, [7, 8]) == (query, [7, 8])
    else:
        assert _numbered(query, [7, 8]) == (translated, {"p1": 7, "p2": 8})
    assert _numbered(query, None) == (query, None)
