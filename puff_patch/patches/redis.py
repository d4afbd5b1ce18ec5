"""redis-py: a client whose pool is full waits for a connection instead of raising.

Replaces the ``ConnectionPool`` that ``redis.Redis(...)`` and ``redis.Redis.from_url`` make for themselves; a
pool that a caller makes is the caller's.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch


class RedisPatch(Patch):
    """Waiting pools for redis-py's clients."""

    name = "redis"
    modules = ("redis",)
    requires = ("redis", (5, 2))

    def apply(self, module: ModuleType) -> None:
        """Replace the pool class that clients make."""
        self.ledger.replace(module.client, "ConnectionPool", _DefaultPool, alias=True)
        self.ledger.on_restore(_close_shared_clients)


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
