"""One data directory: the names in it, how to open them, and the record of what runs.

::

    users.lock      shared by every user, also by forked children; exclusively by a keeper that winds down
    keeper.lock     exclusively by the one keeper, from its first step to its last
    servers.lock    inherited by the servers: free only when no server process of this directory is left
    services.json   URLs and pids; locked by the keeper that wrote it, so a file without its lock is stale
    keeper.pin keeper.stop                     made by the commands ``start`` and ``stop``, for the keeper to find
    postgres/ redis/ run/                      the data, and the sockets where their path is short enough
    keeper.log postgres.log redis.log          what to read when something does not work
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from puff_patch import config
from puff_patch.embedded.account import user_name
from puff_patch.embedded.errors import EmbeddedError
from puff_patch.embedded.locks import try_lock

_LOG_LIMIT = 10_000_000  # bytes after which a log is set aside at the next start
_ELSEWHERE = "Choose another directory with PUFF_DATA_DIR, or ensure(data_dir=...)."


@dataclass(frozen=True)
class Status:
    """What goes on in a data directory.

    Args:
        state: ``"stopped"``, ``"starting"`` (or stopping), ``"ready"``, or ``"restarting"`` after a server died.
        in_use: whether any process holds a share.  A keeper that looks for users, or stops, counts for one.
        pinned: whether the servers stay up without users (the ``start`` command).
        keeper_pid, postgres_pid, redis_pid: process ids, where there is such a process.
        postgres_url, redis_url: where the servers answer; None before they first did.
        problem: why a server is being restarted.
    """

    state: str = "stopped"
    in_use: bool = False
    pinned: bool = False
    keeper_pid: int | None = None
    postgres_pid: int | None = None
    redis_pid: int | None = None
    postgres_url: str | None = None
    redis_url: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Files:
    """The names inside one data directory, and how to open them."""

    root: Path

    @classmethod
    def of(cls, data_dir: Path | None) -> Files:
        """The files of a directory; of the configured one (``PUFF_DATA_DIR``) where none is given."""
        if data_dir is None:
            data_dir = config.current().data_dir
        # Resolved, so that every spelling of the directory means the same servers.
        return cls(Path(data_dir).resolve())

    @property
    def users_lock(self) -> Path:
        return self.root / "users.lock"

    @property
    def keeper_lock(self) -> Path:
        return self.root / "keeper.lock"

    @property
    def servers_lock(self) -> Path:
        return self.root / "servers.lock"

    @property
    def record(self) -> Path:
        return self.root / "services.json"

    @property
    def pin(self) -> Path:
        return self.root / "keeper.pin"

    @property
    def stop_request(self) -> Path:
        return self.root / "keeper.stop"

    @property
    def keeper_log(self) -> Path:
        return self.root / "keeper.log"

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what the operating system says about this directory into an `EmbeddedError`."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise EmbeddedError(f"the file system of {self.root} knows no file locks. {_ELSEWHERE}") from error
            message = f"cannot use {self.root} for the embedded services: {error.strerror or error}"
            if error.filename:
                message += f" ({error.filename})"
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP):
                message += f". It must be a directory that this user may write to{_owner_hint(self.root)}"
            raise EmbeddedError(f"{message}. {_ELSEWHERE}") from error

    def prepare(self) -> None:
        """Make the directory, private, and out of version control."""
        try:
            self.root.mkdir(parents=True)
        except FileExistsError:
            if not self.root.is_dir():
                raise
            return
        # The servers that root starts run as somebody else, who has to pass.
        self.root.chmod(0o711 if os.geteuid() == 0 else 0o700)
        (self.root / ".gitignore").write_text("*\n")

    def open(self, path: Path, flags: int = os.O_RDWR) -> int:
        """Open a file of this directory, made where missing, for its owner alone.

        What root makes in another user's directory is that user's, who can then go on without root.
        """
        fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.geteuid() == 0:
            owner = self.root.stat()
            os.fchown(fd, owner.st_uid, owner.st_gid)
        return fd

    def touch(self, path: Path) -> None:
        """Make a file of this directory, as `open` does, with nothing in it."""
        os.close(self.open(path))

    def open_log(self, path: Path) -> int:
        """Open a log to append to, a fresh one where it has become too long."""
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > _LOG_LIMIT:
                path.rename(path.with_suffix(".log.old"))
        return self.open(path, os.O_WRONLY | os.O_APPEND)

    def read_record(self) -> Status | None:
        """``services.json``, if the keeper that wrote it lives."""
        try:
            fd = os.open(self.record, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with open(fd, encoding="utf-8") as file:
            if try_lock(fd, fcntl.LOCK_SH):
                return None
            # The keeper may be of another version of this package, with more to say.
            known = {each.name for each in fields(Status)}
            return Status(**{name: value for name, value in json.load(file).items() if name in known})

    def write_record(self, found: Status) -> int:
        """Replace ``services.json``; returns the descriptor that keeps it locked."""
        fresh = self.record.with_suffix(".json.new")
        fresh.unlink(missing_ok=True)
        fd = self.open(fresh)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(fd, json.dumps(asdict(found), indent=2).encode())
        fresh.rename(self.record)
        return fd


def _owner_hint(path: Path) -> str:
    try:
        owner = path.stat().st_uid
    except OSError:
        return ""
    if owner == os.geteuid():
        return ""
    return f", and it belongs to user {user_name(owner)}"


def tail(path: Path, lines: int = 12) -> str:
    """The end of a log, ready to be added to a message."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            last = file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return ""
    return "".join(f"\n    {line}" for line in [f"The end of {path}:", *last]) if last else ""
