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
    "is_patched",
    "patch_all",
    "stats",
    "unpatch_all",
]


def stats() -> dict[str, dict[str, int]]:
    """The statistics of every open pool of this process, by pool name, under psycopg_pool's keys."""
    from puff_patch.pools.base import all_pools

    return {pool.name: pool.get_stats() for pool in all_pools()}


def close_pools() -> None:
    """Close every pool of this process: idle connections now, leased ones at their return."""
    import sys

    from puff_patch.pools.base import all_pools

    for pool in all_pools():
        pool.close()
    http = sys.modules.get("puff_patch.pools.http")
    if http is not None:
        http.close_connections()
