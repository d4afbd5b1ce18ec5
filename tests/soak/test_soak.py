"""The soaks, shortened; `make soak` runs them in full length."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("PUFF_SOAK_SECONDS", 0))


def soak(script: str, *arguments: str, seconds: float, env: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3 * seconds + 120,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "redis", "requests"])
def test_a_pool_survives_kills_time_outs_and_ended_sessions(driver: str, services) -> None:
    seconds = SECONDS or 2
    greenlets = 10_000 if SECONDS else 500
    options = ("--seconds", str(seconds), "--greenlets", str(greenlets))
    soak("pool_soak.py", driver, *options, seconds=seconds, env=services.env())


@pytest.mark.skipif(not SECONDS, reason="make soak runs it")
@pytest.mark.parametrize("workers", [1, 3])
def test_a_server_that_is_restarted_loses_no_request(workers: int) -> None:
    soak("sigterm_soak.py", str(SECONDS), str(workers), seconds=SECONDS, env={})


def test_random_bytes_neither_hang_nor_fail_nor_grow_the_server() -> None:
    soak("front_soak.py", str(100_000 if SECONDS else 2000), seconds=200 if SECONDS else 30, env={})
