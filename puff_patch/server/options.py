"""What a server can be told, and the errors it raises about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from puff_patch.server.filters import CompressionOptions, CorsOptions, Filter, StaticFiles

_FRONT_MESSAGE_SIZE = 64 * 1024 * 1024


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
        http: ``"1"``, ``"2"`` or ``"auto"`` for both on one port: with TLS as agreed on (ALPN), else as the client
            begins to speak (prior knowledge).
        http2_max_concurrent_streams: how many requests one HTTP/2 connection may have open at a time.
        ssl_certfile: the path of a certificate in PEM form, with what is between it and its root. TLS is served if
            it is given.
        ssl_keyfile: the path of the certificate's key; not needed if the key is in the same file.
        ssl_keyfile_password: what the key is encrypted with.
        ssl_min_version: ``"1.2"`` or ``"1.3"``, the oldest version of TLS to speak.
        ssl_ca_certs: the path of the certificates of those who issue clients' certificates.
        ssl_client_auth: ``"none"``, ``"optional"`` or ``"required"``: whether clients have to show a certificate.
            It needs ``ssl_ca_certs``; an optional one that is shown is checked all the same.
        max_connections: how many connections are open at a time; further ones wait in the backlog.
            Lowered to what the process's limit of open files allows.
        max_greenlets: how many requests run at a time; further ones wait in order.
        max_queued: how many requests may wait like that; further ones are answered with 503.
        max_head_size: bytes of a request's line and headers, 8192 at least; beyond it the answer is 431.
        max_body_size: bytes of a request's body; beyond it the answer is 413. None for no limit.
        idle_timeout: seconds that a connection may be without a request. It is also how long a client may take
            for a request's head.
        client_timeout: seconds that a client may leave us waiting, for more of its request or to take more of
            the response, before its connection is cut.
        graceful_timeout: seconds that running requests have to finish after SIGTERM or SIGINT.
        access_log: write one line a request to the logger ``puff_patch.access``.
        lifespan: ``"auto"`` sends an ASGI application the lifespan events of its start and stop, if it takes part
            in them; ``"off"`` sends none.
        root_path: the path below which a proxy has mounted the ASGI application, ``/app`` for one, if the proxy
            takes it off.
        workers: how many processes serve; 0 is one for each CPU that this process may use. More than one are
            started and kept up by this one, see `puff_patch.server.supervisor`.
        worker_start_timeout: seconds that a worker may take to load the application.
        max_requests: after how many requests a worker is replaced, against leaks of memory; 0 for never.
        max_requests_jitter: up to how many more, at random, so that workers are not all replaced at one time.
        reload: replace the workers whenever a file of the program changes; for development.
        reload_dirs: folders to watch for that. By default the working directory, and those of the import path that
            are not Python's own.
        max_websockets: how many WebSockets are open at a time, which do not count as requests; further ones are
            refused with 503.
        websocket_max_size: bytes of a message that a WebSocket's client may send; a larger one closes it (1009).
        websocket_origins: which web sites may open WebSockets besides the server's own, each as browsers name them
            in the header Origin (``https://example.com``), or ``"*"`` for any.  Others are refused with 403.
        websocket_require_origin: refuse with 403 the WebSockets of clients that send no Origin: they are no
            browsers.
        access_log_format: ``"text"``, or ``"json"`` for one object a line.
        request_ids: give each request an id in ``X-Request-ID``, or take it from a trusted proxy.
        trusted_proxies: addresses and networks (``10.0.0.0/8``) of proxies that say truly which client, scheme and
            host they speak for; ``unix`` for peers of a Unix socket, ``*`` for everybody.
        proxy_headers: which headers these proxies set themselves, of ``x-forwarded-for``, ``x-forwarded-proto``,
            ``x-forwarded-host``, ``x-forwarded-port`` and ``forwarded``; others are not believed.
        health_path: where 200 says that the server lives, such as ``/-/health``; empty for nowhere.
        ready_path: where 200 says that it takes requests, and 503 that it stops or a check fails, such as
            ``/-/ready``; empty for nowhere.
        ready_services: what must answer for it: ``postgres``, ``redis``, ``postgres:NAME``, ``redis:NAME``.
        ready_checks: functions that must not raise for it, called on greenlets.
        ready_timeout: seconds that all these checks may take.
        metrics_path: where Prometheus finds the metrics, such as ``/metrics``, with the token of
            ``PUFF_METRICS_TOKEN``; empty for nowhere.
        compression: compress responses, see `CompressionOptions`; None for not at all.
        cors: which other origins may use this server, see `CorsOptions`; None for none.
        static: folders whose files are served, see `StaticFiles`.
        filters: more that every request and response goes through, see `puff_patch.server.filters`.
        on_stop: called in order after the last request, also after a forced stop; to close pools, for one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    backlog: int = 2048
    reuse_port: bool = False
    http: str = "auto"
    http2_max_concurrent_streams: int = 128
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_keyfile_password: str | None = field(default=None, repr=False)
    ssl_min_version: str = "1.2"
    ssl_ca_certs: str | None = None
    ssl_client_auth: str = "none"
    max_connections: int = 16384
    max_greenlets: int = 1000
    max_queued: int = 10_000
    max_head_size: int = 64 * 1024
    max_body_size: int | None = None
    idle_timeout: float = 75.0
    client_timeout: float = 60.0
    graceful_timeout: float = 30.0
    access_log: bool = False
    lifespan: Literal["auto", "off"] = "auto"
    root_path: str = ""
    access_log_format: Literal["text", "json"] = "text"
    request_ids: bool = False
    trusted_proxies: tuple[str, ...] = ()
    proxy_headers: tuple[str, ...] = ("x-forwarded-for", "x-forwarded-proto")
    health_path: str = ""
    ready_path: str = ""
    ready_services: tuple[str, ...] = ()
    ready_checks: tuple[Callable[[], object], ...] = ()
    ready_timeout: float = 2.0
    metrics_path: str = ""
    compression: CompressionOptions | None = None
    cors: CorsOptions | None = None
    static: tuple[StaticFiles, ...] = ()
    max_websockets: int = 10000
    websocket_max_size: int = 1024 * 1024
    websocket_origins: tuple[str, ...] = ()
    websocket_require_origin: bool = False
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
        if self.lifespan not in ("auto", "off"):
            raise ValueError(f'lifespan must be "auto" or "off", not {self.lifespan!r}')
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"root_path begins with '/' and does not end with it, unlike {self.root_path!r}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, not {self.port}")
        for name in (
            "backlog",
            "max_connections",
            "max_greenlets",
            "http2_max_concurrent_streams",
            "max_websockets",
            "websocket_max_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_queued < 0:
            raise ValueError(f"max_queued must not be negative, not {self.max_queued}")
        if self.max_head_size < 8192:
            raise ValueError(f"max_head_size must be at least 8192, not {self.max_head_size}")
        if self.max_body_size is not None and self.max_body_size < 0:
            raise ValueError(f"max_body_size must not be negative, not {self.max_body_size}")
        for name in ("workers", "max_requests", "max_requests_jitter"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("idle_timeout", "client_timeout", "worker_start_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.websocket_max_size > _FRONT_MESSAGE_SIZE:
            raise ValueError(
                f"websocket_max_size must be at most {_FRONT_MESSAGE_SIZE}, which is what the front takes, not "
                f"{self.websocket_max_size}"
            )
        for origin in self.websocket_origins:
            if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/]+", origin):
                raise ValueError(f"an origin looks like https://example.com, or is '*', unlike {origin!r}")
        self._check_ssl()
        if self.graceful_timeout < 0:
            raise ValueError(f"graceful_timeout must not be negative, not {self.graceful_timeout}")
        if self.access_log_format not in ("text", "json"):
            raise ValueError(f'access_log_format must be "text" or "json", not {self.access_log_format!r}')
        if self.ready_timeout <= 0:
            raise ValueError(f"ready_timeout must be positive, not {self.ready_timeout}")
        if (self.ready_services or self.ready_checks) and not self.ready_path:
            raise ValueError("ready_services and ready_checks need a ready_path to be asked at")
        for name in ("health_path", "ready_path", "metrics_path"):
            path = getattr(self, name)
            if path and not path.startswith("/"):
                raise ValueError(f"{name} must begin with '/', unlike {path!r}")

    def _check_ssl(self) -> None:
        if self.ssl_min_version not in ("1.2", "1.3"):
            raise ValueError(f'ssl_min_version must be "1.2" or "1.3", not {self.ssl_min_version!r}')
        if self.ssl_client_auth not in ("none", "optional", "required"):
            raise ValueError(
                f'ssl_client_auth must be "none", "optional" or "required", not {self.ssl_client_auth!r}'
            )
        if (self.ssl_client_auth == "none") != (self.ssl_ca_certs is None):
            raise ValueError('ssl_ca_certs goes with an ssl_client_auth of "optional" or "required"')
        for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
            if self.ssl_certfile is None and getattr(self, name) is not None:
                raise ValueError(f"{name} needs an ssl_certfile")
