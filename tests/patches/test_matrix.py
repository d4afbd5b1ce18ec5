"""Every patch, in every order of import, patch and unpatch."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.process import run_python
from support.servers import CountingHTTPServer

from puff_patch.patches import PATCHES

HERE = {"PYTHONPATH": str(Path(__file__).parent)}

# For each patch: whether it is in force, as a user would notice.
IN_FORCE = """
def sockets():
    import gevent, socket
    ticks = []
    gevent.spawn(ticks.append, 1)
    time.sleep(0.01)
    return bool(ticks)

def asyncio():
    import asyncio, gevent
    seen = []
    async def block():
        gevent.sleep(0.001)
    gevent.spawn(lambda: seen.append(asyncio._get_running_loop()))
    asyncio.run(block())
    return seen == [None]

def asgiref():
    import asyncio, gevent, threading
    from asgiref.sync import async_to_sync
    ticks = []
    async def wait():
        await asyncio.sleep(0.01)
    gevent.spawn(ticks.append, 1)
    async_to_sync(wait)()
    found = bool(ticks)
    while any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate()):
        gc.collect()  # asgiref's own thread ends with its executor
        time.sleep(0.001)
    return found

def anyio():
    import anyio, threading
    from anyio._backends import _asyncio as backend
    from puff_patch.runtime import aio
    if not puff_patch.is_patched("anyio") and threading.Thread not in backend.WorkerThread.__bases__:
        return False  # imported while threads were greenlets: its own class of threads is made of them for good
    async def find():
        return await anyio.to_thread.run_sync(threading.get_native_id)
    if puff_patch.is_patched("anyio"):
        # where no thread of anyio's would work once they are greenlets
        found = aio.run_coroutine(find())
        assert aio.stop()
    else:
        found = anyio.run(find)
    while any(thread.name == "AnyIO worker thread" for thread in threading.enumerate()):
        time.sleep(0.001)
    return found == threading.get_native_id()

def psycopg2():
    import psycopg2
    from psycopg2 import extensions
    pids = set()
    for _ in range(2):
        connection = psycopg2.connect(os.environ["PUFF_DEFAULT_POSTGRES_URL"])
        pids.add(connection.get_backend_pid())
        connection.close()
        del connection  # one that is still held is not leased again
    assert (len(pids) == 1) == (extensions.get_wait_callback() is not None), (pids, extensions.get_wait_callback())
    return len(pids) == 1

def psycopg():
    import gevent, psycopg
    ticks, pids = [], set()
    gevent.spawn(ticks.append, 1)
    for _ in range(2):
        with psycopg.connect(os.environ["PUFF_DEFAULT_POSTGRES_URL"]) as connection:
            pids.add(connection.execute("SELECT pg_backend_pid() FROM pg_sleep(0.01)").fetchone()[0])
        connection.close()
    assert (len(pids) == 1) == bool(ticks), (pids, ticks)
    return len(pids) == 1

def redis():
    import redis
    client = redis.Redis.from_url(os.environ["PUFF_DEFAULT_REDIS_URL"])
    assert client.ping()
    try:
        return type(client.connection_pool) is not redis.ConnectionPool
    finally:
        client.close()
        client.connection_pool.disconnect()

def requests():
    import requests
    ports = set()
    for _ in range(2):
        response = requests.get(os.environ["HTTP_URL"], stream=True, timeout=10)
        ports.add(response.raw.connection.sock.getsockname())
        response.content
    return len(ports) == 1

def configure_django():
    from django.conf import settings
    if not settings.configured:
        settings.configure()

def django():
    configure_django()
    from django.core.cache.backends.redis import RedisCache
    url = os.environ["PUFF_DEFAULT_REDIS_URL"]
    one, other = RedisCache(url, {}), RedisCache(url, {})
    one.set("puff-test-matrix", 1)
    assert other.get("puff-test-matrix") == 1
    other.delete("puff-test-matrix")
    try:
        return one._cache is other._cache
    finally:
        for cache in (one, other):
            cache._cache.get_client().connection_pool.disconnect()

def django_redis():
    configure_django()
    import redis
    from django_redis.pool import ConnectionFactory
    factory = ConnectionFactory({})
    client = factory.connect(os.environ["PUFF_DEFAULT_REDIS_URL"])
    assert client.ping()
    try:
        return type(client.connection_pool) is not redis.ConnectionPool
    finally:
        client.connection_pool.disconnect()
        factory._pools.clear()

def puff_alias():
    try:
        import puff
    except ModuleNotFoundError:
        return False
    import puff.json
    return puff.json is puff_patch.json

def sqlalchemy():
    import types
    from puff_patch.patches.base import pooled_elsewhere
    from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
    asks = types.SimpleNamespace(paramstyle="pyformat", __version__="2.9.10", connect=pooled_elsewhere.get)
    return PGDialect_psycopg2(dbapi=asks).connect()
"""


@pytest.mark.parametrize("imported", ["before", "after"])
@pytest.mark.parametrize("name", [*PATCHES, "all"])
def test_import_patch_and_unpatch_in_any_order(
    name: str, imported: str, services, http_server: CountingHTTPServer
) -> None:
    run_python(
        IN_FORCE
        + f"""
import gc, gevent, warnings
import interpreter_state as state
import puff_patch
from puff_patch.patches import PATCHES

NAMES = list(PATCHES) if {name!r} == "all" else [{name!r}]
MODULES = [module for name in NAMES for module in state.LIBRARIES[name]]
state.import_all(state.STDLIB)
state.logging.basicConfig(stream=open(os.devnull, "w"))
if {imported!r} == "before":
    if any(name.startswith("django") for name in NAMES):
        configure_django()
    state.import_all(MODULES)
    watched = state.STDLIB + MODULES
else:
    assert not set(MODULES) & set(sys.modules)
    watched = state.STDLIB

def in_force():
    # Every patch must have a function of its name above, so that none is left out.
    return [name for name in NAMES if globals()[name]()]

switches = {{name: name in NAMES for name in PATCHES}}
before = state.snapshot(watched)
# twice the whole round: patch, patch again, use, unpatch, unpatch again
for round in range(2):
    with warnings.catch_warnings():
        # too late for the libraries imported already; not what this is about
        warnings.simplefilter("ignore", puff_patch.PatchedTooLateWarning)
        puff_patch.patch_all(**switches)
        patched = state.snapshot(watched)
        puff_patch.patch_all(**switches)
    state.assert_same(patched, state.snapshot(watched))
    assert in_force() == NAMES, in_force()
    puff_patch.unpatch_all()
    puff_patch.unpatch_all()
    state.assert_same(before, state.snapshot(watched))
    assert state.left_behind(state.STDLIB + MODULES) == []
    gevent.sleep(0.001)  # the hub drops what has ended
    gc.collect()
    assert puff_patch.stats() == {{}}, "a pool outlives its patch"
    assert in_force() == []
    state.assert_blocking()
    # what the library's own import added is there to stay
    watched = state.STDLIB + MODULES
    before = state.snapshot(watched)
""",
        env={**services.env(), **HERE, "HTTP_URL": http_server.url},
    )
