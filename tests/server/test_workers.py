"""Several workers under a supervisor: kept up, replaced and stopped, and no request lost by it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from server_process import ServerProcess, StartServer, sample_command

from puff_patch.server import ServerError, ServerOptions, cpus, run
from puff_patch.server.watcher import watch

SOAK = Path(__file__).parent.parent / "soak" / "sigterm_soak.py"


def eventually(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait until ``condition()`` is true and return its value."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, f"not within {seconds:g} s"
        time.sleep(0.01)
    return value


def workers(server: ServerProcess) -> set[int]:
    """The processes below the supervisor that are alive."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    found = set()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
    return found


def serving(server: ServerProcess, number: int = 2) -> set[int]:
    """The workers that answer: ask until there are so many."""
    seen: set[int] = set()

    def ask() -> bool:
        seen.add(server.json("/own_pid"))
        return len(seen) >= number

    eventually(ask)
    return seen


def begin(server: ServerProcess, seconds: float) -> http.client.HTTPConnection:
    """Have a request that takes its time run in one of the workers."""
    connection = server.http()
    connection.request("GET", f"/nap?seconds={seconds:g}")
    time.sleep(0.1)
    return connection


def finish(connection: http.client.HTTPConnection) -> None:
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"slept")
    connection.close()


def are_gone(pids: set[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def test_all_serve_on_one_port_and_stop_together(start_server: StartServer, tmp_path: Path) -> None:
    systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    systemd.bind(str(tmp_path / "notify"))
    systemd.settimeout(5)
    server = start_server(workers=2, env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
    assert systemd.recv(100) == b"READY=1"
    pids = serving(server)
    assert pids == workers(server)
    assert server.json("/show_environ")["wsgi.multiprocess"] == "True"
    naps = [begin(server, 0.7) for _ in range(6)]
    began = time.monotonic()
    server.signal()
    for nap in naps:
        finish(nap)
    assert server.wait() == 0
    assert time.monotonic() - began < 5
    assert server.output().count("on_stop was called") == 2
    assert are_gone(pids)
    assert systemd.recv(100) == b"STOPPING=1"
    systemd.close()


def test_reloads_and_restarts_under_load_lose_nothing() -> None:
    """Four seconds of what ``tests/soak/sigterm_soak.py`` does for longer."""
    done = subprocess.run([sys.executable, str(SOAK), "4", "2"], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGHUP" in done.stdout


def test_reload_replaces_all_and_leaks_nothing(start_server: StartServer) -> None:
    server = start_server(workers=2)
    supervisor = psutil.Process(server.process.pid)
    before, descriptors = serving(server), supervisor.num_fds()
    kept = server.http()
    kept.request("GET", "/hello")
    kept.getresponse().read()
    for round_ in (1, 2):
        naps = [begin(server, 1.2) for _ in range(4)]
        server.signal(signal.SIGHUP)
        eventually(lambda: server.output().count("Stopping") == 2 * round_)  # noqa: B023
        # The old ones are still there, and take no new clients.
        assert {server.json("/own_pid") for _ in range(20)}.isdisjoint(before)
        for nap in naps:
            finish(nap)
        after = eventually(lambda: len(now := workers(server)) == 2 and not now & before and now)  # noqa: B023
        assert after == serving(server)
        before = after
    kept.close()
    eventually(lambda: supervisor.num_fds() == descriptors)
    assert len(supervisor.children()) == 2  # no zombies


def test_kept_connection_is_served_once_more_by_the_old_worker(start_server: StartServer) -> None:
    server = start_server(workers=2)
    kept = server.http()
    kept.request("GET", "/own_pid")
    old = json.loads(kept.getresponse().read())
    server.signal(signal.SIGHUP)
    eventually(lambda: server.output().count("Stopping") >= 1 and old not in serving(server), 15)
    with contextlib.suppress(http.client.RemoteDisconnected):
        kept.request("GET", "/own_pid")
        response = kept.getresponse()
        assert json.loads(response.read()) == old
        assert response.headers["Connection"] == "close"
    kept.close()


def test_killed_worker_is_replaced_within_a_second_and_the_other_serves_meanwhile(
    start_server: StartServer,
) -> None:
    server = start_server(workers=2)
    pids = serving(server)
    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    server.wait_for_output(f"(process {victim}) was killed by SIGKILL")
    replaced = eventually(lambda: len(now := workers(server)) == 2 and now)
    assert time.monotonic() - began < 1
    for _ in range(30):
        server.request("/hello")
    assert victim not in replaced
    assert serving(server) == replaced
    assert time.monotonic() - began < 5
    # Also of all at once.
    for pid in replaced:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not replaced & workers(server))
    assert server.request("/hello")[1] == b"hello\n"


def test_worker_that_is_told_to_end_is_replaced_first(start_server: StartServer) -> None:
    server = start_server(workers=2)
    pids = serving(server)
    victim = min(pids)
    os.kill(victim, signal.SIGTERM)
    eventually(lambda: victim not in workers(server))
    assert len(workers(server)) == 2
    assert "killed" not in server.output()


def test_worker_is_replaced_after_so_many_requests(start_server: StartServer) -> None:
    server = start_server(workers=1, max_requests=20, max_requests_jitter=2)
    (first,) = serving(server, 1)
    seen = {server.json("/own_pid") for _ in range(18)}
    assert seen == {first}
    eventually(lambda: server.json("/own_pid") != first)
    eventually(lambda: first not in workers(server))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_all_processes_ends_them_once(start_server: StartServer, signum: int) -> None:
    """Ctrl-C in a terminal; and what systemd does to a control group."""
    server = start_server([sys.executable, "-c", _NEW_GROUP, *sample_command(workers=2)])
    nap = begin(server, 0.5)
    os.killpg(server.process.pid, signum)
    finish(nap)
    assert server.wait() == 0
    assert "Traceback" not in server.output()
    assert server.output().count("on_stop was called") == 2


_NEW_GROUP = "import os, sys; os.setpgid(0, 0); os.execv(sys.argv[1], sys.argv[1:])"


def test_server_ends_with_its_terminal() -> None:
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, sample_command(workers=2))
    with open(terminal, "rb", buffering=0) as screen:
        shown = b""
        while b"listening on" not in shown:
            shown += screen.read(4096)
        pids = {child.pid for child in psutil.Process(pid).children()}
    assert len(pids) == 2
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert are_gone(pids)


def test_second_signal_cuts_running_requests(start_server: StartServer) -> None:
    server = start_server(workers=2)
    nap = begin(server, 30)
    server.signal()
    server.wait_for_output("Stopping")
    time.sleep(0.1)
    began = time.monotonic()
    server.signal()
    assert server.wait() == 1
    assert time.monotonic() - began < 5
    assert "a second signal came" in server.output()
    nap.close()


@pytest.mark.skipif("PUFF_SOAK_SECONDS" not in os.environ, reason="waits for long; PUFF_SOAK_SECONDS=1 runs it")
def test_worker_that_hangs_is_killed(start_server: StartServer) -> None:
    server = start_server(workers=2, graceful_timeout=0)
    pids = serving(server)
    os.kill(min(pids), signal.SIGSTOP)
    server.signal()
    assert server.wait(15) == 1
    assert "did not end in time" in server.output()
    assert are_gone(pids)


def test_workers_end_when_their_supervisor_is_killed(start_server: StartServer) -> None:
    server = start_server(workers=2)
    pids = serving(server)
    nap = begin(server, 0.6)
    server.signal(signal.SIGKILL)
    server.wait()
    finish(nap)
    eventually(lambda: are_gone(pids))
    with pytest.raises(OSError):
        server.connect(1)


def test_unix_socket(start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "puff.sock"
    server = start_server(workers=2, uds=str(path))

    def ask() -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(path))
            sock.sendall(b"GET /own_pid HTTP/1.1\r\nHost: h\r\n\r\n")
            return sock.recv(65536)

    before = workers(server)
    assert b"200 OK" in ask()
    server.signal(signal.SIGHUP)
    eventually(lambda: not before & workers(server))
    assert path.exists()
    assert b"200 OK" in ask()
    assert server.stop() == 0
    assert not path.exists()


def test_port_in_use_is_noticed_though_workers_share_one(start_server: StartServer) -> None:
    server = start_server(workers=2)
    for count in (1, 2):
        done = subprocess.run(
            sample_command(port=server.port, workers=count), capture_output=True, text=True, timeout=20
        )
        assert done.returncode == 1
        assert f"port {server.port} is in use" in done.stderr


APP = """\
import puff_patch
puff_patch.patch_all()
import json, logging, sys
from puff_patch.server import ServerError, ServerOptions, run

logging.basicConfig(level=logging.INFO)

def load():
    import content
    def application(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [content.TEXT]
    return application

if __name__ == "__main__":
    sys.exit(run(load, ServerOptions(port=0, **json.loads(sys.argv[1]))))
"""


class Program:
    """A program of two files in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "app.py").write_text(APP)
        self.write("TEXT = b'one'")

    def write(self, content: str) -> None:
        (self.folder / "content.py").write_text(content + "\n")

    def command(self, **options: Any) -> list[str]:
        return [sys.executable, "-W", "error", str(self.folder / "app.py"), json.dumps(options)]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    (tmp_path / "program").mkdir()
    return Program(tmp_path / "program")


def says(server: ServerProcess, text: bytes, seconds: float = 10) -> None:
    eventually(lambda: server.request("/")[1] == text, seconds)


def test_first_start_that_fails_ends_with_the_traceback(program: Program) -> None:
    program.write("import nothing_of_that_name")
    done = subprocess.run(program.command(workers=3), capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert done.stderr.count("No module named 'nothing_of_that_name'") == 1
    assert "ended with exit code 1 before it could serve" in done.stderr
    assert not done.stdout


def test_broken_program_does_not_replace_one_that_serves(start_server: StartServer, program: Program) -> None:
    server = start_server(program.command(workers=2, worker_start_timeout=1.5))
    says(server, b"one")
    program.write("syntax error")
    server.signal(signal.SIGHUP)
    server.wait_for_output("The old one serves on")
    says(server, b"one")
    # One that never gets ready.
    program.write("import time; time.sleep(60)")
    server.signal(signal.SIGHUP)
    server.wait_for_output("is not ready after 1.5 seconds")
    says(server, b"one")
    # A worker that dies now has no successor, until the program is mended; the other one serves.
    program.write("syntax error again")
    victim = min(workers(server))
    os.kill(victim, signal.SIGKILL)
    server.wait_for_output("the next try is in 0.5 s")
    assert {server.request("/")[1] for _ in range(20)} == {b"one"}
    program.write("TEXT = b'two'")
    eventually(lambda: len(workers(server)) == 2)
    eventually(lambda: server.output().count("is ready after") == 3)
    server.signal(signal.SIGHUP)
    eventually(lambda: {server.request("/")[1] for _ in range(5)} == {b"two"})


def test_reload_on_change(start_server: StartServer, program: Program) -> None:
    server = start_server(program.command(reload=True))
    says(server, b"one")
    began = time.monotonic()
    program.write("TEXT = b'two'")
    says(server, b"two", 5)
    assert time.monotonic() - began < 3
    program.write("syntax error")
    server.wait_for_output("The old one serves on")
    assert "SyntaxError" in server.output()
    assert server.request("/")[1] == b"two"
    program.write("TEXT = b'three'")
    says(server, b"three", 5)
    assert server.stop() == 0


def test_reload_without_watchfiles(start_server: StartServer, program: Program) -> None:
    (program.folder / "watchfiles.py").write_text("raise ImportError")
    server = start_server(program.command(reload=True))
    says(server, b"one")
    program.write("TEXT = b'two'")
    says(server, b"two", 5)


@pytest.mark.parametrize("installed", [True, False])
def test_what_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "watchfiles", None)
    ours = ["app.py", "puff.toml", ".env.local", "site/templates/mail.txt"]
    others = ["app.log", "data.txt", ".git/hook.py", "node_modules/a.py", "__pycache__/b.py"]
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    seen: set[str] = set()
    with watch([str(tmp_path)]) as watcher:
        time.sleep(0.1)  # what was written before is seen, if at all
        watcher.changes()
        for name in (*others, *ours):
            (tmp_path / name).write_text("changed")
        (tmp_path / "new.py").write_text("new")
        eventually(lambda: seen.update(watcher.changes()) or len(seen) >= len(ours) + 1)
        assert seen == {str(tmp_path / name) for name in (*ours, "new.py")}
        (tmp_path / "new.py").unlink()
        assert eventually(watcher.changes) == [str(tmp_path / "new.py")]
    with pytest.raises(ServerError, match="there is no such folder"), watch([str(tmp_path / "nowhere")]):
        pass


def test_reload_waits_for_a_program_that_can_be_started(program: Program, tmp_path: Path) -> None:
    program.write("syntax error")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(program.command(reload=True), stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        eventually(lambda: "Waiting for a change" in (tmp_path / "log").read_text())
        program.write("TEXT = b'one'")
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert "content.py changed, reloading" in lines[0]
        assert "is listening on" in lines[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_command_that_cannot_be_run() -> None:
    def load() -> Any:
        raise AssertionError("the supervisor does not load the application")

    with pytest.raises(ServerError, match="cannot start a worker with /no/such/python"):
        run(load, ServerOptions(port=0, workers=2), command=["/no/such/python", "app.py"])


def test_quota_of_a_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpus, "_CGROUPS", tmp_path)
    everything = cpus.usable_cpus()
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpus.usable_cpus() == everything
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cpus.usable_cpus() == 1
