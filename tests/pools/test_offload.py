"""COPY and large objects work on a cooperative connection, and other greenlets run meanwhile."""

from __future__ import annotations

import pytest
from support.process import TICKER, run_python

PRELUDE = (
    TICKER
    + """
import puff_patch; puff_patch.patch_all()
import io, json, os, gevent, psycopg2, psycopg2.extras
from gevent.event import Event
from psycopg2 import extensions, sql

def connect(**kwargs):
    return psycopg2.connect(os.environ["PUFF_DEFAULT_POSTGRES_URL"], pool=POOL, **kwargs)
"""
)


def run(services, code, pool=True):
    return run_python(PRELUDE.replace("POOL", repr(pool)) + code, env=services.env())


@pytest.mark.parametrize("pool", [True, False], ids=["leased", "own connection"])
def test_rows_go_in_and_out_while_other_greenlets_run(services, pool):
    found = run(
        services,
        """
connection = connect()
cursor = connection.cursor()
cursor.execute("CREATE TEMPORARY TABLE t (a int, b text)")
with Ticker() as ticker:
    cursor.copy_from(io.StringIO("".join(f"{n}\\tx{n}\\n" for n in range(100_000))), "t", columns=["a", "b"])
    copied_in = cursor.rowcount
    out = io.StringIO()
    cursor.copy_to(out, "t", sep=",", columns=["b", "a"])
    binary = io.BytesIO()
    cursor.copy_expert(sql.SQL("COPY {} TO STDOUT (FORMAT binary)").format(sql.Identifier("t")), binary)
lines = out.getvalue().splitlines()
connection.commit()
report(([copied_in, len(lines), lines[7], binary.getvalue()[:6].decode("latin-1"), ticker.count > 5,
                  isinstance(cursor, extensions.cursor)]))
""",
        pool,
    )
    assert found == [100_000, 100_000, "x7,7", "PGCOPY", True, True]


def test_the_file_is_used_in_the_calling_greenlet(services):
    # A file may wait cooperatively, and may rely on greenlet-locals.
    found = run(
        services,
        """
import threading
local = threading.local()
local.who = "caller"
class File:
    rows = ["1\\n", "2\\n", ""]
    def read(self, size):
        gevent.sleep(0.001)
        return self.rows.pop(0) if local.who == "caller" else ""
    def write(self, data):
        written.append((local.who, data.decode()))  # bytes, for it is no TextIOBase
written = []
cursor = connect().cursor()
cursor.execute("CREATE TEMPORARY TABLE t (a int)")
cursor.copy_from(File(), "t")
cursor.copy_to(File(), "t")
report((written))
""",
    )
    assert found == [["caller", "1\n"], ["caller", "2\n"]]


def test_errors_are_psycopg2s_own(services):
    found = run(
        services,
        """
class Broken:
    def read(self, size): raise ValueError("no more")
def failure(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, getattr(error, "pgcode", None), str(error).splitlines()[0]]
    finally:
        connection.rollback()
connection = connect()
cursor = connection.cursor()
cursor.execute("CREATE TEMPORARY TABLE t (a int)")
connection.commit()
seen = [
    failure(lambda: cursor.copy_from(io.StringIO("x\\n"), "t")),
    failure(lambda: cursor.copy_from(Broken(), "t")),
    failure(lambda: cursor.copy_from(object(), "t")),
    failure(lambda: cursor.copy_expert("COPY nowhere FROM STDIN", io.StringIO())),
]
cursor.close()
seen.append(failure(lambda: cursor.copy_to(io.StringIO(), "t")))
report(([seen, extensions.get_wait_callback() is not None]))
""",
    )
    assert found == [
        [
            ["InvalidTextRepresentation", "22P02", 'invalid input syntax for type integer: "x"'],
            ["QueryCanceled", "57014", "COPY from stdin failed: error in .read() call: ValueError no more"],
            ["TypeError", None, "argument 1 must have a .read() method"],
            ["UndefinedTable", "42P01", 'relation "nowhere" does not exist'],
            ["InterfaceError", None, "cursor already closed"],
        ],
        True,
    ]


def test_a_time_out_stops_the_servers_work_and_leaves_the_connection_usable(services):
    found = run(
        services,
        """
holder, waiter = connect(), connect()
with holder.cursor() as cursor:
    cursor.execute("DROP TABLE IF EXISTS offload_locked; CREATE TABLE offload_locked (a int)")
holder.commit()
holding = holder.cursor()
holding.execute("LOCK offload_locked IN ACCESS EXCLUSIVE MODE")
cursor = waiter.cursor()
try:
    with gevent.Timeout(0.2):
        cursor.copy_from(io.StringIO("1\\n"), "offload_locked")
    outcome = "copied"
except gevent.Timeout:
    outcome = "timed out"
holding.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'COPY%'")
waiting = holding.fetchone()[0]
holder.rollback()
waiter.rollback()
cursor.execute("SELECT 1")
report(([outcome, waiting, cursor.fetchone()]))
holder.cursor().execute("DROP TABLE offload_locked")
holder.commit()
""",
    )
    assert found == ["timed out", 0, [1]]


def test_a_copy_broken_off_at_any_moment_ends_and_leaves_the_connection_usable(services):
    """By a time-out while the file waits, while the server waits, and in between; and by an error of the file."""
    run(
        services,
        """
import itertools
COPY_OUT = "COPY (SELECT repeat('x', 1000) FROM generate_series(1, {})) TO STDOUT"
class Endless:
    def __init__(self, pause):
        self.pause = pause
    def read(self, size):
        gevent.sleep(self.pause)
        return "1\\n"
    def write(self, data):
        gevent.sleep(self.pause)
class Full:
    def write(self, data):
        raise OSError("disk full")
connection = connect()
cursor = connection.cursor()
cursor.execute("CREATE TEMPORARY TABLE t (a int)")
connection.commit()
def copy_in(pause):
    cursor.copy_from(Endless(pause), "t")
def copy_out(pause):
    cursor.copy_expert(COPY_OUT.format(1_000_000), Endless(pause))
for copy, pause, seconds in itertools.product((copy_in, copy_out), (0, 0.03), (0.02, 0.05, 0.055)):
    try:
        with gevent.Timeout(seconds):
            copy(pause)
    except gevent.Timeout:
        pass
    else:
        raise AssertionError("it ended by itself")
    connection.rollback()
    cursor.execute("SELECT 7")
    assert cursor.fetchone() == (7,)
try:
    cursor.copy_expert(COPY_OUT.format(1000), Full())
except OSError:
    pass
connection.rollback()
cursor.execute("SELECT 7")
assert cursor.fetchone() == (7,)
""",
    )


@pytest.mark.parametrize("pool", [True, False], ids=["leased", "own connection"])
def test_large_objects(services, pool):
    found = run(
        services,
        """
class Mine(extensions.lobject):
    pass
connection = connect()
data = os.urandom(2_000_000)
with Ticker() as ticker:
    made = connection.lobject(0, "wb", lobject_factory=Mine)
    written, oid = made.write(data), made.oid
    made.close()
    connection.commit()
    again = connection.lobject(oid, "rb")
    same = again.read() == data
    again.seek(3)
    part = again.read(4) == data[3:7]
    again.unlink()
    connection.commit()
gone = False
try:
    connection.lobject(oid, "rb")
except psycopg2.OperationalError:
    gone = True
report(([written, same, part, gone, isinstance(made, Mine), ticker.count > 0]))
""",
        pool,
    )
    assert found == [2_000_000, True, True, True, True, True]


@pytest.mark.parametrize("pool", [True, False], ids=["leased", "own connection"])
def test_a_large_object_ends_with_its_connection(services, pool):
    run(
        services,
        """
connection = connect()
made = connection.lobject(0, "wb")
made.write(b"mine")
connection.close()
assert made.closed
for call in (made.read, made.tell, made.unlink, lambda: made.write(b"more"), lambda: made.export("/nowhere")):
    try:
        call()
    except psycopg2.InterfaceError as error:
        assert "already closed" in str(error), error
    else:
        raise AssertionError("it reached the server")
made.close()
""",
        pool,
    )


def test_cursor_factories_keep_their_meaning(services):
    found = run(
        services,
        """
connection = connect(cursor_factory=psycopg2.extras.DictCursor)
cursor = connection.cursor()
cursor.execute("SELECT 1 AS one")
row = cursor.fetchone()
out = io.StringIO()
cursor.copy_expert("COPY (SELECT 2) TO STDOUT", out)
named = connection.cursor("named", psycopg2.extras.RealDictCursor)
named.execute("SELECT generate_series(1, 3) AS n")
report(([row["one"], out.getvalue(), [r["n"] for r in named],
                  isinstance(cursor, psycopg2.extras.DictCursor), type(cursor).__name__]))
""",
    )
    assert found == [1, "2\n", [1, 2, 3], True, "DictCursor"]
