"""The connections that all ``requests`` sessions of a process share.

A session keeps what is its own (cookies, auth, headers, proxies, certificates, and adapters with their retries);
urllib3 keys connections by host, proxy, TLS settings and certificates, so sessions that differ in those do not
share them.  Nor does a session whose server authenticates connections instead of requests (NTLM, Negotiate): from
the server's first offer on, its connections are its own.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import Any, ClassVar

import requests
from gevent.local import local
from requests.adapters import HTTPAdapter
from urllib3 import PoolManager
from urllib3._collections import RecentlyUsedContainer
from urllib3.exceptions import ClosedPoolError, EmptyPoolError
from urllib3.util.connection import is_connection_dropped

from puff_patch.config import PoolOptions, current
from puff_patch.pools import base
from puff_patch.pools.base import Pool, Slot
from puff_patch.pools.sockets import close_at_home, is_mine, settle

# Hosts whose connections are kept; beyond it the least recently used host's are closed.
_MAX_HOSTS = 256


class PoolTimeout(base.PoolTimeout, requests.exceptions.ConnectTimeout):
    """No connection to the host came free in time."""


class TooManyRequests(base.TooManyRequests, requests.exceptions.ConnectionError):
    """`max_waiting` requests to the host wait already."""


class PoolClosed(base.PoolClosed, requests.exceptions.ConnectionError):
    """The pool was closed."""


class _Connections(Pool[Any]):
    """The connections to one host.

    Args:
        name: of the host, for statistics and errors.
        options: sizes and time-outs.
        owner: urllib3's pool for that host, which says how a connection is made.
    """

    PoolTimeout = PoolTimeout
    TooManyRequests = TooManyRequests
    PoolClosed = PoolClosed
    kind = "http"
    how_to_grow: ClassVar[str] = (
        "read or close responses sooner (stream=True keeps a connection until then), "
        "or raise PUFF_HTTP_POOL_MAX_SIZE"
    )
    # urllib3 returns a connection when the response is read, or closes it.  The steps of a handshake that
    # authenticates a connection follow each other on the one returned last.
    needs_reset = False

    def __init__(self, name: str, options: PoolOptions, owner: Any) -> None:
        self._owner = weakref.ref(owner)
        super().__init__(name, options)

    def _connect(self) -> Any:
        # urllib3 connects it later, when it has set the time-out and the tunnel through a proxy.
        owner = self._owner()
        assert owner is not None, "nobody can ask any more"
        settle()
        return owner._new_conn()

    def _check(self, connection: Any) -> bool:
        owner = self._owner()
        # Libraries that record requests put a class of their own there while they do.
        return (
            owner is not None
            and isinstance(connection, owner.ConnectionCls)
            and not is_connection_dropped(connection)
        )

    def _is_free(self, slot: Slot[Any]) -> bool:
        return slot.connection is None or is_mine(slot.connection.sock)

    def _close(self, connection: Any) -> None:
        close_at_home(connection.sock, connection.close)

    def _fileno(self, connection: Any) -> int | None:
        return None if connection.sock is None else int(connection.sock.fileno())

    def _abandon(self, connection: Any) -> None:
        connection.close()  # says nothing on the wire, also with TLS


class Bounded:
    """What bounds urllib3's pools of connections to one host; stands before one among a class's bases.

    urllib3's own bound (``block=True``) loses the place of a response that is dropped unread, and finds one too
    many when a greenlet is killed while it waits.  A connection is leased here from `_get_conn` until `_put_conn`,
    or until nobody refers to it any more.
    """

    def __init__(self, host: str, port: int | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(host, port, *args, **kwargs)  # type: ignore[call-arg]
        scheme: str = self.scheme  # type: ignore[attr-defined]
        options = replace(current().http_pool, min_size=0)
        self._connections = _Connections(f"{scheme}://{host}:{port}", options, self)
        self._mine = local()
        weakref.finalize(self, self._connections.close)

    def _get_conn(self, timeout: float | None = None) -> Any:
        # Should this be interrupted, urllib3 calls `_put_conn(None)` all the same.
        self._mine.lease = None
        if self.pool is None:  # type: ignore[attr-defined]
            raise ClosedPoolError(self, "Pool is closed.")  # type: ignore[arg-type]
        try:
            slot = self._connections.checkout()
        except base.PoolError as error:
            raise EmptyPoolError(self, str(error)) from error  # type: ignore[arg-type]
        connection, slot.connection = slot.connection, None
        assert connection is not None
        lease = weakref.finalize(connection, self._connections.reclaim, slot)
        connection._puff_lease = self._mine.lease = lease
        return connection

    def _put_conn(self, connection: Any) -> None:
        if connection is None:  # closed after an error
            lease, self._mine.lease = self._mine.lease, None
            if lease is not None:
                lease()
            return
        lease = vars(connection).pop("_puff_lease", None)
        held = lease and lease.detach()
        if held is None:
            connection.close()  # returned already
            return
        _, _, (slot,), _ = held
        self._connections.checkin(slot, connection, reusable=connection.sock is not None)

    def close(self) -> None:
        """Close idle connections now and leased ones at their return."""
        super().close()  # type: ignore[misc]
        self._connections.close()


@functools.cache
def _bounded(pool_class: type) -> type:
    """urllib3's class of pools (SOCKS has its own), bounded."""
    # Its name is part of error messages.
    return type(pool_class.__name__, (Bounded, pool_class), {})


class _Hosts(RecentlyUsedContainer[Any, Any]):
    """Pools by what urllib3 tells them apart."""

    def __init__(self) -> None:
        super().__init__(_MAX_HOSTS)
        _all_hosts.add(self)

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def close(self) -> None:
        """Close every idle connection, and leased ones at their return."""
        with self.lock:
            pools = [self[key] for key in self.keys()]
            self.clear()
        for pool in pools:
            pool.close()

    def after_fork_in_child(self) -> None:
        # Sessions made before the fork hold this very object.  Whoever held the lock is not here.
        self.lock = threading.RLock()
        self.clear()


class _View(MutableMapping[Any, Any]):
    """What one session's manager of pools knows of `_Hosts`: the pools that it asked for itself."""

    def __init__(self, hosts: _Hosts) -> None:
        self._hosts = hosts
        self._known: set[Any] = set()

    @property
    def lock(self) -> Any:
        """For urllib3, which looks and adds under it."""
        return self._hosts.lock

    def __getitem__(self, key: Any) -> Any:
        pool = self._hosts[key]
        self._known.add(key)
        return pool

    def __setitem__(self, key: Any, pool: Any) -> None:
        self._hosts[key] = pool
        self._known.add(key)

    def __delitem__(self, key: Any) -> None:
        self._known.remove(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(tuple(self._known))

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Close what is this session's own; what others use, too, stays open."""
        self._known.clear()
        if self._hosts is not _shared:
            self._hosts.close()


_all_hosts: weakref.WeakSet[_Hosts] = weakref.WeakSet()
_shared: _Hosts | None = None


def _shared_hosts() -> _Hosts:
    global _shared
    if _shared is None:
        _shared = _Hosts()
        base.follow_forks(_after_fork_in_child)
    return _shared


def _after_fork_in_child() -> None:
    for hosts in list(_all_hosts):
        hosts.after_fork_in_child()


# The schemes that authenticate a connection once, and then every request that comes over it.
_BY_CONNECTION = r"(?:negotiate|ntlm|kerberos|nego2)\b"
_USES_ONE = re.compile(rf"\s*{_BY_CONNECTION}", re.IGNORECASE)
_OFFERS_ONE = re.compile(rf"(?:^|,)\s*{_BY_CONNECTION}", re.IGNORECASE)


class SessionAdapter(HTTPAdapter):
    """An HTTPAdapter of one session, over the connections that all sessions share."""

    _hosts: _Hosts

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """As requests', over shared and bounded pools that time out."""
        vars(self).setdefault("_hosts", _shared_hosts())
        super().init_poolmanager(*args, **kwargs)
        self._adopt(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:
        """As requests', over shared and bounded pools that time out."""
        known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **proxy_kwargs)
        if not known:
            self._adopt(manager)
        return manager

    def _adopt(self, manager: PoolManager) -> None:
        manager.pools = _View(self._hosts)  # type: ignore[assignment]
        manager.pool_classes_by_scheme = {
            scheme: _bounded(pool_class) for scheme, pool_class in manager.pool_classes_by_scheme.items()
        }
        manager.key_fn_by_scheme = {
            scheme: functools.partial(_key, key_fn) for scheme, key_fn in manager.key_fn_by_scheme.items()
        }

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        """As requests'.

        Raises:
            PoolTimeout, TooManyRequests, PoolClosed: there was no connection to the host to be had.
        """
        if any(
            _USES_ONE.match(_text(request.headers.get(name))) for name in ("Authorization", "Proxy-Authorization")
        ):
            self._part()
        try:
            response = super().send(request, *args, **kwargs)
        except EmptyPoolError as error:
            for kind in (TooManyRequests, PoolClosed):
                if isinstance(error.__cause__, kind):
                    raise kind(str(error.__cause__), request=request) from error
            raise PoolTimeout(str(error.__cause__), request=request) from error
        if response.status_code in (401, 407) and any(
            _OFFERS_ONE.search(response.headers.get(name, ""))
            for name in ("WWW-Authenticate", "Proxy-Authenticate")
        ):
            self._part()  # before the session's auth answers
        return response

    def _part(self) -> None:
        """Share connections with no other session from now on."""
        if self._hosts is _shared:
            self._hosts = _Hosts()
            for manager in (self.poolmanager, *self.proxy_manager.values()):
                manager.pools = _View(self._hosts)


def _text(header: Any) -> str:
    return header.decode("latin-1") if isinstance(header, bytes) else header or ""


def _key(key_fn: Callable[[Any], Any], context: Mapping[str, Any]) -> Any:
    """urllib3's key for a pool, and the versions of the files it names.

    A session would not outlive a certificate that is replaced; shared connections do.
    """
    versions = []
    for name in ("cert_file", "key_file", "ca_certs", "ca_cert_dir"):
        if path := context.get(name):
            try:
                found = os.stat(path)
            except OSError:
                continue  # requests says what is wrong with it
            versions.append((name, found.st_ino, found.st_size, found.st_mtime_ns))
    return key_fn(context), *versions


def close_connections() -> None:
    """Close the idle connections of all sessions."""
    for hosts in list(_all_hosts):
        hosts.close()
