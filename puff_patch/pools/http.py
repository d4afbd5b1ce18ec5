"""The connections that all ``requests`` sessions of a process share.

A session keeps what is its own (cookies, auth, headers, proxies, certificates); urllib3 keys connections by
host, TLS settings and certificates, so sessions that differ in those do not share them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.exceptions import EmptyPoolError

from puff_patch.config import current
from puff_patch.pools import base

# Hosts whose connections are kept; beyond it the least recently used host's are closed.
_MAX_HOSTS = 256


class PoolTimeout(base.PoolTimeout, requests.exceptions.ConnectTimeout):
    """No connection to the host came free in time."""


class _PatientHTTPConnectionPool(HTTPConnectionPool):
    def _get_conn(self, timeout: float | None = None) -> Any:
        # requests passes no time-out here, and a full pool would wait for ever.
        return super()._get_conn(current().http_pool.timeout if timeout is None else timeout)


class _PatientHTTPSConnectionPool(HTTPSConnectionPool):
    def _get_conn(self, timeout: float | None = None) -> Any:
        return super()._get_conn(current().http_pool.timeout if timeout is None else timeout)


class SharedAdapter(HTTPAdapter):
    """An HTTPAdapter that outlives the sessions it is mounted in."""

    def __init__(self) -> None:
        super().__init__(pool_connections=_MAX_HOSTS, pool_maxsize=current().http_pool.max_size, pool_block=True)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """As requests', with pools that time out instead of waiting for ever."""
        super().init_poolmanager(*args, **kwargs)
        self._be_patient(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        """As requests', with pools that time out instead of waiting for ever."""
        manager = super().proxy_manager_for(*args, **kwargs)
        self._be_patient(manager)
        return manager

    @staticmethod
    def _be_patient(manager: PoolManager) -> None:
        manager.pool_classes_by_scheme = {
            "http": _PatientHTTPConnectionPool,
            "https": _PatientHTTPSConnectionPool,
        }

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        """As requests'.

        Raises:
            PoolTimeout: all connections to the host stayed in use.
        """
        try:
            return super().send(*args, **kwargs)
        except EmptyPoolError as error:
            size = self._pool_maxsize  # type: ignore[attr-defined]
            raise PoolTimeout(
                f"{error.pool}: all {size} connections to this host stayed in use for "
                f"{current().http_pool.timeout:g} s. Read or close responses sooner (stream=True keeps a "
                f"connection until then), or raise PUFF_HTTP_POOL_MAX_SIZE."
            ) from error

    def close(self) -> None:
        """Nothing: ``Session.close()`` must not close what other sessions use."""

    def close_connections(self) -> None:
        """Close every idle connection."""
        super().close()

    def __reduce__(self) -> tuple[Callable[[], SharedAdapter], tuple[()]]:
        return shared_adapter, ()


_adapter: SharedAdapter | None = None
_fork_hook_installed = False


def shared_adapter() -> SharedAdapter:
    """The adapter of this process, made at the first call."""
    global _adapter, _fork_hook_installed
    if _adapter is None:
        _adapter = SharedAdapter()
        if not _fork_hook_installed:
            os.register_at_fork(after_in_child=_after_fork_in_child)
            _fork_hook_installed = True
    return _adapter


def close_shared_adapter() -> None:
    """Close the idle connections of the shared adapter, if there is one."""
    if _adapter is not None:
        _adapter.close_connections()


def _after_fork_in_child() -> None:
    if _adapter is not None:
        # Sessions made before the fork hold this very object, so it gets fresh pools in place.  Dropping the
        # old sockets closes the child's descriptors only.
        _adapter.__init__()  # type: ignore[misc]
