"""What a server can be told, and the errors it raises about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from puff_patch.server.filters import Filter


class ServerError(RuntimeError):
    """The server cannot start; the message says why and what to do."""


@dataclass(frozen=True)
class ServerOptions:
    """How :func:`puff_patch.server.serve` listens, how much it takes on, and how it stops.

    Args:
        host: an IP address or a name to listen on; ``""`` means every IPv4 address.
        port: a TCP port; 0 takes a free one, and the address printed at the start names it.
        uds: the path of a Unix socket to listen on instead of host and port.
        backlog: how many connections the kernel may hold that are not yet accepted.
        reuse_port: let other processes listen on the same port at the same time (SO_REUSEPORT).
        http: ``"1"``, ``"2"`` (with prior knowledge) or ``"auto"`` for both on one port.
        max_connections: how many connections are open at a time; further ones wait in the backlog.
            Lowered to what the process's limit of open files allows.
        max_greenlets: how many requests run at a time; further ones wait in order.
        client_timeout: seconds that a client may leave us waiting, for more of its request or to take more of
            the response, before its connection is cut.
        graceful_timeout: seconds that running requests have to finish after SIGTERM or SIGINT.
        access_log: write one line a request to the logger ``puff_patch.access``.
        workers: how many processes serve; 0 is one for each CPU that this process may use. More than one are
            started and kept up by this one, see `puff_patch.server.supervisor`.
        worker_start_timeout: seconds that a worker may take to load the application.
        max_requests: after how many requests a worker is replaced, against leaks of memory; 0 for never.
        max_requests_jitter: up to how many more, at random, so that workers are not all replaced at one time.
        reload: replace the workers whenever a file of the program changes; for development.
        reload_dirs: folders to watch for that. By default the working directory, and those of the import path that
            are not Python's own.
        filters: what every request and response goes through, see `puff_patch.server.filters`.
        on_stop: called in order after the last request, also after a forced stop; to close pools, for one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    backlog: int = 2048
    reuse_port: bool = False
    http: str = "auto"
    max_connections: int = 16384
    max_greenlets: int = 1000
    client_timeout: float = 60.0
    graceful_timeout: float = 30.0
    access_log: bool = False
    workers: int = 1
    worker_start_timeout: float = 60.0
    max_requests: int = 0
    max_requests_jitter: int = 0
    reload: bool = False
    reload_dirs: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = ()
    on_stop: tuple[Callable[[], object], ...] = field(default=())

    @property
    def supervised(self) -> bool:
        """Whether worker processes serve, and not the one that is told to."""
        return self.workers != 1 or self.reload or self.max_requests > 0

    def __post_init__(self) -> None:
        if self.http not in ("auto", "1", "2"):
            raise ValueError(f'http must be "auto", "1" or "2", not {self.http!r}')
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, not {self.port}")
        for name in ("backlog", "max_connections", "max_greenlets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("workers", "max_requests", "max_requests_jitter"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("client_timeout", "worker_start_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.graceful_timeout < 0:
            raise ValueError(f"graceful_timeout must not be negative, not {self.graceful_timeout}")
