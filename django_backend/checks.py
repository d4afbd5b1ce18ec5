"""``manage.py check``: wrong set-ups, each with what to change.  docs/checks.md lists them.

Checks that ask a server are tagged ``database``, as Django's own are, and run with ``check --database default``,
``migrate`` and the test runner; what matters in production only is told by ``check --deploy``.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gevent
import gevent.monkey
from django.conf import settings
from django.core import checks
from django.core.cache import caches
from django.core.checks import CheckMessage, Error, Info, Tags, Warning
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, DatabaseError, connections

import puff_patch
from django_backend import conf
from puff_patch.config import DEFAULT_POSTGRES_URL, DEFAULT_REDIS_URL, ConfigError, PoolOptions, current
from puff_patch.patches.django import driver

_ENGINE = "django_backend.postgresql"
_CACHE = "django_backend.cache.RedisCache"
_NATIVE_CACHE = "django.core.cache.backends.redis.RedisCache"
# Engines that keep a pool of their own over psycopg2.connect.
_POOLING_ENGINES = ("django_db_geventpool.", "dj_db_conn_pool.", "django_postgrespool")
_PATCH_FIRST = (
    "Put `import puff_patch; puff_patch.patch_all()` into the first lines of manage.py and wsgi.py, before every "
    "other import."
)
# What says how many processes serve: ours, and that of gunicorn and of hosting platforms.
_WORKERS = ("PUFF_WORKERS", "WEB_CONCURRENCY")
# Seconds that a server has to say what it allows.
_PATIENCE = 10.0


def register() -> None:
    """Register every check with Django; a second call does nothing."""
    checks.register(check_patched)
    checks.register(check_configuration)
    checks.register(check_pools)
    checks.register(check_servers)
    checks.register(check_deployment, deploy=True)
    checks.register(check_limits, Tags.database)


def check_patched(**kwargs: Any) -> list[CheckMessage]:
    """E001, W001, W002: whether `puff_patch.patch_all` was called, and early enough."""
    found: list[CheckMessage] = []
    if unpatched := [alias for alias in connections if _has_our_engine(alias) and not driver().is_patched()]:
        found.append(
            Error(
                f"puff_patch.patch_all() was not called; {_entries('DATABASES', unpatched)} needs it.",
                hint=_PATCH_FIRST,
                id="puff.E001",
            )
        )
    elif not gevent.monkey.is_module_patched("socket"):
        found.append(
            Warning(
                "puff_patch.patch_all() was not called, so one request blocks all others.",
                hint=_PATCH_FIRST,
                id="puff.W001",
            )
        )
    from puff_patch.patches import captured_originals
    from puff_patch.patches.sockets import shortened

    if late := captured_originals():
        found.append(
            Warning(
                "puff_patch.patch_all() was called too late: these modules still use the blocking originals: "
                f"{shortened(late)}.",
                hint=f"{_PATCH_FIRST} What was imported before keeps what it has.",
                id="puff.W002",
            )
        )
    return found


def check_configuration(**kwargs: Any) -> list[CheckMessage]:
    """E002: the environment, puff.toml and ``settings.PUFF``."""
    try:
        current()
        _workers()
    except ConfigError as error:
        return [
            Error(
                f"puff_patch cannot use its configuration: {error}.",
                hint="Correct or remove it; docs/configuration.md lists what there is.",
                id="puff.E002",
            )
        ]
    return []


def check_pools(**kwargs: Any) -> list[CheckMessage]:
    """E003, E004, W003: what DATABASES and CACHES say of pools."""
    if check_configuration():
        return []  # said there, and what the options are added to is missing
    found = [message for alias in connections for message in _check_database(alias)]
    for alias, entry in _redis_caches():
        found += _check_cache_options(alias, entry)
    return found


def _check_database(alias: str) -> Iterator[CheckMessage]:
    connection: Any = connections[alias]
    engine, options = connection.settings_dict["ENGINE"], connection.settings_dict["OPTIONS"]
    if engine.startswith(_POOLING_ENGINES):
        yield Warning(
            f"DATABASES[{alias!r}] is pooled twice: {engine} has a pool of its own on top of puff_patch's.",
            hint=f'Write "ENGINE": "{_ENGINE}", and the sizes into its OPTIONS["pool"].',
            id="puff.W003",
        )
        return
    if connection.vendor != "postgresql":
        return
    own_pool = options.get("pool") and not _has_our_engine(alias)
    if own_pool and not _uses_psycopg3():
        yield Error(
            f'DATABASES[{alias!r}]["OPTIONS"]["pool"]: the engine {engine} has it for psycopg 3 only, and '
            "psycopg2 is what is used.",
            hint=f'Write "ENGINE": "{_ENGINE}", whose option sizes puff_patch\'s pool, or leave it out.',
            id="puff.E003",
        )
        return
    if own_pool or not driver().is_patched():
        return
    try:
        _pool_options(alias)
        connection.get_connection_params()
    except ImproperlyConfigured as error:
        yield Error(
            f"DATABASES[{alias!r}] cannot be used: {str(error).rstrip('.')}.",
            hint=f"docs/postgresql.md has the options of a pool: {', '.join(_parameters(PoolOptions))}.",
            id="puff.E003",
        )
        return


def _check_cache_options(alias: str, entry: Mapping[str, Any]) -> Iterator[CheckMessage]:
    from django.core.cache.backends.redis import RedisCacheClient

    from puff_patch.pools.redis import RedisPool

    options = {key: value for key, value in entry.get("OPTIONS", {}).items() if key != "service"}
    try:
        client: Any = RedisCacheClient(["redis://localhost"], **options)
        if "pool_class" not in options:
            # Makes the object, which takes the options; connects to nothing.
            RedisPool.from_url("redis://localhost", **client._pool_options).make_connection()
    except (TypeError, ValueError, ImportError) as error:
        import redis

        known = [*_parameters(redis.Connection), *_parameters(redis.connection.AbstractConnection)]
        known += ["max_connections", "timeout", "serializer", "pool_class", "parser_class"]
        problem, hint = str(error), "max_connections and timeout size the pool; all others are redis.Connection's."
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", problem):
            near = difflib.get_close_matches(unknown[1], known, n=1)
            problem = f"unknown option {unknown[1]!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        yield Error(f'CACHES[{alias!r}]["OPTIONS"]: {problem}', hint=hint, id="puff.E004")


def check_servers(**kwargs: Any) -> list[CheckMessage]:
    """W005: an alias without a server of its own, beside others that have theirs."""
    if check_configuration():
        return []
    found: list[CheckMessage] = []
    nowhere = list(_on_localhost_by_default())
    if DEFAULT_DB_ALIAS not in nowhere:
        found += [
            Warning(
                f"DATABASES[{alias!r}] names no server, so it is {DEFAULT_POSTGRES_URL}, and not that of "
                f"{DEFAULT_DB_ALIAS!r}.",
                hint=f"Set PUFF_{alias.upper()}_POSTGRES_URL, or NAME, HOST and so on in settings.",
                id="puff.W005",
            )
            for alias in nowhere
        ]
    found += [
        Warning(
            f'CACHES[{alias!r}]["OPTIONS"]["service"] is {service!r}, which is not configured, so it is '
            f"{DEFAULT_REDIS_URL}.",
            hint=f"Set PUFF_{service.upper()}_REDIS_URL, or LOCATION in settings.",
            id="puff.W005",
        )
        for alias, service in _caches_on_localhost_by_default()
        if service != "default"
    ]
    return found


def check_deployment(**kwargs: Any) -> list[CheckMessage]:
    """W006, I001, I002, I003: what matters where requests are served; DEBUG is Django's own security.W018."""
    if check_configuration():
        return []
    found: list[CheckMessage] = []
    if current().embedded:
        found.append(
            Warning(
                "PUFF_EMBEDDED is on: PostgreSQL and Redis from wheels are for development and tests.",
                hint="Set PUFF_DEFAULT_POSTGRES_URL and PUFF_DEFAULT_REDIS_URL, and leave PUFF_EMBEDDED out.",
                id="puff.W006",
            )
        )
    places = [(f"DATABASES[{alias!r}]", "POSTGRES") for alias in _on_localhost_by_default() if alias == "default"]
    places += [
        (f"CACHES[{alias!r}]", "REDIS")
        for alias, service in _caches_on_localhost_by_default()
        if service == "default"
    ]
    for place, kind in places:
        url = {"POSTGRES": DEFAULT_POSTGRES_URL, "REDIS": DEFAULT_REDIS_URL}[kind]
        found.append(
            Info(
                f"{place} names no server, so it is {url}.",
                hint=f"Set PUFF_DEFAULT_{kind}_URL where this is deployed.",
                id="puff.I002",
            )
        )
    aged = [alias for alias in connections if connections[alias].settings_dict["CONN_MAX_AGE"] != 0]
    if aged := [alias for alias in aged if _pool_size(alias)]:
        found.append(
            Info(
                f'{_entries("DATABASES", aged)}["CONN_MAX_AGE"] has no effect on requests that greenlets serve: '
                "their connections go back to a pool.",
                hint='Leave it out. How long a pooled connection may live is OPTIONS["pool"]["max_lifetime"].',
                id="puff.I001",
            )
        )
    sqlite = [alias for alias in connections if connections[alias].vendor == "sqlite"]
    if sqlite:
        found.append(
            Info(
                f"{_entries('DATABASES', sqlite)} is SQLite: during a query of one request all others wait.",
                hint=f'Use PostgreSQL: "ENGINE": "{_ENGINE}".',
                id="puff.I003",
            )
        )
    return found


def check_limits(databases: Sequence[str] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """W007, W008, W009: whether the servers allow as many connections as the pools may open."""
    if databases is None or check_configuration():
        return []
    asked = [alias for alias in databases if _pool_size(alias)]
    return [*_check_postgres_limits(asked), *_check_redis_limits()]


@dataclass
class _Server:
    """What one PostgreSQL server allows, as the alias ``alias`` sees it."""

    alias: str
    started: str
    database: str
    role: str
    connections: int
    reserved: int
    database_limit: int
    role_limit: int


def _check_postgres_limits(asked: Iterable[str]) -> Iterator[CheckMessage]:
    servers: list[_Server] = []
    for alias in asked:
        try:
            server = _within_patience(partial(_ask_postgres, alias))
            if _is_pooled_now(alias):
                servers.append(server)
        except (DatabaseError, ImproperlyConfigured, TimeoutError) as error:
            yield _cannot_ask(f"DATABASES[{alias!r}]", error)
    for started in dict.fromkeys(server.started for server in servers):
        group = [server for server in servers if server.started == started]
        first = group[0]
        members = {server.alias: (server.database, server.role) for server in group}
        for alias in connections:
            # Not to be asked now, but settings say that it is the same server.
            if alias not in members and _pool_size(alias) and _address(alias) in map(_address, list(members)):
                own = connections[alias].settings_dict
                members[alias] = (own["NAME"] or first.database, own["USER"] or first.role)
        limits = [
            (
                first.connections - first.reserved,
                f"the server allows (max_connections {first.connections} less {first.reserved} reserved)",
                list(members),
            )
        ]
        for server in group:
            if server.database_limit >= 0:
                of = [alias for alias, (database, _) in members.items() if database == server.database]
                limits.append((server.database_limit, f"the database {server.database!r} allows", of))
            if server.role_limit >= 0:
                of = [alias for alias, (_, role) in members.items() if role == server.role]
                limits.append((server.role_limit, f"the role {server.role!r} is allowed", of))
        for limit, whose, aliases in {what: (number, what, of) for number, what, of in limits}.values():
            pools = _distinct_pools(aliases)
            yield from _compare("DATABASES", limit, whose, pools, 'OPTIONS["pool"]["max_size"]', "puff.W007")


def _ask_postgres(alias: str) -> _Server:
    with connections[alias].cursor() as cursor:
        cursor.execute(
            """
            SELECT pg_postmaster_start_time()::text, current_database(), session_user::text,
                   current_setting('max_connections')::int,
                   current_setting('superuser_reserved_connections')::int
                       + coalesce(current_setting('reserved_connections', true), '0')::int,
                   (SELECT datconnlimit FROM pg_database WHERE datname = current_database()),
                   (SELECT CASE WHEN rolsuper THEN -1 ELSE rolconnlimit END FROM pg_roles
                    WHERE rolname = session_user)
            """
        )
        return _Server(alias, *cursor.fetchone())


def _is_pooled_now(alias: str) -> bool:
    """Whether the open connection of the alias is a pool's: an operator may have turned pooling off."""
    from puff_patch.patches.django import is_leased

    connection: Any = connections[alias]
    own_pool = _uses_psycopg3() and connection.settings_dict["OPTIONS"].get("pool")
    return bool(own_pool) or is_leased(connection.connection)


def _address(alias: str) -> tuple[str, str]:
    own = connections[alias].settings_dict
    return own["HOST"] or "", str(own["PORT"] or "5432")


def _distinct_pools(aliases: Iterable[str]) -> dict[str, int]:
    """The size of each pool by the alias that has it; aliases of equal settings share one."""
    pools: dict[str, tuple[str, int]] = {}
    for alias in aliases:
        own = connections[alias].settings_dict
        key = repr([own[name] for name in ("NAME", "USER", "PASSWORD", "HOST", "PORT", "OPTIONS", "TIME_ZONE")])
        pools.setdefault(key, (alias, _pool_size(alias) or 0))
    return dict(pools.values())


def _pool_size(alias: str) -> int | None:
    """How many connections the alias's pool may open in a process; None if it has no pool, or a wrong one."""
    connection: Any = connections[alias]
    if connection.vendor != "postgresql" or not driver().is_patched():
        return None
    own_pool = connection.settings_dict["OPTIONS"].get("pool")
    if own_pool and _uses_psycopg3() and not _has_our_engine(alias):
        # psycopg_pool: no max_size means min_size, which is 4.
        own = own_pool if isinstance(own_pool, Mapping) else {}
        return int(own.get("max_size") or own.get("min_size", 4))
    try:
        options = _pool_options(alias)
    except ImproperlyConfigured:
        return None  # told by `check_pools`
    return options.max_size if options else None


def _pool_options(alias: str) -> PoolOptions | None:
    """What sizes the alias's pool; None if it has none.

    Raises:
        ImproperlyConfigured: its option is wrong.
    """
    if not _has_our_engine(alias):
        return current().postgres_pool
    from django_backend.postgresql.base import pool_options

    return pool_options(alias, connections[alias].settings_dict["OPTIONS"].get("pool", True))


def _check_redis_limits() -> Iterator[CheckMessage]:
    if not (puff_patch.is_patched("redis") and puff_patch.is_patched("django")):
        return
    import redis

    limits: dict[str, int] = {}
    pools: dict[str, dict[int, tuple[str, int]]] = {}
    for alias, _ in _redis_caches():
        cache: Any = caches[alias]
        try:
            client = cache._cache.get_client(None, write=True)
            server, allowed = _within_patience(partial(_ask_redis, client))
        except (redis.RedisError, TypeError, ValueError, TimeoutError) as error:
            yield _cannot_ask(f"CACHES[{alias!r}]", error)
            continue
        pool = client.connection_pool
        if allowed is not None:
            limits[server] = allowed
            pools.setdefault(server, {}).setdefault(id(pool), (alias, pool.max_connections))
    for server, allowed in limits.items():
        yield from _compare(
            "CACHES",
            allowed,
            "the server allows (maxclients)",
            dict(pools[server].values()),
            'OPTIONS["max_connections"]',
            "puff.W008",
        )


def _ask_redis(client: Any) -> tuple[str, int | None]:
    """The server's identity, and its maxclients if it tells (hosted ones may not)."""
    import redis

    told = client.info("server")["run_id"], client.info("clients").get("maxclients")
    if told[1] is None:
        try:
            told = told[0], client.config_get("maxclients").get("maxclients")
        except redis.ResponseError:
            return told[0], None
    return told[0], int(told[1])


def _within_patience(ask: Callable[[], Any]) -> Any:
    limit = gevent.Timeout(_PATIENCE)
    try:
        with limit:
            return ask()
    except gevent.Timeout as expired:
        if expired is not limit:
            raise
        raise TimeoutError(f"no answer within {_PATIENCE:g} seconds") from None


def _cannot_ask(place: str, error: Exception) -> CheckMessage:
    return Warning(
        f"{place} cannot be asked how many connections it allows: {' '.join(str(error).split())}",
        hint="Start the server, or correct its address, and check again.",
        id="puff.W009",
    )


def _compare(
    setting: str, allowed: int, whose: str, pools: Mapping[str, int], option: str, id: str
) -> Iterator[CheckMessage]:
    """A warning if ``pools`` (sizes by alias), in all processes, may open more than ``allowed`` connections."""
    workers = _workers()
    each = sum(pools.values())
    if each * workers <= allowed:
        return
    sizes = ", ".join(f"{setting}[{alias!r}] {size}" for alias, size in pools.items())
    processes = "process" if workers == 1 else "processes"
    ways = []
    if fits := allowed // workers // len(pools):
        ways.append(f"set {option} to {fits} at most")
    if workers > 1 and allowed >= each:
        ways.append(f"serve with {allowed // each} of them at most")
    ways.append("allow more there")
    hint = f"{', or '.join(ways)}. {' or '.join(_WORKERS)} says how many processes serve."
    yield Warning(
        f"The pools may open {each * workers} connections, {each} in each of {workers} {processes} ({sizes}); "
        f"{allowed} is what {whose}.",
        hint=hint[0].upper() + hint[1:],
        id=id,
    )


def _workers() -> int:
    for variable in _WORKERS:
        if value := os.environ.get(variable):
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"{variable} takes a number of processes, got {value!r}")
            return int(value)
    said: int = conf.read().server.get("workers", 1)
    return max(1, said)  # 0 is as many as there are processors, which may be any number


def _has_our_engine(alias: str) -> bool:
    if connections[alias].vendor != "postgresql":
        return False
    from django_backend.postgresql.base import DatabaseWrapper

    return isinstance(connections[alias], DatabaseWrapper)


def _uses_psycopg3() -> bool:
    from django.db.backends.postgresql.psycopg_any import is_psycopg3

    return is_psycopg3


def _redis_caches() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries of CACHES whose client is ours."""
    for alias, entry in settings.CACHES.items():
        backend = entry.get("BACKEND")
        if backend == _CACHE or (backend == _NATIVE_CACHE and puff_patch.is_patched("django")):
            yield alias, entry


def _on_localhost_by_default() -> Iterator[str]:
    """The aliases of DATABASES with our engine and no server named anywhere."""
    config = current()
    for alias in connections:
        if _has_our_engine(alias) and not config.embedded and alias.lower() not in config.postgres_urls:
            from psycopg2.extensions import parse_dsn

            from django_backend.postgresql.base import SERVER_SETTINGS

            # The engine has filled in what it uses by now.
            own, default = connections[alias].settings_dict, parse_dsn(DEFAULT_POSTGRES_URL)
            if all(str(own[setting]) == default[name] for name, setting in SERVER_SETTINGS.items()):
                yield alias


def _caches_on_localhost_by_default() -> Iterator[tuple[str, str]]:
    """The aliases of CACHES with our backend and no server named anywhere, and their services."""
    config = current()
    for alias, entry in _redis_caches():
        service = entry.get("OPTIONS", {}).get("service", "default")
        named = entry.get("LOCATION") or config.embedded or service.lower() in config.redis_urls
        if entry["BACKEND"] == _CACHE and not named:
            yield alias, service


def _entries(setting: str, aliases: Iterable[str]) -> str:
    return ", ".join(f"{setting}[{alias!r}]" for alias in aliases)


def _parameters(cls: type) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in inspect.signature(cls).parameters.values() if each.kind in kinds]
