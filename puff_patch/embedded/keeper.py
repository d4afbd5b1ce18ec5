"""The keeper: the one process a data directory that starts its servers, watches them, and stops them.

It restarts a server that dies, and stops both once nobody has used them for two seconds (so that ``migrate &&
runpuff`` finds them running).  The kernel counts the users: each holds a shared ``flock`` on ``users.lock``, which
no death, ``kill -9`` included, can leave behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from puff_patch.embedded.account import Account, account_for, let_pass
from puff_patch.embedded.errors import EmbeddedError
from puff_patch.embedded.files import Files, Status
from puff_patch.embedded.locks import is_same_file, try_lock
from puff_patch.embedded.postgres import Postgres
from puff_patch.embedded.redis import Redis
from puff_patch.embedded.server import Server
from puff_patch.embedded.sockets import socket_dir

_log = logging.getLogger(__name__)

_GRACE = 2.0  # seconds without a user before the servers stop
_POLL = 0.1  # seconds between two looks of an idle keeper
_POLL_BUSY = 0.01  # the same, while a server is coming up
_STOP_PATIENCE = 20.0  # seconds a server may take to stop by itself


def keep(files: Files, *, detach: bool, report_fd: int | None) -> int:
    """Be the keeper, in a process that does nothing else, until nobody uses the servers.

    Args:
        files: the data directory.
        detach: go on as a daemon; the calling process ends.
        report_fd: a pipe to tell the starter, once, how it went; see `puff_patch.embedded.launch.start_keeper`.

    Returns:
        The exit code: 0 when it has done its work, or another keeper does it.

    Raises:
        EmbeddedError: the directory cannot be made.
    """
    # What the starter has open, and made inheritable, is not the keeper's to keep open.
    for fd in [int(name) for name in os.listdir("/dev/fd")]:
        if fd > 2 and fd != report_fd:
            with contextlib.suppress(OSError):  # the listing's own is in the list
                os.close(fd)
    if report_fd is not None:
        os.set_inheritable(report_fd, False)

    def report(message: str) -> None:
        nonlocal report_fd
        if report_fd is None:
            return
        # The user may have given up waiting, which is not the keeper's concern.
        with contextlib.suppress(BrokenPipeError):
            os.write(report_fd, message.encode())
        os.close(report_fd)
        report_fd = None

    if detach:
        # An orphan from the start: no child for its starter to reap, or to confuse it if it waits for any child.
        if os.fork() != 0:
            os._exit(0)
        os.setsid()
        # The starter has made the directory; if it is gone by now, so is the reason to be here.
    else:
        with files.errors():
            files.prepare()
    os.chdir("/")
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    return _Keeper(files, report).run()


class _Keeper:
    """Runs the servers of one data directory for as long as somebody uses them."""

    def __init__(self, files: Files, report: Callable[[str], None]) -> None:
        self.files = files
        self._report = report
        self._servers: list[Server] = []
        self._published: Status | None = None
        self._record_fd = -1
        self._sockets: Path | None = None
        self._stopping = False

    def run(self) -> int:
        """Be the keeper; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        try:
            with self.files.errors():
                keeper_lock = self.files.open(self.files.keeper_lock)
                # Looking whether it is locked locks it for an instant, hence a few tries.
                deadline = time.monotonic() + 0.3
                while not try_lock(keeper_lock, fcntl.LOCK_EX):
                    if time.monotonic() > deadline:
                        self._report("again")
                        return 0
                    time.sleep(_POLL_BUSY)
                os.truncate(keeper_lock, 0)
                os.write(keeper_lock, f"{os.getpid()} {time.time()}\n".encode())
                for path in (self.files.record, self.files.pin, self.files.stop_request):
                    path.unlink(missing_ok=True)
                _log.info("keeper of %s, pid %d", self.files.root, os.getpid())
                self._keep()
                self._report("again")  # not heard if it has been ready
        except EmbeddedError as error:
            _log.error("%s", error)
            self._report(str(error))
            return 1
        return 0

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True

    def _keep(self) -> None:
        users_lock = self.files.open(self.files.users_lock)
        try:
            account = account_for(self.files.root)
            let_pass(account, self.files.root / "any")
            sockets = self._sockets = socket_dir(self.files.root, account)
            lock = self._lock_servers(account, sockets)
            servers = (Postgres(self.files, account, lock, sockets), Redis(self.files, account, lock, sockets))
            for server in reversed(servers):
                # Redis first: it comes up while PostgreSQL makes its data directory.
                if (stray := server.stray_pid()) is not None:
                    raise EmbeddedError(
                        f"a {server.name} server that puff_patch did not start runs in {server.data}: "
                        f"stop it (pid {stray})."
                    )
                server.prepare()
                self._servers.append(server)
                server.tick()
            postgres, redis = servers
            self._published = Status(keeper_pid=os.getpid(), postgres_url=postgres.url, redis_url=redis.url)
            self._watch(postgres, redis, users_lock)
        finally:
            self._stop_servers()
            _log.info("stopped")

    def _lock_servers(self, account: Account | None, sockets: Path) -> int:
        """Take the lock that servers inherit, once those of a keeper that was killed have gone."""
        lock = self.files.open(self.files.servers_lock)
        left = [kind(self.files, account, lock, sockets) for kind in (Postgres, Redis)]
        started = time.monotonic()
        signalled: set[tuple[int, int]] = set()
        while not try_lock(lock, fcntl.LOCK_EX):
            passed = time.monotonic() - started
            if passed > _STOP_PATIENCE + 10:
                raise EmbeddedError(
                    f"servers that another keeper started still run in {self.files.root}, and cannot be stopped "
                    f"from here. They hold {self.files.servers_lock}: find them with fuser or lsof, and stop them."
                )
            for server in left:
                pid = server.stray_pid()
                number = server.stop_signal if passed < _STOP_PATIENCE else server.last_resort
                if pid is not None and (pid, number) not in signalled:
                    signalled.add((pid, number))
                    _log.warning("stopping %s, pid %d, which a killed keeper left", server.name, pid)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            time.sleep(_POLL_BUSY)
        return lock

    def _watch(self, postgres: Server, redis: Server, users_lock: int) -> None:
        """Look after the servers until nobody needs them; returns then, alone on the users' lock."""
        idle_since: float | None = None
        while not self._stopping and not self.files.stop_request.exists():
            for server in self._servers:
                server.tick()
            self._publish(postgres, redis)
            if not is_same_file(users_lock, self.files.users_lock):
                _log.warning("%s was removed", self.files.root)
                self._sockets = None  # the directory of this name is somebody else's
                return
            if not try_lock(users_lock, fcntl.LOCK_EX):
                idle_since = None
            elif self.files.pin.exists():
                idle_since = None
                fcntl.flock(users_lock, fcntl.LOCK_UN)
            else:
                now = time.monotonic()
                if idle_since is None:
                    idle_since = now
                if now - idle_since >= _GRACE:
                    _log.info("nobody has used the servers for %g s", _GRACE)
                    return
                fcntl.flock(users_lock, fcntl.LOCK_UN)
            time.sleep(_POLL_BUSY if any(server.is_starting for server in self._servers) else _POLL)

    def _publish(self, postgres: Server, redis: Server) -> None:
        """Write down what runs, where that has changed, from when both first answer."""
        assert self._published is not None
        all_ready = postgres.ready and redis.ready
        first = self._record_fd < 0
        if first and not all_ready:
            return
        found = replace(
            self._published,
            state="ready" if all_ready else "restarting",
            postgres_pid=postgres.pid,
            redis_pid=redis.pid,
            problem=postgres.problem or redis.problem,
        )
        if found == self._published:
            return
        previous, self._record_fd = self._record_fd, self.files.write_record(found)
        self._published = found
        if first:
            self._report("ready")
        else:
            os.close(previous)

    def _stop_servers(self) -> None:
        if self._record_fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                if is_same_file(self._record_fd, self.files.record):
                    self.files.record.unlink()
        if self._wind_down() and self._sockets is not None:
            # Not empty where a server was killed; then it waits for the next keeper.
            with contextlib.suppress(OSError):
                self._sockets.rmdir()

    def _wind_down(self) -> bool:
        """Stop the servers, gently, then less so; returns whether all have stopped."""
        for server in self._servers:
            server.stop()
        for patience, last in ((_STOP_PATIENCE, False), (5.0, True)):
            deadline = time.monotonic() + patience
            while not all(server.has_stopped() for server in self._servers):
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_BUSY)
            else:
                return True
            for server in self._servers:
                if not server.has_stopped():
                    _log.warning("%s does not stop", server.name)
                    server.stop(signal.SIGKILL if last else server.last_resort)
        return False
