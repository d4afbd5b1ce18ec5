"""``manage.py check`` on small projects with something wrong in each, and on right ones."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn
from support.process import run

OURS, NATIVE = "django_backend.postgresql", "django.db.backends.postgresql"
CACHE, NATIVE_CACHE = "django_backend.cache.RedisCache", "django.core.cache.backends.redis.RedisCache"
SQLITE = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
# Reached by nobody: what is checked without asking a server must not ask one.
NOWHERE = {"NAME": "x", "HOST": "127.0.0.1", "PORT": "1", "USER": "x"}

MANAGE = """\
import os, sys
{first}
os.environ["DJANGO_SETTINGS_MODULE"] = "project_settings"
from django.core.management import execute_from_command_line
execute_from_command_line(sys.argv)
"""
PATCHED = "import puff_patch; puff_patch.patch_all()"
SETTINGS = """\
import json, os
SECRET_KEY = "not a secret"
USE_TZ = True
INSTALLED_APPS = ["django_backend"]
globals().update(json.loads(os.environ["PROJECT_SETTINGS"]))
"""


@dataclass
class Project:
    """A project in a folder of its own."""

    folder: Path

    def check(
        self, *arguments: str, first: str = PATCHED, env: dict[str, str | None] | None = None, **settings: Any
    ) -> list[tuple[str, str]]:
        """What ``manage.py check`` says: the id and text of each of our messages.

        Django has none of its own, but for ``--deploy``.

        Args:
            arguments: of the command.
            first: the first lines of manage.py.
            env: environment variables.
            settings: of Django.
        """
        (self.folder / "manage.py").write_text(MANAGE.format(first=first))
        (self.folder / "project_settings.py").write_text(SETTINGS)
        done = run(
            ["manage.py", "check", *arguments],
            cwd=self.folder,
            env={"PROJECT_SETTINGS": json.dumps({"DATABASES": {"default": SQLITE}, **settings}), **(env or {})},
        )
        output = done.stdout + done.stderr
        assert "Traceback" not in output, output
        found = re.findall(r"^\S+: \(([\w.]+)\) (.*\n\tHINT: .*)$", output, re.MULTILINE)
        issues = re.search(r"identified (no|\d+) issues?", output)
        assert issues, output
        assert len(found) == int(issues[1].replace("no", "0")) or "--deploy" in arguments, output
        assert done.returncode == (1 if "ERRORS:" in output else 0)
        return sorted(message for message in found if message[0].startswith("puff."))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def ids(messages: list[tuple[str, str]]) -> list[str]:
    return [id for id, _ in messages]


@dataclass
class Limited:
    """A role and a database of a test's own, each with a CONNECTION LIMIT."""

    role: str
    database: str
    dsn: str
    allowed: int


@pytest.fixture
def limited(postgres_url: str) -> Iterator[Limited]:
    name = f"puff_check_{uuid.uuid4().hex[:8]}"
    admin = psycopg2.connect(postgres_url)
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret' CONNECTION LIMIT 7")
        cursor.execute(f"CREATE DATABASE {name} OWNER {name} CONNECTION LIMIT 9")
        cursor.execute("SELECT current_setting('max_connections')::int - 3")
        (allowed,) = cursor.fetchone()
        yield Limited(name, name, make_dsn(postgres_url, dbname=name, user=name, password="secret"), allowed)
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
        cursor.execute(f"DROP ROLE {name}")
    admin.close()


def test_right_projects_are_told_nothing(project: Project, services) -> None:
    """What the README has a reader write; asked with and without the servers."""
    env = services.env()
    databases = {"default": {"ENGINE": OURS, "OPTIONS": {"pool": {"max_size": 20, "timeout": 10}}}}
    caches = {
        "default": {"BACKEND": CACHE, "OPTIONS": {"max_connections": 20, "timeout": 5, "socket_timeout": 1}},
        "native": {"BACKEND": NATIVE_CACHE, "LOCATION": services.redis},
    }
    assert project.check() == []
    assert project.check("--database", "default", DATABASES=databases, CACHES=caches, env=env) == []
    native = {"ENGINE": NATIVE, **NOWHERE}
    own = {"ENGINE": OURS, **NOWHERE, "OPTIONS": {"pool": False}, "CONN_MAX_AGE": 60}
    assert project.check(DATABASES={"default": native, "own": own}, CACHES=caches, env=env) == []


def test_not_patched(project: Project) -> None:
    messages = project.check(first="", DATABASES={"default": {"ENGINE": OURS, **NOWHERE}, "x": SQLITE})
    assert ids(messages) == ["puff.E001"]
    assert "DATABASES['default']" in messages[0][1]
    assert "`import puff_patch; puff_patch.patch_all()`" in messages[0][1]
    assert ids(project.check(first="")) == ["puff.W001"]
    assert project.check(first="", SILENCED_SYSTEM_CHECKS=["puff.W001"]) == []


def test_patched_too_late(project: Project) -> None:
    """`patch_all` itself sees nothing here: the module that got an original comes after it."""
    (project.folder / "early.py").write_text("import time\nkept = [time.sleep]\n")
    (project.folder / "late.py").write_text("import early\n[doze] = early.kept\n")
    messages = project.check(first=f"import early\n{PATCHED}\nimport late")
    assert ids(messages) == ["puff.W002"]
    assert "late.doze (was time.sleep)." in messages[0][1]
    assert project.check(first=f"{PATCHED}\nimport late") == []


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [("PUFF_POSTGRES_POOL_MAXSIZE", "5", "did you mean 'max_size'"), ("WEB_CONCURRENCY", "many", "got 'many'")],
)
def test_wrong_environment(project: Project, variable: str, value: str, told: str) -> None:
    [(id, text)] = project.check(env={variable: value})
    assert id == "puff.E002"
    assert variable.removesuffix("MAXSIZE") in text
    assert told in text


def test_wrong_options(project: Project) -> None:
    """Without asking any server."""
    engine = project.folder / "dj_db_conn_pool" / "backends" / "postgresql"
    engine.mkdir(parents=True)
    (engine / "base.py").write_text("from django.db.backends.postgresql.base import DatabaseWrapper\n")
    messages = project.check(
        DATABASES={
            "default": {"ENGINE": OURS, **NOWHERE, "OPTIONS": {"pool": {"maxsize": 5}}},
            "impossible": {"ENGINE": OURS, **NOWHERE, "OPTIONS": {"pool": {"max_size": 0}}},
            "yes": {"ENGINE": OURS, **NOWHERE, "OPTIONS": {"pool": "yes"}},
            "twice": {"ENGINE": "dj_db_conn_pool.backends.postgresql", **NOWHERE},
            "replica": {"ENGINE": OURS},
            "fine": {"ENGINE": OURS, **NOWHERE, "OPTIONS": {"pool": {"max_size": 5}}},
        },
        CACHES={
            "default": {"BACKEND": CACHE, "OPTIONS": {"max_conections": 5}},
            "native": {"BACKEND": NATIVE_CACHE, "LOCATION": "redis://127.0.0.1:1", "OPTIONS": {"pool": 1}},
            "other": {"BACKEND": CACHE, "OPTIONS": {"service": "Other"}},
            "fine": {"BACKEND": CACHE, "OPTIONS": {"service": "cache", "max_connections": 5}},
        },
        env={"PUFF_CACHE_REDIS_URL": "redis://127.0.0.1:1"},
    )
    expected = [
        (
            "puff.E003",
            "['default'][\"OPTIONS\"][\"pool\"]: unknown pool option 'maxsize'; did you mean 'max_size'?",
        ),
        ("puff.E003", '[\'impossible\']["OPTIONS"]["pool"]: pool sizes must satisfy'),
        ("puff.E003", "['yes'][\"OPTIONS\"][\"pool\"] takes pool options, True or False, got 'yes'"),
        (
            "puff.E004",
            "CACHES['default'][\"OPTIONS\"]: unknown option 'max_conections'; did you mean 'max_connections'?",
        ),
        ("puff.E004", "CACHES['native'][\"OPTIONS\"]: unknown option 'pool'"),
        ("puff.W003", "DATABASES['twice'] is pooled twice"),
        ("puff.W005", "CACHES['other'][\"OPTIONS\"][\"service\"] is 'Other', which is not configured"),
        ("puff.W005", "DATABASES['replica'] names no server"),
    ]
    assert ids(messages) == ids(expected), messages
    for (_, text), (_, wanted) in zip(messages, expected, strict=True):
        assert wanted in text
    assert "PUFF_OTHER_REDIS_URL" in messages[-2][1]
    assert "PUFF_REPLICA_POSTGRES_URL" in messages[-1][1]


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_the_pool_option_of_djangos_own_engine(project: Project, driver: str) -> None:
    first = PATCHED if driver == "psycopg" else f"sys.modules['psycopg'] = None\n{PATCHED}"
    foreign = {"ENGINE": NATIVE, **NOWHERE, "OPTIONS": {"pool": True}}
    messages = project.check(first=first, DATABASES={"default": foreign})
    assert ids(messages) == ([] if driver == "psycopg" else ["puff.E003"])
    assert all(
        "the engine django.db.backends.postgresql has it for psycopg 3 only" in text for _, text in messages
    )


def test_every_database_on_localhost_is_no_mistake(project: Project) -> None:
    assert project.check(DATABASES={"default": {"ENGINE": OURS}, "replica": {"ENGINE": OURS}}) == []


def test_more_connections_than_the_servers_allow(project: Project, services, limited: Limited) -> None:
    big = limited.allowed // 2
    pool = {"pool": {"max_size": big}}
    databases = {
        # Two aliases of equal settings share a pool; a third one adds to it. Only some are asked.
        "default": {"ENGINE": OURS, "OPTIONS": pool},
        "same": {"ENGINE": OURS, "OPTIONS": pool},
        "more": {"ENGINE": OURS, "OPTIONS": {"pool": {"max_size": big + 2}}},
        "few": {"ENGINE": OURS, "OPTIONS": {"pool": {"max_size": 1}}},
        "nowhere": {"ENGINE": NATIVE, **NOWHERE},
        "lite": SQLITE,
    }
    caches = {
        "default": {"BACKEND": CACHE, "OPTIONS": {"max_connections": 1_000_000}},
        "small": {"BACKEND": CACHE, "OPTIONS": {"max_connections": 2}},
    }
    env: dict[str, str | None] = {
        **services.env(),
        "PUFF_SAME_POSTGRES_URL": services.postgres,
        "PUFF_MORE_POSTGRES_URL": services.postgres,
        "PUFF_FEW_POSTGRES_URL": limited.dsn,
    }
    asked = [f"--database={alias}" for alias in ("default", "few", "nowhere", "lite")]
    messages = project.check(*asked, DATABASES=databases, CACHES=caches, env=env)
    assert ids(messages) == ["puff.W007", "puff.W008", "puff.W009"], messages
    told = dict(messages)
    total = 2 * big + 2 + 1
    assert f"may open {total} connections, {total} in each of 1 process " in told["puff.W007"]
    assert f"(DATABASES['default'] {big}, DATABASES['few'] 1, DATABASES['more'] {big + 2})" in told["puff.W007"]
    assert f"{limited.allowed} is what the server allows (max_connections" in told["puff.W007"]
    assert f'Set OPTIONS["pool"]["max_size"] to {limited.allowed // 3} at most' in told["puff.W007"]
    assert "1000002" in told["puff.W008"]
    assert "maxclients" in told["puff.W008"]
    assert "DATABASES['nowhere'] cannot be asked" in told["puff.W009"]
    assert "refused" in told["puff.W009"]

    few = {"default": SQLITE, "few": {"ENGINE": OURS, "OPTIONS": {"pool": {"max_size": 2}}}}
    messages = project.check("--database=few", DATABASES=few, env={**env, "PUFF_WORKERS": "5"})
    assert ids(messages) == ["puff.W007"] * 2
    assert f"7 is what the role '{limited.role}' is allowed" in messages[0][1]
    assert f"9 is what the database '{limited.database}' allows" in messages[1][1]
    assert "10 connections, 2 in each of 5 processes" in messages[0][1]
    assert "serve with 3 of them at most" in messages[0][1]
    assert project.check("--database=few", DATABASES=few, env={**env, "WEB_CONCURRENCY": "3"}) == []
    assert project.check(DATABASES=databases, CACHES=caches, env=env) == [], "asks servers without being told to"


def test_deployment(project: Project) -> None:
    servers: dict[str, Any] = {
        "DATABASES": {"default": {"ENGINE": OURS}},
        "CACHES": {"default": {"BACKEND": CACHE}},
    }
    messages = project.check("--deploy", **servers)
    assert ids(messages) == ["puff.I002", "puff.I002"]
    assert "PUFF_DEFAULT_REDIS_URL" in messages[0][1]
    assert "PUFF_DEFAULT_POSTGRES_URL" in messages[1][1]
    urls: dict[str, str | None] = {
        "PUFF_DEFAULT_POSTGRES_URL": "postgres://127.0.0.1:1/x",
        "PUFF_DEFAULT_REDIS_URL": "redis://127.0.0.1:1",
    }
    assert project.check("--deploy", env=urls, **servers) == []
    servers["DATABASES"]["default"]["CONN_MAX_AGE"] = 60
    assert project.check(env=urls, **servers) == [], "what it says of requests is of no use to each command"
    [(id, text)] = project.check("--deploy", env=urls, **servers)
    assert id == "puff.I001"
    assert "DATABASES['default'][\"CONN_MAX_AGE\"] has no effect on requests" in text
    servers["DATABASES"]["default"]["OPTIONS"] = {"pool": False}
    assert project.check("--deploy", env=urls, **servers) == []
    assert ids(project.check("--deploy", env={"PUFF_EMBEDDED": "1"})) == ["puff.I003", "puff.W006"]
