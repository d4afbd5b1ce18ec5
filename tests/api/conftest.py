"""Fixtures: this project's own server, to be talked to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

APP = Path(__file__).with_name("http_app.py")
READY = "puff_patch is listening on "


class App:
    """The server of http_app.py."""

    def __init__(self, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(APP), str(port)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(READY), line
        self.url = line.removeprefix(READY).strip()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(20) == 0
        self._close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)
        self._close()

    def _close(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="session")
def http_app() -> Iterator[App]:
    app = App()
    yield app
    app.stop()
