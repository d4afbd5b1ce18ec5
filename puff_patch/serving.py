"""From puff.toml, the environment and a command line to `ServerOptions` and `Applications`.

Every field of ServerOptions that can be written down is a key of puff.toml (``max_greenlets``), a variable
(``PUFF_MAX_GREENLETS``) and an option (``--max-greenlets``) without another word here.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from puff_patch import schema
from puff_patch.config import DEFAULT_POSTGRES_URL, DEFAULT_REDIS_URL, ConfigError
from puff_patch.project import Cors, Program, Project, server_keys
from puff_patch.schema import Key, Mismatch

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from puff_patch.server import Applications, ServerOptions

#: Where ``puff serve`` listens if nothing says so.
DEFAULT_BIND = "127.0.0.1:7777"

#: What Django's static files and checks take, and no other program.
DJANGO_SWITCHES = {
    "--nostatic": "do not serve the static files of installed apps.",
    "--insecure": "serve static files even if DEBUG is off.",
    "--skip-checks": "skip the system checks.",
}

_APPLICATION_KEYS = ("wsgi", "asgi", "asgi_paths")
_URL_KINDS = {
    "postgres": ("Postgres pool configuration for '{}'.", DEFAULT_POSTGRES_URL),
    "redis": ("Redis pool configuration for '{}'.", DEFAULT_REDIS_URL),
    "pubsub": ("PubSub configuration for '{}'.", DEFAULT_REDIS_URL),
    "task_queue": ("{} Redis TaskQueue configuration.", DEFAULT_REDIS_URL),
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help texts below their options, as they are long."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 10, **options})


def add_options(
    parser: argparse._ActionsContainer,
    keys: Mapping[str, Key],
    *,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add an option for each key; what is not given is not in the namespace.

    Args:
        parser: the parser, or a group of one.
        keys: the keys; what cannot be written on a command line is left out.
        defaults: what holds where an option is not given, to be shown in place of a key's own default.
    """
    for key in keys.values():
        if key.secret or key.kind.parse is None:
            continue
        default = (defaults or {}).get(key.name, key.default)
        settings: dict[str, Any] = {"dest": key.name, "default": argparse.SUPPRESS}
        if key.kind.flag:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = _parser_of(key)
            settings["metavar"] = f"<{key.name.upper()}>"
        # Assigned afterwards: argparse of Python 3.10 to 3.12 adds "(default: ==SUPPRESS==)" to that of a flag.
        parser.add_argument(key.option, **settings).help = _help(
            key.help, key.variable, None if default in (None, MISSING, "", ()) else key.kind.show(default)
        )


def add_server_options(parser: argparse.ArgumentParser, project: Project, *, bind: str = "") -> None:
    """Add the options of a server and of what it serves.

    Args:
        parser: of the command.
        project: says what holds where an option is not given.
        bind: where the server listens by default, to be shown.
    """
    of_program = schema.keys(Program)
    applications = {name: of_program[name] for name in _APPLICATION_KEYS}
    add_options(parser.add_argument_group("applications"), applications, defaults=project.values)
    # The address is shown once: as that to bind to.
    shown = {"bind": bind, "host": None, "port": None, **project.server}
    add_options(parser.add_argument_group("server"), server_keys(), defaults=shown)


def add_urls(parser: argparse._ActionsContainer, project: Project) -> None:
    """Add an option for the URL of each service that the project names."""
    for kind, (text, default) in _URL_KINDS.items():
        for service in getattr(project.program, kind):
            if service.enable:
                name = service.name.lower()
                variable = url_variable(kind, name)
                parser.add_argument(
                    f"--{name}-{kind}-url".replace("_", "-"),
                    dest=variable,
                    default=argparse.SUPPRESS,
                    metavar=f"<{variable.removeprefix('PUFF_')}>",
                    help=_help(text.format(service.name), variable, without_password(service.url) or default),
                )


def url_variable(kind: str, name: str) -> str:
    """The variable with the URL of a service."""
    return f"PUFF_{name.upper()}_{kind.upper()}_URL"


def without_password(url: str) -> str:
    """A URL to show."""
    if url in (DEFAULT_POSTGRES_URL, ""):
        return url  # what everybody knows
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@", 1)))


def server_options(
    project: Project,
    given: Mapping[str, Any],
    *,
    environ: Mapping[str, str] | None = None,
    otherwise: Mapping[str, Any] | None = None,
    **fixed: Any,
) -> ServerOptions:
    """What a server is told: by the command line over the environment over the project over ``otherwise``.

    Args:
        project: see `puff_patch.project`.
        given: fields by name, and ``bind``, as they were given on a command line; others are left out.
        environ: by default ``os.environ``.
        otherwise: defaults in place of those of ServerOptions.
        fixed: fields that nobody may change.

    Raises:
        ConfigError: a value cannot be used; the message says where it comes from.
    """
    from puff_patch.server.options import ServerOptions

    keys = server_keys()
    of_environment: dict[str, Any] = {}
    for key in keys.values():
        text = (os.environ if environ is None else environ).get(key.variable, "")
        if text and key.kind.parse is not None:
            try:
                of_environment[key.name] = schema.parse(key, text)
            except Mismatch as error:
                raise ConfigError(f"{key.variable} {error}") from None
    values: dict[str, Any] = dict(otherwise or {})
    origins: dict[str, str] = {}
    layers: tuple[tuple[Mapping[str, Any], Callable[[Key], str]], ...] = (
        (project.server, lambda key: project.where(key.name)),
        (of_environment, lambda key: key.variable),
        ({name: value for name, value in given.items() if name in keys}, lambda key: key.option),
    )
    for layer, origin in layers:
        expanded = dict(layer)
        if bind := expanded.pop("bind", ""):
            try:
                expanded = {**_address(bind), **expanded}
            except ValueError:
                raise ConfigError(
                    f"{origin(keys['bind'])}: bind takes HOST:PORT, PORT or unix:PATH, got {bind!r}"
                ) from None
        if expanded.keys() & {"host", "port"} and "uds" not in expanded:
            expanded["uds"] = None  # a weaker source's
        values.update(expanded)
        origins.update({name: origin(keys[name]) for name in layer})
    _settle_seeds(project, values, origins)
    try:
        return ServerOptions(**values, **fixed)
    except ValueError as error:
        named = schema.mentioned(str(error), origins)
        raise ConfigError(f"{origins[named[0]]}: {error}" if named else str(error)) from error


def _settle_seeds(project: Project, values: dict[str, Any], origins: dict[str, str]) -> None:
    """Say what the seed says of CORS and compression in the words of ServerOptions."""
    from puff_patch.server.options import ServerOptions

    known = schema.keys(ServerOptions)
    if project.program.compression_middleware and "compression" in known:
        kind = known["compression"].kind
        values.setdefault("compression", True if kind.table is None else kind.table())
        origins.setdefault("compression", project.where("compression_middleware"))
    if project.program.cors is not None and "cors" in known:
        table = known["cors"].kind.table
        assert table is not None
        origins["cors"] = project.where("cors")
        try:
            values["cors"] = schema.build(table, _cors(project.program.cors))
        except Mismatch as error:
            raise ConfigError(f"{origins['cors']}: {error}") from error


def _cors(cors: Cors) -> dict[str, Any]:
    every = ("*",)
    base: dict[str, dict[str, Any]] = {
        "Default": {},
        "Permissive": {"allow_origins": every, "allow_headers": every, "allow_methods": every},
        # "*" is no origin to send cookies along with; one that is named is.
        "VeryPermissive": {
            "allow_origin_regex": ".*",
            "allow_headers": every,
            "allow_methods": every,
            "allow_credentials": True,
        },
    }
    said = {
        "allow_origins": cors.allowed_origins,
        "allow_origin_regex": cors.allow_origin_regex,
        "allow_headers": cors.allowed_headers,
        "allow_methods": cors.allowed_methods,
        "allow_credentials": cors.allow_credentials,
        "expose_headers": cors.expose_headers,
        "max_age": cors.max_age_secs,
    }
    return {**base[cors.base_config], **{name: value for name, value in said.items() if value is not None}}


def unavailable(project: Project) -> list[str]:
    """What the project asks for and this version's server cannot do yet, a line each."""
    from puff_patch.server.options import ServerOptions

    found = []
    known = schema.keys(ServerOptions)
    if project.program.compression_middleware and "compression" not in known:
        found.append(f"{project.where('compression_middleware')}: responses are not compressed by this version")
    if project.program.cors is not None and "cors" not in known:
        found.append(f"{project.where('cors')}: this version sends no CORS headers")
    for index, graphql in enumerate(project.program.graphql):
        if graphql.enable and (paths := [graphql.url, graphql.subscription_url, graphql.playground_url]):
            shown = ", ".join(path for path in paths if path) or graphql.schema
            found.append(
                f"{project.where('graphql', index)}: GraphQL comes in a later version; not served: {shown}"
            )
    return found


def says_where(project: Project, given: Mapping[str, Any]) -> bool:
    """Whether anything says where to listen; arguments as those of `server_options`."""
    return any(
        name in given or name in project.server or os.environ.get(server_keys()[name].variable)
        for name in ("bind", "host", "port", "uds")
    )


def applications(
    project: Project, given: Mapping[str, Any], *, otherwise: Callable[[], WSGIApplication] | None = None
) -> Applications:
    """Import what is to be served.

    Args:
        project: see `puff_patch.project`.
        given: ``wsgi``, ``asgi`` and ``asgi_paths``, as they were given on a command line.
        otherwise: loads the WSGI application where none is named and an ASGI one does not stand alone.

    Raises:
        ConfigError: nothing is named, or it is not there; the message says where it was looked for.
    """
    from puff_patch.references import load
    from puff_patch.server import Applications

    program = project.program

    def named(name: str) -> tuple[Any, str]:
        key = schema.keys(Program)[name]
        if name in given:
            return given[name], key.option
        if text := os.environ.get(key.variable):
            return schema.parse(key, text), key.variable
        return getattr(program, name), project.where(name)

    loaded = {}
    for key in ("wsgi", "asgi"):
        reference, where = named(key)
        if reference:
            loaded[key] = load(reference, what=key, where=where)
    asgi_paths, _ = named("asgi_paths")
    if otherwise is not None and "wsgi" not in loaded and ("asgi" not in loaded or asgi_paths):
        loaded["wsgi"] = otherwise()
    handlers: dict[str, Any] = {}
    for index, each in enumerate(program.websocket):
        handlers[each.path] = load(
            each.handler, what="handler", where=project.where("websocket", index, "handler")
        )
    if not loaded and not handlers:
        raise ConfigError(
            "there is nothing to serve: name the application in puff.toml, for example\n"
            '    wsgi = "my_module.app"\n'
            "or on the command line: --wsgi my_module.app"
        )
    try:
        return Applications(**loaded, asgi_paths=asgi_paths, websockets=handlers)
    except ValueError as error:
        places = [project.where(key) for key in ("asgi_paths", "asgi", "wsgi") if key in project.values]
        raise ConfigError(f"{places[0]}: {error}" if places else str(error)) from error


def run(load: Callable[[], Applications], options: ServerOptions) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        load: imports what is to be served, in the process that serves it.
        options: of the server.

    Returns:
        The exit code for this process.

    Raises:
        ConfigError: the server cannot start.
    """
    from puff_patch.server import ServerError
    from puff_patch.server import run as run_server

    try:
        return run_server(load, options)
    except ServerError as error:
        raise ConfigError(str(error)) from error


def _address(bind: str) -> dict[str, Any]:
    if bind.startswith("unix:"):
        return {"uds": bind.removeprefix("unix:")}
    host, _, port = bind.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(bind)
    return {**({"host": host} if host else {}), "port": int(port)}


def _parser_of(key: Key) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return schema.parse(key, text)
        except Mismatch as error:
            raise argparse.ArgumentTypeError(f"{error}") from None

    return parse


def _help(text: str, variable: str, default: str | None) -> str:
    value = os.environ.get(variable, "")
    if re.match(r"\w+://", value):
        value = without_password(value)
    shown = f"{text} [env: {variable}={value}]" + (f" [default: {default}]" if default is not None else "")
    return shown.replace("%", "%%")
