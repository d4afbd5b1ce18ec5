"""global_redis and named_client, for greenlets and event loops alike."""

from __future__ import annotations

from support.process import RAISES, TICKER, run_python

HEAD = (
    RAISES
    + """
import puff_patch
puff_patch.patch_all()
import asyncio, gevent
from puff_patch import join_all, spawn
from puff_patch.redis import global_redis, named_client
from puff_patch.runtime import aio
redis = global_redis
redis.delete(*(f"api-{n}" for n in range(9)))
"""
)


def test_greenlets(services) -> None:
    run_python(
        HEAD
        + TICKER
        + """
assert redis.set("api-1", "ö") is True and redis.get(b"api-1") == "ö".encode()
assert redis.set("api-1", "x", nx=True) is None and redis.set("api-2", 1, nx=True, ex=100) is True
assert redis.get("api-9") is None and 90 < redis.ttl("api-2") <= 100
assert redis.persist("api-2") is True and redis.persist("api-2") is False and redis.expire("api-2", 50) is True
assert (redis.incr("api-2", 4), redis.incr("api-2"), redis.decr("api-2", 2)) == (5, 6, 4)
assert redis.mset({"api-3": "a", "api-4": b"b"}) is True
assert redis.mset([("api-3", "x"), ("api-5", "y")], nx=True) is False
assert redis.mget(["api-3", "api-4", "api-5"]) == [b"a", b"b", None]
assert redis.delete("api-3", "api-4") == 2
# Puff's own test of lists
assert redis.lpop("api-6") == [] == redis.rpop("api-6")
assert redis.rpush("api-6", "hi") == 1 and redis.lpop("api-6") == [b"hi"]
assert redis.rpush("api-6", "1", "2", "3") == 3 and redis.lpush("api-6", b"0") == 4
assert redis.lpop("api-6", 2) == [b"0", b"1"] and redis.rpop("api-6", 9) == [b"3", b"2"]
redis.rpush("api-6", "a")
assert redis.rpoplpush("api-6", "api-7") == b"a"
assert redis.blpop("api-7", 1) == (b"api-7", b"a") and redis.brpop(["api-6", "api-7"], 0.01) is None
# any command, as the server answers; and all of redis-py's
assert redis.command([b"SET", b"api-1", b"raw"]) in (b"OK", "OK") and redis.command(["GET", "api-1"]) == b"raw"
assert redis.hset("api-8", mapping={"a": 1}) == 1 and redis.hgetall("api-8") == {b"a": b"1"}
assert redis.pipeline().set("api-1", 1).incr("api-1").get("api-1").execute() == [True, 2, b"2"]
assert list(redis.scan_iter("api-8")) == [b"api-8"]
with redis.lock("api-9", timeout=5):
    assert redis.exists("api-9") == 1
assert redis.connection_pool is redis.client().connection_pool
raises(AttributeError, getattr, redis, "no_such_command")

with Ticker() as ticker:
    waiting = [spawn(redis.blpop, "api-7", 5) for _ in range(20)]
    gevent.sleep(0.05)
    assert redis.rpush("api-7", *range(20)) >= 1  # others are not kept from the server
    found = join_all(waiting, timeout=5)
assert sorted(int(value) for _, value in found) == list(range(20))
assert ticker.count >= 2, ticker.count

# A killed one takes nothing out of the list, once the server has seen its end.
def waits():
    return redis.info("clients")["blocked_clients"]
def until(condition):
    for _ in range(2000):
        if condition():
            return
        gevent.sleep(0.005)
    raise AssertionError
killed = spawn(redis.blpop, "api-7", 0)
until(waits)
killed.kill()
until(lambda: not waits())
redis.rpush("api-7", "kept")
assert redis.blpop("api-7", 1) == (b"api-7", b"kept")
# What waits for longer than other commands may take is no error.
assert redis._client(patient=True).connection_pool.connection_kwargs["socket_timeout"] is None

assert named_client("other").get("api-1") is None and named_client().get("api-1") == b"2"
assert named_client("other").set("api-1", "other") and redis.get("api-1") == b"2"
named_client("other").flushdb()
""",
        env={**services.env(), "PUFF_OTHER_REDIS_URL": services.redis.split("?")[0].rstrip("/") + "/5"}
        if not services.redis.startswith("unix")
        else {**services.env(), "PUFF_OTHER_REDIS_URL": services.redis.split("?")[0] + "?db=5"},
    )


def test_event_loops(services) -> None:
    run_python(
        HEAD
        + """
async def main():
    assert await redis.set("api-1", "1") is True
    assert await redis.incr("api-1", 2) == 3 and await redis.get("api-1") == b"3"
    assert await redis.command(["GET", "api-1"]) == b"3"
    assert await redis.hset("api-8", "a", 1) in (0, 1)
    assert await redis.pipeline().incr("api-1").get("api-1").execute() == [4, b"4"]
    assert await asyncio.gather(*(redis.get("api-1") for _ in range(200))) == [b"4"] * 200
    waiting = redis.blpop("api-7", 5)
    await asyncio.sleep(0.02)
    await redis.rpush("api-7", "x")
    assert await waiting == (b"api-7", b"x")
    # A cancelled one takes nothing out of the list, once the server has seen its end.
    try:
        await asyncio.wait_for(redis.blpop("api-7", 0), 0.05)
        raise AssertionError
    except asyncio.TimeoutError:
        pass
    while (await redis.info("clients"))["blocked_clients"]:
        await asyncio.sleep(0.005)
    await redis.rpush("api-7", "kept")
    assert await redis.lpop("api-7") == [b"kept"]
    try:
        await redis.command(["INCR", "api-8"])
    except Exception as error:
        assert "WRONGTYPE" in str(error)
    assert "asyncio.to_thread" in str(raises(TypeError, getattr, redis, "pubsub"))
    assert await asyncio.to_thread(lambda: list(redis.scan_iter("api-8"))) == [b"api-8"]
asyncio.run(main())
aio.run_coroutine(main(), timeout=20)
""",
        env=services.env(),
    )
