"""What `patch_all` rewires: one module a library, all of the shape of `puff_patch.patches.base.Patch`."""

from __future__ import annotations

import os
import sys

from puff_patch.config import blocked_hub_ms
from puff_patch.patches import (
    anyio,
    asgiref,
    asyncio,
    django,
    django_redis,
    psycopg,
    psycopg2,
    puff_alias,
    redis,
    requests,
    sockets,
    sqlalchemy,
)
from puff_patch.patches.base import Patch

#: In the order in which they are applied; the standard library comes first.
PATCHES: dict[str, Patch] = {
    module.PATCH.name: module.PATCH
    for module in (
        *(sockets, asyncio, asgiref, anyio),
        *(psycopg2, psycopg, redis, requests),
        *(django, django_redis, sqlalchemy, puff_alias),
    )
}

# Packages that the patches themselves stand on: they may hold originals.
_FOUNDATIONS = frozenset({"gevent", "greenlet", "zope", "wrapt", "puff_patch", "psycogreen"}) | {
    # And what runs tests, which is there before whatever they patch, and waits for nobody while they run.
    *("_pytest", "execnet", "xdist")
}


def patch_all(
    *,
    sockets: bool = True,
    asyncio: bool = True,
    asgiref: bool = True,
    anyio: bool = True,
    psycopg2: bool = True,
    psycopg: bool = True,
    redis: bool = True,
    requests: bool = True,
    django: bool = True,
    django_redis: bool = True,
    sqlalchemy: bool = True,
    puff_alias: bool = True,
) -> None:
    """Make this process cooperative and pooled.  Call it once, in the first lines of the program.

    A library that is not installed is no error; one that is not imported yet is patched when it is.  Calling
    again adds what was left out before and takes nothing back.  With ``PUFF_BLOCKED_HUB_MS`` in the environment
    the hub is watched from now on, see `puff_patch.watch_hub`.

    Args:
        sockets: the standard library (sockets, threads, time, subprocesses, ...), by gevent.
        asyncio: an event loop runs for its own greenlet only; ``to_thread`` runs on greenlets.
        asgiref: ``sync_to_async`` and ``async_to_sync`` between greenlets and event loops.
        anyio: worker threads are greenlets.
        psycopg2: cooperative waits, and ``psycopg2.connect`` from a pool.
        psycopg: the same for psycopg 3.
        redis: clients of redis-py wait for a connection when their pool is full.
        requests: sessions share their connections.
        django: Django's own PostgreSQL and Redis backends share what they otherwise build per greenlet.
        django_redis: caches of django-redis wait for a connection when their pool is full.
        sqlalchemy: SQLAlchemy's own pool is the only one of its engines.
        puff_alias: ``import puff`` finds this project, unless a puff is installed.

    Raises:
        puff_patch.patches.base.UnsupportedVersion: an installed library is too old.
        puff_patch.config.ConfigError: an environment variable has a value that cannot be used.

    Warns:
        PatchedTooLateWarning: modules imported earlier hold on to originals; names them.
    """
    from puff_patch.patches.sockets import warn_of_captured

    switches = {
        "sockets": sockets,
        "asyncio": asyncio,
        "asgiref": asgiref,
        "anyio": anyio,
        "psycopg2": psycopg2,
        "psycopg": psycopg,
        "redis": redis,
        "requests": requests,
        "django": django,
        "django_redis": django_redis,
        "sqlalchemy": sqlalchemy,
        "puff_alias": puff_alias,
    }
    fresh = []
    for name, patch in PATCHES.items():
        if switches[name] and not patch.is_patched() and patch.patch():
            fresh.append(patch)
    warn_of_captured([entry for patch in fresh for entry in patch.ledger.originals()], _FOUNDATIONS)
    if PATCHES["sockets"].is_patched() and blocked_hub_ms(os.environ):
        from puff_patch.runtime.watch import is_watched, watch_hub

        if not is_watched():
            watch_hub()


def captured_originals() -> list[str]:
    """What modules imported by now hold of all that is replaced, e.g. ``["mysite.jobs.sleep (was time.sleep)"]``.

    The finding of `PatchedTooLateWarning`, at any time: also of modules that were imported after `patch_all` and
    got an original from one that was imported before.
    """
    from puff_patch.patches.sockets import captured

    return captured([entry for patch in PATCHES.values() for entry in patch.ledger.originals()], _FOUNDATIONS)


def unpatch_all() -> None:
    """Put back every original, close the pools and end the watch over the hub; where there is none, nothing."""
    watch = sys.modules.get("puff_patch.runtime.watch")
    if watch is not None:
        watch.unwatch_hub()
    clients = sys.modules.get("puff_patch.pools.httpx")
    if clients is not None:
        clients.close_clients()
    for patch in reversed(list(PATCHES.values())):
        patch.unpatch()


def is_patched(name: str) -> bool:
    """Whether the patch ``name`` (a switch of `patch_all`) is in force.

    Raises:
        ValueError: there is no such patch.
    """
    if name not in PATCHES:
        raise ValueError(f"no patch is called {name!r}; there are {', '.join(PATCHES)}")
    return PATCHES[name].is_patched()
