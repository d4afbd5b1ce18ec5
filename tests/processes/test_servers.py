"""Servers and runners that fork or patch by themselves: every process has pools of its own."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def environment(services: Any, http_server: Any) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PUFF_", "PG"))}
    return {**own, **services.env(), "TEST_HTTP_URL": http_server.url, "PYTHONPATH": str(HERE)}


def share_nothing(uses: list[Any]) -> bool:
    owners: dict[Any, int] = {}
    for process, backends, session in uses:
        for key in [*(("postgres", each) for each in backends), ("redis", session)]:
            if owners.setdefault(key, process) != process:
                return False
    return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that must end by itself when it is told to."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield process
            process.terminate()
            process.wait(20)
        except BaseException:
            print(log.read_text())
            raise
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def get(port: int, patience: float = 0) -> Any:
    deadline = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as response:
                return json.load(response)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def load(port: int) -> list[Any]:
    get(port, 20)
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        return [use for answer in executor.map(lambda _: get(port), range(40)) for use in answer]


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_gunicorn_with_preload_and_a_reload(worker: str, environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("gunicorn")
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "-k", worker, "--threads", "4", "-w", "2", "--preload"]
    command += ["-b", f"127.0.0.1:{port}", "--graceful-timeout", "5", "application:application"]
    with running(command, environment, tmp_path / "log") as master:
        uses = load(port)
        before = {process for process, *_ in uses}
        master.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while get(port, 20)[1][0] in before:
            assert time.monotonic() < deadline, "new workers take over"
            time.sleep(0.05)
        uses += load(port)
    assert len({process for process, *_ in uses}) >= 4, "the master, two workers, two new ones"
    assert share_nothing(uses)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_celery_with_gevent(environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("celery")
    environment["TEST_CELERY"] = f"queue-{uuid.uuid4().hex[:8]}"
    command = [sys.executable, "-m", "celery", "-A", "application:celery", "worker", "-P", "gevent", "-c", "20"]
    ask = """
        import json, application
        results = [application.use_task.delay() for _ in range(30)]
        print(json.dumps([application.BEFORE, *[result.get(timeout=30) for result in results]]), flush=True)
    """
    with running([*command, "-l", "WARNING"], environment, tmp_path / "log"):
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(map(str.strip, ask.splitlines()))],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=60,
            check=True,
        )
    uses = json.loads(done.stdout)
    assert len(uses) == 31
    assert len({process for process, *_ in uses}) == 2
    assert share_nothing(uses)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_pytest_xdist(environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text("import puff_patch\npuff_patch.patch_all()\n")
    (tmp_path / "test_it.py").write_text(
        "import json, pathlib, pytest\nfrom worker import use\n"
        "@pytest.mark.parametrize('number', range(20))\n"
        "def test_use(number):\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'use-{{number}}').write_text(json.dumps(use()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "--basetemp", str(tmp_path / "base"), str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    uses = [json.loads(path.read_text()) for path in tmp_path.glob("use-*")]
    assert len(uses) == 20
    assert len({process for process, *_ in uses}) == 2
    assert share_nothing(uses)
