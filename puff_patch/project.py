"""What ``puff.toml`` says of a program, or Django's ``settings.PUFF``, which takes the same keys.

A file is checked as a whole when it is read, and an error names the key, the line, and the nearest right key.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from puff_patch import config, schema
from puff_patch.config import Config, ConfigError, GraphqlOptions, HttpClientOptions, TaskQueueOptions
from puff_patch.schema import Key, Location, Mismatch

FILE = "puff.toml"

# The fields of `Config` that are no keys of the file: they are made of the tables of services.
_OF_SERVICES = frozenset({"postgres_urls", "redis_urls", "pubsub_urls", "task_queue_urls"})
_POOL_TABLES = ("postgres_pool", "redis_pool", "redis_blocking_pool", "http_pool")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Service:
    """One of several services of a kind.

    Args:
        name: what programs, options and variables call it; letters, digits and _.
        enable: false to leave the table out.
    """

    name: str = "default"
    enable: bool = True

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"name is made of letters, digits and _, unlike {self.name!r}")


@dataclass(frozen=True)
class RedisService(Service):
    """A Redis server.

    Args:
        url: where it is.
        max_size: connections that may be open at once, in one process; pool_size is the same.
        timeout: seconds a command waits for a connection.
        max_waiting: commands that may wait for one; 0 for no limit.
        max_idle: seconds after which an unused connection is closed.
        max_lifetime: seconds after which a connection is replaced.
    """

    ALIASES: ClassVar[Mapping[str, str]] = {"pool_size": "max_size"}

    url: str = ""
    max_size: int | None = None
    timeout: float | None = None
    max_waiting: int | None = None
    max_idle: float | None = None
    max_lifetime: float | None = None

    def pool(self) -> dict[str, Any]:
        """The options of its pool that are said."""
        return {
            each.name: value
            for each in fields(config.PoolOptions)
            if (value := getattr(self, each.name, None)) is not None
        }


@dataclass(frozen=True)
class PostgresService(RedisService):
    """A PostgreSQL server.

    Args:
        min_size: connections kept open even when nobody needs them.
        timeout: seconds a checkout waits for a connection.
        max_waiting: checkouts that may wait for one; 0 for no limit.
    """

    min_size: int | None = None


@dataclass(frozen=True)
class PubSubService(Service):
    """Publish and subscribe between processes, over a Redis.

    Args:
        url: of the Redis; where there is none it is that of the Redis of this name, or the default one.
        pool_size: connections that may be open at once, in one process.
    """

    url: str = ""
    pool_size: int | None = None


@dataclass(frozen=True)
class TaskQueueService(TaskQueueOptions, Service):
    """A queue of tasks, in a Redis.

    Args:
        url: of the Redis; where there is none it is that of the Redis of this name, or the default one.
        pool_size: connections that may be open at once, in one process.
    """

    url: str = ""
    pool_size: int | None = None

    def __post_init__(self) -> None:
        Service.__post_init__(self)
        TaskQueueOptions.__post_init__(self)


@dataclass(frozen=True)
class HttpClient(HttpClientOptions, Service):
    """A client of `puff_patch.http`."""

    def __post_init__(self) -> None:
        Service.__post_init__(self)
        HttpClientOptions.__post_init__(self)


@dataclass(frozen=True)
class Graphql(GraphqlOptions):
    """A GraphQL schema.

    Args:
        name: what programs call it; letters, digits and _.
        enable: false to leave the table out.
    """

    name: str = "default"
    enable: bool = True

    def __post_init__(self) -> None:
        Service(self.name)
        super().__post_init__()


@dataclass(frozen=True)
class Command:
    """A command of the program's own.

    Args:
        function: a function without arguments, as "module.attribute"; an async one runs on the asyncio thread.
        command_name: what it is called after puff.
    """

    function: str
    command_name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.:]\S*", self.command_name):
            raise ConfigError(f"command_name is one word, unlike {self.command_name!r}")


@dataclass(frozen=True)
class WebSocket:
    """A path that takes WebSockets.

    Args:
        path: begins with '/'.
        handler: a function that is given the WebSocket on a greenlet of its own, as "module.attribute".
    """

    path: str
    handler: str

    def __post_init__(self) -> None:
        if not self.path.startswith("/"):
            raise ConfigError(f"path begins with '/', unlike {self.path!r}")


@dataclass(frozen=True)
class Cors:
    """Which pages of other origins may read responses.

    Args:
        base_config: what holds where the others say nothing; Default allows nobody, Permissive everybody, and
            VeryPermissive everybody with credentials.
        max_age_secs: seconds that a browser may remember what is allowed.
        allow_credentials: whether cookies may come along.
        allowed_origins: such as "https://example.com"; "*" for all.
        allow_origin_regex: what the whole of an allowed origin matches.
        allowed_headers: headers that a request may have; "*" for all.
        allowed_methods: methods that a request may have; "*" for all.
        expose_headers: headers of a response that scripts may read.
    """

    # As the filter of the server has them, and most others.
    ALIASES: ClassVar[Mapping[str, str]] = {
        "allow_origins": "allowed_origins",
        "allow_headers": "allowed_headers",
        "allow_methods": "allowed_methods",
        "max_age": "max_age_secs",
    }

    base_config: Literal["Default", "Permissive", "VeryPermissive"] = "Default"
    max_age_secs: int | None = None
    allow_credentials: bool | None = None
    allowed_origins: tuple[str, ...] | None = None
    allow_origin_regex: str | None = None
    allowed_headers: tuple[str, ...] | None = None
    allowed_methods: tuple[str, ...] | None = None
    expose_headers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Program:
    """What there is to run, and how.

    Args:
        wsgi: the WSGI application to serve, as "module.attribute" or "module:attribute".
        asgi: the ASGI application to serve.
        asgi_paths: prefixes of the paths that are the ASGI application's, where there are both.
        django: this is a Django project; puff serve does what manage.py runpuff does.
        django_settings_module: the module of Django's settings; where it is not said it is that of
            DJANGO_SETTINGS_MODULE, or that of manage.py.
        add_cwd_to_path: find modules in the working directory first.
        dotenv: read variables that the environment does not have from a file.
        dotenv_path: that file; .env need not be there.
        asyncio: start the asyncio thread at once, and not when it is needed first.
        greenlets: of no effect: functions always run on greenlets.
        pytest: of no effect: puff pytest is always there.
        pytest_path: the folder that puff pytest runs in.
        compression_middleware: compress responses for clients that take it.
        cors: which pages of other origins may read responses.
        commands: the program's own commands.
        websocket: greenlet handlers of WebSockets.
        postgres: PostgreSQL servers.
        redis: Redis servers.
        pubsub: publish and subscribe between processes.
        task_queue: task queues.
        http_client: HTTP clients.
        graphql: GraphQL schemas.
    """

    wsgi: str = ""
    asgi: str = ""
    asgi_paths: tuple[str, ...] = ()
    django: bool = False
    django_settings_module: str = ""
    add_cwd_to_path: bool = True
    dotenv: bool = True
    dotenv_path: str = ".env"
    asyncio: bool = False
    greenlets: bool = True
    pytest: bool = True
    pytest_path: str = "./"
    compression_middleware: bool = False
    cors: Cors | None = None
    commands: tuple[Command, ...] = ()
    websocket: tuple[WebSocket, ...] = ()
    postgres: tuple[PostgresService, ...] = ()
    redis: tuple[RedisService, ...] = ()
    pubsub: tuple[PubSubService, ...] = ()
    task_queue: tuple[TaskQueueService, ...] = ()
    http_client: tuple[HttpClient, ...] = ()
    graphql: tuple[Graphql, ...] = ()


#: The tables of services.
SERVICES = ("postgres", "redis", "pubsub", "task_queue", "http_client", "graphql")


class Source:
    """Where a mapping of keys comes from."""

    def __init__(self, name: str) -> None:
        self.name = name

    def where(self, location: Location) -> str:
        """The place of a key, to begin a message with."""
        steps = "".join(f"[{step!r}]" for step in location[:-1])
        return f"{self.name}{steps}"


class TomlSource(Source):
    """The text of a TOML file."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name)
        self._text = text

    def where(self, location: Location) -> str:
        """The file and the line where the key is, or the nearest table around it."""
        while location:
            if line := line_of(self._text, location):
                return f"{self.name}, line {line}"
            location = location[:-1]
        return self.name


def line_of(text: str, location: Location) -> int | None:
    """The line of a TOML document where the statement of a key begins; None if the key is not in it.

    TOML's own parser says where statements end: at the lines up to which the text is a document in itself.
    """
    begin = 1
    lines = text.splitlines(keepends=True)
    for number in range(1, len(lines) + 1):
        try:
            value: Any = parse_toml("".join(lines[:number]))
        except ValueError:
            continue  # amid a statement
        try:
            for step in location:
                value = value[step]
        except (KeyError, IndexError, TypeError):
            begin = number + 1
        else:
            return begin
    return None


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a TOML document.

    Raises:
        ValueError: it is none; the message names line and column.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


@dataclass(frozen=True)
class Project:
    """A program and everything that was said of it.

    Args:
        program: what to run.
        config: the services, pools and thresholds; without the environment.
        server: fields of `puff_patch.server.ServerOptions` that were said.
        values: all of it, as it was written.
        sources: where each key of ``values`` comes from.
    """

    program: Program = Program()
    config: Config = field(default_factory=Config)
    server: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)

    def where(self, *location: Any) -> str:
        """The place of a key, to begin a message with."""
        source = self.sources.get(location[0])
        return source.where(location) if source is not None else str(location[0])

    def overlaid(self, values: Mapping[str, Any], source: Source) -> Project:
        """This project where ``values`` say nothing else.

        Raises:
            ConfigError: a key is unknown, or its value does not fit.
        """
        read(values, source)
        return _read(
            {**self.values, **values}, {**self.sources, **dict.fromkeys(values, source)}, str(source.name)
        )


def read(values: Mapping[str, Any], source: Source) -> Project:
    """Check a mapping of keys.

    Raises:
        ConfigError: a key is unknown, or its value does not fit.
    """
    return _read(values, dict.fromkeys(values, source), source.name)


def load(path: Path) -> Project:
    """Read a file.

    Raises:
        ConfigError: it cannot be read, is not TOML, a key is unknown, or its value does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        values = parse_toml(text)
    except ValueError as error:
        reason, at, rest = str(error).partition(" (at line ")
        line = f", line {rest.partition(',')[0]}" if at and rest[:1].isdigit() else ""
        raise ConfigError(f"{path.name}{line}: this is no TOML: {reason}{'' if line else at + rest}") from None
    return read(values, TomlSource(path.name, text))


def find(folder: Path | None = None) -> Project:
    """The project of the file that ``PUFF_CONFIG`` names, else of ``puff.toml`` in a folder, if there is one.

    Args:
        folder: by default the working directory.

    Raises:
        ConfigError: as `load`.
    """
    if named := os.environ.get("PUFF_CONFIG"):
        return load(Path(named))
    path = (folder or Path()) / FILE
    return load(path) if path.is_file() else Project()


_used: Project | None = None


def use(project: Project | None) -> None:
    """Make a project the one of this process, and its configuration that below the environment; None for none."""
    global _used
    _used = project
    config.use(None if project is None else project.config)


def in_use() -> Project | None:
    """The project of this process, if `use` was called."""
    return _used


def load_dotenv(project: Project) -> None:
    """Add to the environment what the program's ``.env`` says and the environment does not.

    Raises:
        ConfigError: another file than ``.env`` was asked for, and is not there.
    """
    program = project.program
    if not program.dotenv:
        return
    path = Path(program.dotenv_path)
    if path.is_file():
        import dotenv

        dotenv.load_dotenv(path)
    elif program.dotenv_path != Program.dotenv_path:
        raise ConfigError(f"{project.where('dotenv_path')}: there is no file {program.dotenv_path}")


def allowed_keys() -> dict[str, Key]:
    """Every key of a file by name, in the order in which to explain them."""
    of_config = {name: key for name, key in schema.keys(Config).items() if name not in _OF_SERVICES}
    return {**schema.keys(Program), **of_config, **server_keys()}


@functools.cache
def server_keys() -> Mapping[str, Key]:
    """The fields of ServerOptions that can be written down, and ``bind``, which stands for host and port.

    A key of `Program` of the same name is the seed's, and goes before.
    """
    from puff_patch.server.options import ServerOptions

    @dataclass
    class Bind:
        """More.

        Args:
            bind: where to listen: HOST:PORT, PORT or unix:PATH. Port 0 takes a free one.
        """

        bind: str = ""

    of_program = schema.keys(Program)
    keys = {**schema.keys(Bind), **schema.keys(ServerOptions)}
    return {name: key for name, key in keys.items() if name not in of_program}


def _read(values: Mapping[str, Any], sources: Mapping[str, Source], name: str) -> Project:
    def wrong(error: Mismatch) -> ConfigError:
        source = sources.get(error.location[0]) if error.location else None
        return ConfigError(f"{source.where(error.location) if source else name}: {error}")

    try:
        found = schema.check(values, allowed_keys())
        for kind in SERVICES:
            _check_names(kind, found.get(kind, ()))
        mine = schema.keys(Program)
        program = Program(**{key: value for key, value in found.items() if key in mine})
        project = Project(
            program,
            _config(found, values, program),
            {key: value for key, value in found.items() if key in server_keys()},
            values,
            sources,
        )
        _check_commands(program)
    except Mismatch as error:
        raise wrong(error) from None
    return project


def _check_names(kind: str, services: tuple[Any, ...]) -> None:
    names: set[str] = set()
    for index, service in enumerate(services):
        name = service.name.lower()
        if name in names and service.enable:
            raise Mismatch(
                f"there are two [[{kind}]] named {service.name!r}; give each a name of its own",
                (kind, index, "name") if service.name != "default" else (kind, index),
            )
        if service.enable:
            names.add(name)


def _check_commands(program: Program) -> None:
    names: set[str] = set()
    for index, command in enumerate(program.commands):
        if command.command_name in BUILT_IN:
            raise Mismatch(
                f"command_name {command.command_name!r} is a command of puff itself; take another",
                ("commands", index, "command_name"),
            )
        if command.command_name in names:
            raise Mismatch(
                f"there are two commands named {command.command_name!r}", ("commands", index, "command_name")
            )
        names.add(command.command_name)


#: The commands that `puff` has, each with what it does.
BUILT_IN = {
    "serve": "serve the program's applications",
    "django": "run a management command of Django, as manage.py does",
    "pytest": "run the program's tests",
    "wait_forever": "run what runs in the background, and nothing else, until SIGTERM",
    "new": "make a project that runs at once",
    "doctor": "check this machine, the services and puff.toml, and say what to fix",
    "example_config": "print a puff.toml with every key, each explained",
    "help": "explain a command",
}


def _config(found: Mapping[str, Any], values: Mapping[str, Any], program: Program) -> Config:
    of_config = schema.keys(Config).keys() - _OF_SERVICES - server_keys().keys()
    said: dict[str, Any] = {name: value for name, value in found.items() if name in of_config}
    for name in _POOL_TABLES:
        if name in values:
            # Over this pool's defaults, which are not those of the class.
            try:
                said[name] = getattr(Config, name).merged(values[name], where=f"[{name}]")
            except ConfigError as error:
                raise Mismatch(str(error), (name,), complete=True) from None

    def enabled(services: tuple[Any, ...]) -> dict[str, Any]:
        return {service.name.lower(): service for service in services if service.enable}

    def only(cls: type[Any], services: tuple[Any, ...]) -> dict[str, Any]:
        return {
            name: cls(**{each.name: getattr(service, each.name) for each in fields(cls)})
            for name, service in enabled(services).items()
        }

    def urls(services: tuple[Any, ...]) -> dict[str, str]:
        return {name: service.url for name, service in enabled(services).items() if service.url}

    def pools(services: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
        return {name: pool for name, service in enabled(services).items() if (pool := service.pool())}

    made = replace(
        Config(),
        **said,
        postgres_urls=urls(program.postgres),
        redis_urls=urls(program.redis),
        pubsub_urls=urls(program.pubsub),
        task_queue_urls=urls(program.task_queue),
        postgres_pools=pools(program.postgres),
        redis_pools=pools(program.redis),
        http_clients=only(HttpClientOptions, program.http_client),
        task_queues=only(TaskQueueOptions, program.task_queue),
        graphql=only(GraphqlOptions, program.graphql),
    )
    for kind, options_of in (("postgres", made.postgres_pool_options), ("redis", made.redis_pool_options)):
        for index, service in enumerate(getattr(program, kind)):
            try:
                options_of(service.name)
            except ConfigError as error:
                raise Mismatch(str(error), (kind, index), complete=True) from None
    return made
