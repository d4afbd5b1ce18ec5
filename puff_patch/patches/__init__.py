"""What `patch_all` rewires: one module a library, all of the shape of `puff_patch.patches.base.Patch`."""

from __future__ import annotations

from puff_patch.patches import anyio, asgiref, asyncio, django, psycopg2, redis, requests, sockets
from puff_patch.patches.base import Patch

#: In the order in which they are applied; the standard library comes first.
PATCHES: dict[str, Patch] = {
    module.PATCH.name: module.PATCH
    for module in (sockets, asyncio, asgiref, anyio, psycopg2, redis, requests, django)
}

# Packages that the patches themselves stand on: they may hold originals.
_FOUNDATIONS = frozenset({"gevent", "greenlet", "zope", "wrapt", "puff_patch", "psycogreen"})


def patch_all(
    *,
    sockets: bool = True,
    asyncio: bool = True,
    asgiref: bool = True,
    anyio: bool = True,
    psycopg2: bool = True,
    redis: bool = True,
    requests: bool = True,
    django: bool = True,
) -> None:
    """Make this process cooperative and pooled.  Call it once, in the first lines of the program.

    A library that is not installed is no error; one that is not imported yet is patched when it is.  Calling
    again adds what was left out before and takes nothing back.

    Args:
        sockets: the standard library (sockets, threads, time, subprocesses, ...), by gevent.
        asyncio: an event loop runs for its own greenlet only; ``to_thread`` runs on greenlets.
        asgiref: ``sync_to_async`` and ``async_to_sync`` between greenlets and event loops.
        anyio: worker threads are greenlets.
        psycopg2: cooperative waits, and ``psycopg2.connect`` from a pool.
        redis: clients of redis-py wait for a connection when their pool is full.
        requests: sessions share their connections.
        django: Django's own PostgreSQL and Redis backends share what they otherwise build per greenlet.

    Raises:
        puff_patch.patches.base.UnsupportedVersion: an installed library is too old.

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
        "redis": redis,
        "requests": requests,
        "django": django,
    }
    fresh = []
    for name, patch in PATCHES.items():
        if switches[name] and not patch.is_patched() and patch.patch():
            fresh.append(patch)
    warn_of_captured([entry for patch in fresh for entry in patch.ledger.originals()], _FOUNDATIONS)


def unpatch_all() -> None:
    """Put back every original and close the pools; does nothing where nothing is patched."""
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
