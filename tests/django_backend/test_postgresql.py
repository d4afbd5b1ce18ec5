"""Django over pooled PostgreSQL: its own backend unmodified, and ours, with psycopg2 and with psycopg 3."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from support.process import run_python

ENGINES = ["django.db.backends.postgresql", "django_backend.postgresql"]
DRIVERS = ["psycopg2", "psycopg"]
# The four of them, and two that have each engine and each driver once.
every_setup = pytest.mark.parametrize(
    ("engine", "driver"), [(engine, driver) for engine in ENGINES for driver in DRIVERS]
)
two_setups = pytest.mark.parametrize(("engine", "driver"), list(zip(ENGINES, reversed(DRIVERS), strict=True)))
both_engines = pytest.mark.parametrize("engine", ENGINES)
both_drivers = pytest.mark.parametrize("driver", DRIVERS)

PATCHED = """
import puff_patch
puff_patch.patch_all()
import gevent
from django_process import *
"""


def run(
    code: str,
    services: Any,
    engine: str = ENGINES[1],
    driver: str = "psycopg",
    *,
    patched: str = PATCHED,
    **env: str,
) -> Any:
    """``ENGINE``, ``DRIVER`` and a ``TAG`` of this test's own are there."""
    head = f"ENGINE, DRIVER, TAG = {engine!r}, {driver!r}, 'puff-test-{uuid.uuid4().hex[:12]}'\n"
    if driver == "psycopg2":
        head += "sys.modules['psycopg'] = None  # Django prefers it, if it can be imported\n"
    return run_python(
        head + patched + code, env={**services.env(), "PYTHONPATH": str(Path(__file__).parent), **env}
    )


@pytest.mark.parametrize(
    ("engine", "driver", "max_age"),
    [
        *((engine, driver, None) for engine in ENGINES for driver in DRIVERS),
        (ENGINES[0], "psycopg", 0),
        (ENGINES[1], "psycopg2", 60),
    ],
)
def test_hundreds_of_greenlets_share_a_few_connections(
    engine: str, driver: str, max_age: int | None, services
) -> None:
    run(
        f"""
setup({{"default": database(ENGINE, CONN_MAX_AGE={max_age}, OPTIONS={{"application_name": TAG}})}})
from django.core.signals import request_finished, request_started
from django.db import connection
import gc
server = Server(TAG)
watcher = gevent.spawn(server.watch)

# Greenlets that end without closing what they used, as a program does that knows of no pool.
gc.disable()
greenlets = [gevent.spawn(ask, "SELECT 1 FROM pg_sleep(0.001)") for _ in range(500)]
gevent.joinall(greenlets, timeout=30, raise_error=True)
assert [greenlet.value for greenlet in greenlets] == [1] * 500
def all_back():
    [stats] = puff_patch.stats().values()
    return stats["pool_available"] == stats["pool_size"] <= 4
with gevent.Timeout(5):  # some are being reset
    while not all_back():
        gevent.sleep(0.001)

# Greenlets that live on after a request, as those of a server do: more than there are connections.
may_end = gevent.event.Event()
def serve():
    request_started.send(None)
    ask("SELECT 1")
    request_finished.send(None)
    answered.append(1)
    may_end.wait()
answered = []
servers = [gevent.spawn(serve) for _ in range(40)]
with gevent.Timeout(20):
    while len(answered) < 40:
        gevent.sleep(0.005)
may_end.set()
gevent.joinall(servers, raise_error=True)

watcher.kill()
assert 1 <= server.most <= 4, server.most
""",
        services,
        engine,
        driver,
        PUFF_POSTGRES_POOL_MAX_SIZE="4",
        PUFF_POSTGRES_POOL_TIMEOUT="15",
    )


@every_setup
def test_leases_of_dead_greenlets_come_back_at_once(engine: str, driver: str, services) -> None:
    run(
        """
setup({"default": database(ENGINE, CONN_MAX_AGE=None)})
import gc
gc.disable()
from django.db import transaction

def fail():
    ask("SELECT 1")
    raise LookupError("on purpose")

def hold():
    with transaction.atomic():
        ask("SELECT 1")
        gevent.sleep(60)

def query():
    ask("SELECT 1 FROM pg_sleep(60)")

def receiver(**_):
    if gevent.getcurrent() in greenlets:
        raise LookupError("on purpose")

def live_on():
    # a request that fails as soon as it has its connection, in a greenlet that goes on
    connection_created.connect(receiver)
    try:
        ask("SELECT 1")
    except LookupError:
        pass
    request_finished.send(None)
    gevent.sleep(60)

from django.core.signals import request_finished
from django.db.backends.signals import connection_created
gevent.get_hub().NOT_ERROR += (LookupError,)
for death in (fail, hold, query, live_on):
    greenlets = [gevent.spawn(death) for _ in range(2)]
    gevent.sleep(0.1)
    if death is not live_on:
        gevent.killall(greenlets)
    started = time.monotonic()
    assert gevent.spawn(ask, "SELECT 1").get(timeout=5) == 1
    assert time.monotonic() - started < 2, death
""",
        services,
        engine,
        driver,
        PUFF_POSTGRES_POOL_MAX_SIZE="2",
        PUFF_POSTGRES_POOL_TIMEOUT="4",
    )


@every_setup
def test_transactions(engine: str, driver: str, services) -> None:
    run(
        """
setup({"default": database(ENGINE, CONN_MAX_AGE=60)})
from django.db import connection, transaction
TABLE = TAG.replace("-", "_")
def insert(n):
    with connection.cursor() as cursor:
        cursor.execute(f"INSERT INTO {TABLE} VALUES (%s)", [n])
def values():
    # in another greenlet, so on another connection
    return gevent.spawn(ask, f"SELECT coalesce(array_agg(n ORDER BY n), '{{}}') FROM {TABLE}").get(timeout=10)
with connection.cursor() as cursor:
    cursor.execute(f"CREATE TABLE {TABLE} (n int)")
try:
    done = []
    with transaction.atomic():
        insert(1)
        transaction.on_commit(lambda: done.append("outer"))
        try:
            with transaction.atomic():
                insert(2)
                transaction.on_commit(lambda: done.append("inner"))
                raise LookupError
        except LookupError:
            pass
        with transaction.atomic():
            insert(3)
            transaction.set_rollback(True)
        insert(4)
        assert values() == [] and done == []
    assert values() == [1, 4] and done == ["outer"], (values(), done)
    try:
        with transaction.atomic():
            insert(5)
            raise LookupError
    except LookupError:
        pass
    assert values() == [1, 4]

    # a greenlet that dies within a transaction has done nothing
    def die():
        with transaction.atomic():
            insert(6)
            gevent.sleep(60)
    victim = gevent.spawn(die)
    gevent.sleep(0.1)
    victim.kill()
    assert values() == [1, 4]

    # and a lease in autocommit off does not infect the next
    def manual():
        transaction.set_autocommit(False)
        insert(7)
    gevent.spawn(manual).get(timeout=10)
    assert values() == [1, 4]
    gevent.spawn(insert, 8).get(timeout=10)
    assert values() == [1, 4, 8]
finally:
    connection.close()
    with connection.cursor() as cursor:
        cursor.execute(f"DROP TABLE {TABLE}")
""",
        services,
        engine,
        driver,
        PUFF_POSTGRES_POOL_MAX_SIZE="3",
    )


@every_setup
def test_each_alias_gets_its_own_time_zone(engine: str, driver: str, services) -> None:
    run(
        """
zones = {"default": None, "tokyo": "Asia/Tokyo", "lima": "America/Lima"}
setup(
    {alias: database(ENGINE, TIME_ZONE=zone) for alias, zone in zones.items()}, TIME_ZONE="Africa/Nairobi"
)
from django.db import connections
def look(alias):
    noon = "SELECT extract(hour FROM timestamptz '2020-01-01 12:00Z')::int"
    found = ask("SHOW TimeZone", alias), ask(noon, alias)
    connections[alias].close()
    return found
def spoil(alias):
    ask("SELECT set_config('TimeZone', 'Europe/Oslo', false)", alias)
for _ in range(2):
    assert gevent.spawn(look, "default").get(timeout=10) == ("UTC", 12)
    assert gevent.spawn(look, "tokyo").get(timeout=10) == ("Asia/Tokyo", 21)
    assert gevent.spawn(look, "lima").get(timeout=10) == ("America/Lima", 7)
    for alias in zones:
        gevent.spawn(spoil, alias).get(timeout=10)
""",
        services,
        engine,
        driver,
        PUFF_POSTGRES_POOL_MAX_SIZE="1",
    )


@two_setups
def test_the_test_runner_makes_and_drops_its_databases(engine: str, driver: str, services) -> None:
    run(
        """
import psycopg2
from psycopg2.extensions import parse_dsn
# A replica in production, and in tests the same database by another way.
host = parse_dsn(POSTGRES_URL).get("host", "")
replica = database("django.db.backends.postgresql", TEST={"MIRROR": "default"})
setup({
    "default": database(ENGINE, CONN_MAX_AGE=None, TEST={"NAME": TAG}),
    "replica": {**replica, "ENGINE": ENGINE, "HOST": host + "/" if host.startswith("/") else host},
})
from django.db import connection
from django.test.utils import setup_databases, teardown_databases
admin = psycopg2.connect(POSTGRES_URL, pool=False)
admin.autocommit = True
def ours():
    with admin.cursor() as cursor:
        cursor.execute("SELECT datname FROM pg_database WHERE datname LIKE %s ORDER BY 1", [TAG + "%"])
        return [name for (name,) in cursor]
before = ask("SELECT current_database()")
old = setup_databases(verbosity=0, interactive=False, parallel=2)
assert ours() == [TAG, TAG + "_1", TAG + "_2"], ours()
assert ask("SELECT current_database()") == TAG
# also in greenlets, whose connections nobody closes
for alias in ("default", "replica"):
    assert gevent.spawn(ask, "SELECT current_database()", alias).get(timeout=10) == TAG
teardown_databases(old, verbosity=0, parallel=2)
assert ours() == []
assert ask("SELECT current_database()") == before
""",
        services,
        engine,
        driver,
    )


@both_engines
def test_a_long_running_command_survives_restarts_and_holds_nothing_while_idle(engine: str, services) -> None:
    run(
        """
setup({
    "default": database(ENGINE, OPTIONS={"application_name": TAG}),
    "kept": database(
        ENGINE, CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=True, OPTIONS={"application_name": TAG + "-kept"}
    ),
})
from django.db import close_old_connections, connections
from django.core.management import BaseCommand, call_command

def restart_the_server():
    # All that its clients see of it: their sessions are over.
    for tag in (TAG, TAG + "-kept"):
        server = Server(tag)
        server.end_sessions()
        with gevent.Timeout(10):
            while server.sessions():
                gevent.sleep(0.01)

def leased():
    return sum(stats["pool_size"] - stats["pool_available"] for stats in puff_patch.stats().values())

class Command(BaseCommand):
    def handle(self, **options):
        pids = []
        for _ in range(3):
            close_old_connections()
            pids.append([ask("SELECT pg_backend_pid()", alias) for alias in connections])
            close_old_connections()
            # Idle from here on: without CONN_MAX_AGE nothing is held; with it, in this one thread, as ever.
            assert connections["default"].connection is None
            assert connections["kept"].connection is not None
            with gevent.Timeout(10):  # some are being reset
                while leased() != 1:
                    gevent.sleep(0.01)
            if len(pids) == 2:
                restart_the_server()
        first, second, third = pids
        assert first[1] == second[1], pids
        assert not {*second} & {*third}, pids

call_command(Command())

# A greenlet is one of many, and holds nothing after a request.
def serve():
    ask("SELECT 1", "kept")
    close_old_connections()
    return connections["kept"].connection
assert gevent.spawn(serve).get(timeout=10) is None

connections.close_all()
with gevent.Timeout(10):
    while leased():
        gevent.sleep(0.01)
""",
        services,
        engine,
    )


@pytest.mark.parametrize(("engine", "driver"), list(zip(ENGINES, DRIVERS, strict=True)))
def test_engines_and_tools_of_others_find_what_they_rely_on(engine: str, driver: str, services) -> None:
    run(
        """
# A third-party engine: of Django's engine a subclass, which hooks in where such engines do.
import types
module = types.ModuleType("their_engine")
sys.modules["their_engine"] = module
sys.modules["their_engine.base"] = module
from django.conf import settings
settings.configure(DATABASES={
    "default": database(ENGINE, CONN_MAX_AGE=None),
    "theirs": {**database(ENGINE, CONN_MAX_AGE=None), "ENGINE": "their_engine"},
}, USE_TZ=True)
os.environ["PUFF_THEIRS_POSTGRES_URL"] = POSTGRES_URL
import importlib, django
calls = []
class DatabaseWrapper(importlib.import_module(ENGINE + ".base").DatabaseWrapper):
    def get_connection_params(self):
        return {**super().get_connection_params(), "application_name": TAG}
    def get_new_connection(self, conn_params):
        calls.append("get_new_connection")
        return super().get_new_connection(conn_params)
    def init_connection_state(self):
        calls.append("init_connection_state")
        super().init_connection_state()
module.DatabaseWrapper = DatabaseWrapper
django.setup()

# A tool that measures connecting (Sentry does it so), installed after us.
from django.db.backends.base.base import BaseDatabaseWrapper
connect = BaseDatabaseWrapper.connect
def measured(self):
    calls.append("connect")
    return connect(self)
BaseDatabaseWrapper.connect = measured

from django.core.signals import request_finished
from django.db import connections
def request():
    assert ask("SHOW application_name", "theirs") == TAG
    assert ask("SHOW TimeZone", "theirs") == "UTC"
    request_finished.send(None)
    return connections["theirs"].connection
assert gevent.spawn(request).get(timeout=10) is None
assert calls == ["connect", "get_new_connection", "init_connection_state"], calls

# What a program does that opens connections of its own to a database of Django's.
params = connections["default"].get_connection_params()
if DRIVER == "psycopg2":
    from psycopg2.extensions import make_dsn
    make_dsn(**{key: value for key, value in params.items() if key != "cursor_factory"})
with importlib.import_module(DRIVER).connect(**params) as connection, connection.cursor() as cursor:
    cursor.execute("SELECT 1")
""",
        services,
        engine,
        driver,
    )


@both_engines
def test_a_connection_shared_between_threads_outlives_the_thread_that_opened_it(engine: str, services) -> None:
    run(
        """
setup({"default": database(ENGINE)})
import threading
from django.db import connections
shared = connections["default"]
def lend(connection):
    connections["default"] = connection
    pids.append(ask("SELECT pg_backend_pid()"))
    lent.set()
pids, lent = [], threading.Event()
shared.inc_thread_sharing()
thread = threading.Thread(target=lend, args=(shared,))
thread.start()
assert lent.wait(10)
shared.dec_thread_sharing()
assert [ask("SELECT pg_backend_pid() FROM pg_sleep(0.05)")] == pids
assert [ask("SELECT pg_backend_pid()")] == pids
""",
        services,
        engine,
    )


def test_the_configured_server_of_the_alias_is_used(services) -> None:
    run(
        """
separator = "&" if "?" in POSTGRES_URL else "?"
os.environ["PUFF_REPORTS_POSTGRES_URL"] = f"{POSTGRES_URL}{separator}application_name=reports"
setup({
    "default": database(ENGINE),
    "reports": database(ENGINE),
    "named": database(ENGINE, NAME="puff_no_such_database"),
})
assert ask("SHOW application_name") == ""
assert ask("SHOW application_name", "reports") == "reports"
from django.db import connections
# A NAME is a choice: nothing is taken from the configuration then, nor for Django's connection to create it.
assert connections["named"].settings_dict["HOST"] == ""
nodb = connections["named"].__class__({**connections["named"].settings_dict, "NAME": None}, alias="__no_db__")
assert nodb.settings_dict["HOST"] == nodb.settings_dict["USER"] == ""
""",
        services,
    )


@both_drivers
def test_pool_options(driver: str, services) -> None:
    run(
        """
setup({
    "default": database(ENGINE, OPTIONS={"pool": {"max_size": 2, "timeout": 0.2}, "application_name": TAG}),
    "roomy": database(ENGINE, OPTIONS={"pool": {"min_size": 20}}),
    "plain": database(ENGINE, OPTIONS={"pool": True}),
    "own": database(ENGINE, CONN_MAX_AGE=60, OPTIONS={"pool": False, "application_name": TAG + "-own"}),
    "typo": database(ENGINE, OPTIONS={"pool": {"max_sise": 2}}),
    "wrong": database(ENGINE, OPTIONS={"pool": {"max_size": 0}}),
    "silly": database(ENGINE, OPTIONS={"pool": "yes"}),
    "strange": database(ENGINE, OPTIONS={"pool": {"max_size": 2, "num_workers": 3}}),
})
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connection, connections
held = [gevent.spawn(ask, "SELECT 1 FROM pg_sleep(1)") for _ in range(2)]
gevent.sleep(0.1)
try:
    ask("SELECT 1")
except OperationalError as error:
    assert type(error.__cause__).__name__ == "PoolTimeout", error.__cause__
    for part in ("max_size", " 2 ", "0.2 s", "PUFF_POSTGRES_POOL_MAX_SIZE", "postgres://"):
        assert part in str(error), (part, str(error))
else:
    raise AssertionError("a third connection")
gevent.joinall(held, raise_error=True)
connection.close()
connection.close_pool()

assert ask("SELECT 1", "roomy") == ask("SELECT 1", "plain") == 1

names = set(puff_patch.stats())
pid = ask("SELECT pg_backend_pid()", "own")
connections["own"].close_if_unusable_or_obsolete()
assert ask("SELECT pg_backend_pid()", "own") == pid, "CONN_MAX_AGE does not hold for a connection of one's own"
server = Server(TAG + "-own")
assert server.sessions() == 1
connections["own"].close()
assert set(puff_patch.stats()) == names
with gevent.Timeout(10):
    while server.sessions():
        gevent.sleep(0.01)

for alias, parts in {
    "typo": ["DATABASES['typo']", "'max_sise'", "did you mean 'max_size'"],
    "wrong": ["max_size"],
    "silly": ["DATABASES['silly']", "'yes'"],
    "strange": ["DATABASES['strange']", "'num_workers'", "psycopg_pool", "django.db.backends.postgresql"],
}.items():
    try:
        ask("SELECT 1", alias)
    except ImproperlyConfigured as error:
        assert all(part in str(error) for part in parts), error
    else:
        raise AssertionError(alias)
""",
        services,
        driver=driver,
        PUFF_POSTGRES_POOL_MAX_SIZE="50",
    )


@both_drivers
def test_without_patch_all_it_says_where_to_put_the_line(driver: str, services) -> None:
    message = run(
        """
setup({"default": database(ENGINE)})
from django.core.exceptions import ImproperlyConfigured
try:
    ask("SELECT 1")
except ImproperlyConfigured as error:
    report(str(error))
""",
        services,
        driver=driver,
        patched="from django_process import *\n",
    )
    assert "puff_patch.patch_all()" in message
    assert "first lines of manage.py and wsgi.py" in message


@two_setups
def test_an_unreachable_server_names_the_ways_out(engine: str, driver: str, services) -> None:
    message = run(
        """
setup({"default": database(ENGINE, HOST="127.0.0.1", PORT="1", NAME="nowhere", USER="me", PASSWORD="s3cret")})
from django.db import OperationalError
try:
    ask("SELECT 1")
except OperationalError as error:
    report(str(error))
""",
        services,
        engine,
        driver,
    )
    assert "127.0.0.1:1/nowhere" in message
    assert "s3cret" not in message
    for way_out in ("start a PostgreSQL server", "PUFF_DEFAULT_POSTGRES_URL", "PUFF_EMBEDDED=1"):
        assert way_out in message


def test_djangos_own_pool_is_left_to_itself_and_cooperative(services) -> None:
    """psycopg_pool, by OPTIONS["pool"] of Django's own engine: no pool of ours behind it."""
    run(
        """
pool = {"min_size": 1, "max_size": 3, "timeout": 10}
setup({"default": database(ENGINE, OPTIONS={"pool": pool, "application_name": TAG})}, TIME_ZONE="Asia/Tokyo")
from django.db import connection, connections
import psycopg
server = Server(TAG)
watcher = gevent.spawn(server.watch)
moments = []
def tick():
    while True:
        moments.append(time.monotonic())
        gevent.sleep(0.005)
def work():
    try:
        return ask("SELECT current_setting('TimeZone') FROM pg_sleep(0.1)")
    finally:
        connections.close_all()
assert ask("SELECT 1") == 1
assert type(connection.connection) is psycopg.Connection  # not a lease
connection.close()
ticker = gevent.spawn(tick)
workers = [gevent.spawn(work) for _ in range(12)]
gevent.joinall(workers, raise_error=True, timeout=30)
assert [worker.value for worker in workers] == ["UTC"] * 12
assert max(later - earlier for earlier, later in zip(moments, moments[1:])) < 0.1
assert 1 < server.most <= 3, server.most
assert puff_patch.stats() == {}
connection.close_pool()
""",
        services,
        ENGINES[0],
    )


@both_engines
def test_options_of_psycopg_3_hold_for_each_lease(engine: str, services) -> None:
    run(
        """
import json, psycopg
class Cursor(psycopg.ClientCursor):
    pass
setup({
    "default": database(ENGINE),
    "bound": database(ENGINE, OPTIONS={"server_side_binding": True, "prepare_threshold": 0}),
    "mine": database(ENGINE, OPTIONS={"cursor_factory": Cursor}),
    "role": database(ENGINE, OPTIONS={"assume_role": "pg_read_all_data", "isolation_level": 4}),
}, TIME_ZONE="Asia/Tokyo")
from django.db import connections, transaction
def look(alias):
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT %s::int, '{\\"a\\": 1}'::jsonb, timestamptz '2020-01-01 12:00Z'", [7])
        number, text, moment = cursor.fetchone()
        # Django's adapters: it decodes JSON by itself, and moments are UTC
        assert (number, json.loads(text), str(moment)) == (7, {"a": 1}, "2020-01-01 12:00:00+00:00")
        prepared = ask("SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql", alias)
        lease = connections[alias].connection
        found = type(cursor.cursor).__mro__, ask("SELECT current_user", alias), prepared, lease.isolation_level
    connections[alias].close()
    return found
for _ in range(2):
    for alias in ("bound", "default", "mine", "role"):
        mro, user, prepared, isolation = gevent.spawn(look, alias).get(timeout=10)
        assert (psycopg.ClientCursor in mro) == (alias != "bound"), (alias, mro)
        assert (Cursor in mro) == (alias == "mine")
        assert (user == "pg_read_all_data") == (alias == "role")
        assert (prepared > 0) == (alias == "bound"), (alias, prepared)
        assert (isolation == psycopg.IsolationLevel.SERIALIZABLE) == (alias == "role")
with transaction.atomic(), connections["default"].chunked_cursor() as cursor:
    cursor.execute("SELECT generate_series(1, 3)")
    assert [n for (n,) in cursor] == [1, 2, 3]
connections["default"].close()
""",
        services,
        engine,
    )
