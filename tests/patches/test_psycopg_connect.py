"""`psycopg.connect` after `patch_all`: what is psycopg 3's own; the rest is in test_psycopg2_connect.py."""

from __future__ import annotations

import ctypes.util

import pytest
from support.process import run_python

PATCHED = """
import puff_patch; puff_patch.patch_all()
import gevent, psycopg
URL = os.environ["PUFF_DEFAULT_POSTGRES_URL"]
def pid(connection):
    return connection.execute("SELECT pg_backend_pid()").fetchone()[0]
def refused(exception, *args, **options):
    try:
        psycopg.connect(*args, **options)
    except exception as error:
        return str(error)
    raise AssertionError("it was not refused")
"""


@pytest.mark.parametrize(("implementation", "imported"), [("binary", "before"), ("python", "after")])
def test_every_wait_is_cooperative(implementation: str, imported: str, services) -> None:
    """Also if psycopg was there first, with its waits in C and its native locks; and psycopg_pool on top."""
    if implementation == "python" and ctypes.util.find_library("pq") is None:
        pytest.skip("needs a libpq of the system")
    first = "import psycopg" if imported == "before" else ""
    run_python(
        f"""
import warnings
warnings.simplefilter("ignore", RuntimeWarning)  # patched too late
{first}
"""
        + PATCHED
        + """
assert psycopg.pq.__impl__ == os.environ["PSYCOPG_IMPL"]
moments = []
def tick():
    while True:
        moments.append(time.monotonic())
        gevent.sleep(0.005)
gevent.spawn(tick)
gevent.sleep(0.01)

# An unreachable server that never answers: connecting lets others run, and ends in time.
import socket
with socket.create_server(("127.0.0.1", 0)) as deaf:
    port = deaf.getsockname()[1]
    started = time.monotonic()
    message = refused(psycopg.OperationalError, host="127.0.0.1", port=port, pool={"timeout": 0.3})
    assert 0.25 < time.monotonic() - started < 3
    assert len(moments) >= 10, len(moments)
    assert "PUFF_EMBEDDED=1" in message, message

def sleeps(connection):
    connection.execute("SELECT pg_sleep(0.1)")
def side(connection):
    with connection.cursor("side") as cursor:
        cursor.itersize = 2
        cursor.execute("SELECT n, pg_sleep(0.01) FROM generate_series(1, 10) n")
        assert [n for n, _ in cursor] == list(range(1, 11))
def copies(connection):
    slow = "COPY (SELECT n FROM generate_series(1, 9) n, LATERAL pg_sleep(0.01 + n * 0)) TO STDOUT"
    with connection.cursor() as cursor, cursor.copy(slow) as copy:
        assert sum(1 for _ in copy.rows()) == 9
def pipelines(connection):
    with connection.pipeline():
        for _ in range(3):
            connection.execute("SELECT pg_sleep(0.03)")
def shares(connection):
    # The second waits for the connection's lock, and the hub goes on.
    both = [gevent.spawn(connection.execute, "SELECT pg_sleep(0.05)") for _ in range(2)]
    gevent.joinall(both, raise_error=True)
def listens(connection):
    connection.commit()
    connection.autocommit = True
    connection.execute("LISTEN gossip")
    def tell():
        gevent.sleep(0.1)
        with psycopg.connect(URL, autocommit=True) as other:
            other.execute("NOTIFY gossip, 'psst'")
    gevent.spawn(tell)
    [notice] = connection.notifies(timeout=5, stop_after=1)
    assert notice.payload == "psst"

for connection in (psycopg.connect(URL), psycopg.Connection.connect(URL)):
    with connection:
        for deed in (sleeps, side, copies, pipelines, shares, listens):
            before = len(moments)
            deed(connection)
            assert len(moments) - before >= 4, (deed, len(moments) - before)
        # Cancelling, from another greenlet.
        sleeper = gevent.spawn(connection.execute, "SELECT pg_sleep(30)")
        gevent.sleep(0.05)
        connection.cancel()
        try:
            sleeper.get(timeout=5)
        except psycopg.errors.QueryCanceled:
            pass
        else:
            raise AssertionError("not cancelled")
""",
        env={**services.env(), "PSYCOPG_IMPL": implementation},
        quiet=False,  # gevent reports the greenlet that was cancelled
    )


def test_what_is_not_pooled(services) -> None:
    run_python(
        PATCHED
        + """
import asyncio
from psycopg.conninfo import make_conninfo
class Mine(psycopg.Connection):
    pass
for connection in (
    psycopg.connect(URL, pool=False),
    psycopg.connect(conninfo=URL, pool=False, autocommit=True),
    psycopg.Connection.connect(URL),
    Mine.connect(URL),
    psycopg.connect(make_conninfo(URL, replication="database"), autocommit=True),
):
    assert type(connection) is (Mine if isinstance(connection, Mine) else psycopg.Connection)
    connection.close()
    assert connection.closed

async def work():
    async with await psycopg.AsyncConnection.connect(URL) as connection:
        cursor = await connection.execute("SELECT 7")
        return await cursor.fetchone()
# asyncio has a thread of its own in a program of greenlets
assert gevent.get_hub().threadpool.apply(lambda: asyncio.run(work())) == (7,)
assert puff_patch.stats() == {}, puff_patch.stats()
os.environ["PUFF_POSTGRES_POOL"] = "0"
connection = psycopg.connect(URL)
assert type(connection) is psycopg.Connection
connection.close()
os.environ["PUFF_POSTGRES_POOL"] = "1"
os.environ["PUFF_POSTGRES_UNPOOLED"] = "*/postgres"
psycopg.connect(URL).close()
assert puff_patch.stats() == {}, puff_patch.stats()
""",
        env=services.env(),
    )


def test_arguments_are_those_of_psycopg(services) -> None:
    run_python(
        PATCHED
        + """
from psycopg import rows
from psycopg.conninfo import conninfo_to_dict
plain = psycopg.Connection.connect
for args, options in [(("host=nowhere=",), {}), ((), {"hots": "nowhere"}), (("", ""), {}), ((7,), {})]:
    outcomes = []
    for connect in (plain, psycopg.connect):
        try:
            connect(*args, **options)
        except Exception as error:
            outcomes.append(type(error))
    assert len(outcomes) == 2 and outcomes[0] is outcomes[1], (args, options, outcomes)
assert "did you mean 'max_size'?" in refused(puff_patch.config.ConfigError, URL, pool={"max_sice": 8})
connection = psycopg.connect(
    application_name="mine", connect_timeout=7, autocommit=True, row_factory=rows.dict_row, prepare_threshold=None,
    cursor_factory=psycopg.ClientCursor, options=None, **conninfo_to_dict(URL),
)
assert connection.execute("SHOW application_name").fetchone() == {"application_name": "mine"}
assert connection.autocommit and connection.prepare_threshold is None
connection.close()
assert sum(stats["connections_num"] - stats["connections_errors"] for stats in puff_patch.stats().values()) == 1
# A setup of the pool's, and what else libpq takes from the environment, tell pools apart.
os.environ["PGAPPNAME"] = "theirs"
with psycopg.connect(URL, pool={"setup": "SET TIME ZONE 'Asia/Tokyo'"}) as connection:
    assert connection.info.parameter_status("TimeZone") == "Asia/Tokyo"
    assert connection.info.get_parameters()["application_name"] == "theirs"
""",
        env=services.env(),
    )


def test_what_the_server_refuses_is_passed_on_unchanged(services) -> None:
    told = run_python(
        PATCHED
        + """
from psycopg.conninfo import make_conninfo
CONNECTS = psycopg.Connection.connect, psycopg.connect
def said(connect, conninfo):
    try:
        connect(conninfo)
    except psycopg.OperationalError as error:
        return [type(error).__name__, str(error)]
report([
    [said(connect, make_conninfo(URL, **{name: value})) for connect in CONNECTS]
    for name, value in [("dbname", "there is no refused one"), ("user", "nobody_of_this_name")]
])
""",
        env=services.env(),
    )
    for plain, pooled in told:
        assert plain == pooled
        assert "PUFF" not in pooled[1]


def test_psycopg_pool_keeps_connections_of_its_own(services) -> None:
    """psycopg_pool keeps connections of its own; a pool by another library works on leases."""
    run_python(
        PATCHED
        + """
import psycopg_pool
def ask(pool):
    with pool.connection() as connection:
        return connection.execute("SELECT pg_backend_pid(), pg_sleep(0.005)").fetchone()[0]
check = psycopg_pool.ConnectionPool.check_connection
with psycopg_pool.ConnectionPool(URL, min_size=1, max_size=3, check=check) as pool:
    greenlets = [gevent.spawn(ask, pool) for _ in range(50)]
    gevent.joinall(greenlets, raise_error=True, timeout=20)
    assert 1 <= len({greenlet.value for greenlet in greenlets}) <= 3
    # Killed in the midst of a query: the pool gets it back, sees that it is broken and makes another.
    victim = gevent.spawn(lambda: pool.connection().__enter__().execute("SELECT pg_sleep(30)"))
    gevent.sleep(0.1)
    victim.kill()
    greenlets = [gevent.spawn(ask, pool) for _ in range(20)]
    gevent.joinall(greenlets, raise_error=True, timeout=20)
with psycopg_pool.NullConnectionPool(URL, max_size=2) as pool:
    gevent.joinall([gevent.spawn(ask, pool) for _ in range(10)], raise_error=True, timeout=20)
assert puff_patch.stats() == {}, puff_patch.stats()
""",
        env=services.env(),
    )


def test_a_fork_leaves_the_parents_running_query_alone(services) -> None:
    run_python(
        PATCHED
        + """
held = psycopg.connect(URL)
worker = gevent.spawn(lambda: held.execute("SELECT 42 FROM pg_sleep(0.5)").fetchone())
while held.info.transaction_status != psycopg.pq.TransactionStatus.ACTIVE or not held.lock.locked():
    gevent.sleep(0.01)
gevent.sleep(0.05)
child = os.fork()
if not child:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the copy of the worker finds itself cut off
    held.close()
    assert held.closed
    with psycopg.connect(URL) as mine:
        assert mine.execute("SELECT 1").fetchone() == (1,)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert worker.get(timeout=10) == (42,)
held.close()
""",
        env=services.env(),
    )
