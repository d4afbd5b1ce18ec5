"""The ``puff`` command, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.process import run

SERVICES = """
[[postgres]]
name = "default"
[[postgres]]
name = "readonly"
[[postgres]]
name = "audit"
[[redis]]
name = "default"
[[redis]]
name = "other"
[[http_client]]
name = "internal"
http2_prior_knowledge = true
[[pubsub]]
name = "default"
[[pubsub]]
name = "otherpubsub"
"""
# What the seed's README shows of its own command's help.
SEED_HELP = """
--default-postgres-url <DEFAULT_POSTGRES_URL>
    Postgres pool configuration for 'default'. [env: PUFF_DEFAULT_POSTGRES_URL=]
    [default: postgres://postgres:password@localhost:5432/postgres]
--audit-postgres-url <AUDIT_POSTGRES_URL>
    Postgres pool configuration for 'audit'. [env: PUFF_AUDIT_POSTGRES_URL=]
    [default: postgres://postgres:password@localhost:5432/postgres]
--readonly-postgres-url <READONLY_POSTGRES_URL>
    Postgres pool configuration for 'readonly'. [env: PUFF_READONLY_POSTGRES_URL=]
    [default: postgres://postgres:password@localhost:5432/postgres]
--default-redis-url <DEFAULT_REDIS_URL>
    Redis pool configuration for 'default'. [env: PUFF_DEFAULT_REDIS_URL=] [default: redis://localhost:6379]
--other-redis-url <OTHER_REDIS_URL>
    Redis pool configuration for 'other'. [env: PUFF_OTHER_REDIS_URL=] [default: redis://localhost:6379]
--default-pubsub-url <DEFAULT_PUBSUB_URL>
    PubSub configuration for 'default'. [env: PUFF_DEFAULT_PUBSUB_URL=] [default: redis://localhost:6379]
--otherpubsub-pubsub-url <OTHERPUBSUB_PUBSUB_URL>
    PubSub configuration for 'otherpubsub'. [env: PUFF_OTHERPUBSUB_PUBSUB_URL=] [default: redis://localhost:6379]
"""
COMMANDS = """
[[commands]]
function = "jobs.on_greenlet"
command_name = "greenlet"

[[commands]]
function = "jobs:on_loop"
command_name = "loop"

[[commands]]
function = "jobs.fail"
command_name = "fail"

[[commands]]
function = "jobs.leave"
command_name = "leave"

[[commands]]
function = "jobs.gone"
command_name = "gone"

[[commands]]
function = "broken.job"
command_name = "broken"
"""
JOBS = """
import asyncio, json, os, sys, threading, time
from puff_patch import config

def tell(**more):
    more |= {"argv": sys.argv, "patched": time.sleep.__module__.startswith("gevent")}
    print(json.dumps({**more, "said": os.environ.get("SAID"), "redis": config.current().redis_url()}))

def on_greenlet():
    import gevent
    tell(greenlet=isinstance(gevent.getcurrent(), gevent.Greenlet))

async def on_loop():
    from puff_patch.runtime import aio
    await asyncio.sleep(0.01)
    tell(loop=aio.in_thread())

def fail():
    raise LookupError("what the job raises")

def leave():
    sys.exit(7)
"""


def puff(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(["-m", "puff_patch.cli", *arguments], cwd=cwd, env=env)


def told(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def refused(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """What it says when it ends with an error that a user makes."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def complaints(*calls: tuple[str, ...], cwd: Path, code: int = 1) -> Iterator[str]:
    """What each of several calls says when it ends with such an error; in one process, to be quick."""
    done = run(
        [
            "-c",
            "import contextlib, io, json, sys\nfrom puff_patch.cli import main\n"
            "for call in json.loads(sys.argv[1]):\n"
            "    with contextlib.redirect_stderr(io.StringIO()) as told:\n"
            "        try: code = main(call)\n"
            "        except SystemExit as end: code = end.code\n"
            "    print(json.dumps([code, told.getvalue()]))\n",
            json.dumps(calls),
        ],
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [end[0] for end in ends] == [code] * len(calls), ends
    return iter([end[1] for end in ends])


def on_one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    (tmp_path / "puff.toml").write_text(COMMANDS)
    (tmp_path / "jobs.py").write_text(JOBS)
    (tmp_path / "broken.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / ".env").write_text("SAID='by .env'\nPUFF_DEFAULT_REDIS_URL=redis://dotenv\n")
    return tmp_path


def test_help_is_quick_and_names_the_commands(jobs: Path) -> None:
    done = run(
        [
            "-c",
            "import resource, sys\nfrom puff_patch.cli import main\nassert main(['--help']) == 0\n"
            "used = resource.getrusage(resource.RUSAGE_SELF)\n"
            "slow = {'django', 'psycopg2', 'psycopg', 'redis', 'requests', 'uvloop', 'dotenv', 'httpx'}\n"
            "print(used.ru_utime + used.ru_stime, sorted(slow & set(sys.modules)), file=sys.stderr)",
        ],
        cwd=jobs,
    )
    seconds, _, loaded = done.stderr.strip().partition(" ")
    assert loaded == "[]"
    assert float(seconds) < 0.5, "it takes 0.15 s of a processor"
    names = re.findall(r"^  (\w+)  ", done.stdout, re.M)
    assert names == [
        *("serve", "django", "pytest", "wait_forever", "new", "doctor", "example_config", "help"),
        *("greenlet", "loop", "fail", "leave", "gone", "broken"),
    ]


def test_help_of_the_named_services_is_as_the_seed_shows_it(tmp_path: Path) -> None:
    (tmp_path / "puff.toml").write_text(SERVICES)
    shown = puff("serve", "--help", cwd=tmp_path).stdout
    entries = re.split(r"^(?=--)", SEED_HELP.strip(), flags=re.M)
    assert len(entries) == 8
    for entry in entries:
        assert on_one_line(entry) in on_one_line(shown)
    assert "[default: 127.0.0.1:7777]" in shown
    explained = puff("help", "serve", cwd=tmp_path, PUFF_AUDIT_POSTGRES_URL="postgres://me:hush@db/x").stdout
    assert "[env: PUFF_AUDIT_POSTGRES_URL=postgres://me:***@db/x]" in on_one_line(explained)
    assert on_one_line(SEED_HELP.strip().partition("--other")[0][-400:]).split("] --")[-1] in on_one_line(
        puff("help", "pytest", cwd=tmp_path).stdout
    )


def test_functions_run_on_a_greenlet_or_on_the_asyncio_thread(jobs: Path) -> None:
    assert told(puff("greenlet", "a", "--b", cwd=jobs)) == {
        "greenlet": True,
        "argv": ["puff greenlet", "a", "--b"],
        "patched": True,
        "said": "by .env",
        "redis": "redis://dotenv",
    }
    (jobs / "puff.toml").write_text(f'{COMMANDS}\n[[redis]]\nurl = "redis://file"\n')
    by_option = told(puff("loop", "--default-redis-url", "redis://option", cwd=jobs, SAID="before"))
    assert (by_option["loop"], by_option["said"], by_option["redis"]) == (True, "before", "redis://option")
    assert by_option["argv"] == ["puff loop"]
    (jobs / ".env").unlink()
    assert told(puff("greenlet", cwd=jobs))["redis"] == "redis://file"
    assert told(puff("greenlet", cwd=jobs, PUFF_DEFAULT_REDIS_URL="redis://env"))["redis"] == "redis://env"


def test_how_functions_end(jobs: Path) -> None:
    failed = puff("fail", cwd=jobs)
    assert failed.returncode == 1
    assert failed.stderr.count("LookupError: what the job raises") == 1, failed.stderr
    assert "jobs.py" in failed.stderr
    assert puff("leave", cwd=jobs).returncode == 7
    assert "puff.toml, line 19: function names 'jobs.gone', but jobs (" in refused(puff("gone", cwd=jobs))
    broken = puff("broken", cwd=jobs)
    assert "ModuleNotFoundError: No module named 'a_library_that_is_not_there'" in broken.stderr
    assert "broken.py" in broken.stderr, "whose import it is"


def test_what_is_called_wrongly(jobs: Path) -> None:
    (jobs / "other.toml").write_text("wsgy = 1\n")
    told = complaints(
        ("greenlt",),
        ("serve",),
        ("serve", "--wsgi", "jebs.app"),
        ("serve", "--wsgi", "jobs.leaves"),
        ("serve", "--wsgi", "jobs:json"),
        ("serve", "--wsgi", "jobs"),
        ("serve", "--wsgi", "jobs.leave", "--port", "70000"),
        ("django", "migrate"),
        ("--config", "other.toml", "greenlet"),
        ("--config=other.toml", "--help"),
        ("--config=gone.toml", "greenlet"),
        cwd=jobs,
    )
    assert "there is no command 'greenlt'; did you mean 'greenlet'?" in next(told)
    assert "there is nothing to serve" in next(told)
    assert "there is no module 'jebs'" in next(told)
    assert "has no 'leaves'; did you mean 'leave'?" in next(told)
    assert "is not callable but module" in next(told)
    assert 'it takes "module.attribute" or "module:attribute"' in next(told)
    assert "--port: port must be between 0 and 65535" in next(told)
    assert "nothing names the settings of Django" in next(told)
    for _ in range(2):
        assert "other.toml, line 1: unknown key 'wsgy'; did you mean 'wsgi'?" in next(told)
    assert "cannot read gone.toml" in next(told)
    told = complaints(("--wrong",), ("serve", "--max-greenlets", "x"), ("serve", "8000"), cwd=jobs, code=2)
    assert "there is no option --wrong" in next(told)
    assert "--max-greenlets: takes a whole number, got 'x'" in next(told)
    assert "unrecognized arguments: 8000" in next(told)


def test_example_config_is_a_right_file(tmp_path: Path) -> None:
    (tmp_path / "puff.toml").write_text(puff("example_config", cwd=tmp_path).stdout)
    assert "--default-task-queue-url" in puff("serve", "--help", cwd=tmp_path).stdout
    done = puff("--version", cwd=tmp_path)
    assert re.fullmatch(r"puff \d\S+\n", done.stdout)


def test_wait_forever_waits_until_sigterm(tmp_path: Path) -> None:
    (tmp_path / "puff.toml").write_text("asyncio = true\n[[task_queue]]\nenable = true\n")
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "puff_patch.cli", "wait_forever"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("PUFF_")},
    )
    assert process.stdout is not None
    try:
        assert "is waiting" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert error == (
        "puff: puff.toml, line 2: tasks are run by a later version; the queue 'default' has no worker here\n"
    )


def test_pytest_runs_patched_in_the_folder_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "puff.toml").write_text('pytest = true\npytest_path = "checks"\n')
    (tmp_path / "checks").mkdir()
    (tmp_path / "my_library.py").write_text("answer = 42\n")
    (tmp_path / "checks" / "test_it.py").write_text(
        "import my_library, os, time\n"
        "def test_it():\n"
        "    assert time.sleep.__module__.startswith('gevent') and my_library.answer == 42\n"
        "    assert os.environ['PUFF_DEFAULT_REDIS_URL'] == 'redis://said'\n"
        "def test_wrong():\n    assert False\n"
    )
    redis = "PUFF_DEFAULT_REDIS_URL"
    done = puff(
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:asyncio",
        "-k",
        "test_it",
        cwd=tmp_path,
        **{redis: "redis://said"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert puff("pytest", "--version", cwd=tmp_path).stdout.startswith("pytest ")


def test_new_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "app.py").write_text("mine")
    told = complaints(
        *[("new", "taken"), ("new", "taken/app.py"), ("new", "3", "--django"), ("new", "json", "--django")],
        cwd=tmp_path,
    )
    assert "not empty; nothing was written" in next(told)
    assert "is no folder" in next(told)
    assert "makes no name of a package" in next(told)
    assert "would hide" in next(told)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "app.py"]
    assert (tmp_path / "taken" / "app.py").read_text() == "mine"


@pytest.mark.services
def test_doctor(tmp_path: Path, services: Any) -> None:
    assert puff("new", "fine", cwd=tmp_path).returncode == 0
    with (tmp_path / "fine" / "puff.toml").open("a") as file:
        file.write("[[postgres]]\n[[redis]]\n[[pubsub]]\n")
    done = puff("doctor", cwd=tmp_path / "fine", **services.env())
    assert done.returncode == 0, done.stdout
    assert re.search(r"ok +postgres 'default' at \S+: PostgreSQL \d+", done.stdout)
    assert re.search(r"ok +pubsub 'default' at \S+: Redis \d+", done.stdout)
    assert "nothing to fix" in done.stdout
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "puff.toml").write_text('wsgi = "nowhere.app"\n[[postgres]]\nname = "audit"\n')
    nobody = "postgres://me:hush@127.0.0.1:1/x"
    done = puff("doctor", "--json", cwd=wrong, PUFF_AUDIT_POSTGRES_URL=nobody, PUFF_WSGY="x")
    assert done.returncode == 1
    assert "hush" not in done.stdout
    found = {(each["about"], each["level"]): each for each in json.loads(done.stdout) if each["level"] != "ok"}
    assert found["Program", "bad"]["text"].startswith("puff.toml, line 1: wsgi names 'nowhere.app', but")
    assert "postgres 'audit' at postgres://me:***@127.0.0.1:1/x: " in found["Services", "bad"]["text"]
    assert "PUFF_AUDIT_POSTGRES_URL" in found["Services", "bad"]["fix"]
    assert found["Configuration", "warn"]["text"].endswith("PUFF_WSGY; did you mean 'PUFF_WSGI'?")
