"""What psycopg2's documentation shows, done on leases while other greenlets run."""

from __future__ import annotations

from support.process import TICKER, run_python

PATCHED = (
    TICKER
    + """
import puff_patch; puff_patch.patch_all()
import datetime, io, ipaddress, pickle, select, threading, uuid
import gevent, psycopg2, psycopg2.extras
from psycopg2 import extensions
URL = os.environ["PUFF_DEFAULT_POSTGRES_URL"]
def connect(**options):
    return psycopg2.connect(URL, **options)
def ask(connection, sql, *args):
    with connection.cursor() as cursor:
        cursor.execute(sql, args)
        return cursor.fetchone()[0]
def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never came"
        gevent.sleep(0.005)
"""
)


def run(services, code: str, **env: str):
    return run_python(PATCHED + code, env={**services.env(), **env})


def test_notifications_in_the_documented_loop(services) -> None:
    """The loop waits in `select`, which is cooperative; the channel is forgotten with the lease."""
    run(
        services,
        """
listener = connect(pool={"max_size": 1})
listener.set_isolation_level(extensions.ISOLATION_LEVEL_AUTOCOMMIT)
session = ask(listener, "SELECT pg_backend_pid()")
listener.cursor().execute("LISTEN puff_api;")
received = []
def loop():
    while len(received) < 2:
        if select.select([listener], [], [], 5) == ([], [], []):
            raise AssertionError("nothing came")
        listener.poll()
        while listener.notifies:
            notify = listener.notifies.pop(0)
            received.append((notify.channel, notify.payload))
with Ticker() as ticker:
    waiting = gevent.spawn(loop)
    sender = connect()
    sender.autocommit = True
    for payload in ("one", "two"):
        gevent.sleep(0.05)
        sender.cursor().execute(f"NOTIFY puff_api, '{payload}'")
    waiting.get(timeout=10)
assert received == [("puff_api", "one"), ("puff_api", "two")]
assert ticker.count > 10
listener.close()
del listener, waiting
gevent.sleep(0.05)
again = connect(pool={"max_size": 1})
assert ask(again, "SELECT pg_backend_pid()") == session
assert ask(again, "SELECT count(*) FROM pg_listening_channels()") == 0
""",
    )


def test_two_phase_commit(services) -> None:
    """A transaction that was prepared and left behind outlives its lease, and any other can end it."""
    run(
        services,
        """
first = connect()
with first.cursor() as cursor:
    cursor.execute("SHOW max_prepared_transactions")
    if cursor.fetchone() == ("0",):
        sys.exit(0)  # a server of the user's own that forbids it
    cursor.execute("DROP TABLE IF EXISTS puff_tpc; CREATE TABLE puff_tpc (n int)")
first.commit()
def prepare(n):
    connection = connect()
    connection.tpc_begin(connection.xid(4711, f"puff-{n}", "branch"))
    connection.cursor().execute("INSERT INTO puff_tpc VALUES (%s)", (n,))
    connection.tpc_prepare()
    assert connection.status == extensions.STATUS_PREPARED
    return connection
def mine(connection):
    return sorted(xid.gtrid for xid in connection.tpc_recover() if (xid.gtrid or "").startswith("puff-"))
finished = prepare(1)
finished.tpc_commit()
for n in (2, 3):
    prepare(n).close()
begun = connect()
begun.tpc_begin("puff-4")
begun.cursor().execute("INSERT INTO puff_tpc VALUES (4)")
begun.close()  # not prepared: rolled back as any other
assert mine(first) == ["puff-2", "puff-3"], first.tpc_recover()
first.rollback()
xids = {xid.gtrid: xid for xid in first.tpc_recover()}
first.rollback()
first.tpc_commit(xids["puff-2"])
first.tpc_rollback(xids["puff-3"])
assert mine(first) == []
with first.cursor() as cursor:
    cursor.execute("SELECT n FROM puff_tpc ORDER BY n")
    assert cursor.fetchall() == [(1,), (2,)]
    cursor.execute("DROP TABLE puff_tpc")
first.commit()
""",
    )


def test_cancel_from_another_greenlet(services) -> None:
    run(
        services,
        """
admin = connect(pool=False)
admin.autocommit = True
for pool in (True, False):
    connection = connect(pool=pool)
    session = connection.info.backend_pid
    outcome = []
    def work():
        try:
            ask(connection, "SELECT pg_sleep(30)")
        except extensions.QueryCanceledError as error:
            outcome.append(error.pgcode)
    worker = gevent.spawn(work)
    # Until the server has begun there is nothing to cancel.
    wait_for(lambda: ask(admin, "SELECT state FROM pg_stat_activity WHERE pid = %s", session) == "active")
    connection.cancel()
    worker.get(timeout=10)
    assert outcome == ["57014"], outcome
    connection.rollback()
    assert ask(connection, "SELECT pg_backend_pid()") == session
    connection.close()
connecting = connect(async_=1)
try:
    connecting.cancel()
except psycopg2.OperationalError as error:
    assert "underway" in str(error)
else:
    raise AssertionError("there is nothing to cancel yet")
psycopg2.extras.wait_select(connecting)
connecting.close()
""",
    )


def test_named_cursors(services) -> None:
    run(
        services,
        """
connection = connect()
rows = connection.cursor("rows")
rows.itersize = 7
rows.execute("SELECT generate_series(1, 50)")
assert [n for (n,) in rows] == list(range(1, 51))
rows.close()
scrolled = connection.cursor("scrolled", scrollable=True)
scrolled.execute("SELECT generate_series(1, 50)")
assert scrolled.fetchmany(3) == [(1,), (2,), (3,)]
scrolled.scroll(-2)
assert scrolled.fetchone() == (2,)
scrolled.scroll(40, mode="absolute")
assert scrolled.fetchone() == (41,) and len(scrolled.fetchall()) == 9
scrolled.close()
with connection:
    held = connection.cursor("held", withhold=True, cursor_factory=psycopg2.extras.RealDictCursor)
    held.execute("SELECT generate_series(1, 3) AS n")
assert [row["n"] for row in held] == [1, 2, 3]
held.close()
session = ask(connection, "SELECT pg_backend_pid()")
connection.close()
del connection, rows, scrolled, held
gevent.sleep(0.05)
again = connect()
assert ask(again, "SELECT pg_backend_pid()") == session, "all its cursors were closed: it was as good as new"
assert ask(again, "SELECT count(*) FROM pg_cursors") == 0
""",
    )


def test_types_registered_on_a_lease_end_with_it(services) -> None:
    """uuid, json, ranges, addresses and composites, with a connection or a cursor as their scope."""
    run(
        services,
        """
admin = connect(pool=False)
admin.autocommit = True
admin.cursor().execute("DROP TYPE IF EXISTS puff_pair; CREATE TYPE puff_pair AS (a int, b text)")
SQL = "SELECT '6d0d5d2c-5a60-4d0e-9f4c-000000000001'::uuid, '{}'::json, '127.0.0.1/32'::inet, (1,'x')::puff_pair"
def fetch(scope):
    with (scope if isinstance(scope, extensions.cursor) else scope.cursor()) as cursor:
        cursor.execute(SQL)
        return cursor.fetchone()
def register(scope):
    psycopg2.extras.register_uuid(conn_or_curs=scope)
    psycopg2.extras.register_default_json(scope, loads=lambda text: "mine")
    if isinstance(scope, extensions.cursor):
        address = extensions.new_type((869,), "INET", lambda text, cursor: ipaddress.ip_address(text))
        extensions.register_type(address, scope)
    else:
        psycopg2.extras.register_ipaddress(scope)
    psycopg2.extras.register_composite("puff_pair", scope)
connection = connect()
plain = fetch(connection)
session = connection.info.backend_pid
assert plain == ("6d0d5d2c-5a60-4d0e-9f4c-000000000001", {}, "127.0.0.1", "(1,x)"), plain
for scope in (connection.cursor(), connection):
    register(scope)
    found = fetch(scope)
    assert isinstance(found[0], uuid.UUID) and found[1] == "mine" and found[3].b == "x", found
    if scope is not connection:
        assert fetch(connection) == plain, "the scope was one cursor"
connection.close()
del connection, scope
gevent.sleep(0.05)
again = connect()
assert again.info.backend_pid == session
assert fetch(again) == plain
""",
    )


def test_errors_tell_what_the_server_told(services) -> None:
    run(
        services,
        """
connection = connect()
cursor = connection.cursor()
cursor.execute("CREATE TEMP TABLE puff_errors (n int CONSTRAINT positive CHECK (n > 0))")
try:
    cursor.execute("INSERT INTO puff_errors VALUES (-1)")
except psycopg2.errors.CheckViolation as error:
    assert error.pgcode == "23514" and error.cursor is cursor
    assert error.diag.constraint_name == "positive" and error.diag.severity == "ERROR"
    assert "-1" in error.diag.message_detail
    thawed = pickle.loads(pickle.dumps(error))
    assert type(thawed) is type(error) and thawed.pgcode == "23514" and str(thawed) == str(error)
else:
    raise AssertionError("it was not refused")
connection.rollback()
assert ask(connection, "SELECT 1") == 1
""",
    )


def test_a_native_thread_leases_from_the_same_pool(services) -> None:
    """gevent's thread pool runs real threads, each with a hub of its own."""
    run(
        services,
        """
import os
from gevent.threadpool import ThreadPool
def session():
    connection = connect(pool={"max_size": 2})
    try:
        return ask(connection, "SELECT pg_backend_pid() FROM pg_sleep(0.02)")
    finally:
        connection.close()
native_threads = len(os.listdir("/proc/self/task"))
threads = ThreadPool(4)
with Ticker() as ticker:
    tasks = [threads.spawn(session) for _ in range(12)] + [gevent.spawn(session) for _ in range(12)]
    sessions = {task.get() for task in tasks}
assert ticker.count > 10
(stats,) = puff_patch.stats().values()
assert stats["pool_size"] <= 2 and stats["requests_errors"] == 0, stats
threads.kill()
# That returns before they have destroyed their hubs, and a native thread that the interpreter's end meets in a
# hub crashes it: gevent alone does so too (2 of 150 runs of a ThreadPool whose tasks sleep).
while len(os.listdir("/proc/self/task")) > native_threads:
    gevent.sleep(0.001)
""",
    )


def test_a_replication_stream(services) -> None:
    """psycopg2 refuses it to cooperative connections; here the stream is consumed while other greenlets run."""
    run(
        services,
        """
writer = connect()
writer.autocommit = True
class Enough(Exception):
    pass
def consume(message):
    assert isinstance(message, psycopg2.extras.ReplicationMessage) and message.cursor is stream
    received.append(len(message.payload))
    message.cursor.send_feedback(flush_lsn=message.data_start)
    if b"puff was here" in message.payload:
        raise Enough
def write():
    gevent.sleep(0.1)
    writer.cursor().execute("SELECT pg_logical_emit_message(false, 'puff', 'puff was here', true)")
def start():
    connection = connect(connection_factory=psycopg2.extras.PhysicalReplicationConnection)
    cursor = connection.cursor()
    assert isinstance(cursor, psycopg2.extras.ReplicationCursor)
    cursor.start_replication(start_lsn=ask(writer, "SELECT pg_current_wal_flush_lsn()::text"), decode=False)
    return connection, cursor
received = []
connection, stream = start()
with Ticker() as ticker:
    gevent.spawn(write)
    try:
        stream.consume_stream(consume, keepalive_interval=1)
    except Enough:
        pass
assert received and ticker.count > 20
connection.close()
connection, stream = start()
try:
    with gevent.Timeout(0.2):
        stream.consume_stream(lambda message: None)
except gevent.Timeout:
    pass
connection.close()
# By hand, as an asynchronous program does.
connection, stream = start()
write()
while (message := stream.read_message()) is None or b"puff was here" not in message.payload:
    if message is None:
        assert select.select([stream], [], [], 5)[0]
connection.close()
try:
    stream.read_message()
except psycopg2.InterfaceError:
    pass
else:
    raise AssertionError("closed, and yet it reads")
assert extensions.get_wait_callback() is not None
""",
    )


def test_a_stand_in_for_psycopg2s_connect_sees_what_the_program_asks_for(services) -> None:
    """Tests and tracers replace ``psycopg2._connect``, which ``psycopg2.connect`` calls."""
    run(
        services,
        """
from unittest import mock
with mock.patch.object(psycopg2, "_connect") as stand_in:
    assert psycopg2.connect("dbname=x", user="me") is stand_in.return_value
assert stand_in.call_args == mock.call("dbname=x user=me", connection_factory=None)
assert ask(connect(), "SELECT 1") == 1
""",
    )


def test_connection_factories_that_connect_as_they_like(services) -> None:
    """Whatever their __init__ does, it means what it means without a pool, and no connection is left behind."""
    run(
        services,
        """
class Renamed(extensions.connection):
    def __init__(self, dsn, **kwargs):
        super().__init__(extensions.make_dsn(dsn, application_name="puff renamed"), **kwargs)
class Direct(extensions.connection):
    def __init__(self, *args, **kwargs):
        extensions.connection.__init__(self, *args, **kwargs)
        self.mine = 1
class Never(extensions.connection):
    def __init__(self, *args, **kwargs):
        pass
class Polite(extensions.connection):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mine = 1
admin = connect(pool=False)
admin.autocommit = True
def sessions():
    return ask(admin, "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'puff %%'")
for _ in range(3):
    renamed = connect(connection_factory=Renamed)
    assert ask(renamed, "SHOW application_name") == "puff renamed"
    renamed.close()
    direct = connect(connection_factory=Direct)
    assert ask(direct, "SELECT 1") == 1 and direct.mine == 1 and isinstance(direct, Direct)
    direct.close()
    assert direct.closed
    never = connect(connection_factory=Never)
    assert never.info.dbname is None and never.info.status == 1  # CONNECTION_BAD
    polite = connect(connection_factory=Polite)
    assert polite.mine == 1
    polite.close()
puff_patch.close_pools()
del polite
wait_for(lambda: sessions() == 1)
""",
        PGAPPNAME="puff factories",
    )
