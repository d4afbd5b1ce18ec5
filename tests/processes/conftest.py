"""Running whole programs, which multiprocessing must be able to import."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.process import run

Program = Callable[..., str]


@pytest.fixture
def program(tmp_path: Path, services: Any, http_server: Any) -> Program:
    """Write a patched program, run it with warnings as errors, and return what it printed; it may say no more."""

    def run_program(code: str, *arguments: str, timeout: float = 60) -> str:
        script = tmp_path / "program.py"
        script.write_text("import puff_patch\npuff_patch.patch_all()\n" + textwrap.dedent(code))
        done = run(
            [str(script), *arguments],
            env={**services.env(), "TEST_HTTP_URL": http_server.url, "PYTHONPATH": str(Path(__file__).parent)},
            timeout=timeout,
        )
        told = f"exit code {done.returncode}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
        assert done.returncode == 0, told
        assert not done.stderr, told
        return done.stdout

    return run_program
