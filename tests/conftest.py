"""Fixtures that all tests share.  A folder's own conftest.py may add to them."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.servers import CountingHTTPServer


@dataclass(frozen=True)
class Urls:
    """Where the PostgreSQL and the Redis of this test run are."""

    postgres: str
    redis: str

    def env(self) -> dict[str, str]:
        """For `support.process.run_python`."""
        return {"PUFF_DEFAULT_POSTGRES_URL": self.postgres, "PUFF_DEFAULT_REDIS_URL": self.redis}


@pytest.fixture(scope="session")
def services() -> Iterator[Urls]:
    """A PostgreSQL and a Redis: those named in the environment, else embedded ones of this test run."""
    postgres, redis = os.environ.get("PUFF_TEST_POSTGRES_URL"), os.environ.get("PUFF_TEST_REDIS_URL")
    if postgres and redis:
        yield Urls(postgres, redis)
        return
    from puff_patch import embedded

    # Not in pytest's own folder: each run of pytest closes that one to all but its user, also while another runs.
    with tempfile.TemporaryDirectory(prefix="puff-test-") as folder:
        started = embedded.ensure(Path(folder))
        yield Urls(postgres or started.postgres_url, redis or started.redis_url)
        started.stop()
        embedded.stop(Path(folder))


@pytest.fixture(scope="session")
def postgres_url(services: Urls) -> str:
    return services.postgres


@pytest.fixture(scope="session")
def redis_url(services: Urls) -> str:
    return services.redis


@pytest.fixture
def http_server() -> Iterator[CountingHTTPServer]:
    """A local HTTP server that counts connections."""
    server = CountingHTTPServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join(10)
