"""A lease is a psycopg 3 connection in every respect, and nothing of it outlives its return.

What is the same with psycopg2 is in test_postgres_leases.py.
"""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import psycopg
import pytest
from gevent._hub_local import get_hub_if_exists
from gevent.event import Event
from gevent.monkey import get_original
from psycopg import pq, rows
from psycopg.types.json import Json, set_json_loads
from support.dirt import SQL_DIRT, Deed, assign, execute, in_autocommit, server_state
from support.waiting import eventually

from puff_patch.config import PoolOptions
from puff_patch.pools import psycopg as pools_psycopg
from puff_patch.pools.psycopg import PsycopgPool

pytestmark = [
    pytest.mark.usefixtures("cooperative_psycopg"),
    pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning"),
]

MakePool = Callable[..., PsycopgPool]


@pytest.fixture
def make_pool(postgres_url: str) -> Iterator[MakePool]:
    pools = []

    def make(setup: str | None = None, **options: Any) -> PsycopgPool:
        pool = PsycopgPool(postgres_url, PoolOptions(**{"max_size": 1, "timeout": 5, **options}), setup=setup)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def pool(make_pool: MakePool) -> PsycopgPool:
    """A pool of one: the next lease is the same session."""
    return make_pool()


def ask(connection: Any, sql: str, *args: Any) -> Any:
    """The one value that a query gives."""
    [value] = connection.execute(sql, args).fetchone()
    return value


def pid(connection: Any) -> int:
    return int(ask(connection, "SELECT pg_backend_pid()"))


def is_clean(pool: PsycopgPool) -> None:
    """Wait for the janitor."""
    eventually(lambda: pool._clean and not pool._dirty)


# --- The state of a session


def state(connection: Any) -> dict[str, Any]:
    """Everything about a session and its connection object that a program could change."""
    pgconn = connection.pgconn
    names = (
        *("autocommit", "isolation_level", "read_only", "deferrable", "row_factory", "cursor_factory", "closed"),
        *("server_cursor_factory", "prepare_threshold", "prepared_max", "broken", "_pipeline", "_tpc"),
        *("_num_transactions", "_notice_handlers", "_notify_handlers", "_notifies_backlog"),
    )
    found = {name: getattr(connection, name) for name in names}
    found = {name: value.copy() if isinstance(value, (list, deque)) else value for name, value in found.items()}
    found["own"] = sorted(vars(connection))
    found["adapters"] = ask(connection, "SELECT '{\"a\": 1}'::jsonb"), ask(connection, "SELECT 1")
    found["prepared here"] = len(connection._prepared._names), len(connection._prepared._counts)
    found["transaction"], found["pipeline"] = pgconn.transaction_status, pgconn.pipeline_status
    found["nonblocking"] = pgconn.nonblocking
    connection.rollback()
    with psycopg.Cursor(connection) as cursor:
        found.update(server_state(cursor))
    connection.rollback()
    return found


def prepare(connection: Any) -> None:
    for _ in range(3):
        connection.execute("SELECT %s::int", [1], prepare=True)
    connection.commit()


def adapt(connection: Any) -> None:
    set_json_loads(lambda text: "mine", connection)
    connection.adapters.register_loader("int4", psycopg.adapt.AdaptersMap(psycopg.adapters).get_loader(25, 0))


def handle(connection: Any) -> None:
    connection.add_notice_handler(print)
    connection.add_notify_handler(print)


def in_pipeline(connection: Any) -> Any:
    pipeline = connection.pipeline()
    pipeline.__enter__()
    connection.execute("SELECT 1")
    return pipeline


def copying(statement: str) -> Callable[[Any], Any]:
    def make_dirty(connection: Any) -> Any:
        copying = connection.cursor().copy(statement)
        copy = copying.__enter__()
        if "STDIN" in statement:
            copy.write("1\n")
        else:
            copy.read()
        return copying

    return make_dirty


def stream(connection: Any) -> Any:
    rows = connection.cursor().stream("SELECT generate_series(1, 1000)")
    next(rows)
    return rows


def hold_cursor(connection: Any) -> None:
    connection.cursor("held", withhold=True).execute("SELECT generate_series(1, 100)")
    connection.commit()


def in_transaction_block(connection: Any) -> Any:
    block = connection.transaction()
    block.__enter__()
    connection.execute("SELECT 1")
    return block


def two_phases(connection: Any) -> None:
    connection.tpc_begin("puff-test")
    connection.execute("SELECT 1")


DIRT: dict[str, Deed] = {
    **SQL_DIRT,
    "isolation level": assign(isolation_level=psycopg.IsolationLevel.SERIALIZABLE),
    "isolation level in autocommit": in_autocommit(assign(isolation_level=1)),
    "read only": assign(read_only=True),
    "read and write": assign(read_only=False),
    "deferrable": assign(isolation_level=4, read_only=True, deferrable=True),
    "row factory": assign(row_factory=rows.dict_row),
    "cursor factory": assign(cursor_factory=psycopg.ClientCursor, server_cursor_factory=psycopg.RawServerCursor),
    "prepared by the client": prepare,
    "prepare threshold": assign(prepare_threshold=0, prepared_max=1),
    "adapters": adapt,
    "handlers": handle,
    "server-side cursor": lambda connection: connection.cursor("mine").execute("SELECT 1"),
    "server-side cursor with hold": hold_cursor,
    "two-phase transaction": two_phases,
}
# In the midst of which no connection can be cleaned; each returns what must be held for it to go on.
UNFINISHED: dict[str, Callable[[Any], Any]] = {
    "pipeline": in_pipeline,
    "COPY in": copying("COPY pg_temp.t FROM STDIN"),
    "COPY out": copying("COPY (SELECT generate_series(1, 100000)) TO STDOUT"),
    "stream": stream,
    "transaction block": in_transaction_block,
}


@pytest.mark.parametrize("name", [*DIRT, *UNFINISHED])
@pytest.mark.parametrize("cleaner", ["janitor", "next"])
def test_no_state_leaks_into_the_next_lease(pool: PsycopgPool, name: str, cleaner: str) -> None:
    connection = pool.lease()
    session = pid(connection)
    connection.rollback()
    before = state(connection)
    if name == "COPY in":
        execute("CREATE TEMP TABLE t (x int)")(connection)
    held: Any = {**DIRT, **UNFINISHED}[name](connection)
    connection.close()
    del connection
    if cleaner == "janitor" and name in DIRT:
        is_clean(pool)
    connection = pool.lease()
    assert state(connection) == before
    if name in DIRT:
        assert pid(connection) == session, "a connection that could be cleaned was thrown away"
    # What goes on with the old lease does not disturb the new one.
    if held is not None:
        with contextlib.suppress(psycopg.Error):
            held.close() if name == "stream" else held.__exit__(None, None, None)
    assert ask(connection, "SELECT 42") == 42
    connection.close()


def test_what_a_lease_is_asked_for_is_had_and_not_kept(pool: PsycopgPool) -> None:
    context = psycopg.adapt.AdaptersMap(psycopg.adapters)
    connection = pool.lease()
    before = state(connection)
    connection.close()
    connection = pool.lease(
        autocommit=True,
        prepare_threshold=None,
        context=connection,
        row_factory=rows.dict_row,
        cursor_factory=psycopg.ClientCursor,
    )
    assert connection.autocommit is True
    assert connection.prepare_threshold is None
    assert type(connection.cursor()) is psycopg.ClientCursor
    assert connection.execute("SELECT %s AS a", [Json({"b": 1})]).fetchone() == {"a": {"b": 1}}
    assert connection.adapters is not context
    connection.close()
    assert state(pool.lease()) == before


@pytest.mark.parametrize("name", ["SET", "time zone", "client encoding by SQL", "deferrable"])
def test_the_setup_of_a_pool_outlives_every_reset(make_pool: MakePool, name: str) -> None:
    pool = make_pool(setup="SET TIME ZONE 'Asia/Tokyo'; SET work_mem = '2MB'")
    for _ in range(3):
        connection = pool.lease()
        assert connection.info.parameter_status("TimeZone") == "Asia/Tokyo"
        assert ask(connection, "SHOW work_mem") == "2MB"
        connection.rollback()
        assert connection.autocommit is False
        DIRT[name](connection)
        connection.close()
    assert pool.get_stats()["connections_num"] == 1


# --- Stale handles and cursors


def outcomes(connection: Any, cursor: Any) -> dict[str, Any]:
    """What comes of what can be done with a closed connection and its cursor."""

    def outcome(deed: Callable[[], Any]) -> Any:
        try:
            value = deed()
        except Exception as error:  # noqa: BLE001  that is what is compared
            return f"{type(error).__name__}: {error}"
        return value if isinstance(value, (int, str, tuple, type(None))) else type(value).__name__

    def enter(manager: Any) -> None:
        with manager:
            pass

    deeds: dict[str, Callable[[], Any]] = {
        "execute": lambda: connection.execute("SELECT 1"),
        "cursor": connection.cursor,
        "server cursor": lambda: connection.cursor("mine"),
        "commit": connection.commit,
        "rollback": connection.rollback,
        "cancel": connection.cancel,
        "cancel_safe": connection.cancel_safe,
        "fileno": connection.fileno,
        "notifies": lambda: next(connection.notifies(timeout=0.1)),
        "transaction": lambda: enter(connection.transaction()),
        "pipeline": lambda: enter(connection.pipeline()),
        "tpc_begin": lambda: connection.tpc_begin("x"),
        "pid": lambda: connection.info.backend_pid,
        "time zone": lambda: connection.info.parameter_status("TimeZone"),
        "status": lambda: connection.info.status,
        "closed": lambda: connection.closed,
        "broken": lambda: connection.broken,
        "with": lambda: enter(connection),
        "close": connection.close,
        **{
            f"{name} =": lambda name=name: setattr(connection, name, True)
            for name in ("autocommit", "isolation_level", "read_only", "deferrable", "prepare_threshold")
        },
        "cursor.fetchone": cursor.fetchone,
        "cursor.execute": lambda: cursor.execute("SELECT 1"),
        "cursor.executemany": lambda: cursor.executemany("SELECT %s", [[1], [2]]),
        "cursor.stream": lambda: next(cursor.stream("SELECT 1")),
        "cursor.copy": lambda: enter(cursor.copy("COPY (SELECT 1) TO STDOUT")),
        "cursor.close": cursor.close,
        "cursor closed": lambda: cursor.execute("SELECT 1"),
    }
    return {name: outcome(deed) for name, deed in deeds.items()}


@pytest.mark.parametrize("stage", ["returned", "being reset", "clean", "leased to another"])
@pytest.mark.parametrize("autocommit", [False, True])
def test_a_returned_handle_does_what_a_closed_connection_does(
    make_pool: MakePool, postgres_url: str, stage: str, autocommit: bool
) -> None:
    """At every stage of what becomes of its session, and without disturbing it."""
    pool = make_pool(max_size=2)
    arrived, hold = Event(), Event()
    if stage == "being reset":
        reset = pool._reset

        def slow_reset(session: Any) -> None:
            arrived.set()
            hold.wait()
            reset(session)

        pool._reset = slow_reset  # type: ignore[method-assign]
    closed, stale = psycopg.Connection.connect(postgres_url), pool.lease()
    found = []
    for connection in (closed, stale):
        connection.autocommit = autocommit
        cursor = connection.execute("SELECT generate_series(1, 3), 'x', %s", ["y"])
        connection.close()
        if connection is stale and stage == "being reset":
            arrived.wait()
        elif connection is stale and stage != "returned":
            is_clean(pool)
        other = pool.lease() if connection is stale and stage == "leased to another" else None
        found.append(outcomes(connection, cursor))
        if other is not None:
            assert ask(other, "SELECT 42") == 42
            assert other.info.transaction_status == pq.TransactionStatus.INTRANS
    assert found[1] == found[0]
    hold.set()


def test_a_server_that_has_gone_leaves_a_broken_handle(pool: PsycopgPool, postgres_url: str) -> None:
    connection = pool.lease()
    with psycopg.Connection.connect(postgres_url, autocommit=True) as admin:
        ask(admin, "SELECT pg_terminate_backend(%s, 5000)", pid(connection))
    with pytest.raises(psycopg.OperationalError):
        ask(connection, "SELECT 1")
    assert connection.broken
    connection.close()
    assert connection.broken
    assert ask(pool.lease(timeout=1), "SELECT 1") == 1


def test_old_handles_and_cursors_do_not_cost_a_session(pool: PsycopgPool) -> None:
    """Neither can reach it any more, whatever they did, and what was fetched can still be read."""
    old: list[Any] = []
    sessions = set()
    for number in range(4):
        connection = pool.lease()
        sessions.add(pid(connection))
        cursor = connection.execute(
            "SELECT %s::int, now(), cardinality(%s::text[]), %s::jsonb", [number, ["x"], Json([1])]
        )
        other = connection.execute("SELECT generate_series(1, 2)")
        closed = connection.execute("SELECT 1::numeric")
        closed.close()
        connection.close()
        is_clean(pool)
        old += [connection, cursor, other, closed]
        assert cursor.fetchone()[0] == number
        assert len(other.fetchall()) == 2
    assert len(sessions) == 1


@pytest.mark.parametrize("grip", ["pgconn", "info", "generator"])
def test_whoever_could_reach_a_session_costs_it(pool: PsycopgPool, grip: str) -> None:
    connection = pool.lease()
    session = pid(connection)
    connection.commit()
    held: Any = getattr(connection, grip, None)
    if grip == "generator":
        held = connection.notifies(timeout=0.01)
        assert list(held) == []
        held = connection.notifies()
        waiter = gevent.spawn(next, held)
        gevent.sleep(0.01)
    connection.close()
    other = pool.lease(timeout=2)
    assert pid(other) != session
    assert ask(other, "SELECT 42") == 42
    if grip == "pgconn":
        with pytest.raises(psycopg.OperationalError, match="closed"):
            held.exec_(b"SELECT 1")
    elif grip == "generator":
        with pytest.raises(psycopg.OperationalError):
            waiter.get(timeout=2)
    assert pool.get_stats()["pool_size"] == 1


# --- Being a psycopg connection


def test_with_a_lease_commits_or_rolls_back_and_returns_it(pool: PsycopgPool) -> None:
    with pool.lease(autocommit=True) as connection:
        connection.execute("CREATE UNLOGGED TABLE IF NOT EXISTS puff_with (x int)")
        connection.execute("TRUNCATE puff_with")
    with pool.lease() as connection:
        connection.execute("INSERT INTO puff_with VALUES (1)")
    assert connection.closed
    assert not connection.broken
    with contextlib.suppress(LookupError), pool.lease() as connection:
        connection.execute("INSERT INTO puff_with VALUES (2)")
        raise LookupError
    with pool.lease() as connection:
        assert connection.execute("SELECT * FROM puff_with").fetchall() == [(1,)]
        connection.execute("DROP TABLE puff_with")
    assert pool.get_stats()["connections_num"] == 1


def test_a_lease_is_a_connection(pool: PsycopgPool) -> None:
    connection = pool.lease()
    assert isinstance(connection, psycopg.Connection)
    assert repr(connection).startswith("<psycopg.Connection [IDLE]")
    assert psycopg.sql.Identifier('a"b').as_string(connection) == '"a""b"'
    assert psycopg.types.TypeInfo.fetch(connection, "uuid").oid == 2950
    connection.rollback()
    with connection.pipeline(), connection.transaction():
        cursors = [connection.execute("SELECT %s::int", [number]) for number in range(3)]
    assert [cursor.fetchone()[0] for cursor in cursors] == [0, 1, 2]
    with connection.cursor("side") as cursor:
        cursor.execute("SELECT generate_series(1, 5)")
        assert [number for (number,) in cursor] == [1, 2, 3, 4, 5]
    with connection.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE c (n int, t text)")
        with cursor.copy("COPY c FROM STDIN") as copy:
            for number in range(20_000):
                copy.write_row((number, "x" * 50))
        with cursor.copy("COPY c TO STDOUT") as copy:
            assert sum(1 for _ in copy.rows()) == 20_000
        cursor.executemany("INSERT INTO c VALUES (%s, %s)", [(number, "y") for number in range(100)])
    connection.commit()
    connection.execute("LISTEN gossip")
    connection.commit()
    connection.execute("SELECT pg_notify('gossip', 'psst')")
    connection.commit()
    assert [notice.payload for notice in connection.notifies(timeout=5, stop_after=1)] == ["psst"]
    connection.close()


def test_a_dropped_lease_comes_back(pool: PsycopgPool) -> None:
    for _ in range(5):
        connection = pool.lease(timeout=1)
        info = connection.info
        assert ask(connection, "SELECT 1") == 1
        with pytest.warns(ResourceWarning, match="still open"):
            del connection
        assert info.status == pq.ConnStatus.BAD, "its session is left open"
    assert pool.get_stats()["pool_size"] == 0


def test_a_busy_lease_that_is_dropped_in_a_plain_thread_gives_it_no_hub(pool: PsycopgPool) -> None:
    connection = pool.lease()
    connection.pgconn.send_query(b"SELECT pg_sleep(30)")
    last = [connection]
    del connection
    hubs = []

    def drop() -> None:
        last.clear()
        hubs.append(get_hub_if_exists())

    get_original("_thread", "start_new_thread")(drop, ())
    eventually(lambda: hubs)
    assert hubs == [None]
    assert ask(pool.lease(), "SELECT 1") == 1


def test_without_threads_a_connection_is_given_up_all_the_same(
    pool: PsycopgPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pools_psycopg, "_start_thread", refuse)
    connection = pool.lease()
    with gevent.Timeout(0.01, False):
        connection.execute("SELECT pg_sleep(0.2)")
    connection.close()
    assert ask(pool.lease(), "SELECT 1") == 1
    eventually(lambda: not len(pool.farewells))


def test_cancel_from_another_greenlet_leaves_the_lease_usable(pool: PsycopgPool) -> None:
    connection = pool.lease(autocommit=True)
    worker = gevent.spawn(ask, connection, "SELECT pg_sleep(30)")
    eventually(lambda: connection.pgconn.transaction_status == pq.TransactionStatus.ACTIVE)
    eventually(lambda: connection.cancel() or worker.ready())  # the first may come before the query
    with pytest.raises(psycopg.errors.QueryCanceled):
        worker.get()
    assert ask(connection, "SELECT 1") == 1


def test_a_killed_copy_is_not_handed_on(pool: PsycopgPool) -> None:
    connection = pool.lease()
    session = pid(connection)

    def work() -> None:
        with connection.cursor().copy(
            "COPY (SELECT pg_sleep(0.01) FROM generate_series(1, 3000)) TO STDOUT"
        ) as copy:
            for _ in copy:
                pass

    worker = gevent.spawn(work)
    gevent.sleep(0.05)
    worker.kill(timeout=5)
    assert worker.dead
    connection.close()
    other = pool.lease()
    assert pid(other) != session
    assert ask(other, "SELECT 42") == 42
    gc.collect()
