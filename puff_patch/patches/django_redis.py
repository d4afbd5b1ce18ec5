"""django-redis: its pools, one a URL and process, wait when they are full.

Replaces ``ConnectionFactory.__init__``, which chooses the class of the pools: where that is redis-py's plain
``ConnectionPool`` or ``SentinelConnectionPool`` (django-redis' own choice), ours stands in.  Any other class
(``OPTIONS["CONNECTION_POOL_CLASS"]``) is kept.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch


class DjangoRedisPatch(Patch):
    """Waiting pools for django-redis."""

    name = "django_redis"
    modules = ("django_redis.pool",)
    requires = ("django-redis", (5, 4))

    def apply(self, module: ModuleType) -> None:
        """Let connection factories choose our pools."""
        factory = module.ConnectionFactory
        original = factory.__init__

        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            import redis

            from puff_patch.pools.redis import RedisPool, SentinelPool

            original(self, *args, **kwargs)
            ours = {redis.ConnectionPool: RedisPool, redis.SentinelConnectionPool: SentinelPool}
            self.pool_cls = ours.get(self.pool_cls, self.pool_cls)

        self.ledger.replace(factory, "__init__", __init__)
        self.ledger.on_restore(functools.partial(_close_pools, factory))


def _close_pools(factory: Any) -> None:
    from puff_patch.pools.redis import RedisPool, SentinelPool

    for url, pool in list(factory._pools.items()):
        if isinstance(pool, (RedisPool, SentinelPool)):
            del factory._pools[url]
            pool.close()


PATCH = DjangoRedisPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
