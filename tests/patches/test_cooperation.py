"""What blocks elsewhere lets other greenlets run: a second greenlet ticks meanwhile."""

from __future__ import annotations

import textwrap
import threading
import time

import pytest
from support.process import run_python
from support.servers import CountingHTTPServer

# Each blocks for at least PAUSE seconds, or until the test's server answers.
WAITS = {
    "sleep": "time.sleep(PAUSE)",
    "psycopg2": """
        import psycopg2
        connection = psycopg2.connect(os.environ["PUFF_DEFAULT_POSTGRES_URL"])
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(%s), 7", [PAUSE])
            assert cursor.fetchone()[1] == 7
        connection.close()
    """,
    "psycopg": """
        import psycopg
        assert psycopg.pq.__impl__ == os.environ.get("PSYCOPG_IMPL", "binary")
        with psycopg.connect(os.environ["PUFF_DEFAULT_POSTGRES_URL"]) as connection:
            assert connection.execute("SELECT pg_sleep(%s), 7", [PAUSE]).fetchone()[1] == 7
    """,
    "psycopg of its own": """
        import psycopg
        with psycopg.Connection.connect(os.environ["PUFF_DEFAULT_POSTGRES_URL"]) as connection:
            assert connection.execute("SELECT pg_sleep(%s), 7", [PAUSE]).fetchone()[1] == 7
    """,
    "psycopg_pool": """
        import psycopg_pool
        with psycopg_pool.ConnectionPool(os.environ["PUFF_DEFAULT_POSTGRES_URL"], min_size=1) as pool:
            with pool.connection() as connection:
                assert connection.execute("SELECT pg_sleep(%s), 7", [PAUSE]).fetchone()[1] == 7
                # full: the next waits for a place
                try:
                    pool.getconn(timeout=PAUSE)
                except psycopg_pool.PoolTimeout:
                    pass
        assert puff_patch.stats() == {}
    """,
    "redis": """
        import redis
        client = redis.Redis.from_url(os.environ["PUFF_DEFAULT_REDIS_URL"])
        assert client.blpop("nothing is ever here", timeout=PAUSE) is None
        client.close()
    """,
    "requests": """
        import requests
        assert requests.get(os.environ["SLOW"], timeout=20).status_code == 200
    """,
    "subprocess": """
        import subprocess
        nap = "import time; time.sleep(0.25); print(7)"
        done = subprocess.run([sys.executable, "-S", "-c", nap], capture_output=True)
        assert done.stdout == b"7\\n"
    """,
    "process": """
        import multiprocessing
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(PAUSE,))
        process.start()
        process.join()
        assert process.exitcode == 0
    """,
    "process pool": """
        # Three threads that read pipes and queues, in this process alone.
        import multiprocessing
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(abs, [-1, -2, -3]) == [1, 2, 3]
            assert len(pool.apply(bytes, [1_000_000])) == pool.apply(len, [bytes(1_000_000)]) == 1_000_000
            assert pool.map(time.sleep, [PAUSE, PAUSE]) == [None, None]
            pool.close()
            pool.join()
    """,
    "name lookup": """
        # getaddrinfo blocks in C; this one does for sure.
        import _socket, socket
        from gevent.monkey import get_original
        nap = get_original("time", "sleep")
        def slow(*args, **options):
            nap(PAUSE)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]
        _socket.getaddrinfo = slow
        assert socket.getaddrinfo("somewhere.invalid", 80)[0][4] == ("127.0.0.1", 80)
    """,
    "thread": """
        import threading
        thread = threading.Thread(target=time.sleep, args=(PAUSE,))
        thread.start()
        thread.join()
    """,
    "queue": """
        import queue
        try:
            queue.Queue().get(timeout=PAUSE)
        except queue.Empty:
            pass
    """,
    "select": """
        import select, socket
        left, right = socket.socketpair()
        assert select.select([left], [], [], PAUSE) == ([], [], [])
        left.close(), right.close()
    """,
    "event loop": """
        import asyncio
        assert asyncio.run(asyncio.sleep(PAUSE, 7)) == 7
    """,
    "async_to_sync": """
        import asyncio
        from asgiref.sync import async_to_sync, sync_to_async
        async def both():
            await asyncio.sleep(PAUSE / 2)
            await sync_to_async(time.sleep)(PAUSE / 2)
        async_to_sync(both)()
    """,
    "asyncio thread": """
        import asyncio
        from puff_patch.runtime import aio
        async def both():
            await asyncio.sleep(PAUSE / 2)
            await aio.run_on_hub(time.sleep, PAUSE / 2)
        aio.run_coroutine(both())
    """,
    "lock": """
        import threading
        lock = threading.Lock()
        lock.acquire()
        assert not lock.acquire(timeout=PAUSE)
    """,
}


@pytest.fixture
def dawdling_server(http_server: CountingHTTPServer) -> CountingHTTPServer:
    """Answers /slow a quarter of a second after it was asked."""

    def release() -> None:
        if http_server.arrived.acquire(timeout=30):
            time.sleep(0.25)
            http_server.release.set()

    threading.Thread(target=release, daemon=True).start()
    return http_server


@pytest.mark.parametrize("wait", WAITS)
def test_waiting_lets_others_run(wait: str, services, dawdling_server: CountingHTTPServer) -> None:
    longest, ticks = run_python(
        """
import puff_patch; puff_patch.patch_all()
import gevent
PAUSE = 0.25
moments = []
def tick():
    while True:
        moments.append(time.monotonic())
        gevent.sleep(0.005)
def wait():
"""
        + textwrap.indent(textwrap.dedent(WAITS[wait]), "    ")
        + """
ticker = gevent.spawn(tick)
gevent.sleep(0.01)
wait()
ended = time.monotonic()
# The last quarter of a second, when nothing is imported any more.
late = [moment for moment in moments if moment > ended - 0.2]
report([max(b - a for a, b in zip(late, [*late[1:], ended])), len(late)])
""",
        env={**services.env(), "SLOW": f"{dawdling_server.url}/slow"},
    )
    assert longest < 0.1
    assert ticks >= 8


def test_hundreds_of_waits_take_as_long_as_one(services) -> None:
    elapsed = run_python(
        """
import puff_patch; puff_patch.patch_all()
import gevent, redis, threading
client = redis.Redis.from_url(os.environ["PUFF_DEFAULT_REDIS_URL"], max_connections=200)
client.ping()
def wait():
    assert client.blpop("nothing is ever here", timeout=0.5) is None
threads = [threading.Thread(target=wait) for _ in range(200)]
started = time.monotonic()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
report(time.monotonic() - started)
client.close()
""",
        env=services.env(),
    )
    assert elapsed < 5


def test_the_greenlets_of_the_parent_end_in_a_child_that_multiprocessing_forks() -> None:
    run_python(
        """
import puff_patch; puff_patch.patch_all()
import gevent, multiprocessing, socket, subprocess, threading
fork = multiprocessing.get_context("fork")
parent = os.getpid()
def tick():
    try:
        while True:
            assert os.getpid() == parent, "goes on in the child"
            gevent.sleep(0.005)
    finally:
        assert os.getpid() == parent, "ends in the child"
gevent.spawn(tick)
threading.Thread(target=tick, daemon=True).start()
assert socket.getaddrinfo("localhost", 80)  # in gevent's native threads
def work(answers):
    import gc
    time.sleep(0.05)
    gc.collect()
    # What needs the hub works in the child, too.
    found = []
    thread = threading.Thread(target=lambda: found.append(bool(socket.getaddrinfo("localhost", 80))))
    thread.start()
    thread.join()
    subprocess.run([sys.executable, "-S", "-c", ""], check=True)
    with fork.Pool(1) as pool:
        answers.put((found, gevent.spawn(abs, -5).get(), pool.map(abs, [-3])))
def ask():
    answers = fork.Queue()
    process = fork.Process(target=work, args=(answers,))
    process.start()
    assert answers.get(timeout=20) == ([True], 5, [3])
    process.join(20)
    assert process.exitcode == 0
ask()
gevent.spawn(ask).get()
"""
    )
