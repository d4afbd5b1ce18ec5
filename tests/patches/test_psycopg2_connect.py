"""`psycopg2.connect` after `patch_all`; what takes a ``driver`` is the same with psycopg 3."""

from __future__ import annotations

from typing import Any

import pytest
from support.process import run_python
from support.servers import PostgresProxy

PATCHED = """
import puff_patch; puff_patch.patch_all()
import gevent, psycopg2, psycopg2.extras
from psycopg2 import extensions
URL = os.environ.get("PUFF_DEFAULT_POSTGRES_URL")
def ask(connection, sql, *args):
    with connection.cursor() as cursor:
        cursor.execute(sql, args)
        return cursor.fetchone()[0]
def refused(exception, *args, **options):
    try:
        psycopg2.connect(*args, **options)
    except exception as error:
        return str(error)
    raise AssertionError("it was not refused")
"""

STRESS = """
import collections, random, signal
counts, most = collections.Counter(), 0
admin = psycopg2.connect(URL, pool=False)
admin.autocommit = True
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'stress'"
OPTIONS = {"application_name": "stress", "pool": {"max_size": 8, "timeout": 60}}

def watch():
    global most
    admin = psycopg2.connect(URL, pool=False)
    admin.autocommit = True
    while True:
        most = max(most, ask(admin, SESSIONS))
        gevent.sleep(0.002)

def query(pause):
    number = random.randrange(10**9)
    connection = psycopg2.connect(URL, **OPTIONS)
    try:
        assert ask(connection, "SELECT %s, pg_sleep(%s)", number, pause) == number
    finally:
        connection.close()
    counts["answered"] += 1

def work(end):
    while time.monotonic() < end:
        query(random.choice([0, 0, 0.001, 0.02]))
        gevent.sleep(random.random() * 0.01)

def whole():
    # All eight can be had at once, and are eight sessions.
    leases = [psycopg2.connect(URL, **OPTIONS) for _ in range(8)]
    assert len({ask(lease, "SELECT pg_backend_pid()") for lease in leases}) == 8
    for lease in leases:
        lease.close()

watcher = gevent.spawn(watch)
"""


# psycopg 3 warns of connections that are dropped.
UNCLOSED = "import warnings; warnings.simplefilter('ignore', ResourceWarning)\n"


def program(driver: str, code: str) -> str:
    """This code, which is written for psycopg2, after `patch_all` with either driver."""
    text = PATCHED + code
    if driver == "psycopg":
        text = text.replace(", psycopg2.extras\nfrom psycopg2 import extensions\n", "\n" + UNCLOSED)
    return text.replace("psycopg2", driver)


both_drivers = pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])


@both_drivers
def test_two_thousand_greenlets_over_eight_connections(driver: str, services) -> None:
    told = run_python(
        program(
            driver,
            STRESS
            + """
workers = [gevent.spawn(query, 0.001) for _ in range(2000)]
gevent.joinall(workers, raise_error=True)
whole()
report([counts["answered"], most, list(puff_patch.stats().values())[0]])
""",
        ),
        env=services.env(),
    )
    answered, most, stats = told
    assert answered == 2000
    assert most == 8
    assert stats["connections_num"] == 8
    assert stats["requests_errors"] == 0


@both_drivers
def test_random_kills_and_time_outs_do_not_poison_the_pool(driver: str, services) -> None:
    """Every query checks that its answer is its own."""
    told = run_python(
        program(
            driver,
            STRESS
            + """
end = time.monotonic() + 2.5
workers = [gevent.spawn(work, end) for _ in range(2000)]
def hasty():
    while time.monotonic() < end:
        try:
            with gevent.Timeout(random.random() * 0.02):
                query(0.02)
        except gevent.Timeout:
            counts["timed out"] += 1
workers += [gevent.spawn(hasty) for _ in range(20)]
def kill():
    while time.monotonic() < end:
        gevent.sleep(0.002)
        random.choice(workers).kill(block=False)
        counts["killed"] += 1
killer = gevent.spawn(kill)
gevent.joinall(workers)
failures = {repr(worker.exception) for worker in workers if not worker.successful()}
assert not failures, failures
killer.join()
watcher.kill()
end = time.monotonic() + 5
while ask(admin, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'stress' AND state = 'active'"):
    assert time.monotonic() < end, "queries that nobody waits for go on"
    gevent.sleep(0.01)
whole()
end = time.monotonic() + 5
while ask(admin, SESSIONS) > 8:
    assert time.monotonic() < end, "connections were left behind"
    gevent.sleep(0.01)
report([counts, list(puff_patch.stats().values())[0]])
""",
        ),
        env=services.env(),
    )
    counts, stats = told
    assert counts["answered"] > 20
    assert counts["killed"] > 20
    assert counts["timed out"] > 3
    assert stats["pool_size"] <= 8
    assert stats["requests_waiting"] == 0


@both_drivers
def test_a_fork_shares_no_connection(driver: str, services) -> None:
    """The child connects anew; the parent's leases and idle connections work on, whatever the child does."""
    run_python(
        program(
            driver,
            """
import gc
held = psycopg2.connect(URL)
session = ask(held, "SELECT pg_backend_pid()")
idle = psycopg2.connect(URL)
idle_session = ask(idle, "SELECT pg_backend_pid()")
idle.close()
del idle
gevent.sleep(0.05)
for ending in ("close", "drop", "exit", "unpatch"):
    child = os.fork()
    if not child:
        mine = psycopg2.connect(URL)
        assert ask(mine, "SELECT pg_backend_pid()") not in (session, idle_session)
        mine.close()
        if ending == "close":
            held.close()
            assert held.closed
        elif ending == "drop":
            del held
            gc.collect()
        elif ending == "unpatch":
            puff_patch.unpatch_all()
        if ending != "exit":
            gevent.sleep(0.05)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, ending
    assert ask(held, "SELECT pg_backend_pid()") == session, ending
    other = psycopg2.connect(URL)
    assert ask(other, "SELECT pg_backend_pid()") == idle_session, ending
    other.close()
    del other
    gevent.sleep(0.05)
held.close()
""",
        ),
        env=services.env(),
    )


def test_a_fork_leaves_the_parents_running_query_alone(services) -> None:
    """The child connects anew, and its copy of the lease ends with it, or with a close()."""
    run_python(
        PATCHED
        + """
import io
def copy(connection):
    out = io.StringIO()
    with connection.cursor() as cursor:
        cursor.copy_expert("COPY (SELECT 7) TO STDOUT", out)
    return out.getvalue().strip()
for pool in (True, False):
    held = psycopg2.connect(URL, pool=pool)
    assert copy(held) == "7"
    worker = gevent.spawn(ask, held, "SELECT 42 FROM pg_sleep(0.5)")
    while held.info.transaction_status != extensions.TRANSACTION_STATUS_ACTIVE:
        gevent.sleep(0.01)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the copy of the worker finds itself cut off
        if pool:
            held.close()
            assert held.closed
        mine = psycopg2.connect(URL, pool=pool)
        assert ask(mine, "SELECT 1") == 1 and copy(mine) == "7"
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert worker.get(timeout=10) == 42
    assert copy(held) == "7"
    held.close()
""",
        env=services.env(),
    )


@both_drivers
def test_options_of_the_pool(driver: str, services) -> None:
    run_python(
        program(
            driver,
            """
import puff_patch.config
assert "did you mean 'max_size'?" in refused(puff_patch.config.ConfigError, URL, pool={"max_sice": 8})
assert "max_size takes a number" in refused(puff_patch.config.ConfigError, URL, pool={"max_size": "many"})
assert "max_size" in refused(puff_patch.config.ConfigError, URL, pool={"max_size": 0})
assert "got 8" in refused(puff_patch.config.ConfigError, URL, pool=8)
# Different options, different pools; the same options in another order, the same pool.
first = psycopg2.connect(URL, pool={"max_size": 1, "timeout": 0.05})
message = refused(psycopg2.OperationalError, URL, pool={"timeout": 0.05, "max_size": 1})
assert "1 (max_size)" in message, message
second = psycopg2.connect(URL, pool={"max_size": 2})
assert len(puff_patch.stats()) == 2, puff_patch.stats()
first.close(), second.close()
""",
        ),
        env=services.env(),
    )


def test_the_environment_sizes_the_pools(services) -> None:
    env = {**services.env(), "PUFF_POSTGRES_POOL_MAX_SIZE": "1", "PUFF_POSTGRES_POOL_TIMEOUT": "0.05"}
    run_python(
        PATCHED
        + """
first = psycopg2.connect(URL)
assert "1 (max_size)" in refused(psycopg2.OperationalError, URL)
""",
        env=env,
    )


def test_what_is_not_pooled(services) -> None:
    run_python(
        PATCHED
        + """
import select
class Slotted(extensions.connection):
    __slots__ = ("more",)
own = psycopg2.connect(URL, pool=False)
session = ask(own, "SELECT pg_backend_pid()")
own.close()
assert own.closed
asynchronous = psycopg2.connect(URL, async_=1)
while (state := asynchronous.poll()) != extensions.POLL_OK:
    select.select([asynchronous] if state == 1 else [], [asynchronous] if state == 2 else [], [], 5)
cursor = asynchronous.cursor()
cursor.execute("SELECT 7")
while asynchronous.poll() != extensions.POLL_OK:
    select.select([asynchronous], [], [], 5)
assert cursor.fetchone() == (7,)
asynchronous.close()
made = []
def factory(dsn, *more):
    made.append(extensions.connection(dsn, *more))
    return made[-1]
for other in (Slotted, factory):
    connection = psycopg2.connect(URL, connection_factory=other)
    assert ask(connection, "SELECT 7") == 7
    connection.close()
assert made[0].closed
replication = psycopg2.connect(URL, connection_factory=psycopg2.extras.LogicalReplicationConnection)
assert isinstance(replication, psycopg2.extras.LogicalReplicationConnection)
replication.close()
separator = "&" if "?" in URL else "?"
walsender = psycopg2.connect(URL + separator + "replication=database")
walsender.autocommit = True
assert ask(walsender, "IDENTIFY_SYSTEM")
walsender.close()
assert puff_patch.stats() == {}, puff_patch.stats()
""",
        env=services.env(),
    )


@pytest.mark.parametrize("switch", ["all", "server", "call"])
def test_without_a_pool_connections_are_still_cooperative(services, switch) -> None:
    """Twenty times as many as a pool of one would give, all waiting at once; COPY works; `close` closes."""
    env = {
        "all": {"PUFF_POSTGRES_POOL": "0"},
        "server": {"PUFF_POSTGRES_UNPOOLED": "*/nowhere,postgres://*@*/" + "postgres"},
        "call": {},
    }[switch]
    options = "pool=False" if switch == "call" else "pool={'max_size': 1, 'timeout': 0.1, 'setup': 'SELECT 1'}"
    run_python(
        PATCHED
        + f"OPTIONS = dict({options})"
        + """
import io
from psycopg2.extensions import connection
class Mine(connection):
    pass
connections = [psycopg2.connect(URL, connection_factory=Mine, **OPTIONS) for _ in range(20)]
assert puff_patch.stats() == {}, puff_patch.stats()
waiting = [gevent.spawn(ask, connection, "SELECT pg_sleep(0.3) IS NULL") for connection in connections]
started = time.monotonic()
gevent.joinall(waiting, raise_error=True)
assert time.monotonic() - started < 3
out = io.StringIO()
with connections[0].cursor() as cursor:
    cursor.copy_expert("COPY (SELECT 7) TO STDOUT", out)
assert out.getvalue().strip() == "7"
session = ask(connections[0], "SELECT pg_backend_pid()")
connections[1].rollback()
connections[1].autocommit = True
assert isinstance(connections[0], Mine)
connections[0].close()
while ask(connections[1], "SELECT count(*) FROM pg_stat_activity WHERE pid = %s", session):
    gevent.sleep(0.01)
""",
        env={**services.env(), **env},
    )


def test_cursor_factories_and_keywords(services) -> None:
    run_python(
        PATCHED
        + """
parameters = extensions.parse_dsn(URL)
for _ in range(2):
    connection = psycopg2.connect(cursor_factory=psycopg2.extras.RealDictCursor, **parameters)
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1 AS a")
        assert cursor.fetchone() == {"a": 1}
    connection.close()
    del connection, cursor
connection = psycopg2.connect(**parameters)
with connection.cursor() as cursor:
    cursor.execute("SELECT 1 AS a")
    assert cursor.fetchone() == (1,)
connection.close()
assert len(puff_patch.stats()) == 1
""",
        env=services.env(),
    )


def test_psycopg2s_own_pool_works_on_leases(services) -> None:
    run_python(
        PATCHED
        + """
from psycopg2.pool import ThreadedConnectionPool
pool = ThreadedConnectionPool(1, 3, URL)
connections = [pool.getconn() for _ in range(3)]
assert len({ask(connection, "SELECT pg_backend_pid()") for connection in connections}) == 3
for connection in connections:
    pool.putconn(connection)
pool.closeall()
assert all(connection.closed for connection in connections)
""",
        env=services.env(),
    )


@both_drivers
def test_an_unreachable_server_names_all_three_ways_out(driver: str, tmp_path) -> None:
    message = run_python(
        program(
            driver,
            """
import socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    port = listener.getsockname()[1]
for url in (f"postgres://me:secret@127.0.0.1:{port}/x", "postgres://me:secret@/x?host=" + os.environ["NOWHERE"]):
    message = refused(psycopg2.OperationalError, url)
    for way_out in ("start a PostgreSQL server", "PUFF_DEFAULT_POSTGRES_URL", "PUFF_EMBEDDED=1"):
        assert way_out in message, message
    assert "secret" not in message.replace("postgres:password", ""), message
report(message)
""",
        ),
        env={"PUFF_DEFAULT_POSTGRES_URL": "", "NOWHERE": str(tmp_path)},
    )
    assert str(tmp_path) in message


def test_what_the_server_refuses_is_passed_on_unchanged(services) -> None:
    told = run_python(
        PATCHED
        + """
from psycopg2 import _psycopg
def twice(dsn):
    try:
        _psycopg._connect(dsn)
    except psycopg2.OperationalError as error:
        plain = error
    try:
        psycopg2.connect(dsn)
    except psycopg2.OperationalError as error:
        return [str(plain), str(error), type(plain) is type(error)]
report([twice(extensions.make_dsn(URL, **{name: value})) for name, value in [
    ("dbname", "there is no refused one"), ("user", "nobody_of_this_name")
]])
""",
        env=services.env(),
    )
    for plain, pooled, same_class in told:
        assert plain == pooled
        assert "PUFF" not in pooled
        assert same_class


def test_a_wrong_password_is_passed_on_unchanged() -> None:
    """Against a few lines that speak the protocol: the tests' own server trusts everybody."""
    message = run_python(
        PATCHED
        + """
import socket, struct
listener = socket.create_server(("127.0.0.1", 0))
def refuse():
    while True:
        client, _ = listener.accept()
        while True:
            (size,) = struct.unpack("!i", client.recv(4, socket.MSG_WAITALL))
            if client.recv(size - 4, socket.MSG_WAITALL) != struct.pack("!i", 80877103):  # SSLRequest
                break
            client.sendall(b"N")
        fields = b"SFATAL\\0VFATAL\\0C28P01\\0Mpassword authentication failed for user \\"me\\"\\0\\0"
        client.sendall(b"E" + struct.pack("!i", len(fields) + 4) + fields)
        client.close()
gevent.spawn(refuse)
port = listener.getsockname()[1]
report(refused(psycopg2.OperationalError, host="127.0.0.1", port=port, user="me", password="wrong", dbname="x"))
""",
    )
    assert 'FATAL:  password authentication failed for user "me"' in message
    assert "PUFF_EMBEDDED" not in message


def test_a_silent_server_is_a_time_out_with_the_ways_out() -> None:
    message = run_python(
        PATCHED
        + """
import socket
listener = socket.create_server(("127.0.0.1", 0))
started = time.monotonic()
message = refused(
    psycopg2.OperationalError, host="127.0.0.1", port=listener.getsockname()[1], user="me", connect_timeout=1
)
assert 0.9 < time.monotonic() - started < 3
listener.close()
report(message)
""",
    )
    assert "no answer in 1 s" in message
    assert "PUFF_EMBEDDED=1" in message


@pytest.mark.parametrize("how", ["keyword", "environment"])
def test_the_connect_timeout_of_a_connection_without_a_pool(how) -> None:
    """libpq leaves it to the caller as soon as waits are cooperative."""
    message = run_python(
        PATCHED
        + """
import socket
listener = socket.create_server(("127.0.0.1", 0))
options = {"connect_timeout": 1} if "PGCONNECT_TIMEOUT" not in os.environ else {}
started = time.monotonic()
message = refused(
    psycopg2.OperationalError, host="127.0.0.1", port=listener.getsockname()[1], user="me", pool=False, **options
)
assert 0.9 < time.monotonic() - started < 3
listener.close()
report(message)
""",
        env={"PGCONNECT_TIMEOUT": "1"} if how == "environment" else {},
    )
    assert "timeout expired" in message


def test_servers_sessions_ended_by_an_administrator(services) -> None:
    """pg_terminate_backend on an idle and on a leased connection."""
    run_python(
        PATCHED
        + """
OPTIONS = {"application_name": "ended", "pool": {"max_size": 2}}
admin = psycopg2.connect(URL, pool=False)
admin.autocommit = True
def end(session):
    assert ask(admin, "SELECT pg_terminate_backend(%s, 5000)", session)
idle, leased = psycopg2.connect(URL, **OPTIONS), psycopg2.connect(URL, **OPTIONS)
sessions = [ask(connection, "SELECT pg_backend_pid()") for connection in (idle, leased)]
idle.close()
del idle
gevent.sleep(0.05)
end(sessions[0])
again = psycopg2.connect(URL, **OPTIONS)
assert ask(again, "SELECT pg_backend_pid()") not in sessions
again.close()
del again
executioner = gevent.spawn_later(0.05, end, sessions[1])
try:
    ask(leased, "SELECT pg_sleep(30)")
except psycopg2.OperationalError as error:
    assert "terminating connection" in str(error), error
else:
    raise AssertionError("not ended")
executioner.join()
assert leased.closed
leased.close()
connections = [psycopg2.connect(URL, **OPTIONS) for _ in range(2)]
for connection in connections:
    assert ask(connection, "SELECT 1") == 1
""",
        env=services.env(),
    )


@pytest.fixture
def proxy(services) -> Any:
    proxy = PostgresProxy(services.postgres)
    yield proxy
    proxy.close()


def test_a_restarted_server_is_found_again(services, proxy: PostgresProxy) -> None:
    """All connections die at once; the next statements fail or not, the next leases work."""
    run_python(
        PATCHED
        + """
URL = os.environ["PROXY"]
connections = [psycopg2.connect(URL) for _ in range(5)]
for connection in connections:
    ask(connection, "SELECT 1")
    connection.close()
del connections, connection
gevent.sleep(0.1)
admin = psycopg2.connect(os.environ["PUFF_DEFAULT_POSTGRES_URL"], pool=False)
admin.autocommit = True
with admin.cursor() as cursor:
    cursor.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'restarted'"
    )
    assert len(cursor.fetchall()) == 5
gevent.sleep(0.05)
for _ in range(10):
    connection = psycopg2.connect(URL)
    assert ask(connection, "SELECT 1") == 1
    connection.close()
""",
        env={**services.env(), "PROXY": proxy.dsn + " application_name=restarted"},
    )


@pytest.mark.services
def test_a_pool_of_psycopg2_is_the_pool_of_its_connections(services) -> None:
    """Leases that it keeps would be lost to all others, and it could have no more of them than there are."""
    run_python(
        PATCHED
        + """
from psycopg2.pool import ThreadedConnectionPool
own = ThreadedConnectionPool(3, 5, URL)
connections = [own.getconn() for _ in range(5)]
for connection in connections:
    own.putconn(connection)
leased = psycopg2.connect(URL)  # the place is free
[stats] = puff_patch.stats().values()
assert (stats["pool_max"], stats["connections_num"]) == (1, 1), stats
# They wait cooperatively, and are one session each, as in any pool of psycopg2.
connection = own.getconn()
ticks = []
gevent.spawn(ticks.append, 1)
assert ask(connection, "SELECT 1 FROM pg_sleep(0.05)") == 1
assert ticks
pid = connection.get_backend_pid()
own.putconn(connection)
assert own.getconn().get_backend_pid() == pid
own.closeall()
leased.close()
puff_patch.unpatch_all()
own = ThreadedConnectionPool(1, 5, URL)
assert type(own.getconn()) is extensions.connection
own.closeall()
""",
        env={**services.env(), "PUFF_POSTGRES_POOL_MAX_SIZE": "1", "PUFF_POSTGRES_POOL_TIMEOUT": "5"},
    )
