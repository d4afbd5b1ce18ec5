"""redis-py's clients after `patch_all`: every way of using one, over a bounded pool that waits."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from support.process import run_python
from support.servers import RedisProxy

from puff_patch.pools.redis_blocking import Use, use_of

PATCHED = """
import puff_patch; puff_patch.patch_all()
import gc, gevent, random, redis
URL, TAG = os.environ["PUFF_DEFAULT_REDIS_URL"], os.environ["TAG"]
admin = redis.Redis(connection_pool=redis.ConnectionPool.from_url(URL, decode_responses=True))
def connections():
    return sum(client["name"] == TAG for client in admin.client_list())
def at_most(number):
    # The server hears of a closed connection a little later.
    with gevent.Timeout(5):
        while connections() > number:
            gevent.sleep(0.005)
def make(size, **options):
    return redis.Redis.from_url(URL, client_name=TAG, max_connections=size, decode_responses=True, **options)
def is_whole(client, size):
    # As many as promised can be had at once.
    pool = client.connection_pool
    with gevent.Timeout(5):
        taken = [pool.get_connection() for _ in range(size)]
    for connection in taken:
        pool.release(connection)
    at_most(size)
"""


def run(code: str, services: Any, **env: str) -> Any:
    return run_python(PATCHED + code, env={**services.env(), "TAG": f"puff-test-{uuid.uuid4().hex[:12]}", **env})


@pytest.fixture
def redis_proxy(services) -> Iterator[RedisProxy]:
    proxy = RedisProxy(services.redis)
    yield proxy
    proxy.close()


def test_hundreds_of_greenlets_share_a_few_connections(services) -> None:
    run(
        """
client = make(5)
def use(number):
    client.set(f"{TAG}:{number}", number, ex=60)
    assert client.get(f"{TAG}:{number}") == str(number)
    assert client.delete(f"{TAG}:{number}") == 1
workers = [gevent.spawn(use, number) for number in range(500)]
most = 0
while not all(worker.dead for worker in workers):
    most = max(most, connections())
    gevent.sleep(0.002)
gevent.joinall(workers, raise_error=True)
assert 1 <= most <= 5, most
is_whole(client, 5)
""",
        services,
    )


def test_random_kills_and_time_outs_mix_up_no_answers(services) -> None:
    run(
        """
client = make(4)
answered = 0
def work():
    global answered
    while time.monotonic() < end:
        number = str(random.randrange(10**9))
        assert client.echo(number) == number
        pipeline = client.pipeline(transaction=False)
        assert pipeline.echo("a" + number).echo("b" + number).execute() == ["a" + number, "b" + number]
        answered += 1
def hasty():
    while time.monotonic() < end:
        try:
            with gevent.Timeout(random.random() * 0.01):
                client.blpop(TAG, timeout=5)
        except gevent.Timeout:
            pass
end = time.monotonic() + 1.5
workers = [gevent.spawn(work) for _ in range(200)] + [gevent.spawn(hasty) for _ in range(20)]
def kill():
    while time.monotonic() < end:
        random.choice(workers).kill(block=False)
        gevent.sleep(0.003)
gevent.joinall([*workers, gevent.spawn(kill)], raise_error=True)
assert answered > 50, answered
is_whole(client, 4)
""",
        services,
    )


def test_every_way_to_use_a_client(services) -> None:
    run(
        """
client = make(2)
# A transaction with WATCH
with client.pipeline() as pipeline:
    pipeline.watch(TAG)
    pipeline.multi()
    pipeline.set(TAG, 1, ex=60)
    pipeline.incr(TAG)
    assert pipeline.execute() == [True, 2]
client.delete(TAG)
# A lock
with client.lock(TAG + "-lock", timeout=5, blocking_timeout=5):
    assert client.exists(TAG + "-lock")
# A script
assert client.eval("return ARGV[1]", 0, "x") == "x"
# A subscription has a connection to itself for as long as it lasts.
subscription = client.pubsub(ignore_subscribe_messages=True)
subscription.subscribe(TAG)
got = []
def listen():
    for message in subscription.listen():
        got.append(message["data"])
        return
listener = gevent.spawn(listen)
while not client.publish(TAG, "hello"):
    gevent.sleep(0.001)
listener.join(5)
assert got == ["hello"]
subscription.close()
# Iteration, and one connection for all
assert list(client.scan_iter(TAG + "*")) == []
with redis.Redis.from_url(URL, single_connection_client=True) as single:
    assert single.ping()
is_whole(client, 2)
# Closed, and used again
client.close()
assert client.ping()
client.close()
at_most(0)
""",
        services,
    )


def test_dropped_subscriptions_and_transactions_come_back(services) -> None:
    run(
        """
client = make(1)
for _ in range(3):
    subscription = client.pubsub()
    subscription.subscribe(TAG)
    del subscription
    pipeline = client.pipeline()
    pipeline.watch(TAG)
    del pipeline
    gc.collect()
    with gevent.Timeout(2):
        assert client.ping()
""",
        services,
    )


def test_the_third_protocol_and_client_side_caching(services, redis_proxy: RedisProxy) -> None:
    run(
        """
from redis.cache import CacheConfig
other = make(1)
URL = os.environ["PROXY"]  # over TCP, as redis-py wants it for this
third = make(2, protocol=3)
assert third.ping() and third.ping()
client = redis.Redis.from_url(
    URL, client_name=TAG, max_connections=3, protocol=3, decode_responses=True,
    cache_config=CacheConfig(max_size=100),
)
other.set(TAG, "first", ex=60)
try:
    assert client.get(TAG) == client.get(TAG) == "first"
except redis.ConnectionError as error:
    # An old server was reached: nobody should look for it elsewhere.
    assert "Redis 7.4" in str(error) and "PUFF" not in str(error), error
else:
    other.set(TAG, "second", ex=60)
    with gevent.Timeout(5):
        while client.get(TAG) != "second":
            gevent.sleep(0.01)
    gevent.joinall([gevent.spawn(client.get, TAG) for _ in range(50)], raise_error=True)
other.delete(TAG)
at_most(6)
""",
        services,
        PROXY=redis_proxy.url,
    )


def test_a_pool_of_the_callers_own_is_left_alone(services) -> None:
    run(
        """
pool = redis.ConnectionPool.from_url(URL)
assert type(pool) is redis.ConnectionPool
client = redis.Redis(connection_pool=pool)
assert client.connection_pool is pool and client.ping()
pool.disconnect()
""",
        services,
    )


def test_the_environment_bounds_a_client_that_says_nothing(services) -> None:
    run(
        """
client = redis.Redis.from_url(URL)
first = client.connection_pool.get_connection()
try:
    client.ping()
except redis.ConnectionError as error:
    assert "1 (max_size)" in str(error) and "PUFF_REDIS_POOL_MAX_SIZE" in str(error), error
else:
    raise AssertionError("a second connection")
client.connection_pool.release(first)
""",
        services,
        PUFF_REDIS_POOL_MAX_SIZE="1",
        PUFF_REDIS_POOL_TIMEOUT="0.05",
    )


def test_a_server_that_is_restarted_is_found_again(services) -> None:
    run(
        """
client = make(5)
def use():
    assert client.ping()
    gevent.sleep(0.01)
gevent.joinall([gevent.spawn(use) for _ in range(20)], raise_error=True)
assert connections()
for each in admin.client_list():
    if each["name"] == TAG:
        admin.client_kill_filter(_id=each["id"])
gevent.joinall([gevent.spawn(use) for _ in range(20)], raise_error=True)
is_whole(client, 5)
""",
        services,
    )


def test_a_fork_shares_no_connection(services) -> None:
    run(
        """
client = make(3)
held = client.connection_pool.get_connection()
def session(connection):
    connection.send_command("CLIENT", "ID")
    return connection.read_response()
mine, idle = session(held), client.client_id()
for ending in ("release", "drop", "exit"):
    child = os.fork()
    if not child:
        assert client.client_id() not in (mine, idle)
        if ending == "release":
            client.connection_pool.release(held)
        elif ending == "drop":
            del held
            gc.collect()
        assert client.ping()
        client.close()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, ending
    assert session(held) == mine, ending
    assert client.client_id() == idle, ending
client.connection_pool.release(held)
is_whole(client, 3)
""",
        services,
    )


@pytest.mark.parametrize("how", ["refused", "silent", "no such file", "no such name"])
def test_an_unreachable_server_names_all_three_ways_out(how: str) -> None:
    message = run_python(f"""
        import puff_patch; puff_patch.patch_all()
        import redis, socket
        listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        port = listener.getsockname()[1]
        crowd = []
        if {how!r} == "silent":
            # The kernel answers nobody once its queue is full.
            for _ in range(4):
                crowd.append(socket.socket())
                crowd[-1].setblocking(False)
                crowd[-1].connect_ex(("127.0.0.1", port))
        else:
            listener.close()
        urls = {{
            "refused": f"redis://me:secret@127.0.0.1:{{port}}/3",
            "silent": f"redis://me:secret@127.0.0.1:{{port}}/3",
            "no such file": "unix://me:secret@/nowhere/redis.sock?db=3",
            "no such name": "redis://me:secret@nowhere.invalid/3",
        }}
        client = redis.Redis.from_url(urls[{how!r}], retry=None, socket_connect_timeout=0.5)
        try:
            client.ping()
        except (redis.ConnectionError, redis.TimeoutError) as error:
            report(str(error))
        for each in [listener, *crowd]:
            each.close()
    """)
    for part in ("start a Redis server", "PUFF_DEFAULT_REDIS_URL", "PUFF_EMBEDDED=1"):
        assert part in message
    assert "127.0.0.1" in message or "nowhere" in message
    assert "secret" not in message


def test_a_wrong_password_is_passed_on_unchanged(services) -> None:
    plain, pooled = run(
        """
from puff_patch.pools.redis import RedisPool
def error_of(pool_class):
    client = redis.Redis(connection_pool=pool_class.from_url(URL, username="nobody", password="wrong"))
    try:
        client.ping()
    except redis.RedisError as error:
        return [type(error).__name__, str(error)]
report([error_of(redis.ConnectionPool), error_of(RedisPool)])
""",
        services,
    )
    assert plain == pooled
    assert plain[0] == "AuthenticationError"


def test_a_new_retry_and_new_credentials_reach_all_connections(services) -> None:
    run(
        """
from redis.backoff import NoBackoff
from redis.retry import Retry
client = make(2)
pool = client.connection_pool
held = pool.get_connection()
assert client.ping()
retry = Retry(NoBackoff(), 7)
client.set_retry(retry)
assert held.retry is retry
assert all(connection.retry is retry for connection in pool._get_free_connections())
old = client.client_id()
pool.re_auth_callback(None)
assert client.client_id() != old
pool.release(held)
at_most(1)
""",
        services,
    )


def test_the_rest_of_the_face_of_redis_pys_pool(services) -> None:
    run(
        """
from puff_patch.pools.redis import RedisPool
pool = RedisPool.from_url(URL, client_name=TAG, max_connections=1, timeout=0.05)
other = RedisPool.from_url(URL, client_name=TAG, max_connections=1)
connection = pool.get_connection()
assert pool._get_in_use_connections() == {connection}
try:
    pool.get_connection()
except redis.ConnectionError as error:
    assert "0.05 s" in str(error), error
else:
    raise AssertionError("a second connection")
# One of another pool is not taken in.
other.release(connection)
assert not connection._sock
pool.release(connection)
assert pool.get_stats()["pool_size"] == 0
# In use by somebody else: its socket is closed under it, and it does not come back into the pool.
connection = pool.get_connection()
pool.disconnect(inuse_connections=False)
assert connection._sock
pool.disconnect()
assert not connection._sock
pool.release(connection)
# Forgotten, as redis-py does after a fork.
connection = pool.get_connection()
pool.reset()
second = pool.get_connection()
pool.release(connection)
pool.release(second)
assert pool.get_stats()["pool_size"] <= 1
import contextlib
# The pools of an older redis-py (7.1, say) are no context managers.
with pool if hasattr(redis.ConnectionPool, "__enter__") else contextlib.closing(pool):
    client = redis.Redis(connection_pool=pool)
    assert client.ping()
at_most(0)
""",
        services,
    )


@pytest.mark.parametrize(
    ("command", "use"),
    [
        *[
            ((name, "key", 0), Use.BLOCKING)
            for name in ("BLPOP", "brpop", b"BLMOVE", "BRPOPLPUSH", "BLMPOP", "BZPOPMIN", "BZPOPMAX", b"bzmpop")
        ],
        (("XREAD", b"COUNT", b"1", b"BLOCK", b"0", b"STREAMS", "s", "$"), Use.BLOCKING),
        (("XREAD BLOCK", 0, "STREAMS", "s", "$"), Use.BLOCKING),
        (("XREADGROUP", "GROUP", "g", "c", "block", 10, "STREAMS", "s", ">"), Use.BLOCKING),
        (("MONITOR",), Use.BLOCKING),
        (("SUBSCRIBE", "channel"), Use.BLOCKING),
        (("WAIT", 1, 0), Use.SETTLING),
        (("WAITAOF", 1, 0, 0), Use.SETTLING),
        # These answer at once, whatever the words in them.
        (("XREAD", "COUNT", 1, "STREAMS", "BLOCK", 0), None),
        (("XREADGROUP", "GROUP", "BLOCK", "BLOCK", "STREAMS", "s", ">"), None),
        (("GET", "BLPOP"), None),
        (("SET", "k", "BLOCK"), None),
        (("",), None),
        ((" ",), None),
        ((7,), None),
        ((), None),
    ],
)
def test_which_commands_wait(command: tuple[Any, ...], use: Use | None) -> None:
    assert use_of(command) is use


def test_no_number_of_waiting_commands_keeps_others_waiting(services) -> None:
    run(
        """
client = make(2)
newer = int(client.info("server")["redis_version"].split(".")[0]) >= 7
client.xgroup_create(TAG + "-stream", "group", mkstream=True)
KINDS = {
    "blpop": lambda: client.blpop(TAG, 30),
    "brpop": lambda: client.brpop(TAG, 30),
    "blmove": lambda: client.blmove(TAG, TAG + "-other", 30),
    "brpoplpush": lambda: client.brpoplpush(TAG, TAG + "-other", 30),
    "bzpopmin": lambda: client.bzpopmin(TAG + "-zset", 30),
    "bzpopmax": lambda: client.bzpopmax(TAG + "-zset", 30),
    "xread": lambda: client.xread({TAG + "-stream": "$"}, block=30000),
    "xreadgroup": lambda: client.xreadgroup("group", "me", {TAG + "-stream": ">"}, block=30000),
    "raw": lambda: client.execute_command("blpop", TAG, 30),
    "pipeline": lambda: client.pipeline(transaction=False).blpop(TAG, 30).execute(),
}
if newer:
    KINDS["blmpop"] = lambda: client.blmpop(30, 1, TAG, direction="LEFT")
    KINDS["bzmpop"] = lambda: client.bzmpop(30, 1, [TAG + "-zset"], min=True)
waiting = [gevent.spawn(wait) for wait in KINDS.values() for _ in range(5)]
subscriptions = [client.pubsub() for _ in range(5)]
for subscription in subscriptions:
    subscription.subscribe(TAG)
monitors = [client.monitor().__enter__() for _ in range(2)]
with gevent.Timeout(5):
    while admin.info("clients")["blocked_clients"] < len(waiting):
        gevent.sleep(0.005)

def ordinary():
    client.set(TAG + "-key", 1, ex=60)
    assert client.get(TAG + "-key") == "1"
    # Inside MULTI they do not wait, and without BLOCK neither do these.
    assert client.pipeline().blpop(TAG + "-none", 30).execute() == [None]
    assert not client.xread({TAG + "-stream": "$"})
    assert not client.xreadgroup("group", "me", {TAG + "-stream": ">"})
with gevent.Timeout(5):
    gevent.joinall([gevent.spawn(ordinary) for _ in range(20)], raise_error=True)
assert not any(greenlet.dead for greenlet in waiting)

def stats():
    for name, found in puff_patch.stats().items():
        if name.endswith(" blocking"):
            return found
held = len(waiting) + len(subscriptions) + len(monitors)
assert client.connection_pool.get_stats()["pool_size"] <= 2
assert stats()["pool_size"] == held and stats()["connections_num"] == held, stats()
assert connections() <= held + 2
# All are woken, and each gets what it asked for.
with gevent.Timeout(10):
    while not all(greenlet.dead for greenlet in waiting):
        client.rpush(TAG, *range(40))
        client.zadd(TAG + "-zset", {str(number): number for number in range(20)})
        client.xadd(TAG + "-stream", {"a": 1})
        gevent.sleep(0.01)
gevent.joinall(waiting, raise_error=True)
assert all(greenlet.value for greenlet in waiting)
for subscription in subscriptions:
    subscription.close()
for monitor in monitors:
    monitor.__exit__(None, None, None)
# Their connections serve again.
assert stats()["pool_available"] == len(waiting), stats()
client.delete(TAG)
assert client.blpop(TAG, 0.01) is None
assert stats()["connections_num"] == held
for key in client.scan_iter(TAG + "*"):
    client.delete(key)
client.close()
at_most(0)
""",
        services,
    )


def test_waiting_commands_have_a_bound_of_their_own(services) -> None:
    run(
        """
client = make(1)
waiting = [gevent.spawn(client.blpop, TAG, 1) for _ in range(2)]
gevent.sleep(0.1)
try:
    client.blpop(TAG, 1)
except redis.ConnectionError as error:
    assert "2 (max_size)" in str(error) and "PUFF_REDIS_BLOCKING_POOL_MAX_SIZE" in str(error), error
else:
    raise AssertionError("a third connection")
assert client.ping()
gevent.joinall(waiting, raise_error=True)
""",
        services,
        PUFF_REDIS_BLOCKING_POOL_MAX_SIZE="2",
        PUFF_REDIS_BLOCKING_POOL_TIMEOUT="0.1",
    )


def test_wait_waits_for_what_was_written_before(services) -> None:
    """The server looks only at what came over the same connection, which others must not wait for either."""
    run(
        """
client = make(1)
for _ in range(2):
    client.set(TAG, 1, ex=60)
    mine = client.client_id()
    waiter = gevent.spawn(client.wait, 5, 300)
    with gevent.Timeout(5):
        found = []
        while not found:
            gevent.sleep(0.005)
            found = [each["id"] for each in admin.client_list() if each["cmd"] == "wait" and each["name"] == TAG]
    assert found == [str(mine)], (found, mine)
    with gevent.Timeout(0.2):
        assert client.get(TAG) == "1"
    assert isinstance(waiter.get(timeout=5), int)
client.delete(TAG)
""",
        services,
    )


def test_a_mock_in_place_of_the_socket_is_no_other_threads_socket():
    """redis-py's own tests do that, with as many answers as one connection asks for."""
    run_python(
        """
        import puff_patch
        puff_patch.patch_all()
        import redis
        from unittest import mock

        connection = redis.UnixDomainSocketConnection
        answers = [{"proto": 3}, b"OK", b"OK", b"PONG", b"PONG"]
        with mock.patch.object(connection, "_connect", return_value=mock.MagicMock()) as connect, \\
             mock.patch.object(connection, "can_read", return_value=False), \\
             mock.patch.object(connection, "send_command"), \\
             mock.patch.object(connection, "read_response", side_effect=answers):
            client = redis.Redis(unix_socket_path="/socket")
            assert client.ping() and client.ping()
            assert connect.call_count == 1
        """
    )
