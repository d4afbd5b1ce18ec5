"""puff_patch: one line makes a synchronous Python program highly concurrent.

``import puff_patch; puff_patch.patch_all()`` in the first lines of a program makes its sockets, PostgreSQL and
Redis connections, ``requests`` calls and Django backends cooperative, on bounded pools.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from puff_patch.patches import is_patched, patch_all, unpatch_all
from puff_patch.patches.base import DidPatch, DidUnpatch, DoNotPatch, UnsupportedVersion, WillPatch
from puff_patch.patches.sockets import PatchedTooLateWarning

if TYPE_CHECKING:
    from puff_patch.runtime.calls import (
        Task,
        TaskKilled,
        global_state,
        is_asyncio,
        is_greenlet,
        join_all,
        join_iter,
        set_global_state,
        sleep_ms,
        spawn,
        wrap_async,
    )
    from puff_patch.runtime.native import blocking, read_file_bytes, spawn_blocking

__version__ = "0.1.0.dev0"

__all__ = [
    "DidPatch",
    "DidUnpatch",
    "DoNotPatch",
    "PatchedTooLateWarning",
    "Task",
    "TaskKilled",
    "UnsupportedVersion",
    "WillPatch",
    "blocking",
    "close_pools",
    "global_state",
    "hub_stats",
    "is_asyncio",
    "is_greenlet",
    "is_patched",
    "join_all",
    "join_iter",
    "patch_all",
    "read_file_bytes",
    "set_global_state",
    "sleep_ms",
    "spawn",
    "spawn_blocking",
    "stats",
    "unpatch_all",
    "unwatch_hub",
    "watch_hub",
    "wrap_async",
]

# The functions for greenlets import gevent, which importing this package does not.
_LAZY = {
    **dict.fromkeys(("blocking", "read_file_bytes", "spawn_blocking"), "puff_patch.runtime.native"),
    **dict.fromkeys(
        (
            *("Task", "TaskKilled", "global_state", "is_asyncio", "is_greenlet", "join_all", "join_iter"),
            *("set_global_state", "sleep_ms", "spawn", "wrap_async"),
        ),
        "puff_patch.runtime.calls",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
    clients = sys.modules.get("puff_patch.pools.httpx")
    if clients is not None:
        clients.close_clients()
