"""redis-py: a client whose pool is full waits for a connection instead of raising.

Replaces the pools that clients make for themselves: ``redis.Redis(...)`` and ``from_url``, the masters and
replicas of a ``Sentinel``, the nodes of a ``RedisCluster``.  A pool that a caller makes is the caller's.

Wraps what takes a connection for long (``execute_command`` of a blocking command, subscriptions, MONITOR), so
that our pools give it one beside those of all other commands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch
from puff_patch.pools.redis_blocking import Use, use_of, using


class RedisPatch(Patch):
    """Waiting pools for redis-py's clients."""

    name = "redis"
    modules = ("redis",)
    requires = ("redis", (5, 2))

    def apply(self, module: ModuleType) -> None:
        """Replace the pool classes that clients make, and tell long uses of a connection from short ones."""
        client, cluster, sentinel = module.client, module.cluster, module.sentinel
        self.ledger.replace(client, "ConnectionPool", _DefaultPool, alias=True)
        self._wrap(cluster.NodesManager, "__init__", _with_waiting_nodes)
        # replica_for came with redis-py 8, and names the class when it calls slave_for.
        for method in {"master_for", "slave_for", "replica_for"} & set(vars(sentinel.Sentinel)):
            self._wrap(sentinel.Sentinel, method, _with_waiting_sentinel_pool)
        for owner in (client.Redis, cluster.RedisCluster):
            self._wrap(owner, "execute_command", _for_its_use)
        self._wrap(client.Pipeline, "execute", _for_its_commands)
        self._wrap(cluster.ClusterPipeline, "execute", _for(Use.SEVERAL))
        for owner, method in (
            (client.PubSub, "execute_command"),
            (cluster.ClusterPubSub, "execute_command"),
            (client.Monitor, "__init__"),
            # Asks for the topology, often while a command that was redirected holds a connection.
            (cluster.NodesManager, "initialize"),
        ):
            self._wrap(owner, method, _for(Use.BLOCKING))
        self.ledger.on_restore(_close_shared_clients)

    def _wrap(self, owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = vars(owner)[name]
        self.ledger.replace(owner, name, functools.wraps(original)(wrapper(original)))


def _for_its_use(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_command(self: Any, *args: Any, **options: Any) -> Any:
        use = use_of(args)
        if use is None:
            return original(self, *args, **options)
        with using(use):
            return original(self, *args, **options)

    return execute_command


def _for_its_commands(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute(self: Any, *args: Any, **options: Any) -> Any:
        # Inside MULTI nothing blocks.
        if not (self.transaction or self.explicit_transaction) and any(
            use_of(command) for command, _ in self.command_stack
        ):
            with using(Use.BLOCKING):
                return original(self, *args, **options)
        return original(self, *args, **options)

    return execute


def _for(use: Use) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        def for_use(self: Any, *args: Any, **options: Any) -> Any:
            with using(use):
                return original(self, *args, **options)

        return for_use

    return wrapper


def _with_waiting_nodes(original: Callable[..., Any]) -> Callable[..., Any]:
    # As redis-py has it, only a cluster that was made from a URL asks the manager for its pools; the others make
    # clients, which make theirs.
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        options.setdefault("connection_pool_class", _DefaultPool)
        original(self, *args, **options)

    return __init__


def _with_waiting_sentinel_pool(original: Callable[..., Any]) -> Callable[..., Any]:
    def client_for(self: Any, service_name: str, *args: Any, **options: Any) -> Any:
        if len(args) < 2:  # the second is the pool's class
            from puff_patch.pools.redis import SentinelPool

            options.setdefault("connection_pool_class", SentinelPool)
        return original(self, service_name, *args, **options)

    return client_for


class _DefaultPool:
    """Stands for ``ConnectionPool`` where clients make their own; imports our pool only then."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from puff_patch.pools.redis import RedisPool

        return RedisPool(*args, **kwargs)

    @classmethod
    def from_url(cls, url: str, **kwargs: Any) -> Any:
        """As `redis.ConnectionPool.from_url`."""
        from puff_patch.pools.redis import RedisPool

        return RedisPool.from_url(url, **kwargs)


def _close_shared_clients() -> None:
    from puff_patch.pools.redis import close_shared_clients

    close_shared_clients()


PATCH = RedisPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
