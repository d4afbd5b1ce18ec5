"""The pytest plugin: projects of a few lines, each under a pytest of its own."""

from __future__ import annotations

import re
import textwrap
import uuid
from pathlib import Path
from typing import Any

import pytest
from support.process import run

# Our own settings must not reach the inner pytest.
PLAIN = {"PYTEST_ADDOPTS": None, "PYTEST_PLUGINS": None}
PLUGIN = ("-p", "puff_patch.pytest_plugin")


class Project:
    """A folder with tests in it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.write("pytest.ini", "[pytest]\naddopts = -p puff_patch.pytest_plugin\nfilterwarnings = error\n")

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def pytest(self, *arguments: str, exit_code: int = 0, **environment: str) -> tuple[dict[str, int], str]:
        """How many tests ended how, and all of the output."""
        base = ["-p", "no:cacheprovider", "-p", "no:asyncio", "-p", "no:django"]
        done = run(
            ["-m", "pytest", *base, f"--basetemp={self.folder / 'tmp'}", "-q", *arguments],
            env={**self.environment, "COLUMNS": "150", **environment},
            cwd=self.folder,
            timeout=60,
        )
        output = done.stdout + done.stderr
        assert done.returncode == exit_code, output
        return {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|error)s?", output)}, output


@pytest.fixture
def project(tmp_path: Path, services: Any) -> Project:
    return Project(tmp_path / "project", services.env())


BASICS = """\
    import asyncio
    import contextvars
    import time

    import gevent
    import pytest
    import requests

    who = contextvars.ContextVar("who", default="nobody")

    @pytest.fixture(scope="session")
    async def loop():
        return asyncio.get_running_loop()

    @pytest.fixture
    async def ticks(loop):
        who.set("the fixture")
        seen = []

        async def tick():
            while True:
                seen.append(1)
                await asyncio.sleep(0.001)

        task = asyncio.create_task(tick())
        yield seen
        task.cancel()

    class TestOneByOne:
        @pytest.fixture
        async def me(self):
            return self

        async def test_loops_and_fixtures(self, me, loop, ticks):
            assert me is self
            assert loop is asyncio.get_running_loop()
            assert who.get() == "the fixture"
            before = len(ticks)
            for _ in range(100):
                await asyncio.to_thread(time.sleep, 0.01)
                if len(ticks) > before:
                    return
            pytest.fail("the fixture's task did not go on")

    def test_sleeps_at_once():
        started = time.monotonic()
        gevent.joinall([gevent.spawn(time.sleep, 0.1) for _ in range(50)], raise_error=True)
        assert time.monotonic() - started < 2

    def test_server(puff_server):
        greeting = ["hello"]
        def app(environ, start_response):
            time.sleep(0.05)
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [greeting[0].encode(), environ["PATH_INFO"].encode()]
        url = puff_server(app)
        other = puff_server(app)
        assert other != url
        greeting[0] = "bye"
        calls = [gevent.spawn(requests.get, f"{url}/{n}", timeout=10) for n in range(20)]
        gevent.joinall(calls, raise_error=True)
        assert [call.value.text for call in calls] == [f"bye/{n}" for n in range(20)]

    def test_services(puff_services):
        import psycopg2, redis
        with psycopg2.connect(puff_services.postgres_url) as connection:
            connection.cursor().execute("SELECT 1")
        assert redis.Redis.from_url(puff_services.redis_url).ping()
        connection.close()
"""


def test_tests_run_patched_in_one_process_and_in_the_workers_of_xdist(project: Project) -> None:
    # What a conftest imports must be patched by then.
    project.write(
        "conftest.py",
        """\
        from time import sleep
        assert sleep.__module__.startswith("gevent")
        """,
    )
    project.write("test_basics.py", BASICS)
    assert project.pytest()[0] == {"passed": 4}
    assert project.pytest("-n2", "--puff-timeout=30")[0] == {"passed": 4}


def test_a_hanging_test_fails_and_shows_every_stack(project: Project) -> None:
    project.write(
        "test_hangs.py",
        """\
        import asyncio
        import gevent
        import pytest
        from gevent.monkey import get_original

        def waits_in_a_greenlet():
            gevent.sleep(20)

        def test_waits():
            waiting = gevent.spawn(waits_in_a_greenlet)
            try:
                waiting.join()
            finally:
                waiting.kill()

        async def never():
            await asyncio.Event().wait()

        async def test_awaits():
            await never()

        def blocks_the_hub():
            get_original("time", "sleep")(20)

        def test_blocked_by_itself():
            blocks_the_hub()

        def test_blocked_by_another():
            gevent.spawn(blocks_the_hub).join()

        @pytest.fixture
        def slow_to_end():
            yield
            gevent.sleep(20)

        def test_hangs_at_its_end(slow_to_end):
            pass

        @pytest.mark.puff_timeout(0)
        def test_that_may_take_long():
            gevent.sleep(0.6)

        def test_goes_on():
            gevent.sleep(0.01)
        """,
    )
    counts, output = project.pytest("--puff-timeout=0.4", exit_code=1)
    assert counts == {"failed": 4, "passed": 3, "error": 1}, output
    assert output.count("it took more than 0.4 s") >= 5
    assert "INTERNALERROR" not in output
    assert "gevent.sleep(20)" in output
    assert "await asyncio.Event().wait()" in output
    assert "waiting.join()" in output
    assert re.search(r"^the test(, which is running)?:", output, re.MULTILINE)
    # pytest-timeout's settings come to the same.
    counts, output = project.pytest("--timeout=0.4", "-k", "test_waits or test_goes_on", exit_code=1)
    assert counts == {"failed": 1, "passed": 1}, output
    assert "gevent.sleep(20)" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "early"), "early.sleep (was time.sleep)"),
        (("--puff-timeout=-1",), "it takes a number of seconds"),
        ((), "test_nothing.py::test_wrong_limit: puff_timeout: it takes a number of seconds"),
    ],
)
def test_what_is_wrong_is_said_plainly(project: Project, arguments: tuple[str, ...], message: str) -> None:
    project.write("early.py", "from time import sleep\n")
    project.write("pytest.ini", "[pytest]\n")
    project.write(
        "test_nothing.py", "import pytest\n@pytest.mark.puff_timeout('never')\ndef test_wrong_limit(): pass\n"
    )
    _, output = project.pytest(*arguments, *PLUGIN, exit_code=4, PYTHONPATH=".")
    assert message in output
    assert "INTERNALERROR" not in output
    assert "Traceback" not in output


def test_leaks_are_told_on_option(project: Project) -> None:
    project.write(
        "test_leaks.py",
        """\
        import gevent, psycopg2
        from gevent.event import Event

        kept, connected, done = [], Event(), Event()

        def holds_a_connection(url):
            kept.append(psycopg2.connect(url))
            connected.set()
            done.wait()

        def test_leaks(puff_services):
            gevent.spawn(holds_a_connection, puff_services.postgres_url)
            assert connected.wait(10)

        def test_leaves_nothing():
            gevent.spawn(gevent.sleep, 0.05)

        def test_cleans_up():
            done.set()
            kept[0].close()
        """,
    )
    assert project.pytest()[0] == {"passed": 3}
    counts, output = project.pytest("--puff-leaks", exit_code=1)
    assert counts == {"passed": 3, "error": 1}, output
    assert re.search(r"test_leaks.py:\d+ in holds_a_connection", output)
    assert "leases of postgres://" in output


def test_other_plugins_for_async_tests_keep_theirs(project: Project) -> None:
    project.write(
        "pytest.ini",
        """\
        [pytest]
        addopts = -p puff_patch.pytest_plugin
        filterwarnings = error
        asyncio_default_fixture_loop_scope = function
        """,
    )
    project.write(
        "test_async.py",
        """\
        import asyncio
        import time
        import threading
        import gevent
        import pytest
        import pytest_asyncio
        from gevent.monkey import get_original

        native_ident = get_original("_thread", "get_ident")
        home = native_ident()

        @pytest_asyncio.fixture
        async def theirs():
            return native_ident()

        @pytest.mark.asyncio
        async def test_pytest_asyncio(theirs):
            assert theirs == native_ident() == home
            ticks = []
            def tick():
                while True:
                    gevent.sleep(0.001)
                    ticks.append(1)
            ticker = gevent.spawn(tick)
            for _ in range(1000):
                if len(ticks) < 5:
                    await asyncio.sleep(0.01)
            assert len(ticks) >= 5
            ticker.kill()

        @pytest.mark.anyio
        async def test_anyio(anyio_backend):
            assert anyio_backend == "asyncio"
            assert native_ident() == home

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.fixture
        async def ours():
            return native_ident()

        async def test_ours(ours):
            assert ours == native_ident() != home
        """,
    )
    # The last word counts: what switches them off in Project.pytest is taken back.
    assert project.pytest("-p", "pytest_asyncio.plugin")[0] == {"passed": 3}


DJANGO_TESTS = """\
    import time
    from urllib.request import urlopen

    import gevent
    import pytest
    from asgiref.sync import sync_to_async
    from django.db import connection, connections, transaction
    from shop.models import Item, Receipt

    import puff_patch

    def session():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return cursor.fetchone()[0]

    @pytest.fixture
    def pen(db):
        return Item.objects.create(name="pen", stock=3), session()

    class TestTransactions:
        @pytest.mark.parametrize("time", [1, 2])
        def test_what_a_fixture_made_is_there_and_undone_later(self, time, pen):
            assert puff_patch.is_patched("sockets")
            assert Item.objects.count() == 1
            gevent.sleep(0.01)
            assert session() == pen[1]
            assert connection.in_atomic_block

        async def test_async_code_is_in_the_same_transaction(self, pen):
            assert await Item.objects.acount() == 1
            await Item.objects.acreate(name="cup")
            assert await sync_to_async(session)() == pen[1]

        def test_that_is_undone(self, db, client):
            assert not Item.objects.exists()
            Item.objects.create(name="pen", stock=3)
            assert client.get("/buy/pen/").content == b"2"
            assert not Receipt.objects.exists()

    @pytest.mark.django_db(transaction=True)
    def test_live_server(live_server):
        Item.objects.create(name="pen", stock=100)
        mine = session()

        def buy():
            with urlopen(f"{live_server.url}/buy/pen/", timeout=10) as response:
                return response.status

        def others():
            try:
                return session()
            finally:
                connection.close()

        calls = [gevent.spawn(buy) for _ in range(20)]
        other = gevent.spawn(others)
        gevent.joinall([*calls, other], raise_error=True)
        assert Item.objects.get().stock == 80
        assert session() == mine != other.value

    @pytest.mark.django_db(transaction=True)
    def test_puff_server(puff_server, settings):
        from django.core.wsgi import get_wsgi_application

        Item.objects.create(name="pen", stock=3)
        with urlopen(f"{puff_server(get_wsgi_application())}/buy/pen/", timeout=10) as response:
            assert response.read() == b"2"
        assert Item.objects.get().stock == 2
"""


def test_pytest_django(project: Project) -> None:
    backend = Path(__file__).parent / "django_backend"
    project.write(
        "pytest.ini",
        """\
        [pytest]
        addopts = -p puff_patch.pytest_plugin
        filterwarnings = error
        DJANGO_SETTINGS_MODULE = test_settings
        pythonpath = .
        """,
    )
    project.write(
        "test_settings.py",
        """\
        import sys
        sys.modules["psycopg"] = None  # Django prefers it, if it can be imported
        from shop.settings import *
        DATABASES = {"default": {**DATABASES["default"], "TEST": {"NAME": TAG}}}
        DATABASE_ROUTERS = []
        """,
    )
    project.write("test_shop.py", DJANGO_TESTS)
    counts, output = project.pytest(
        *("-p", "pytest_django.plugin", "--puff-leaks", "--puff-timeout=30"),
        ENGINE="django_backend.postgresql",
        TAG=f"puff_test_{uuid.uuid4().hex[:12]}",
        PYTHONPATH=f"{backend}:{backend / 'project'}",
    )
    assert counts == {"passed": 6}, output
