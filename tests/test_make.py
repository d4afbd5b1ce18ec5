"""`make demo` serves a page that a newcomer sees, twice in a row, and ends cleanly."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def make(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Run make with the virtual environment of this very test run, so that nothing is installed."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PUFF_", "MAKE", "MFLAGS"))}
    return subprocess.Popen(
        ["make", f"VENV={sys.prefix}", f"--assume-old={sys.prefix}/.puff-installed", *arguments],
        cwd=ROOT,
        env={**environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def interrupt(process: subprocess.Popen[str]) -> None:
    """What Ctrl-C in a terminal does."""
    os.killpg(process.pid, signal.SIGINT)


def terminate(process: subprocess.Popen[str]) -> None:
    """What `kill` and systemd do, to make alone; the server must not stay behind."""
    process.terminate()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo_serves_the_sample_twice(tmp_path):
    for stop in (interrupt, terminate):
        process = make("demo", "ADDR=127.0.0.1:0", PUFF_DATA_DIR=str(tmp_path / "data"))
        assert process.stdout is not None
        try:
            seen = []
            for line in process.stdout:
                seen.append(line)
                if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            else:
                pytest.fail("make demo ended: " + "".join(seen))
            with urllib.request.urlopen(address[0], timeout=30) as response:
                page = response.read().decode()
            assert response.status == 200
            assert "<h1" in page
            stop(process)
            process.communicate(timeout=30)  # until the server, too, has ended
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_plainly_what_is_missing(tmp_path):
    process = make("install", "PYTHON=python3.1999", f"VENV={tmp_path / 'venv'}")
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "there is no python3.1999" in output
