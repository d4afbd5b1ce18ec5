"""Redis for plain programs: ``global_redis`` and ``named_client(name)``, for greenlets and event loops alike.

Every method waits in a greenlet and returns an awaitable where an event loop is running.  Strings come back as
bytes.  The connections are those of the shared, bounded pool of `puff_patch.pools.redis`; commands that wait for
others (BLPOP, ...) have connections without a time-out, so they wait for as long as they say.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from puff_patch.config import current
from puff_patch.runtime.calls import either_way, is_asyncio

if TYPE_CHECKING:
    import redis

Key = str | bytes

# Their methods are used over a while, by a greenlet.
_FOR_GREENLETS = frozenset({"lock", "monitor", "pubsub", "register_script", "transaction"})
_WAITS = frozenset(
    {
        *("blmove", "blmpop", "blpop", "brpop", "brpoplpush", "bzmpop", "bzpopmax", "bzpopmin", "wait", "waitaof"),
        *("xread", "xreadgroup"),
    }
)


class RedisClient:
    """A client of one configured Redis.  Beside the methods here it has all of redis-py's ``Redis``.

    Args:
        name: the service: ``PUFF_<NAME>_REDIS_URL``.
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name
        self._url = ""

    def client(self) -> redis.Redis:
        """The client of redis-py that this one stands on; for greenlets."""
        return self._client(patient=False)

    def _client(self, *, patient: bool) -> redis.Redis:
        from puff_patch.pools.redis import shared_client

        if not self._url:
            self._url = current().redis_url(self.name)
        return shared_client(self._url, self._patient if patient else None)

    @functools.cached_property
    def _patient(self) -> dict[str, Any]:
        # A server that has died is noticed all the same; a Unix socket's ends by itself.
        keepalive = {} if self._url.startswith("unix") else {"socket_keepalive": True}
        return {"socket_timeout": None, **keepalive}

    @either_way
    def get(self, key: Key) -> Any:
        """The value of a key, or None."""
        return self.client().get(key)

    @either_way
    def set(self, key: Key, value: Any, nx: bool | None = None, ex: int | None = None, **options: Any) -> Any:
        """Set a key; True, or None if ``nx`` asked for a new one and there is one.

        Args:
            key: the key.
            value: str, bytes or a number.
            nx: whether to set it only if there is none.
            ex: seconds after which it expires.
            options: further ones of redis-py's ``set``.
        """
        return self.client().set(key, value, nx=bool(nx), ex=ex, **options)

    @either_way
    def mget(self, keys: Iterable[Key]) -> Any:
        """The values of keys, None for those that do not exist."""
        return self.client().mget(list(keys))

    @either_way
    def mset(self, values: Mapping[Key, Any] | Iterable[tuple[Key, Any]], nx: bool | None = None) -> Any:
        """Set several keys; with ``nx`` only if none of them exists, which is what is returned."""
        mapping: Any = dict(values)
        return self.client().msetnx(mapping) if nx else self.client().mset(mapping)

    @either_way
    def persist(self, key: Key) -> Any:
        """Have a key expire no more; whether it would have."""
        return bool(self.client().persist(key))

    @either_way
    def expire(self, key: Key, seconds: int, **options: Any) -> Any:
        """Have a key expire after ``seconds``; whether there is one."""
        return bool(self.client().expire(key, seconds, **options))

    @either_way
    def delete(self, *keys: Key) -> Any:
        """Delete keys; how many there were."""
        return self.client().delete(*keys)

    @either_way
    def incr(self, key: Key, delta: int = 1) -> Any:
        """Add to a number; its new value."""
        return self.client().incrby(key, delta)

    @either_way
    def decr(self, key: Key, delta: int = 1) -> Any:
        """Take from a number; its new value."""
        return self.client().decrby(key, delta)

    @either_way
    def lpop(self, key: Key, count: int = 1) -> Any:
        """Take up to ``count`` values from the head of a list; always a list, which may be empty."""
        return self.client().lpop(key, count) or []

    @either_way
    def rpop(self, key: Key, count: int = 1) -> Any:
        """Take up to ``count`` values from the tail of a list; always a list, which may be empty."""
        return self.client().rpop(key, count) or []

    @either_way
    def blpop(self, key: Key | Sequence[Key], timeout: float = 0) -> Any:
        """Take a value from the head of a list, once there is one.

        Args:
            key: the list, or several.
            timeout: seconds to wait at most; 0 means no limit.

        Returns:
            The key and the value, or None if the time is over.
        """
        return _pair(self._client(patient=True).blpop(key, timeout))

    @either_way
    def brpop(self, key: Key | Sequence[Key], timeout: float = 0) -> Any:
        """Take a value from the tail of a list, once there is one; as `blpop`."""
        return _pair(self._client(patient=True).brpop(key, timeout))

    @either_way
    def lpush(self, key: Key, *values: Any) -> Any:
        """Put values at the head of a list; its length."""
        return self.client().lpush(key, *values)

    @either_way
    def rpush(self, key: Key, *values: Any) -> Any:
        """Put values at the tail of a list; its length."""
        return self.client().rpush(key, *values)

    @either_way
    def rpoplpush(self, key: Key, destination: Key) -> Any:
        """Move a value from the tail of a list to the head of another one; the value, or None."""
        return self.client().rpoplpush(key, destination)

    @either_way
    def command(self, command: Sequence[Any]) -> Any:
        """Any command, given as its words; the reply as the server sent it."""
        from puff_patch.pools.redis_blocking import use_of

        name, *arguments = command
        # As bytes redis-py does not recognize it, and so does not change the reply.
        words = (name.encode() if isinstance(name, str) else name, *arguments)
        return self._client(patient=use_of(words) is not None).execute_command(*words)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True) -> RedisPipeline:
        """Commands that are sent together by ``execute()``, which returns the list of their results."""
        return RedisPipeline(self.client().pipeline(transaction=transaction))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self._client(patient=name in _WAITS), name)
        if not callable(method):
            return method
        if name in _FOR_GREENLETS or name.endswith("_iter"):
            if is_asyncio():
                raise TypeError(f"{name}() is for greenlets: call a function that uses it with asyncio.to_thread")
            return method
        return either_way(method)

    def __repr__(self) -> str:
        return f"<RedisClient {self.name}>"


class RedisPipeline:
    """redis-py's pipeline: each command is put in line, `execute` sends them."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    @either_way
    def execute(self, raise_on_error: bool = True) -> Any:
        """Send the commands; the list of their results."""
        return self._pipeline.execute(raise_on_error)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self._pipeline, name)

        def put_in_line(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self._pipeline else result

        return put_in_line if callable(method) else method


def _pair(found: Any) -> tuple[bytes, bytes] | None:
    return None if found is None else (found[0], found[1])


#: The client of the service ``default``.
global_redis = RedisClient()


def named_client(name: str = "default") -> RedisClient:
    """The client of a service; nothing is connected before its first command.

    Args:
        name: the service: ``PUFF_<NAME>_REDIS_URL``.
    """
    return RedisClient(name)
