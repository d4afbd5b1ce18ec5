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
        lifespan: ``"auto"`` sends an ASGI application the lifespan events of its start and stop, if it takes part
            in them; ``"off"`` sends none.
        root_path: the path below which a proxy has mounted the ASGI application, ``/app`` for one, if the proxy
            takes it off.
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
    lifespan: str = "auto"
    root_path: str = ""
    filters: tuple[Filter, ...] = ()
    on_stop: tuple[Callable[[], object], ...] = field(default=())

    def __post_init__(self) -> None:
        if self.http not in ("auto", "1", "2"):
            raise ValueError(f'http must be "auto", "1" or "2", not {self.http!r}')
        if self.lifespan not in ("auto", "off"):
            raise ValueError(f'lifespan must be "auto" or "off", not {self.lifespan!r}')
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"root_path begins with '/' and does not end with it, unlike {self.root_path!r}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, not {self.port}")
        for name in ("backlog", "max_connections", "max_greenlets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.client_timeout <= 0:
            raise ValueError(f"client_timeout must be positive, not {self.client_timeout}")
        if self.graceful_timeout < 0:
            raise ValueError(f"graceful_timeout must not be negative, not {self.graceful_timeout}")
