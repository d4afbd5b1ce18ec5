"""One server under the keeper: what PostgreSQL and Redis have in common."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from pathlib import Path

from puff_patch.embedded.account import Account, child
from puff_patch.embedded.errors import EmbeddedError
from puff_patch.embedded.files import Files, tail

_log = logging.getLogger(__name__)

_BIND = 3.0  # seconds within which a server makes its socket, which both do before they read their data
_FIRST_BACKOFF = 0.1  # seconds before the second attempt to restart a server; the first comes at once
_MAX_BACKOFF = 5.0  # seconds between attempts to restart a server that does not stay up


class Server:
    """A server that is started, watched, started again, stopped.

    Args:
        files: the data directory.
        account: whom to run it as.
        lock: a descriptor of ``servers.lock`` for it to inherit.
        sockets: the directory for its socket.
    """

    name: str
    stop_signal: int
    last_resort: int = signal.SIGKILL
    process_name: str
    socket_name: str
    url: str

    def __init__(self, files: Files, account: Account | None, lock: int, sockets: Path) -> None:
        self.files = files
        self.account = account
        self.data = files.root / self.name
        self.log = files.root / f"{self.name}.log"
        self.socket = sockets / self.socket_name
        self.ready = False
        self.problem: str | None = None
        self._lock = lock
        self._process: subprocess.Popen[bytes] | None = None
        self._launched = 0.0
        self._condemned = False
        self._was_ready = False
        self._retry_at = 0.0
        self._backoff = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def is_starting(self) -> bool:
        return self._process is not None and not self.ready

    def prepare(self) -> None:
        """Find the binary and make the data directory, once.

        Raises:
            EmbeddedError: that cannot be done.
        """
        raise NotImplementedError

    def argv(self) -> list[str]:
        """The command line that runs the server in the foreground."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether the running process takes connections by now."""
        raise NotImplementedError

    def recorded_pid(self) -> int | None:
        """The pid a server of this directory wrote down, dead or alive."""
        raise NotImplementedError

    def tick(self) -> None:
        """Look after the process: start it, see that it has come up, start it again when it has died.

        Raises:
            EmbeddedError: it ended before it ever answered.
        """
        if self._process is None:
            if time.monotonic() >= self._retry_at:
                self._launch()
        elif (code := self._process.poll()) is not None:
            self._process = None
            self.ready = False
            self.problem = f"{self.name} ended with code {code}"
            _log.warning("%s", self.problem)
            if not self._was_ready and not self._condemned:
                raise EmbeddedError(f"{self.problem} while starting.{tail(self.log)}")
            self._retry_at = time.monotonic() + self._backoff
            self._backoff = min(_MAX_BACKOFF, 2 * self._backoff + _FIRST_BACKOFF)
        elif not self.ready and self.answers():
            self.ready = self._was_ready = True
            self.problem = None
            self._backoff = 0.0
            _log.info("%s answers, pid %s", self.name, self.pid)
        elif not self._condemned and self._should_have_socket() and not self.socket.exists():
            # Removed by hand, by a cleaner of old files, or by the servers of a directory that was here before.
            self.ready = False
            self._condemned = True
            self.problem = f"{self.socket} was removed"
            _log.warning("%s", self.problem)
            self.stop()

    def _should_have_socket(self) -> bool:
        return self.ready or time.monotonic() > self._launched + _BIND

    def stop(self, sig: int | None = None) -> None:
        """Ask the process to stop."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(self.stop_signal if sig is None else sig)

    def has_stopped(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def stray_pid(self) -> int | None:
        """The pid of a server that runs in this directory without being this keeper's child."""
        pid = self.recorded_pid()
        return pid if pid is not None and pid != self.pid and self._is_server(pid) else None

    def _is_server(self, pid: int) -> bool:
        import psutil  # of the extra, so not before somebody needs it

        try:
            process = psutil.Process(pid)
            return process.name() == self.process_name and Path(process.cwd()) == self.data
        except psutil.Error:
            return False

    def _launch(self) -> None:
        self._make_dir(self.socket.parent)
        self._launched = time.monotonic()
        self._condemned = False
        log = self.files.open_log(self.log)
        try:
            self._process = child(
                self.argv(),
                self.account,
                death_signal=self.stop_signal,
                stdout=log,
                stderr=log,
                pass_fds=(self._lock,),
            )
        except OSError as error:
            raise EmbeddedError(f"cannot run {self.argv()[0]}: {error.strerror}.") from error
        finally:
            os.close(log)

    def _make_dir(self, path: Path) -> None:
        """A directory for the server alone."""
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            return
        if self.account is not None:
            os.chown(path, self.account.uid, self.account.gid, follow_symlinks=False)
