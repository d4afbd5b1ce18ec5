"""Other people's test suites, plain and patched, compared test by test: what passes plain must pass patched.

::

    python tests/compat/run.py [SUITE ...] [--keep DIR]

A suite is taken from the source distribution of the very version that is installed, and runs against embedded
servers.  A test that passes plain and not patched is run again alone, both ways; if it still does not pass it is a
difference.  Differences that docs/compatibility.md lists (by test id, in backquotes, with their reason) are
expected; any other makes the exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2
from psycopg2 import extensions

from puff_patch import embedded

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "compatibility.md"
# For one run of one suite.
LIMIT_SECONDS = 1200
_WORST_FIRST = ("failed", "skipped", "passed")
Outcomes = dict[str, str]


@dataclass(frozen=True)
class Servers:
    """The servers of this run, and scratch space."""

    postgres_url: str
    redis_url: str
    folder: Path


@dataclass(frozen=True)
class Suite:
    """One project's own tests.

    Args:
        distribution: on the package index; the installed version is taken.
        files: what to take from its source distribution; the rest might shadow what is installed.
        command: the program's arguments to run everything; the servers say where.
        narrow: a command that runs everything, and test ids, to the command that runs just these.
        environment: what the program needs besides.
        cwd: where to run it, below the copied files.
    """

    distribution: str
    files: tuple[str, ...]
    command: Callable[[Servers], list[str]]
    narrow: Callable[[list[str], list[str]], list[str]]
    environment: Callable[[Servers], dict[str, str]] = field(default=lambda servers: {})
    cwd: str = "."


def _psycopg2_environment(servers: Servers) -> dict[str, str]:
    parameters = extensions.parse_dsn(servers.postgres_url)
    administer(
        servers.postgres_url, "DROP DATABASE IF EXISTS psycopg2_test WITH (FORCE)", "CREATE DATABASE psycopg2_test"
    )
    return {
        "PSYCOPG2_TESTDB": "psycopg2_test",
        "PSYCOPG2_TESTDB_HOST": parameters["host"],
        "PSYCOPG2_TESTDB_PORT": parameters["port"],
        "PSYCOPG2_TESTDB_USER": parameters["user"],
        "PSYCOPG2_TEST_REPL_DSN": f"host={parameters['host']} port={parameters['port']} user=postgres",
    }


DJANGO_SETTINGS = """
PATCHED = {patched!r}
_database = {{
    "ENGINE": "django_backend.postgresql" if PATCHED else "django.db.backends.postgresql",
    "USER": {user!r}, "HOST": {host!r}, "PORT": {port!r},
}}
DATABASES = {{
    "default": {{**_database, "NAME": "django"}},
    "other": {{**_database, "NAME": "django_other"}},
}}
CACHES = {{
    "default": {{
        "BACKEND": "django_backend.cache.RedisCache" if PATCHED else "django.core.cache.backends.redis.RedisCache",
        "LOCATION": {redis!r},
    }},
}}
SECRET_KEY = "compat"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = False
"""
DJANGO_APPS = (
    "backends basic cache queries select_for_update transaction_hooks transactions "
    "async asgi delete get_or_create handlers multiple_database prefetch_related sessions_tests signals "
    "postgres_tests test_runner bulk_create expressions"
)


def _django_environment(servers: Servers) -> dict[str, str]:
    parameters = extensions.parse_dsn(servers.postgres_url)
    for name, patched in (("compat_plain", False), ("compat_patched", True)):
        (servers.folder / f"{name}.py").write_text(
            DJANGO_SETTINGS.format(
                patched=patched,
                user=parameters["user"],
                host=parameters["host"],
                port=parameters["port"],
                redis=servers.redis_url,
            )
        )
    return {"PYTHONPATH": str(servers.folder)}


def _pytest_ids(command: list[str], ids: list[str]) -> list[str]:
    return [*(word for word in command if not word.startswith("tests")), *ids]


def _django_labels(command: list[str], ids: list[str]) -> list[str]:
    return [*command[: command.index("--") + 1], *ids]


SUITES = {
    "psycopg2": Suite(
        "psycopg2-binary",
        ("tests",),
        lambda servers: ["-m", "unittest", "tests.test_suite"],
        lambda command, ids: ["-m", "unittest", *ids],
        _psycopg2_environment,
    ),
    "django": Suite(
        "Django",
        ("tests",),
        lambda servers: [
            "runtests.py",
            "--settings=compat_{mode}",
            "--parallel=1",
            "--noinput",
            "--",
            *DJANGO_APPS.split(),
        ],
        _django_labels,
        _django_environment,
        cwd="tests",
    ),
    "redis": Suite(
        "redis",
        ("tests", "pyproject.toml"),
        lambda servers: [
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--redis-url={servers.redis_url}"),
            *(
                "--ignore=tests/test_scenario",
                "--ignore=tests/test_asyncio",
                "-m",
                "not onlycluster and not redismod",
            ),
            "tests",
        ],
        _pytest_ids,
    ),
    "requests": Suite(
        "requests",
        ("tests", "pyproject.toml", "requirements-dev.txt"),
        lambda servers: ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        _pytest_ids,
    ),
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
                    *(sys.executable, str(HERE / "record.py"), mode, str(outcomes_file)),
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
    """Run a suite both ways, say what came out, and return the differences that nothing explains."""
    suite = SUITES[name]
    target.mkdir(parents=True, exist_ok=True)
    version = unpack(suite, target)
    command = suite.command(servers)
    plain = run(suite, "plain", command, servers, target)
    patched = run(suite, "patched", command, servers, target)
    print(f"{suite.distribution} {version}\n  plain:   {summary(plain)}\n  patched: {summary(patched)}")
    if not plain:
        print(f"  nothing ran; see {target}/log-plain.txt")
        return [name]
    candidates = lost(plain, patched)
    again = suite.narrow(command, candidates)
    differences = (
        lost(
            run(suite, "plain", again, servers, target / "again"),
            run(suite, "patched", again, servers, target / "again"),
        )
        if candidates and _copy(target)
        else []
    )
    for test in candidates:
        word = "passes alone" if test not in differences else "expected" if test in expected else "LOST"
        print(f"  {word}: {test} ({patched.get(test, 'did not run')})")
    for test, outcome in patched.items():
        if outcome == "passed" and plain.get(test) == "failed":
            print(f"  gained: {test}")
    return [test for test in differences if test not in expected]


def _copy(target: Path) -> bool:
    """A second copy of the suite beside the first, so that the logs of the whole run stay."""
    shutil.copytree(target, target / "again", ignore=shutil.ignore_patterns("again"), dirs_exist_ok=True)
    return True


def main() -> int:
    """Do what the module says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep suites, outcomes and logs here")
    options = parser.parse_args()
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite is called {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    expected = set(re.findall(r"`([^`\n]+)`", PAGE.read_text())) if PAGE.exists() else set()
    with tempfile.TemporaryDirectory(prefix="puff-compat-") as scratch:
        folder = (options.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        services = embedded.ensure(folder / "services")
        try:
            # What tests of two-phase commit and replication need; takes effect at the next start.
            settings = {"max_prepared_transactions": "20", "wal_level": "logical", "max_connections": "200"}
            administer(
                services.postgres_url,
                *(f"ALTER SYSTEM SET {name} = {value}" for name, value in settings.items()),
                *(f"DROP DATABASE IF EXISTS {name}" for name in ("django", "django_other")),
                *(f"CREATE DATABASE {name}" for name in ("django", "django_other")),
            )
            services.stop()
            embedded.stop(folder / "services")
            services = embedded.ensure(folder / "services")
            servers = Servers(services.postgres_url, services.redis_url, folder)
            unexplained = {
                name: found
                for name in options.suites or SUITES
                if (found := compare(name, servers, folder / name, expected))
            }
        finally:
            services.stop()
            embedded.stop(folder / "services")
    return 1 if unexplained else 0


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


if __name__ == "__main__":
    sys.exit(main())
