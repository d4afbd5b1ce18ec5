"""puff_patch: one line makes a synchronous Python program highly concurrent.

``import puff_patch; puff_patch.patch_all()`` in the first lines of a program makes its sockets, PostgreSQL and
Redis connections, ``requests`` calls and Django backends cooperative, on bounded pools.
"""

from __future__ import annotations

from puff_patch.patches import is_patched, patch_all, unpatch_all
from puff_patch.patches.base import DidPatch, DidUnpatch, DoNotPatch, UnsupportedVersion, WillPatch
from puff_patch.patches.sockets import PatchedTooLateWarning

__version__ = "0.1.0.dev0"

__all__ = [
    "DidPatch",
    "DidUnpatch",
    "DoNotPatch",
    "PatchedTooLateWarning",
    "UnsupportedVersion",
    "WillPatch",
    "close_pools",
    "hub_stats",
    "is_patched",
    "patch_all",
    "stats",
    "unpatch_all",
    "unwatch_hub",
    "watch_hub",
]


def stats() -> dict[str, dict[str, int]]:
    """The statistics of every open pool of this process, by pool name, under psycopg_pool's keys."""
    from puff_patch.pools.base import all_pools

    return {pool.name: pool.get_stats() for pool in all_pools()}


def hub_stats() -> dict[str, int]:
    """How the hub of this process fared while it was watched (see `watch_hub`); times in milliseconds.

    Returns:
        ``watched`` (1 or 0), ``blocks_num`` and ``blocked_ms`` (how often and how long a greenlet held the hub for
        too long), ``lag_num`` and ``lag_ms`` (how often it was measured how late the hub is, and the sum),
        ``greenlets_num`` and ``greenlets_busy`` (of the warm ones that serve requests) and ``jobs_waiting`` (for
        one of those).
    """
    from puff_patch.runtime import watch
    from puff_patch.runtime.greenlets import warm_pools

    seen, warm = watch.hub_stats(), warm_pools()
    return {
        "watched": int(watch.is_watched()),
        "blocks_num": seen.blocks,
        "blocked_ms": int(seen.blocked_seconds * 1000),
        "lag_num": sum(seen.lag_classes),
        "lag_ms": int(seen.lag_seconds * 1000),
        "greenlets_num": sum(pool.size for pool in warm),
        "greenlets_busy": sum(pool.running for pool in warm),
        "jobs_waiting": sum(pool.waiting for pool in warm),
    }


def watch_hub(blocked_ms: float | None = None) -> None:
    """Warn from now on whenever a greenlet holds the hub of the calling thread for too long.

    The warning goes to the logger ``puff_patch.hub`` and says for how long, by which line of your code, and with
    which stack; of one place at most once a minute.  A forked child is watched as well, from when its hub runs.
    Calling again replaces the watch there is.

    Args:
        blocked_ms: milliseconds that are too long; by default ``PUFF_BLOCKED_HUB_MS``, or 250.  With 0 nothing is
            watched.

    Raises:
        puff_patch.config.ConfigError: ``PUFF_BLOCKED_HUB_MS`` is not a number.
        ValueError: ``blocked_ms`` is negative.
    """
    from puff_patch.runtime import watch

    watch.watch_hub(blocked_ms)


def unwatch_hub() -> None:
    """End what `watch_hub` began; does nothing if nothing is watched."""
    from puff_patch.runtime import watch

    watch.unwatch_hub()


def close_pools() -> None:
    """Close every pool of this process: idle connections now, leased ones at their return."""
    import sys

    from puff_patch.pools.base import all_pools

    for pool in all_pools():
        pool.close()
    http = sys.modules.get("puff_patch.pools.http")
    if http is not None:
        http.close_connections()
