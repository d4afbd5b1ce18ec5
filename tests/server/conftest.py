"""Fixtures: servers of the sample application."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, StartServer, sample_command


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The sample application, for tests that leave the server as it was."""
    process = ServerProcess(sample_command(), tmp_path_factory.mktemp("server") / "stderr")
    yield process
    assert process.stop() == 0, process.output()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers of the test's own: keyword arguments are fields of ServerOptions."""
    started: list[ServerProcess] = []

    def start(
        command: list[str] | None = None, env: dict[str, str] | None = None, **options: Any
    ) -> ServerProcess:
        log = tmp_path / f"stderr-{len(started)}"
        started.append(ServerProcess(command or sample_command(**options), log, env))
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.fixture(scope="module")
def start_module_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Like ``start_server``, for servers that all tests of a module share; they must end without an error."""
    started: list[ServerProcess] = []

    def start(env: dict[str, str] | None = None, **options: Any) -> ServerProcess:
        log = tmp_path_factory.mktemp("server") / "stderr"
        started.append(ServerProcess(sample_command(**options), log, env))
        return started[-1]

    yield start
    for process in started:
        assert process.stop() == 0, process.output()
