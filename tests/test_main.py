"""``python -m puff_patch``."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support.process import run

TELL = """
import json, sys, time
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__,
    "patched": time.sleep.__module__.startswith("gevent"),
}))
"""


def told(done: Any) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "tell.py").write_text(TELL)
    (tmp_path / "tell_module.py").write_text(TELL)
    return tmp_path


def test_a_script_runs_as_python_would_run_it_but_patched(folder: Path) -> None:
    arguments = ["scripts/tell.py", "--flag", "-m", "x", "--embedded"]
    plain = told(run(arguments, cwd=folder))
    ours = told(run(["-m", "puff_patch", *arguments], cwd=folder))
    # runpy leaves the name of the script as it was given
    assert ours == {**plain, "patched": True, "file": "scripts/tell.py"}
    assert ours["path"] == str(folder / "scripts")


@pytest.mark.parametrize("option", [["-m", "tell_module"], ["-mtell_module"]])
def test_a_module_runs_as_python_would_run_it_but_patched(folder: Path, option: list[str]) -> None:
    plain = told(run([*option, "a", "-h"], cwd=folder))
    assert told(run(["-m", "puff_patch", *option, "a", "-h"], cwd=folder)) == {**plain, "patched": True}


@pytest.mark.parametrize(
    ("body", "exit_code", "stderr"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("import sys; sys.exit('no luck')", 1, "no luck"),
        ("raise LookupError('lost')", 1, "LookupError: lost"),
        ("import threading; threading.Thread(target=print).start()", 0, ""),
    ],
)
def test_the_exit_code_is_the_scripts(tmp_path: Path, body: str, exit_code: int, stderr: str) -> None:
    (tmp_path / "script.py").write_text(body)
    done = run(["-m", "puff_patch", "script.py"], cwd=tmp_path)
    assert done.returncode == exit_code
    assert stderr in done.stderr
    assert bool(stderr) == bool(done.stderr), done.stderr


def test_a_script_with_clients_needs_no_change(tmp_path: Path, services) -> None:
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import os, threading, psycopg2, redis
        url = os.environ["PUFF_DEFAULT_POSTGRES_URL"]
        pids = set()
        def ask():
            assert redis.Redis.from_url(os.environ["PUFF_DEFAULT_REDIS_URL"]).ping()
            connection = psycopg2.connect(url)
            with connection, connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid(), pg_sleep(0.002)")
                pids.add(cursor.fetchone()[0])
            connection.close()
        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(len(pids))
        """)
    )
    done = run(
        ["-m", "puff_patch", "script.py"],
        cwd=tmp_path,
        env={**services.env(), "PUFF_POSTGRES_POOL_MAX_SIZE": "3"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert 1 <= int(done.stdout) <= 3


@pytest.mark.parametrize(
    ("arguments", "stderr"),
    [
        (["no_such.py"], "no_such.py"),
        (["-m", "no_such_module"], "No module named"),
        ([], "name a script to run, or a module after -m"),
        (["-m"], "usage: python -m puff_patch"),
        (["--no-such-option", "script.py"], "--no-such-option"),
    ],
)
def test_mistakes_are_told_without_a_traceback(tmp_path: Path, arguments: list[str], stderr: str) -> None:
    done = run(["-m", "puff_patch", *arguments], cwd=tmp_path)
    assert done.returncode != 0
    assert stderr in done.stderr
    assert "Traceback" not in done.stderr


def test_help(tmp_path: Path) -> None:
    done = run(["-m", "puff_patch", "--help"], cwd=tmp_path)
    assert done.returncode == 0
    assert "SCRIPT" in done.stdout
    assert sys.executable not in done.stdout
