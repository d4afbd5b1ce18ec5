"""The Redis pool: redis-py's own `ConnectionPool`, bounded by and waiting on ours.

redis-py's pool raises when it is full; this one makes the next command wait its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import redis
from gevent.monkey import get_original
from redis.backoff import EqualJitterBackoff
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool, SentinelManagedConnection

from puff_patch.config import PoolOptions, current, unreachable_hint
from puff_patch.pools import base
from puff_patch.pools.base import Pool, Slot
from puff_patch.pools.redis_blocking import Use, current_use, took_one
from puff_patch.pools.sockets import close_at_home, is_mine, settle


class PoolTimeout(base.PoolTimeout, redis.exceptions.ConnectionError):
    """No connection came free in time."""


class TooManyRequests(base.TooManyRequests, redis.exceptions.ConnectionError):
    """`max_waiting` checkouts wait already."""


class PoolClosed(base.PoolClosed, redis.exceptions.ConnectionError):
    """The pool was closed."""


class _Connections(Pool[Any]):
    """A bounded pool inside a `RedisPool`."""

    PoolTimeout = PoolTimeout
    TooManyRequests = TooManyRequests
    PoolClosed = PoolClosed
    kind = "redis"
    how_to_grow: ClassVar[str] = "raise max_size (PUFF_REDIS_POOL_MAX_SIZE, or max_connections of the client)"
    needs_reset = False  # redis-py leaves a connection clean, or disconnects it

    def __init__(
        self, name: str, options: PoolOptions, make: Callable[[], Any], may_push: Callable[[], bool]
    ) -> None:
        self._make = make
        self._may_push = may_push
        super().__init__(name, options)

    def _connect(self) -> Any:
        connection = self._make()
        settle()
        self._all.add(connection)  # while it connects, too
        try:
            connection.connect()
        except BaseException as error:
            connection.disconnect()
            expected = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)
            # Caused by the socket; else the server was reached, and says why it will not serve.
            if not isinstance(error, expected) or not isinstance(error.__context__, OSError):
                raise
            if isinstance(connection, SentinelManagedConnection):
                raise  # where it connects to is not the user's choice
            raise type(error)(
                f"cannot reach Redis at {self.name}: {error}\n{unreachable_hint('redis')}"
            ) from error
        return connection

    def _check(self, connection: Any) -> bool:
        if not _is_connected(connection):
            return False
        try:
            # An idle connection has nothing to say, but for RESP3's push messages: data or EOF mean that it
            # is out of step or dead.
            return not connection.can_read() or self._may_push()
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError):
            return False

    def _is_free(self, slot: Slot[Any]) -> bool:
        return is_mine(_socket_of(slot.connection))

    def _close(self, connection: Any) -> None:
        close_at_home(_socket_of(connection), connection.disconnect)

    def _fileno(self, connection: Any) -> int | None:
        sock = _socket_of(connection)
        return None if sock is None else int(sock.fileno())

    def _abandon(self, connection: Any) -> None:
        """Nothing: dropping it closes the child's descriptor only."""


class _BlockingConnections(_Connections):
    """The one beside it, for what would keep the others waiting."""

    how_to_grow: ClassVar[str] = "raise PUFF_REDIS_BLOCKING_POOL_MAX_SIZE"


if TYPE_CHECKING:
    _Before = redis.ConnectionPool  # what the mixin stands before
else:
    _Before = object


class _Waiting(_Before):
    """What makes one of redis-py's pools wait when it is full; stands before it among a class's bases.

    Commands that wait for others (BLPOP, ...) and subscriptions have connections beside the pool's own, so that
    no number of them keeps a GET waiting; see `puff_patch.pools.redis_blocking`.

    Args:
        max_connections: connections that may be open at once; the configured default if None.
        timeout: seconds a command waits for a connection; the configured default if None.
        pool_options: further options of the pool, see `PoolOptions`, over the configured defaults.
        connection_kwargs: as for `redis.ConnectionPool`.
    """

    def __init__(
        self,
        *args: Any,
        max_connections: int | None = None,
        timeout: float | None = None,
        pool_options: Mapping[str, Any] | None = None,
        **connection_kwargs: Any,
    ) -> None:
        config = current()
        configured = config.redis_pool.merged(pool_options or {}, where="Redis pool options")
        connection_kwargs["max_connections"] = max_connections or configured.max_size
        super().__init__(*args, **connection_kwargs)
        patience = {} if timeout is None else {"timeout": timeout}
        options = configured.merged(
            {"max_size": self.max_connections, "min_size": 0, **patience}, where="Redis pool options"
        )
        self._blocking_options = config.redis_blocking_pool.merged(
            {"min_size": 0, **patience}, where="Redis pool options"
        )
        self._leased: dict[Any, tuple[_Connections, Slot[Any]]] = {}
        self._connections = _Connections(self._display_name(), options, self._make_connection, self._may_push)
        self._blocking: _Connections | None = None  # most clients never need it

    def _display_name(self) -> str:
        return display_name(self.connection_kwargs)

    def _blocking_connections(self) -> _Connections:
        if self._blocking is None:
            with self._lock:
                if self._blocking is None:
                    self._blocking = _BlockingConnections(
                        f"{self._display_name()} blocking",
                        self._blocking_options,
                        self._make_connection,
                        self._may_push,
                    )
        return self._blocking

    def _pools(self) -> list[_Connections]:
        return [pool for pool in (self._connections, self._blocking) if pool is not None]

    def _make_connection(self) -> Any:
        # redis-py counts what it makes, but never what is dropped: the bound is ours to keep.
        self._created_connections = 0
        return self.make_connection()

    def _may_push(self) -> bool:
        # redis-py before 6.4 knows no maintenance notifications
        enabled: Callable[[], bool] = getattr(self, "maint_notifications_enabled", bool)
        return self.cache is not None or enabled()

    def _is_current(self, connection: Any) -> bool:
        """Whether a connection leads where a new one would."""
        return True

    def reset(self) -> None:
        """Forget all connections, as `redis.ConnectionPool.reset` does."""
        super().reset()
        if "_connections" in vars(self):  # redis-py's __init__ calls this first
            leased, self._leased = self._leased, {}
            for pool, slot in leased.values():
                pool.reclaim(slot)
            for pool in self._pools():
                pool.drain()

    def get_connection(self, command_name: Any = None, *keys: Any, **options: Any) -> Any:
        """A connected connection; waits its turn when all are in use.

        Raises:
            PoolTimeout, TooManyRequests, PoolClosed: see there.
            redis.exceptions.ConnectionError: the server cannot be reached.
        """
        use = current_use()
        if use is None or use is Use.SEVERAL:
            pool = self._connections
            slot = pool.checkout()
            if use is not None:
                took_one()
        else:
            pool = self._blocking_connections()
            slot = pool.checkout() if use is Use.BLOCKING else pool.checkout_from(self._connections)
        connection, slot.connection = slot.connection, None
        self._leased[connection] = pool, slot
        return connection

    def release(self, connection: Any) -> None:
        """Return a connection taken with `get_connection`."""
        lease = self._leased.pop(connection, None)
        if lease is None:
            connection.disconnect()  # of another pool, or of this one before a fork or a reset
            return
        pool, slot = lease
        reusable = _is_connected(connection) and not _should_reconnect(connection) and self._is_current(connection)
        pool.checkin(slot, connection, reusable=reusable)

    def disconnect(self, inuse_connections: bool = True) -> None:
        """Disconnect all connections, optionally also those in use; the pool can be used afterwards."""
        if inuse_connections:
            for connection in list(self._leased):
                connection.disconnect()
        for pool in self._pools():
            if inuse_connections:
                pool.drain()
            else:
                pool.close_idle()

    def close(self) -> None:
        """Disconnect everything, as `redis.ConnectionPool.close` does."""
        self.disconnect()

    def set_retry(self, retry: Retry) -> None:
        """Use ``retry`` for every connection from now on, as `redis.ConnectionPool.set_retry` does."""
        super().set_retry(retry)
        for connection in [*self._get_free_connections(), *self._leased]:
            connection.retry = retry

    def re_auth_callback(self, token: Any) -> None:
        """New credentials: connections made with the old ones are replaced, the leased ones at their return."""
        for pool in self._pools():
            pool.drain()

    def get_stats(self) -> dict[str, int]:
        """Counters and gauges under psycopg_pool's keys, of the connections for ordinary commands."""
        return self._connections.get_stats()

    def pop_stats(self) -> dict[str, int]:
        """As `get_stats`; the counters start anew from zero."""
        return self._connections.pop_stats()

    def _get_free_connections(self) -> set[Any]:
        return {connection for pool in self._pools() for connection in pool.idle()}

    def _get_in_use_connections(self) -> set[Any]:
        return set(self._leased)


class RedisPool(_Waiting, redis.ConnectionPool):
    """A `redis.ConnectionPool` that waits when it is full."""


class SentinelPool(_Waiting, SentinelConnectionPool):
    """A `redis.sentinel.SentinelConnectionPool` that waits when it is full."""

    def _display_name(self) -> str:
        return f"sentinel://{self.proxy.service_name}/{'master' if self.is_master else 'replica'}"

    def _is_current(self, connection: Any) -> bool:
        return not self.is_master or self.master_address == (connection.host, connection.port)


# redis-py puts the name into its repr, and people into the searches of their logs.
RedisPool.__name__, SentinelPool.__name__ = "ConnectionPool", "SentinelConnectionPool"


def _socket_of(connection: Any) -> Any:
    # A client-side cache wraps the connection.
    return getattr(connection, "_conn", connection)._sock


def _is_connected(connection: Any) -> bool:
    # redis-py 7.1 has a property for it.
    return _socket_of(connection) is not None


def _should_reconnect(connection: Any) -> bool:
    # redis-py 7.0 and newer: the server announced that it will move.
    ask: Callable[[], bool] = getattr(connection, "should_reconnect", bool)
    return ask()


def display_name(kwargs: Mapping[str, Any]) -> str:
    """A URL without secrets that tells a reader which server and database are meant."""
    if "path" in kwargs:
        return f"unix://{kwargs['path']}?db={kwargs.get('db', 0)}"
    host, port = kwargs.get("host", "localhost"), kwargs.get("port", 6379)
    return f"redis://{host}:{port}/{kwargs.get('db', 0)}"


# What a shared client does that redis-py leaves open: no wait without a limit, short retries.
_SHARED_DEFAULTS: dict[str, Any] = {"socket_connect_timeout": 5.0, "socket_timeout": 30.0}

_clients: dict[Any, tuple[redis.Redis, object]] = {}
# Reentrant: the garbage collector may run a finalizer that asks for a client while one is being made.
_allocate_lock: Callable[[], Any] = get_original("_thread", "RLock")
_clients_lock = _allocate_lock()


def _renew_lock() -> None:
    global _clients_lock
    _clients_lock = _allocate_lock()


def shared_client(
    url: str, options: Mapping[str, Any] | None = None, pool_class: type[redis.ConnectionPool] | None = None
) -> redis.Redis:
    """The one client of this process for a URL with these options, over a bounded pool; made at first use.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        options: keyword arguments of the pool and its connections.
        pool_class: another pool class than `RedisPool`.
    """
    options = dict(options or {})
    # driver_info says who we are to the server; Django builds an equal one that compares unequal each time.
    key = (url, pool_class, freeze({k: v for k, v in options.items() if k != "driver_info"}))
    found = _clients.get(key)
    if found is None:
        base.follow_forks(_renew_lock)  # another thread of the parent may have held it
        with _clients_lock:
            found = _clients.get(key)
            if found is None:
                settings = dict(options)
                if pool_class is None:
                    settings = {**_SHARED_DEFAULTS, "retry": _short_retry(), **settings}
                pool = (pool_class or RedisPool).from_url(url, **settings)
                # The options are kept: a key may hold the id() of one of their values.
                found = _clients[key] = (redis.Redis(connection_pool=pool), options)
    return found[0]


def _short_retry() -> Retry:
    # redis-py's default may spend more than ten seconds on a server that is down; a page should not.
    return Retry(EqualJitterBackoff(base=0.05, cap=0.5), 3)


def freeze(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options as a dictionary key; what cannot be hashed counts by identity, so its owner must keep it."""
    return tuple((name, _hashable(value)) for name, value in sorted(options.items()))


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def close_shared_clients() -> None:
    """Close the pools of all shared clients."""
    with _clients_lock:
        clients = [client for client, _ in _clients.values()]
        _clients.clear()
    for client in clients:
        client.connection_pool.close()
