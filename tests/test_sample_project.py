"""The sample project: its own tests, its settings, and a crowd that votes over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest

SAMPLE = Path(__file__).resolve().parent.parent / "sample_django_project"
SERVICES = ("PUFF_DEFAULT_POSTGRES_URL", "PUFF_DEFAULT_REDIS_URL")
OURS = ("PUFF_", "DJANGO_", "SAMPLE_")


def environment(**variables: str) -> dict[str, str]:
    """The environment without what sets up Django and puff_patch, and with ``variables``."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {**clean, **variables}


def manage(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run manage.py of the sample to its end, warnings being errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "manage.py", *arguments],
        cwd=SAMPLE,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PostgreSQL and Redis for these tests alone."""
    return {"PUFF_EMBEDDED": "1", "PUFF_DATA_DIR": str(tmp_path_factory.mktemp("services"))}


@pytest.fixture
def services(request: pytest.FixtureRequest) -> dict[str, str]:
    """The servers that the environment names, or else the embedded ones."""
    named = {name: os.environ[name] for name in SERVICES if os.environ.get(name)}
    return named if len(named) == len(SERVICES) else request.getfixturevalue("embedded")


@pytest.mark.services
def test_its_own_tests_pass(services):
    done = manage("test", "--noinput", **services)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^Ran [1-9]\d* tests", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.services
def test_its_migrations_are_complete(services):
    done = manage("makemigrations", "--check", "--dry-run", **services)
    assert done.returncode == 0, done.stdout


def test_it_does_not_run_in_production_with_the_development_key():
    done = manage("check", DJANGO_DEBUG="0")
    assert done.returncode != 0
    assert "Set DJANGO_SECRET_KEY" in done.stdout


def test_it_is_fit_for_production():
    done = manage(
        "check",
        "--deploy",
        "--fail-level=WARNING",
        DJANGO_DEBUG="0",
        DJANGO_HTTPS="1",
        DJANGO_SECRET_KEY=secrets.token_urlsafe(50),
        DJANGO_ALLOWED_HOSTS="polls.example.org",
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("variables", "there"),
    [
        ({}, True),
        ({"SAMPLE_BENCH": "0"}, False),
        ({"DJANGO_DEBUG": "0", "DJANGO_SECRET_KEY": "x" * 50}, False),
        ({"DJANGO_DEBUG": "0", "DJANGO_SECRET_KEY": "x" * 50, "SAMPLE_BENCH": "1"}, True),
    ],
)
def test_the_urls_that_make_it_work_are_there_only_when_wanted(variables, there):
    code = "from django.urls import resolve, Resolver404; print(resolve('/bench/stream/').view_name)"
    done = manage("shell", "--no-imports", "--command", code, **variables)
    assert (done.returncode == 0) == there, done.stdout
    assert ("bench:stream" if there else "Resolver404") in done.stdout


def test_a_flag_that_is_neither_on_nor_off_is_refused():
    done = manage("check", DJANGO_DEBUG="maybe")
    assert "DJANGO_DEBUG takes 1 or 0, got 'maybe'" in done.stdout


def test_only_a_few_files_know_of_puff():
    knowing = {
        path.relative_to(SAMPLE).as_posix()
        for path in SAMPLE.rglob("*.py")
        if re.search(r"puff_patch|django_backend", path.read_text())
    }
    settings = {"manage.py", "mysite/wsgi.py", "mysite/settings.py"}
    shows_the_pools = {"polls/context_processors.py", "polls/tests.py"}
    assert knowing == settings | shows_the_pools


@contextmanager
def serving(**variables: str) -> Iterator[int]:
    """The sample behind runpuff, on a port of 127.0.0.1; ends it with SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "manage.py", "runpuff", "127.0.0.1:0"],
        cwd=SAMPLE,
        env=environment(**variables, PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    # It ends, and so does reading its output, whatever goes wrong.
    deadline = threading.Timer(120, process.kill)
    deadline.start()
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()))
    try:
        for line in process.stdout:
            output.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            pytest.fail("runpuff did not start:\n" + "".join(output))
        reader.start()
        yield int(found[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, "".join(output)
    finally:
        deadline.cancel()
        process.kill()
        process.wait(10)
        if reader.ident is not None:
            reader.join(10)
        process.stdout.close()


class Visitor:
    """One browser: keeps its connection and its cookies."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.cookies: dict[str, str] = {}

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def request(self, method: str, path: str, **form: str) -> tuple[int, str]:
        """Status and text of the answer."""
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}
        if method == "POST":
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            form["csrfmiddlewaretoken"] = self.cookies["csrftoken"]
        self.connection.request(method, path, urlencode(form) or None, headers)
        response = self.connection.getresponse()
        for cookie in response.headers.get_all("Set-Cookie", []):
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
        return response.status, response.read().decode()

    def vote(self, path: str) -> int:
        """Open the ballot and vote for its first choice; the status."""
        status, page = self.request("GET", path)
        assert status == 200, page
        choice = re.search(r'name="choice" value="(\d+)"', page)
        assert choice, page
        return self.request("POST", path, choice=choice[1])[0]


@pytest.mark.services
def test_a_crowd_votes_and_every_vote_counts(embedded):
    crowd = 60
    for command in (["migrate", "--verbosity=0"], ["seed"], ["seed"]):
        done = manage(*command, **embedded)
        assert done.returncode == 0, done.stdout

    with serving(**embedded) as port, Visitor(port) as visitor:
        status, page = visitor.request("GET", "/")
        assert status == 200
        path = re.search(r"/polls/\d+/", page)
        assert path, page
        stylesheet = re.search(r'href="(/static/[^"]+\.css)"', page)
        assert stylesheet, page
        assert visitor.request("GET", stylesheet[1])[0] == 200

        def total() -> int:
            return json.loads(visitor.request("GET", f"{path[0]}results.json")[1])["total"]

        def come_and_vote(_: int) -> int:
            with Visitor(port) as someone:
                return someone.vote(path[0])

        before = total()
        with ThreadPoolExecutor(crowd) as people:
            assert set(people.map(come_and_vote, range(crowd))) == {302}
        assert total() == before + crowd

        footer = re.search(r"PostgreSQL: \d+ of (\d+) connections in use", visitor.request("GET", "/")[1])
        assert footer
        assert int(footer[1]) < crowd
