"""One typed configuration for the whole library.

Sources, weakest first: the defaults below, the process environment, explicit arguments.  (``puff.toml`` and
``.env`` join them with the ``puff`` command.)  Nothing is read at import: `current` reads the environment each
time it is asked, which costs microseconds and keeps tests and forked workers honest.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

DEFAULT_POSTGRES_URL = "postgres://postgres:password@localhost:5432/postgres"
DEFAULT_REDIS_URL = "redis://localhost:6379"
# Much longer than a page's own Python takes, much shorter than a client's patience.
BLOCKED_HUB_MS = 250.0

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class ConfigError(ValueError):
    """A setting is wrong; the message names it and says what it takes."""


@dataclass(frozen=True)
class PoolOptions:
    """The size and patience of one pool.  Names and meanings are psycopg_pool's.

    Args:
        min_size: connections kept open even when nobody needs them.
        max_size: connections that may ever be open at once, in this process.
        timeout: seconds a checkout waits for a connection before `PoolTimeout`.
        max_waiting: checkouts that may queue before `TooManyRequests`; 0 means no limit.
        max_idle: seconds after which an unused connection above `min_size` is closed.
        max_lifetime: seconds after which a connection is replaced at its next return.
    """

    min_size: int = 0
    max_size: int = 10
    timeout: float = 30.0
    max_waiting: int = 0
    max_idle: float = 600.0
    max_lifetime: float = 3600.0

    def __post_init__(self) -> None:
        if self.min_size < 0 or self.max_size < 1 or self.min_size > self.max_size:
            raise ConfigError(
                f"pool sizes must satisfy 0 <= min_size <= max_size and max_size >= 1, "
                f"got min_size={self.min_size}, max_size={self.max_size}"
            )
        for name in ("timeout", "max_idle", "max_lifetime"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"pool option {name} must be a positive number of seconds")
        if self.max_waiting < 0:
            raise ConfigError("pool option max_waiting must be 0 (no limit) or more")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], *, where: str) -> PoolOptions:
        """Build from e.g. Django's ``OPTIONS["pool"]`` or environment strings; ``where`` names the source."""
        return cls().merged(options, where=where)

    def merged(self, options: Mapping[str, Any], *, where: str) -> PoolOptions:
        """These options with some replaced; ``where`` names the source in errors.

        Raises:
            ConfigError: an option is unknown or impossible.
        """
        coerced = _coerce(type(self), options, where=where)
        try:
            return replace(self, **coerced)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


@dataclass(frozen=True)
class HttpClientOptions:
    """How one of the HTTP clients of `puff_patch.http` talks to servers.

    Args:
        http2_prior_knowledge: speak HTTP/2 from the first byte, also without TLS: for servers known to.
        http2: use HTTP/2 with servers that offer it over TLS.
        user_agent: the header of that name; empty for the library's own.
        timeout: seconds that a request may take as a whole, unless it says otherwise itself.
        connect_timeout: seconds that connecting may take.
        max_connections: connections that may be open at once, in this process; further requests wait.
        max_keepalive: how many of those are kept open while idle.
        base_url: what relative URLs are relative to; empty for nothing.
    """

    http2_prior_knowledge: bool = False
    http2: bool = True
    user_agent: str = ""
    timeout: float = 30.0
    connect_timeout: float = 10.0
    max_connections: int = 100
    max_keepalive: int = 100
    base_url: str = ""

    def __post_init__(self) -> None:
        for name in ("timeout", "connect_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"HTTP client option {name} must be a positive number of seconds")
        if self.max_connections < 1 or self.max_keepalive < 0:
            raise ConfigError("HTTP client options max_connections >= 1 and max_keepalive >= 0 are expected")


def _coerce(cls: type[PoolOptions], options: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    types: dict[str, Any] = {f.name: type(f.default) for f in fields(cls)}
    coerced: dict[str, Any] = {}
    for name, value in options.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(types)}"
            raise ConfigError(f"{where}: unknown pool option {name!r}{hint}")
        try:
            coerced[name] = types[name](value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: pool option {name} takes a number, got {value!r}") from error
    return coerced


@dataclass(frozen=True)
class Config:
    """What this process is set up to use.

    Args:
        embedded: whether PostgreSQL and Redis from wheels stand in where no URL is given.
        data_dir: where the embedded services keep their data.
        postgres_urls: PostgreSQL URL by service name in lower case.
        redis_urls: Redis URL by service name in lower case.
        pool_postgres: whether PostgreSQL connections are pooled at all.
        unpooled_postgres: patterns of the PostgreSQL servers whose connections are not, see `pools_postgres`.
        postgres_pool: defaults for every PostgreSQL pool.
        redis_pool: defaults for every Redis pool.
        redis_blocking_pool: beside each of these, for commands that wait for others, and subscriptions.
        http_pool: defaults for the connections to one host that `requests` shares.
        slow_checkout_ms: milliseconds in the queue of a pool after which a warning tells who holds its
            connections; 0 for never.
        blocked_hub_ms: milliseconds a greenlet may hold the hub before a warning tells which; 0 for never, None
            for `BLOCKED_HUB_MS` while serving and never elsewhere.
        reuse_port: whether servers share their port with others, see `ServerOptions.reuse_port`.
        blocking_threads: native threads in which calls of `puff_patch.blocking` run at once.
        http_clients: the options of each HTTP client by its name in lower case.
        metrics_token: what a client sends to read the metrics over HTTP; empty shows them to nobody.
    """

    embedded: bool = False
    data_dir: Path = Path(".puff")
    postgres_urls: Mapping[str, str] = field(default_factory=dict)
    redis_urls: Mapping[str, str] = field(default_factory=dict)
    pool_postgres: bool = True
    unpooled_postgres: tuple[str, ...] = ()
    postgres_pool: PoolOptions = PoolOptions()
    redis_pool: PoolOptions = PoolOptions(max_size=100)  # as redis-py's own
    redis_blocking_pool: PoolOptions = PoolOptions(max_size=1000, max_idle=60.0)
    http_pool: PoolOptions = PoolOptions(max_size=100)
    slow_checkout_ms: float = 1000.0
    blocked_hub_ms: float | None = None
    reuse_port: bool = False
    blocking_threads: int = 32
    http_clients: Mapping[str, HttpClientOptions] = field(default_factory=dict)
    metrics_token: str = field(default="", repr=False)

    def postgres_url(self, name: str = "default") -> str:
        """The URL of the PostgreSQL service ``name``; may start the embedded one.

        Raises:
            puff_patch.embedded.EmbeddedError: the embedded services are wanted and do not start.
        """
        if url := self.postgres_urls.get(name.lower()):
            return url
        if self.embedded:
            from puff_patch import embedded

            return embedded.ensure(self.data_dir).postgres_url
        return DEFAULT_POSTGRES_URL

    def redis_url(self, name: str = "default") -> str:
        """The URL of the Redis service ``name``; may start the embedded one.

        Raises:
            puff_patch.embedded.EmbeddedError: the embedded services are wanted and do not start.
        """
        if url := self.redis_urls.get(name.lower()):
            return url
        if self.embedded:
            from puff_patch import embedded

            return embedded.ensure(self.data_dir).redis_url
        return DEFAULT_REDIS_URL

    def http_client(self, name: str = "default") -> HttpClientOptions:
        """The options of the HTTP client ``name``; the defaults if nothing was said of it."""
        return self.http_clients.get(name.lower(), HttpClientOptions())

    def pools_postgres(self, name: str) -> bool:
        """Whether connections to a PostgreSQL server are pooled, as far as the operator is concerned.

        Args:
            name: what a pool to it is called in statistics and messages, ``postgres://USER@HOST:PORT/DATABASE``.
                It is compared with the patterns as the shell compares file names.
        """
        return self.pool_postgres and not any(fnmatchcase(name, pattern) for pattern in self.unpooled_postgres)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Read the ``PUFF_*`` variables of ``environ``.

        Raises:
            ConfigError: a variable has a value that cannot be used.
        """
        urls: dict[str, dict[str, str]] = {"POSTGRES": {}, "REDIS": {}}
        kinds = ("POSTGRES", "REDIS", "REDIS_BLOCKING", "HTTP")
        pools: dict[str, dict[str, str]] = {kind: {} for kind in kinds}
        for variable, value in environ.items():
            if not variable.startswith("PUFF_"):
                continue
            for kind, found in urls.items():
                # PUFF_<NAME>_POSTGRES_URL, as the seed's help text has it.
                suffix = f"_{kind}_URL"
                if variable.endswith(suffix) and value:
                    found[variable[len("PUFF_") : -len(suffix)].lower()] = value
            for kind, options in pools.items():
                prefix = f"PUFF_{kind}_POOL_"
                if variable.startswith(prefix):
                    options[variable[len(prefix) :].lower()] = value
        defaults = cls()

        def pool(kind: str, default: PoolOptions) -> PoolOptions:
            return default.merged(pools[kind], where=f"environment PUFF_{kind}_POOL_*")

        return cls(
            embedded=_flag(environ, "PUFF_EMBEDDED"),
            data_dir=Path(environ.get("PUFF_DATA_DIR") or defaults.data_dir),
            postgres_urls=urls["POSTGRES"],
            redis_urls=urls["REDIS"],
            pool_postgres=_flag(environ, "PUFF_POSTGRES_POOL", default=True),
            unpooled_postgres=_patterns(environ, "PUFF_POSTGRES_UNPOOLED"),
            postgres_pool=pool("POSTGRES", defaults.postgres_pool),
            redis_pool=pool("REDIS", defaults.redis_pool),
            redis_blocking_pool=pool("REDIS_BLOCKING", defaults.redis_blocking_pool),
            http_pool=pool("HTTP", defaults.http_pool),
            slow_checkout_ms=_milliseconds(environ, "PUFF_SLOW_CHECKOUT_MS", defaults.slow_checkout_ms),
            blocked_hub_ms=blocked_hub_ms(environ),
            reuse_port=_flag(environ, "PUFF_REUSE_PORT"),
            blocking_threads=_count(environ, "PUFF_BLOCKING_THREADS", defaults.blocking_threads),
            metrics_token=environ.get("PUFF_METRICS_TOKEN", ""),
        )


def _flag(environ: Mapping[str, str], name: str, *, default: bool = False) -> bool:
    value = environ.get(name, "").strip().lower()
    if not value:
        return default
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ConfigError(f"{name} takes 1 or 0, got {environ[name]!r}")


def _patterns(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    found = tuple(pattern for part in environ.get(name, "").split(",") if (pattern := part.strip()))
    for pattern in found:
        if not pattern.startswith(("postgres://", "*")):
            raise ConfigError(
                f"{name} takes patterns of pool names such as 'postgres://*@db:5432/reporting' or "
                f"'*/reporting', separated by commas, got {pattern!r}"
            )
    return found


def _count(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name} takes a whole number of at least 1, got {environ[name]!r}")
    return int(text)


_M = TypeVar("_M", float, "float | None")


def _milliseconds(environ: Mapping[str, str], name: str, default: _M) -> float | _M:
    text = environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{name} takes a number of milliseconds, 0 for never, got {environ[name]!r}")
    return value


def blocked_hub_ms(environ: Mapping[str, str]) -> float | None:
    """`Config.blocked_hub_ms` alone: `patch_all` asks, and must not fail for what only a pool would mind.

    Raises:
        ConfigError: the variable has a value that cannot be used.
    """
    return _milliseconds(environ, "PUFF_BLOCKED_HUB_MS", None)


def current() -> Config:
    """The configuration in force now.

    Raises:
        ConfigError: an environment variable has a value that cannot be used.
    """
    return Config.from_env(os.environ)


def unreachable_hint(kind: str) -> str:
    """The three ways out when a server cannot be reached; ``kind`` is ``"postgres"`` or ``"redis"``."""
    label, default = {
        "postgres": ("PostgreSQL", DEFAULT_POSTGRES_URL),
        "redis": ("Redis", DEFAULT_REDIS_URL),
    }[kind]
    return (
        f"Either start a {label} server there, or name yours in the program, "
        f"or in PUFF_DEFAULT_{kind.upper()}_URL if that names none (the default is {default}), "
        f"or set PUFF_EMBEDDED=1 (runpuff --embedded) instead, to run one from a wheel: "
        f"pip install 'puff-patch[embedded]'."
    )
