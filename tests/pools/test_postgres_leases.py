"""A lease is a psycopg2 connection in every respect, and nothing of it outlives its return.

What takes the ``sql`` fixture is the same with psycopg 3, whose own tests are in test_psycopg_leases.py.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gevent
import psycopg2
import psycopg2.extras
import pytest
from gevent.event import Event
from psycopg2 import _psycopg, extensions
from support.dirt import SQL_DIRT, assign, in_autocommit, server_state
from support.drivers import Sql
from support.servers import PostgresProxy
from support.waiting import eventually

from puff_patch.config import PoolOptions
from puff_patch.pools import base
from puff_patch.pools.postgres import PostgresPool

pytestmark = [
    pytest.mark.usefixtures("cooperative_psycopg2"),
    # What psycopg 3 says of any connection.
    pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning"),
]

MakePool = Callable[..., PostgresPool]


@pytest.fixture
def make_pool(postgres_url: str) -> Iterator[MakePool]:
    pools = []

    def make(setup: str | None = None, **options: Any) -> PostgresPool:
        pool = PostgresPool(postgres_url, PoolOptions(**{"max_size": 1, "timeout": 5, **options}), setup=setup)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def pool(make_pool: MakePool) -> PostgresPool:
    """A pool of one: the next lease is the same session."""
    return make_pool()


def ask(connection: Any, sql: str, *args: Any) -> Any:
    """The one value that a query gives."""
    with connection.cursor() as cursor:
        cursor.execute(sql, args)
        return next(iter(cursor.fetchone()))


def pid(connection: Any) -> int:
    return int(ask(connection, "SELECT pg_backend_pid()"))


def is_clean(pool: PostgresPool) -> None:
    """Wait for the janitor."""
    eventually(lambda: pool._clean and not pool._dirty)


# --- The state of a session


def state(connection: Any) -> dict[str, Any]:
    """Everything about a session and its connection object that a program could change."""
    attributes = {
        name: getattr(connection, name)
        for name in (
            "autocommit",
            "isolation_level",
            "readonly",
            "deferrable",
            "encoding",
            "cursor_factory",
            "notices",
            "notifies",
            "string_types",
            "binary_types",
            "status",
            "closed",
        )
    }
    attributes = {
        name: value.copy() if isinstance(value, (list, dict)) else value for name, value in attributes.items()
    }
    attributes["transaction"] = connection.get_transaction_status()
    connection.rollback()
    attributes["own"] = sorted(set(vars(connection)) - {"_puff_lease", "_puff_cursors"})
    with _psycopg.cursor(connection) as cursor:
        found = {**attributes, **server_state(cursor)}
    connection.rollback()
    return found


def hold_cursor(connection: Any) -> None:
    connection.cursor("held", withhold=True).execute("SELECT generate_series(1, 100)")
    connection.commit()


def register_types(connection: Any) -> None:
    psycopg2.extras.register_uuid(conn_or_curs=connection)
    psycopg2.extras.register_default_json(connection, loads=lambda text: "mine")
    psycopg2.extras.register_default_jsonb(connection, loads=lambda text: "mine")
    extensions.register_type(extensions.new_type((23,), "INT", lambda value, cursor: "mine"), connection)


DIRT: dict[str, Callable[[Any], None]] = {
    **SQL_DIRT,
    "client encoding": lambda connection: connection.set_client_encoding("LATIN1"),
    "isolation level": assign(isolation_level=extensions.ISOLATION_LEVEL_SERIALIZABLE),
    "isolation level in autocommit": in_autocommit(assign(isolation_level="REPEATABLE READ")),
    "old isolation level": lambda connection: connection.set_isolation_level(0),
    "read only": assign(readonly=True),
    "read and write": assign(readonly=False),
    "deferrable": lambda connection: connection.set_session("SERIALIZABLE", True, True),
    "not deferrable": assign(deferrable=False),
    "session in autocommit": lambda connection: connection.set_session("SERIALIZABLE", True, True, True),
    "registered types": register_types,
    "cursor_factory": assign(cursor_factory=psycopg2.extras.NamedTupleCursor),
    "notices list": assign(notices=["mine"]),
    "named cursor": lambda connection: connection.cursor("mine").execute("SELECT 1"),
    "named cursor with hold": hold_cursor,
    "named cursor never executed": lambda connection: connection.cursor("mine"),
}


@pytest.mark.parametrize("name", DIRT)
@pytest.mark.parametrize("cleaner", ["janitor", "next"])
def test_no_state_leaks_into_the_next_lease(pool: PostgresPool, name: str, cleaner: str) -> None:
    connection = pool.lease()
    session = pid(connection)
    connection.rollback()
    before = state(connection)
    DIRT[name](connection)
    connection.close()
    del connection
    if cleaner == "janitor" and "named cursor" not in name:
        is_clean(pool)
    connection = pool.lease()
    assert state(connection) == before
    if "named cursor" not in name:  # those only the server could close
        assert pid(connection) == session, "a connection that could be cleaned was thrown away"
    connection.close()


@pytest.mark.parametrize("name", ["SET", "time zone", "client encoding", "DateStyle", "session in autocommit"])
def test_the_setup_of_a_psycopg2_pool_outlives_every_reset(make_pool: MakePool, name: str) -> None:
    pool = make_pool(setup="SET TIME ZONE 'Asia/Tokyo'")
    for _ in range(3):
        connection = pool.lease()
        assert connection.info.parameter_status("TimeZone") == "Asia/Tokyo"
        assert connection.autocommit is False
        assert connection.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE
        DIRT[name](connection)
        connection.close()
        del connection


def test_a_server_whose_dates_are_not_iso_keeps_the_setup(postgres_url: str) -> None:
    """psycopg2 sets DateStyle when it connects; a reset undoes that."""
    dsn = extensions.make_dsn(postgres_url, options="-c DateStyle=German")
    pool = PostgresPool(dsn, PoolOptions(max_size=1), setup="SET TIME ZONE 'Asia/Tokyo'")
    for _ in range(2):
        connection = pool.lease()
        assert connection.info.parameter_status("TimeZone") == "Asia/Tokyo"
        assert ask(connection, "SELECT date '2024-03-01'").isoformat() == "2024-03-01"
        connection.close()
        del connection
    assert pool.get_stats()["connections_num"] == 1
    pool.close()


def test_what_a_returned_handle_is_given_never_reaches_the_next_lease(pool: PostgresPool) -> None:
    connection = pool.lease()
    before = state(connection)
    connection.close()
    is_clean(pool)
    connection.mine = 1
    connection.cursor_factory = psycopg2.extras.DictCursor
    connection.notices = ["mine"]
    with contextlib.suppress(psycopg2.InterfaceError):
        register_types(connection)
    del connection
    assert state(pool.lease()) == before


# --- Stale handles and cursors


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "set_client_encoding": ("UTF8",),
    "set_isolation_level": (1,),
    "get_parameter_status": ("TimeZone",),
    "tpc_begin": ("x",),
    "xid": (1, "a", "b"),
    "__exit__": (None, None, None),
}


def outcomes(connection: Any) -> dict[str, Any]:
    """What comes of everything that can be done with a closed connection."""

    def outcome(deed: Callable[[], Any]) -> Any:
        try:
            value = deed()
        except psycopg2.Error as error:
            return type(error)
        return value if isinstance(value, (int, str, type(None))) else type(value).__name__

    found = {}
    for name in dir(extensions.connection):
        public = not name.startswith("_") or name in ("__enter__", "__exit__")
        if not public or isinstance(getattr(extensions.connection, name), type):
            continue
        attribute = outcome(lambda name=name: getattr(connection, name))
        if attribute is not psycopg2.InterfaceError and callable(getattr(connection, name)):
            attribute = outcome(lambda name=name: getattr(connection, name)(*ARGUMENTS.get(name, ())))
        found[name] = attribute
    for name in ("autocommit", "isolation_level", "readonly", "deferrable"):
        found[f"{name} ="] = outcome(lambda name=name: setattr(connection, name, True))
    return found


# What a really closed connection still tells, and a returned one refuses, or tells as it was.
HARMLESS = {"dsn", "encoding", "info", "notices", "notifies", "pgconn_ptr", "protocol_version", "server_version"}


def test_a_returned_handle_does_what_a_closed_connection_does(pool: PostgresPool, postgres_url: str) -> None:
    closed = _psycopg._connect(postgres_url)
    closed.close()
    stale = pool.lease()
    stale.close()
    expected, found = outcomes(closed), outcomes(stale)
    for name, outcome in expected.items():
        if outcome is psycopg2.InterfaceError:
            assert found[name] is psycopg2.InterfaceError, name
    differing = {name: (expected[name], found[name]) for name in expected if expected[name] != found[name]}
    assert not {name for name, (_, now) in differing.items() if now is not psycopg2.InterfaceError} - HARMLESS, (
        differing
    )
    assert stale.closed
    stale.close()  # may be closed again
    assert "returned" in repr(stale)


@pytest.fixture(params=["returned", "being reset", "clean", "leased to another"])
def stale(request: pytest.FixtureRequest, make_pool: MakePool) -> Iterator[tuple[Any, Any, Any]]:
    """A returned handle with two of its cursors, at every stage of what becomes of its session."""
    pool = make_pool(max_size=2)
    connection = pool.lease()
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute("SELECT generate_series(1, 3)")
    named = connection.cursor("named", withhold=True)
    named.execute("SELECT generate_series(1, 3)")
    hold, arrived = Event(), Event()
    reset = pool._reset

    def slow_reset(connection: Any) -> None:
        arrived.set()
        hold.wait()
        reset(connection)

    if request.param == "being reset":
        pool._reset = slow_reset  # type: ignore[method-assign]
    connection.close()
    others = []
    if request.param == "being reset":
        # Only a connection without open named cursors is worth a reset.
        gevent.sleep(0.01)
    elif request.param == "clean":
        gevent.sleep(0.05)
    elif request.param == "leased to another":
        others = [pool.lease(), pool.lease()]
        assert not any(other is connection for other in others)
    yield connection, cursor, named
    hold.set()
    for other in others:
        assert ask(other, "SELECT 42") == 42
        other.close()


def test_a_stale_handle_and_its_cursors_are_dead_for_ever(stale: tuple[Any, Any, Any]) -> None:
    connection, cursor, named = stale
    for _ in range(2):
        with pytest.raises(psycopg2.InterfaceError, match="already closed"):
            connection.cursor()
        with pytest.raises(psycopg2.InterfaceError):
            connection.commit()
        with pytest.raises(psycopg2.InterfaceError), connection:
            pass
        with pytest.raises(psycopg2.InterfaceError):
            cursor.execute("SELECT 1")
        for dead in (cursor, named):
            with pytest.raises(psycopg2.InterfaceError):
                dead.fetchone()
            with pytest.raises(psycopg2.InterfaceError):
                dead.copy_expert("COPY (SELECT 1) TO STDOUT", io.StringIO())
        gevent.sleep(0.01)


def test_an_old_cursor_never_works_on_a_later_lease_of_its_session(pool: PostgresPool) -> None:
    """Cursors do not keep a session from being leased again: they are closed."""
    connection = pool.lease()
    session = pid(connection)
    cursors = [connection.cursor() for _ in range(3)]
    connection.close()
    del connection
    is_clean(pool)
    connection = pool.lease()
    assert pid(connection) == session
    for cursor in cursors:
        with pytest.raises(psycopg2.InterfaceError):
            cursor.execute("SELECT 1")
    assert ask(connection, "SELECT 1") == 1
    connection.close()


def test_a_weakly_held_handle_costs_its_session_not_its_safety(pool: PostgresPool) -> None:
    """Who keeps things in a WeakKeyDictionary by connection must not find them at somebody else's."""
    connection = pool.lease()
    session = pid(connection)
    notes = weakref.WeakKeyDictionary({connection: "mine"})
    connection.close()
    del connection
    assert not notes
    other = pool.lease()
    assert other not in notes
    assert pid(other) != session
    other.close()


def test_a_broken_lease_leaves_its_place_at_once(pool: PostgresPool, postgres_url: str) -> None:
    """Though the program has not closed it, and may look at it still."""
    connection = pool.lease()
    admin = _psycopg._connect(postgres_url)
    ask(admin, "SELECT pg_terminate_backend(%s, 5000)", pid(connection))
    admin.close()
    with pytest.raises(psycopg2.OperationalError):
        ask(connection, "SELECT 1")
    other = pool.lease(timeout=0.1)
    assert ask(other, "SELECT 42") == 42
    assert connection.closed == 2, "psycopg2's word for broken"
    with pytest.raises(psycopg2.InterfaceError):
        connection.cursor()
    connection.close()
    assert connection.closed
    assert ask(other, "SELECT 42") == 42
    other.close()
    stats = pool.get_stats()
    assert (stats["pool_size"], stats["returns_bad"]) == (1, 1)


def test_an_interrupted_lease_that_is_never_closed_keeps_no_session(pool: PostgresPool, postgres_url: str) -> None:
    """psycopg2 marks it as broken and keeps its socket open; the server would count it."""
    connection = pool.lease()
    session = pid(connection)
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.1):
        ask(connection, "SELECT pg_sleep(30)")
    assert connection.closed
    admin = _psycopg._connect(postgres_url)
    admin.autocommit = True
    eventually(lambda: ask(admin, "SELECT count(*) FROM pg_stat_activity WHERE pid = %s", session) == 0)
    admin.close()
    assert ask(pool.lease(timeout=0.1), "SELECT 42") == 42


def test_a_held_handle_costs_its_session_not_its_safety(pool: PostgresPool) -> None:
    first = pool.lease()
    first.close()
    second = pool.lease()  # first is still held, and max_size is 1
    assert second is not first
    assert ask(second, "SELECT 1") == 1
    with pytest.raises(psycopg2.InterfaceError):
        first.cursor()
    assert pool.get_stats()["pool_size"] == 1


# --- Being a psycopg2 connection


def test_c_functions_take_a_lease(pool: PostgresPool) -> None:
    connection = pool.lease()
    psycopg2.extras.register_uuid(conn_or_curs=connection)
    psycopg2.extras.register_default_json(connection)
    assert ask(connection, "SELECT %s::uuid", str(uuid.UUID(int=7))) == uuid.UUID(int=7)
    assert extensions.quote_ident('a"b', connection) == '"a""b"'
    quoted = extensions.adapt("Bobby's")
    quoted.prepare(connection)
    assert quoted.getquoted() == b"'Bobby''s'"
    assert extensions.encrypt_password("secret", "me", connection).startswith("SCRAM-SHA-256$")
    assert psycopg2.extras.Json({"a": 1}).getquoted() == b"'{\"a\": 1}'"
    assert connection.info.host
    assert isinstance(connection.cursor(), extensions.cursor)
    assert psycopg2.sql.Identifier("x").as_string(connection) == '"x"'


class Counting(extensions.connection):
    """A factory with an __init__ of its own."""

    made = 0

    def __init__(self, dsn: str, *more: Any, **options: Any) -> None:
        super().__init__(dsn, *more, **options)
        Counting.made += 1
        self.log: list[str] = []

    def cursor(self, *args: Any, **options: Any) -> Any:
        self.log.append("cursor")
        return super().cursor(*args, **options)


@pytest.mark.parametrize(
    ("factory", "row"),
    [
        (psycopg2.extras.DictConnection, {"a": 1}),
        (psycopg2.extras.RealDictConnection, {"a": 1}),
        (psycopg2.extras.NamedTupleConnection, (1,)),
        (extensions.connection, (1,)),
    ],
)
def test_factories_of_psycopg2(pool: PostgresPool, factory: Any, row: Any) -> None:
    for _ in range(2):
        connection = pool.lease(factory)
        assert isinstance(connection, factory)
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT 1 AS a")
            found = cursor.fetchone()
            assert (dict(found) if isinstance(row, dict) else tuple(found)) == row
        connection.close()
        with pytest.raises(psycopg2.InterfaceError):
            connection.cursor()
        del connection, cursor
    assert pool.get_stats()["connections_num"] == 1, "all factories share the sessions"


def test_a_lease_of_one_class_becomes_a_lease_of_another(pool: PostgresPool) -> None:
    connection = pool.lease(psycopg2.extras.DictConnection)
    session = pid(connection)
    connection.close()
    del connection
    connection = pool.lease()
    assert pid(connection) == session
    assert not isinstance(connection.cursor(), psycopg2.extras.DictCursor)
    assert not isinstance(connection, psycopg2.extras.DictConnection)


def test_a_logging_connection(pool: PostgresPool) -> None:
    log = io.StringIO()
    connection: Any = pool.lease(psycopg2.extras.LoggingConnection)
    connection.initialize(log)
    assert ask(connection, "SELECT 1") == 1
    connection.close()
    assert "SELECT 1" in log.getvalue()


def test_a_factory_with_an_init_of_its_own(pool: PostgresPool) -> None:
    Counting.made = 0
    for number in (1, 2):
        connection: Any = pool.lease(Counting)
        assert connection.log == []
        assert ask(connection, "SELECT 1") == 1
        assert connection.log == ["cursor"]
        assert Counting.made == number
        connection.close()
        del connection
    assert pool.get_stats()["connections_num"] == 1


class Failing(extensions.connection):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        raise LookupError("no")


class Slotted(extensions.connection):
    __slots__ = ("more",)


@pytest.mark.parametrize(
    ("factory", "error"), [(Failing, LookupError), (Slotted, TypeError), (lambda dsn: None, TypeError)]
)
def test_a_factory_that_fails_costs_no_place(pool: PostgresPool, factory: Any, error: type[Exception]) -> None:
    for _ in range(3):
        with pytest.raises(error):
            pool.lease(factory, timeout=1)
    gc.collect()
    connection = pool.lease(timeout=1)
    assert ask(connection, "SELECT 1") == 1


class ClosesItself(extensions.connection):
    def __del__(self) -> None:
        self.close()


class Forgetful(extensions.connection):
    def __del__(self) -> None:
        """Does not call super()."""


@pytest.mark.parametrize("factory", [extensions.connection, ClosesItself, Forgetful])
def test_a_dropped_lease_comes_back(pool: PostgresPool, factory: Any) -> None:
    for _ in range(5):
        connection = pool.lease(factory, timeout=1)
        assert ask(connection, "SELECT 1") == 1
        del connection
    assert pool.get_stats()["pool_size"] <= 1


def test_a_lease_dropped_in_a_cycle_comes_back_while_another_waits(
    sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = sql.make_pool()
    monkeypatch.setattr(base, "_collected_at", -1000.0)
    gc.collect()
    gc.disable()
    try:
        connection: Any = pool.lease()
        connection.me = connection
        del connection
        second = pool.lease(timeout=2)
    finally:
        gc.enable()
    assert ask(second, "SELECT 1") == 1


def test_a_lease_returned_by_a_finalizer_of_its_owner_comes_back(sql: Sql) -> None:
    """The owner's __del__ and the lease's run in one collection, in any order."""
    pool = sql.make_pool()

    class Owner:
        def __init__(self) -> None:
            self.connection = pool.lease(timeout=1)
            self.me = self

        def __del__(self) -> None:
            self.connection.close()

    for _ in range(6):
        Owner()
        gc.collect()
        # Dropped again: also a lease that was rescued by a finalizer must come back.
        pool.lease(timeout=1)


def test_with_a_lease_is_a_transaction_and_not_its_end(pool: PostgresPool) -> None:
    connection = pool.lease()
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE t (x int)")
    with pytest.raises(psycopg2.DataError), connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO t VALUES (1); SELECT 1/0")
    assert not connection.closed
    assert ask(connection, "SELECT count(*) FROM t") == 0


def test_weak_references_to_cursors_do_not_pile_up(pool: PostgresPool) -> None:
    connection: Any = pool.lease()
    for _ in range(1000):
        connection.cursor().close()
    assert len(connection._puff_cursors._references) < 200
    cursor = connection.cursor()
    watch = weakref.ref(cursor)
    del cursor
    assert watch() is None


# --- Interruptions


@pytest.mark.parametrize("how", ["kill", "timeout"])
def test_an_interrupted_query_is_stopped_and_its_connection_replaced(sql: Sql, how: str) -> None:
    pool = sql.make_pool(max_size=2)
    watcher = pool.lease()
    watcher.autocommit = True
    started = Event()
    found: dict[str, Any] = {}

    def work() -> None:
        connection = pool.lease()
        found["pid"] = pid(connection)
        started.set()
        try:
            with gevent.Timeout(0.1 if how == "timeout" else None):
                ask(connection, "SELECT pg_sleep(30)")
        finally:
            found["closed"] = connection.closed
            connection.close()

    worker = gevent.spawn(work)
    started.wait()
    running = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
    eventually(lambda: ask(watcher, running, found["pid"]))
    if how == "kill":
        worker.kill()
    else:
        with pytest.raises(gevent.Timeout):
            worker.get()
    assert found["closed"], "the connection cannot be used on"
    eventually(lambda: not ask(watcher, running, found["pid"]), 5)
    connection = pool.lease()
    assert ask(connection, "SELECT 42") == 42
    assert pid(connection) != found["pid"]
    assert pool.get_stats()["pool_size"] == 2


def test_a_lease_returned_while_another_greenlet_uses_it_is_not_handed_on(sql: Sql) -> None:
    pool = sql.make_pool()
    connection = pool.lease()
    session = pid(connection)
    connection.commit()
    user = gevent.spawn(ask, connection, "SELECT pg_sleep(0.3), 1")
    eventually(partial(sql.is_busy, connection))
    connection.close()
    del connection
    other = pool.lease()
    assert pid(other) != session
    assert ask(other, "SELECT 42") == 42
    with pytest.raises(sql.module.Error):
        user.get(timeout=5)
    other.close()


def test_time_outs_name_the_setting_and_are_errors_of_the_driver(sql: Sql) -> None:
    pool = sql.make_pool()
    connection = pool.lease()
    with pytest.raises(pool.PoolTimeout, match="PUFF_POSTGRES_POOL_MAX_SIZE") as raised:
        pool.lease(timeout=0.01)
    assert isinstance(raised.value, sql.module.OperationalError)
    connection.close()


def test_a_server_that_never_answers_is_a_time_out(sql: Sql) -> None:
    """Neither connecting nor resetting may wait for ever."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        dsn = f"host=127.0.0.1 port={deaf.getsockname()[1]} user=x"
        # psycopg 3 makes two seconds of one, as libpq does.
        for limit, message in ({"dsn": f"{dsn} connect_timeout=2"}, "time"), ({"timeout": 0.3}, r"in 0\.3 s"):
            started = time.monotonic()
            with pytest.raises(sql.module.OperationalError, match=message):
                sql.make_pool(**{"dsn": dsn, **limit}).lease()
            assert time.monotonic() - started < 4
    pool = sql.make_pool(timeout=0.2)
    connection = pool.lease()
    session = pid(connection)
    connection.close()
    del connection
    pool._setup = "SELECT pg_sleep(30)"
    with pytest.raises(sql.module.OperationalError, match=r"no answer in 0\.2 s"):
        pool.lease()
    pool._setup = None
    assert pid(pool.lease()) != session


def test_an_interruption_does_not_wait_for_a_server_that_is_gone(sql: Sql, postgres_url: str) -> None:
    """Neither the interrupted greenlet nor any other, though the requests to cancel get no answer."""
    proxy = PostgresProxy(postgres_url)
    pool = sql.make_pool(dsn=proxy.dsn)
    connection = pool.lease()
    session = pid(connection)
    worker = gevent.spawn(ask, connection, "SELECT pg_sleep(30)")
    eventually(partial(sql.is_busy, connection))
    proxy.silent.set()
    ticks: list[float] = []

    def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            gevent.sleep(0.01)

    ticker = gevent.spawn(tick)
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.1):
        connection.cancel()
    started = time.monotonic()
    worker.kill()
    assert time.monotonic() - started < 1
    eventually(lambda: proxy.accepted == 3, what="both requests to cancel")
    gevent.sleep(0.2)
    ticker.kill()
    assert max(later - earlier for earlier, later in itertools.pairwise(ticks)) < 0.15
    assert connection.closed
    connection.close()
    pool.close()
    proxy.close()
    # The proxy swallowed the good-bye.
    admin = _psycopg._connect(postgres_url)
    admin.autocommit = True
    ask(admin, "SELECT pg_terminate_backend(%s, 5000)", session)
    admin.close()
