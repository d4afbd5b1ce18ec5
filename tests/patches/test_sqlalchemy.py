"""SQLAlchemy's engines: one pool each, theirs or ours."""

from __future__ import annotations

from typing import Any

from support.process import run_python

HEAD = """
import puff_patch
puff_patch.patch_all()
import gevent, sqlalchemy
from sqlalchemy import event, text

from psycopg2.extensions import parse_dsn

SERVER = parse_dsn(os.environ["PUFF_DEFAULT_POSTGRES_URL"])

def engine(**options):
    return sqlalchemy.create_engine("postgresql+psycopg2://", connect_args=SERVER, **options)

def pids(engine, count):
    connections = [engine.connect() for _ in range(count)]
    found = {connection.scalar(text("SELECT pg_backend_pid()")) for connection in connections}
    for connection in connections:
        connection.close()
    return found
"""


def run(code: str, services: Any, **env: str) -> Any:
    return run_python(HEAD + code, env={**services.env(), **env})


def test_engines_that_keep_their_connections_starve_nobody(services) -> None:
    run(
        """
engines = [engine(pool_size=2) for _ in range(2)]
kept = [pids(one, 2) for one in engines]
assert [pids(one, 2) for one in engines] == kept, "its pool does not keep what it has"
# All that our pool may open.
leasing = engine(poolclass=sqlalchemy.NullPool)
assert len(pids(leasing, 2)) == 2
assert len(pids(engine(pool_size=2), 2)) == 2
[stats] = puff_patch.stats().values()
assert (stats["pool_size"], stats["requests_num"]) == (2, 2), stats
for one in engines:
    one.dispose()
""",
        services,
        PUFF_POSTGRES_POOL_MAX_SIZE="2",
        PUFF_POSTGRES_POOL_TIMEOUT="5",
    )


def test_its_pool_waits_cooperatively_and_keeps_its_meaning(services) -> None:
    run(
        """
seen = []
small = engine(pool_size=2, max_overflow=1, pool_timeout=20, pool_pre_ping=True)
event.listen(small, "connect", lambda *_: seen.append("connect"))
def ask(number):
    with small.connect() as connection:
        return connection.scalar(text(f"SELECT {number} FROM pg_sleep(0.02)"))
ticks = []
def tick():
    while True:
        ticks.append(1)
        gevent.sleep(0.001)
ticker = gevent.spawn(tick)
greenlets = [gevent.spawn(ask, number) for number in range(30)]
gevent.joinall(greenlets, timeout=30, raise_error=True)
assert [greenlet.value for greenlet in greenlets] == list(range(30))
assert len(ticks) > 30, ticks
ticker.kill()
assert 2 <= len(seen) <= 3 + 30, seen
# Pre-ping: a connection that the server has closed is replaced, and nobody sees an error.
dead = pids(small, 2)
with engine(poolclass=sqlalchemy.NullPool).connect() as other:
    for pid in dead:
        other.execute(text(f"SELECT pg_terminate_backend({pid}, 5000)"))
assert not pids(small, 2) & dead
assert puff_patch.stats() != {}
small.dispose()
puff_patch.unpatch_all()
assert len(pids(small, 2)) == 2, "an engine does not outlive the patch"
small.dispose()
""",
        services,
    )


def test_an_engine_may_ask_for_our_pool(services) -> None:
    run(
        """
SERVER["pool"] = {"max_size": 3}
asking = engine()
pids(asking, 2)
[stats] = puff_patch.stats().values()
assert stats["pool_max"] == 3, stats
""",
        services,
    )
