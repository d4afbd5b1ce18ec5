"""Django's Redis cache over shared clients: its own backend unmodified, and ours."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from support.process import run_python

BACKENDS = ["django.core.cache.backends.redis.RedisCache", "django_backend.cache.RedisCache"]
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def run(code: str, services: Any, backend: str = BACKENDS[1], **env: str) -> Any:
    """``BACKEND`` and a ``TAG`` of this test's own are there; keys begin with the tag."""
    head = f"""
BACKEND, TAG = {backend!r}, 'puff-test-{uuid.uuid4().hex[:12]}'
import puff_patch
puff_patch.patch_all()
import gevent, redis
from django_process import *
from django.core.cache import cache, caches

def entry(**more):
    return {{"BACKEND": BACKEND, "LOCATION": REDIS_URL, "KEY_PREFIX": TAG, "TIMEOUT": 60, **more}}
admin = redis.Redis.from_url(REDIS_URL, decode_responses=True)
most = 0
def connections():
    global most
    found = sum(client["name"] == TAG for client in admin.client_list())
    most = max(most, found)
    return found
def watch():
    while True:
        connections()
        gevent.sleep(0.005)
"""
    return run_python(head + code, env={**services.env(), "PYTHONPATH": str(Path(__file__).parent), **env})


@both_backends
def test_hundreds_of_greenlets_share_a_few_connections(backend: str, services) -> None:
    run(
        """
options = {"client_name": TAG, "max_connections": 5}
# A second alias with the same server and options shares the pool, but not the keys.
other = entry(KEY_PREFIX=TAG + "-2", OPTIONS=dict(options))
setup(caches={"default": entry(OPTIONS=dict(options)), "other": other})
watcher = gevent.spawn(watch)
def use(n):
    for alias in ("default", "other"):
        caches[alias].set(f"k{n}", f"{alias}{n}")
        assert caches[alias].get(f"k{n}") == f"{alias}{n}"
    return 1
greenlets = [gevent.spawn(use, n) for n in range(500)]
gevent.joinall(greenlets, timeout=30, raise_error=True)
assert sum(greenlet.value for greenlet in greenlets) == 500
watcher.kill()
connections()
assert 1 <= most <= 5, most
cache.delete_many(f"k{n}" for n in range(500))
assert cache.get("k1") is None
assert caches["other"].get("k1") == "other1"
caches["other"].delete_many(f"k{n}" for n in range(500))
""",
        services,
        backend,
    )


@both_backends
def test_the_whole_interface_works(backend: str, services) -> None:
    run(
        """
setup(caches={"default": entry()})
assert cache.add("a", 1) and not cache.add("a", 2)
assert cache.incr("a") == 2 and cache.decr("a") == 1
cache.set_many({"b": {"x": [1]}, "c": None})
assert cache.get_many(["a", "b", "c", "d"]) == {"a": 1, "b": {"x": [1]}, "c": None}
assert cache.get_or_set("d", lambda: 4) == 4 and cache.has_key("d") and "e" not in cache
assert cache.touch("d", 0) and cache.get("d", "gone") == "gone"
cache.delete_many(["a", "b", "c"])
cache.close()
assert cache.get("a") is None
""",
        services,
        backend,
    )


@both_backends
def test_a_full_pool_waits_and_then_says_what_to_raise(backend: str, services) -> None:
    run(
        """
setup(caches={"default": entry(OPTIONS={"client_name": TAG, "max_connections": 1, "timeout": 0.2})})
client = cache._cache.get_client()
held = client.connection_pool.get_connection()
try:
    cache.get("x")
except redis.ConnectionError as error:
    assert type(error).__name__ == "PoolTimeout", repr(error)
    for part in ("0.2 s", "max_size", "PUFF_REDIS_POOL_MAX_SIZE", "max_connections"):
        assert part in str(error), (part, str(error))
else:
    raise AssertionError("a second connection")
client.connection_pool.release(held)
assert cache.get("x") is None
assert connections() == 1
""",
        services,
        backend,
    )


@both_backends
def test_a_pool_class_of_the_users_own_is_kept(backend: str, services) -> None:
    run(
        """
setup(caches={"default": entry(OPTIONS={"pool_class": "redis.BlockingConnectionPool", "max_connections": 2})})
assert type(cache._cache.get_client().connection_pool) is redis.BlockingConnectionPool
cache.set("mine", 1)
assert cache.get("mine") == 1
cache.delete("mine")
""",
        services,
        backend,
    )


@both_backends
def test_a_subclass_may_choose_servers_clients_and_serializers(backend: str, services) -> None:
    run(
        """
import importlib, types
module = sys.modules["theirs"] = types.ModuleType("theirs")
from django.conf import settings
settings.configure(CACHES={"default": entry(BACKEND="theirs.Cache", LOCATION=["redis://127.0.0.1:1", REDIS_URL])})
from django.core.cache.backends.redis import RedisCacheClient
class Strict(redis.Redis):
    pass
class Client(RedisCacheClient):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._client = Strict
    def _get_connection_pool_index(self, write):
        return 1
    def get_client(self, key=None, *, write=False):
        asked.append((key, write))
        return super().get_client(key, write=write)
class Cache(importlib.import_module(BACKEND.rpartition(".")[0]).RedisCache):
    def __init__(self, server, params):
        super().__init__(server, params)
        self._class = Client
module.Cache = Cache
asked = []
cache.set("a", 1)
assert gevent.spawn(cache.get, "a").get(timeout=10) == 1
key = f"{TAG}:1:a"
assert asked == [(key, True), (key, False)], asked
client = cache._cache.get_client()
assert type(client) is Strict
assert gevent.spawn(lambda: cache._cache.get_client()).get(timeout=10) is client
cache.delete("a")
""",
        services,
        backend,
    )


def test_a_service_names_the_server_in_every_greenlet(services) -> None:
    run(
        """
# Another database of the same server, so that it can be told apart.
scheme, _, rest = REDIS_URL.partition("://")
os.environ["PUFF_SESSIONS_REDIS_URL"] = f"{scheme}://{rest.partition('?')[0]}" + (
    "?db=7" if scheme == "unix" else "/7" if rest.count("/") == 0 else "?db=7"
)
unlocated = {key: value for key, value in entry().items() if key != "LOCATION"}
setup(caches={"default": unlocated, "sessions": {**unlocated, "OPTIONS": {"service": "sessions"}}})
def database(alias):
    return caches[alias]._cache.get_client().connection_pool.connection_kwargs.get("db", 0)
for _ in range(3):
    assert gevent.spawn(database, "sessions").get(timeout=10) == 7
    assert gevent.spawn(database, "default").get(timeout=10) == 0
""",
        services,
    )


@both_backends
def test_an_unreachable_server_names_the_ways_out(backend: str, services) -> None:
    message = run(
        """
setup(caches={"default": entry(LOCATION="redis://127.0.0.1:1/0")})
started = time.monotonic()
try:
    cache.get("x")
except redis.ConnectionError as error:
    report(str(error))
assert time.monotonic() - started < 5
""",
        services,
        backend,
    )
    assert "127.0.0.1:1" in message
    for way_out in ("start a Redis server", "PUFF_DEFAULT_REDIS_URL", "PUFF_EMBEDDED=1"):
        assert way_out in message


def test_django_redis_shares_a_bounded_pool(services) -> None:
    run(
        """
BACKEND = "django_redis.cache.RedisCache"
kwargs = {"client_name": TAG, "max_connections": 4, "socket_timeout": 30}
def options(**more):
    return {"CONNECTION_POOL_KWARGS": dict(kwargs), **more}
setup(caches={
    "default": entry(OPTIONS=options()),
    "other": entry(KEY_PREFIX=TAG + "-2", OPTIONS=options()),
    # Other classes of pools, here over the same server by another URL, are the user's.
    "blocking": entry(
        LOCATION=REDIS_URL + ("&" if "?" in REDIS_URL else "?") + "health_check_interval=60",
        OPTIONS=options(CONNECTION_POOL_CLASS="redis.BlockingConnectionPool"),
    ),
})
from django_redis import get_redis_connection
watcher = gevent.spawn(watch)
def use(n):
    for alias in caches:
        caches[alias].set(f"k{n}", f"{alias}{n}")
        assert caches[alias].get(f"k{n}") == f"{alias}{n}"
        with caches[alias].lock(f"l{n}", timeout=30):
            caches[alias].delete(f"k{n}")
def use_all():
    gevent.joinall([gevent.spawn(use, n) for n in range(60)], timeout=30, raise_error=True)
use_all()
assert 2 <= most <= 4 + 4, most
# Waiting commands have connections beside it.
waiting = [gevent.spawn(get_redis_connection("default").blpop, TAG, 20) for _ in range(10)]
gevent.sleep(0.05)
use_all()
get_redis_connection("default").rpush(TAG, *range(10))
gevent.joinall(waiting, timeout=10, raise_error=True)
watcher.kill()
pools = {alias: get_redis_connection(alias).connection_pool for alias in caches}
assert pools["default"] is pools["other"]
assert type(pools["blocking"]) is redis.BlockingConnectionPool
assert len([name for name in puff_patch.stats() if "blocking" not in name]) == 2  # admin's is one of them
pools["blocking"].disconnect()
puff_patch.unpatch_all()
assert type(gevent.spawn(lambda: get_redis_connection("default").connection_pool).get()) is redis.ConnectionPool
get_redis_connection("default").connection_pool.disconnect()
""",
        services,
    )


@pytest.mark.parametrize("engine", ["cache", "cached_db"])
def test_sessions_on_the_cache(engine: str, services) -> None:
    run(
        f"""
setup(
    databases={{"default": database("django_backend.postgresql")}},
    caches={{"default": entry(OPTIONS={{"client_name": TAG, "max_connections": 3}})}},
    SECRET_KEY="only for this test",
    SESSION_ENGINE="django.contrib.sessions.backends.{engine}",
    INSTALLED_APPS=["django.contrib.sessions"],
)
"""
        + """
from importlib import import_module
from django.conf import settings
from django.core.management import call_command
from django.db import connection
if settings.SESSION_ENGINE.endswith("cached_db"):
    call_command("migrate", verbosity=0)
SessionStore = import_module(settings.SESSION_ENGINE).SessionStore
watcher = gevent.spawn(watch)
def visit(number):
    session = SessionStore()
    session["number"] = number
    session.save()
    again = SessionStore(session.session_key)
    assert again["number"] == number
    again["number"] = -number
    again.save()
    assert SessionStore(session.session_key)["number"] == -number
    again.flush()
    assert not again.exists(session.session_key)
gevent.joinall([gevent.spawn(visit, number) for number in range(100)], timeout=40, raise_error=True)
watcher.kill()
assert 1 <= most <= 3, most
""",
        services,
    )
