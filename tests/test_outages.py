"""PostgreSQL and Redis are killed under load: clear 500s meanwhile, and all is well again within two seconds."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from puff_patch import embedded

SAMPLE = Path(__file__).resolve().parent.parent / "sample_django_project"
PAGE = "/bench/mixed/"
CLIENTS = 16
POOL = 4
# The longest a request may take: a redis-py retry, a connect, and this machine's other work.
HANG = 10.0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path, Path]]:
    """The sample project on servers of its own: port, data directory, log."""
    folder = tmp_path_factory.mktemp("outage")
    data, log = folder / "data", folder / "server.log"
    services = embedded.ensure(data)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PUFF_", "DJANGO_"))}
    environment = {
        **clean,
        "PUFF_DEFAULT_POSTGRES_URL": services.postgres_url,
        "PUFF_DEFAULT_REDIS_URL": services.redis_url,
        "PUFF_POSTGRES_POOL_MAX_SIZE": str(POOL),
        "DJANGO_DEBUG": "0",
        "DJANGO_SECRET_KEY": "only-for-this-test",
        "DJANGO_ALLOWED_HOSTS": "127.0.0.1",
        "SAMPLE_BENCH": "1",
    }
    for command in (["migrate", "--verbosity", "0"], ["seed", "--questions", "1"]):
        subprocess.run(
            [sys.executable, "manage.py", *command], cwd=SAMPLE, env=environment, check=True, timeout=60
        )
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [sys.executable, "manage.py", "runpuff", "127.0.0.1:0"],
            cwd=SAMPLE,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert server.stdout is not None
    try:
        port = next(int(found[1]) for line in server.stdout if (found := re.search(r"http://[\d.]+:(\d+)", line)))
        yield port, data, log
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        server.stdout.close()
        services.stop()


class Load:
    """Clients that ask for a page without pause, and note each answer and how long it took."""

    def __init__(self, port: int) -> None:
        self.answers: list[tuple[float, int, float]] = []  # when it came, status, seconds it took
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(port,)) for _ in range(CLIENTS)]

    def _run(self, port: int) -> None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2 * HANG)
            while not self._stop.is_set():
                started = time.monotonic()
                connection.request("GET", PAGE)
                response = connection.getresponse()
                response.read()
                now = time.monotonic()
                self.answers.append((now, response.status, now - started))
            connection.close()
        except BaseException as error:
            self._failures.append(error)
            raise

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(3 * HANG)
        assert not self._failures
        assert not any(thread.is_alive() for thread in self._threads)

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> float:
        """Wait until the condition holds; return how long that took."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < seconds, "it did not happen in time"
            time.sleep(0.01)
        return time.monotonic() - started

    def statuses(self, since: float) -> list[int]:
        """What has been answered from a moment on."""
        return [status for when, status, _ in self.answers if when >= since]


@pytest.mark.services
@pytest.mark.parametrize("service", ["postgres", "redis"])
def test_a_killed_server_costs_requests_only_while_it_is_down(site, service):
    port, data, log = site
    with Load(port) as load:
        load.wait_for(lambda: load.statuses(0).count(200) > CLIENTS, 20)
        before = embedded.status(data)
        pid = getattr(before, f"{service}_pid")
        assert pid is not None
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)

        def is_back() -> bool:
            found = embedded.status(data)
            return found.state == "ready" and getattr(found, f"{service}_pid") not in (None, pid)

        load.wait_for(is_back, 20)
        back = time.monotonic()
        # From two seconds after the server's return on, every single request succeeds again.
        load.wait_for(lambda: time.monotonic() > back + 2, 5)
        well = time.monotonic()
        load.wait_for(lambda: len(load.statuses(well)) > 10 * CLIENTS, 20)
        assert set(load.statuses(well)) == {200}
    down = set(load.statuses(killed))
    assert down <= {200, 500}, "a request that fails is answered with a 500, and none is dropped"
    if service == "postgres":
        assert 500 in down
        assert re.search("cannot reach PostgreSQL|closed the connection|terminating|starting up", log.read_text())
    assert max(seconds for _, _, seconds in load.answers) < HANG


@pytest.mark.services
def test_afterwards_the_pool_is_whole_and_within_its_size(site):
    import psycopg2

    port, data, _ = site
    with Load(port) as load:
        load.wait_for(lambda: load.statuses(0).count(200) > 10 * CLIENTS, 20)
        url = embedded.status(data).postgres_url
        connection = psycopg2.connect(url, application_name="watcher")
        try:
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT count(*) FROM pg_stat_activity "
                    "WHERE backend_type = 'client backend' AND application_name <> 'watcher'"
                )
                assert cursor.fetchone() == (POOL,)
        finally:
            connection.close()
    assert {status for _, status, _ in load.answers} == {200}
