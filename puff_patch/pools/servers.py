"""What the pools of psycopg2 and of psycopg 3 share: which server is meant, and which pool is whose.

Knows PostgreSQL, and neither driver.
"""

from __future__ import annotations

import os
import re
import select
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar

import gevent
from gevent.monkey import get_original

from puff_patch.config import PoolOptions, current, unreachable_hint
from puff_patch.pools.base import Pool, all_pools, follow_forks
from puff_patch.pools.farewell import Farewells

C = TypeVar("C")
P = TypeVar("P", bound="ServerPool[Any]")

_POLL_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR
_poll: Callable[[], Any] = get_original("select", "poll")

# What libpq says when it reached no server at all, as against one that refused the login.
_UNREACHABLE = re.compile(
    r"refused|could not connect|could not translate|failed to resolve|No such file|timeout expired|unreachable"
    r"|No route|reset by peer",
    re.IGNORECASE,
)


class ServerPool(Pool[C]):
    """A bounded pool of connections to one PostgreSQL DSN.

    Args:
        dsn: a libpq connection string.
        options: sizes and time-outs.
        setup: SQL run on every new connection and after every reset, e.g. ``SET TIME ZONE 'UTC'``.
        name: for messages and statistics; derived from the DSN by default.
    """

    kind = "postgres"
    how_to_grow: ClassVar[str] = (
        'raise max_size (PUFF_POSTGRES_POOL_MAX_SIZE, or OPTIONS["pool"] in DATABASES) within what '
        "the server's max_connections allows for all processes"
    )

    def __init__(self, dsn: str, options: PoolOptions, *, setup: str | None = None, name: str = "") -> None:
        self.dsn = dsn
        self._setup = setup
        #: Connections that are closed here, and that the server still has.
        self.farewells = Farewells()
        super().__init__(name or display_name(self.parse(dsn)), options)

    @staticmethod
    def parse(dsn: str) -> Mapping[str, Any]:
        """The parameters of a connection string, as the driver understands it."""
        raise NotImplementedError

    def _wait_for_room(self) -> None:
        self.farewells.wait(lambda leaving: self._size + leaving <= self.options.max_size or not leaving)

    def _after_fork_in_child(self) -> None:
        self.farewells.forget_all()
        super()._after_fork_in_child()

    def _unreachable(self, reason: str) -> str:
        return f"cannot reach PostgreSQL at {self.name}: {reason.strip()}\n{unreachable_hint('postgres')}"


def says_unreachable(message: str) -> bool:
    """Whether an error of libpq means that no server was reached, as against one that refused the login."""
    return _UNREACHABLE.search(message) is not None and "FATAL" not in message


def is_silent(fileno: int) -> bool:
    """Whether an idle session's socket has nothing to say: bytes or EOF mean that the server ended it."""
    poll = _poll()
    poll.register(fileno, _POLL_READABLE)
    return not poll.poll(0)


@contextmanager
def at_most(seconds: float | None, error: Callable[[], Exception]) -> Iterator[None]:
    """Raise ``error()`` in a block that takes longer than ``seconds``; None is for ever."""
    timeout = gevent.Timeout(seconds)
    timeout.start()
    try:
        yield
    except gevent.Timeout as expired:
        if expired is not timeout:
            raise
        raise error() from None
    finally:
        timeout.close()


class Cursors:
    """The cursors of a session that are still alive, over all its leases."""

    __slots__ = ("_prune_at", "_references")

    def __init__(self) -> None:
        self._references: list[weakref.ref[Any]] = []
        self._prune_at = 64

    def add(self, cursor: Any) -> None:
        """Remember a cursor without keeping it alive."""
        self._references.append(weakref.ref(cursor))
        if len(self._references) > self._prune_at:
            self._prune_at = 2 * len(self.alive()) + 64

    def alive(self) -> list[Any]:
        """Those that somebody still holds."""
        found = [cursor for reference in self._references if (cursor := reference()) is not None]
        if len(found) < len(self._references):
            self._references = [weakref.ref(cursor) for cursor in found]
        return found


def display_name(parameters: Mapping[str, Any]) -> str:
    """A URL without secrets that tells a reader which server and database are meant."""
    host = parameters.get("host") or os.environ.get("PGHOST") or "local socket"
    port = parameters.get("port") or os.environ.get("PGPORT") or "5432"
    user = parameters.get("user") or os.environ.get("PGUSER") or ""
    database = parameters.get("dbname") or os.environ.get("PGDATABASE") or user
    where = host if host.startswith(("/", "@")) or host == "local socket" else f"{host}:{port}"
    return f"postgres://{user}@{where}/{database}" if user else f"postgres://{where}/{database}"


# What libpq takes from the environment if a DSN leaves it out, so that it is part of what a DSN means; and what
# decides whether there is a pool (see `Config.pools_postgres`).
_VARIABLES = (
    *("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE", "PGOPTIONS", "PGAPPNAME"),
    *("PGCLIENTENCODING", "PGDATESTYLE", "PGTZ", "PGSSLMODE", "PGTARGETSESSIONATTRS"),
    *("PUFF_POSTGRES_POOL", "PUFF_POSTGRES_UNPOOLED"),
)


_RAW_VARIABLES = tuple(map(os.fsencode, _VARIABLES))


def _environment() -> tuple[Any, ...]:
    """What the environment says now; only to be compared."""
    # What os.environ wraps, where it does: that would encode and decode at each look, at twenty times the price.
    raw = getattr(os.environ, "_data", None)
    return tuple(map(os.environ.get, _VARIABLES)) if raw is None else tuple(map(raw.get, _RAW_VARIABLES))


class Registry(Generic[P]):
    """The pools that one driver has in this process, one for each DSN and set of options."""

    def __init__(self, pool_class: type[P]) -> None:
        self._pool_class = pool_class
        # None stands for a server that is not to be pooled.
        self._pools: dict[Any, P | None] = {}
        self._renew_lock()

    def _renew_lock(self) -> None:
        # Reentrant: the garbage collector may run a finalizer that connects while a pool is being made.
        self._lock = get_original("_thread", "RLock")()

    def get(self, dsn: str, overrides: Mapping[str, Any] | None = None, *, setup: str | None = None) -> P | None:
        """The pool of this process for a DSN with these options; made at the first call.

        Args:
            dsn: a libpq connection string.
            overrides: pool options that differ from the configured defaults.
            setup: see `ServerPool`.

        Returns:
            None if the operator wants no pool for this server, see `puff_patch.config.Config.pools_postgres`.

        Raises:
            puff_patch.config.ConfigError: an unknown or impossible option.
        """
        key = (dsn, tuple(sorted((overrides or {}).items())), setup, _environment())
        if key in self._pools and ((pool := self._pools[key]) is None or not pool.closed):
            return pool
        config = current()
        options = config.postgres_pool.merged(overrides or {}, where="PostgreSQL pool options")
        if not config.pools_postgres(display_name(self._pool_class.parse(dsn))):
            self._pools[key] = None
            return None
        follow_forks(self._renew_lock)  # another thread of the parent may have held it
        with self._lock:
            pool = self._pools.get(key)
            if pool is None or pool.closed:
                pool = self._pools[key] = self._pool_class(dsn, options, setup=setup)
        pool.open()
        return pool


def drain_pools(*, dbname: str) -> None:
    """Close the idle connections of every pool to a database of that name, and the leased ones at their return.

    Args:
        dbname: the database's name, as in the DSN; empty for the DSNs that name none.
    """
    for pool in all_pools():
        if isinstance(pool, ServerPool) and pool.parse(pool.dsn).get("dbname", "") == dbname:
            pool.drain()


def close_pools(pool_class: type[ServerPool[Any]]) -> None:
    """Close every pool of one driver in this process."""
    for pool in all_pools():
        if isinstance(pool, pool_class):
            pool.close()
