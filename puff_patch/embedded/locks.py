"""File locks (``flock``), which the kernel lets go when their last holder dies, however it died."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def try_lock(fd: int, kind: int) -> bool:
    """Take a lock, ``LOCK_SH`` or ``LOCK_EX``, unless somebody's excludes it; returns whether it was taken."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path, *, probe: int = fcntl.LOCK_SH) -> bool:
    """Whether a lock on a file is held that excludes ``probe``; by default, an exclusive one.

    It takes the lock for an instant to find out, so whoever wants it exclusively must try more than once.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(fd, probe)
    finally:
        os.close(fd)


def identity(found: os.stat_result) -> tuple[int, int]:
    """What tells a file from every other of this machine, whatever its name."""
    return found.st_dev, found.st_ino


def is_same_file(fd: int, path: Path) -> bool:
    """Whether the open file is the one that others find under this name."""
    try:
        return identity(os.fstat(fd)) == identity(path.stat())
    except FileNotFoundError:
        return False
