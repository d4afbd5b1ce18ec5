"""A small project's own tests under ``manage.py test``: worker processes, cloned databases, a live server."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from support.process import run

FOLDER = Path(__file__).parent


@pytest.mark.parametrize(
    ("engine", "driver", "start_method"),
    [("django.db.backends.postgresql", "psycopg2", "fork"), ("django_backend.postgresql", "psycopg", "spawn")],
)
def test_manage_py_test(engine: str, driver: str, start_method: str, services: Any) -> None:
    environment = {
        **services.env(),
        "PYTHONPATH": str(FOLDER),
        "ENGINE": engine,
        "DRIVER": driver,
        "START_METHOD": start_method,
        "TAG": f"puff_test_{uuid.uuid4().hex[:12]}",
        # Fewer leases than the live server has threads.
        "PUFF_POSTGRES_POOL_MAX_SIZE": "5",
    }
    done = run(
        ["manage.py", "test", "--parallel", "2", "--noinput"],
        env=environment,
        cwd=FOLDER / "project",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Ran 10 tests" in done.stderr
    assert "OK" in done.stderr
