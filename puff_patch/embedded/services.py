"""What a user's process does: have the servers started or join them, ask after them, stop them."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from puff_patch.embedded.files import Files, Status
from puff_patch.embedded.launch import start_keeper
from puff_patch.embedded.locks import is_locked
from puff_patch.embedded.share import Share, Wait

_held: dict[Path, Services] = {}
_joining: dict[tuple[int, Path], object] = {}


@dataclass(frozen=True)
class Services:
    """A running pair of servers, and this process's share in keeping them up.

    Args:
        postgres_url: a libpq URL (psycopg2, psycopg) of the database ``postgres``, as superuser ``postgres``.
        redis_url: a redis-py URL of database 0.
        data_dir: the resolved directory that holds their data.
    """

    postgres_url: str
    redis_url: str
    data_dir: Path
    _share: Share = field(repr=False, compare=False)

    def stop(self) -> None:
        """Give up this process's share now instead of at its end.

        The servers stop shortly after the last share is gone.  A forked child has a share of its own, which this
        leaves alone.  May be called twice.
        """
        if _held.get(self.data_dir) is self:
            del _held[self.data_dir]
        self._share.release()


def ensure(data_dir: Path | None = None, *, timeout: float = 60.0, export: bool = False) -> Services:
    """Start PostgreSQL and Redis below a directory, or join those already running there.

    The servers stay up until this process and every other user has ended or called `Services.stop`.  Calling again
    returns the same `Services` at the cost of a few system calls, or brings the servers back if their keeper was
    killed.  Works before and after monkeypatching; under gevent other greenlets run on while this one waits.

    Args:
        data_dir: directory for data, sockets and logs, created where missing; by default the configured one
            (``PUFF_DATA_DIR``, else ``.puff`` below the working directory).
        timeout: seconds to wait until both servers answer.  Making a new database cluster takes about one.
        export: also set PUFF_DEFAULT_POSTGRES_URL, PUFF_DEFAULT_REDIS_URL, DATABASE_URL and REDIS_URL in
            ``os.environ``, each only where it is not set already.

    Raises:
        EmbeddedError: they cannot be had; the message says what to do.
    """
    files = Files.of(data_dir)
    wait = Wait(files, timeout)
    services = _joined(files)
    if services is None:
        # One greenlet or thread of a process at a time; the pid keeps a fork's copy of the entry from counting.
        # A lock would not do: one made before monkeypatching blocks the hub, one made after is unknown to threads.
        key, token = (os.getpid(), files.root), object()
        while _joining.setdefault(key, token) is not token:
            wait.pause("another greenlet or thread of this process to start them")
        try:
            services = _joined(files) or _join(files, wait)
        finally:
            del _joining[key]
    if export:
        for name, url in (("POSTGRES", services.postgres_url), ("REDIS", services.redis_url)):
            os.environ.setdefault(f"PUFF_DEFAULT_{name}_URL", url)
        os.environ.setdefault("DATABASE_URL", services.postgres_url)
        os.environ.setdefault("REDIS_URL", services.redis_url)
    return services


def status(data_dir: Path | None = None) -> Status:
    """Tell what runs in a data directory; changes and starts nothing.

    Args:
        data_dir: as for `ensure`.

    Raises:
        EmbeddedError: the directory may not be read.
    """
    files = Files.of(data_dir)
    with files.errors():
        keeper_lives = is_locked(files.keeper_lock)
        found = files.read_record()
        if found is None:
            found = Status(state="starting" if keeper_lives else "stopped")
        in_use = keeper_lives and is_locked(files.users_lock, probe=fcntl.LOCK_EX)
        return replace(found, in_use=in_use, pinned=keeper_lives and files.pin.exists())


def stop(data_dir: Path | None = None, *, timeout: float = 60.0) -> bool:
    """Stop the servers of a data directory now, whoever uses them.

    Args:
        data_dir: as for `ensure`.
        timeout: seconds to wait until they have stopped.

    Returns:
        Whether there was anything to stop.

    Raises:
        EmbeddedError: they did not stop in time, or this user may not stop them.
    """
    files = Files.of(data_dir)
    wait = Wait(files, timeout)
    with files.errors():
        keeper = b""
        while is_locked(files.keeper_lock):
            # A keeper writes its pid and the time in there, once it has locked it; we stop the first one we see.
            found = files.keeper_lock.read_bytes()
            if keeper and found != keeper:
                break
            keeper = found
            # A file and not a signal, because a pid means another process inside a container.  Made again each
            # time, because a keeper that is just starting clears old requests away.
            files.touch(files.stop_request)
            wait.pause("the keeper to stop")
        files.stop_request.unlink(missing_ok=True)
        return bool(keeper)


def _joined(files: Files) -> Services | None:
    """The services this process has already joined, if they are up and its share still counts."""
    services = _held.get(files.root)
    if services is None or not services._share.is_held(files):
        return None
    found = files.read_record()
    return services if found is not None and found.state == "ready" else None


def _join(files: Files, wait: Wait) -> Services:
    held = _held.get(files.root)
    share = held._share if held is not None else Share()
    with files.errors():
        if renewed := not share.is_held(files):
            share.take(files, wait)
        try:
            found = _await_ready(files, wait)
        except BaseException:
            if renewed:
                share.release()
            raise
    assert found.postgres_url is not None
    assert found.redis_url is not None
    services = Services(found.postgres_url, found.redis_url, files.root, share)
    if services == held:
        return held
    _held[files.root] = services
    return services


def _await_ready(files: Files, wait: Wait) -> Status:
    while True:
        found = files.read_record()
        if found is not None and found.state == "ready":
            return found
        if not is_locked(files.keeper_lock):
            start_keeper(files, wait)
        wait.pause("both servers to answer")
