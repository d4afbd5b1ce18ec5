"""The connections that all ``requests`` sessions of a process share.

A session keeps what is its own (cookies, auth, headers, proxies, certificates); urllib3 keys connections by
host, TLS settings and certificates, so sessions that differ in those do not share them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import requests
from gevent.local import local
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.exceptions import EmptyPoolError

from puff_patch.config import current
from puff_patch.pools import base
from puff_patch.pools.base import Pool
from puff_patch.pools.sockets import close_at_home, cut_off, is_mine, settle

# Hosts whose connections are kept; beyond it the least recently used host's are closed.
_MAX_HOSTS = 256


class PoolTimeout(base.PoolTimeout, requests.exceptions.ConnectTimeout):
    """No connection to the host came free in time."""


class TooManyRequests(base.TooManyRequests, requests.exceptions.ConnectionError):
    """`max_waiting` requests to the host wait already."""


class _Places(Pool[object]):
    """How many connections to one host there may be; the connections themselves urllib3 keeps."""

    how_to_grow: ClassVar[str] = (
        "read or close responses sooner (stream=True keeps a connection until then), "
        "or raise PUFF_HTTP_POOL_MAX_SIZE"
    )

    def _connect(self) -> object:
        return object()

    def _check(self, connection: object) -> bool:
        return True

    def _close(self, connection: object) -> None:
        """Nothing to do, and nothing to abandon."""

    _abandon = _close


# For a fork.
_connections: weakref.WeakSet[Any] = weakref.WeakSet()


class _Bounded:
    """urllib3's pools of connections to one host, with a bound that no interrupted request upsets.

    urllib3's own (``block=True``) loses the place of a response that is dropped unread, and finds one too many
    when a greenlet is killed while it waits.  A place is had here by the connection object, from `_get_conn`
    until `_put_conn`, or until nobody refers to it any more.
    """

    def __init__(self, host: str, port: int | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(host, port, *args, **kwargs)  # type: ignore[call-arg]
        scheme: str = self.scheme  # type: ignore[attr-defined]
        self._places = _Places(f"{scheme}://{host}:{port}", replace(current().http_pool, min_size=0))
        self._mine = local()

    def _get_conn(self, timeout: float | None = None) -> Any:
        # Should this be interrupted, urllib3 calls `_put_conn(None)` all the same.
        self._mine.leave = None
        try:
            slot = self._places.checkout()
        except base.PoolError as error:
            raise EmptyPoolError(self, str(error)) from error  # type: ignore[arg-type]
        try:
            settle()
            connection = super()._get_conn(timeout)  # type: ignore[misc]
            while not is_mine(connection.sock):
                close_at_home(connection.sock, connection.close)
                connection = super()._get_conn(timeout)  # type: ignore[misc]
        except BaseException:
            self._places.reclaim(slot)
            raise
        _connections.add(connection)
        connection._puff_leave = self._mine.leave = weakref.finalize(connection, self._places.reclaim, slot)
        return connection

    def _put_conn(self, connection: Any) -> None:
        if connection is None:  # closed after an error
            leave, self._mine.leave = self._mine.leave, None
        else:
            leave = connection._puff_leave
            super()._put_conn(connection)  # type: ignore[misc]
        if leave is not None:
            leave()


class _BoundedHTTPConnectionPool(_Bounded, HTTPConnectionPool):
    pass


class _BoundedHTTPSConnectionPool(_Bounded, HTTPSConnectionPool):
    pass


class SharedAdapter(HTTPAdapter):
    """An HTTPAdapter that outlives the sessions it is mounted in."""

    def __init__(self) -> None:
        super().__init__(pool_connections=_MAX_HOSTS, pool_maxsize=current().http_pool.max_size)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """As requests', with bounded pools that time out."""
        super().init_poolmanager(*args, **kwargs)
        self._bound(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        """As requests', with bounded pools that time out."""
        manager = super().proxy_manager_for(*args, **kwargs)
        self._bound(manager)
        return manager

    @staticmethod
    def _bound(manager: PoolManager) -> None:
        manager.pool_classes_by_scheme = {
            "http": _BoundedHTTPConnectionPool,
            "https": _BoundedHTTPSConnectionPool,
        }

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        """As requests'.

        Raises:
            PoolTimeout, TooManyRequests: all connections to the host stayed in use.
        """
        try:
            return super().send(request, *args, **kwargs)
        except EmptyPoolError as error:
            cause = error.__cause__
            kind = TooManyRequests if isinstance(cause, base.TooManyRequests) else PoolTimeout
            raise kind(str(cause), request=request) from error

    def close(self) -> None:
        """Nothing: ``Session.close()`` must not close what other sessions use."""

    def close_connections(self) -> None:
        """Close every idle connection."""
        super().close()

    def __reduce__(self) -> tuple[Callable[[], SharedAdapter], tuple[()]]:
        return shared_adapter, ()


_adapter: SharedAdapter | None = None


def shared_adapter() -> SharedAdapter:
    """The adapter of this process, made at the first call."""
    global _adapter
    if _adapter is None:
        _adapter = SharedAdapter()
        base.follow_forks(_after_fork_in_child)
    return _adapter


def close_shared_adapter() -> None:
    """Close the idle connections of the shared adapter, if there is one."""
    if _adapter is not None:
        _adapter.close_connections()


def _after_fork_in_child() -> None:
    for connection in list(_connections):
        if connection.sock is not None and connection.sock.fileno() >= 0:
            cut_off(connection.sock.fileno())
    _connections.clear()
    if _adapter is not None:
        # Sessions made before the fork hold this very object, so it gets fresh pools in place.  Dropping the
        # old sockets closes the child's descriptors only.
        _adapter.__init__()  # type: ignore[misc]
