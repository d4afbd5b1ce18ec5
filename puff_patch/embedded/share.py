"""What counts a process as a user of the servers, and how long it waits for them."""

from __future__ import annotations

import fcntl
import os
import time

from puff_patch.embedded.errors import EmbeddedError
from puff_patch.embedded.files import Files, tail
from puff_patch.embedded.locks import identity, is_same_file, try_lock

_LOOK = 0.02  # seconds between two looks of a user who waits


class Wait:
    """The deadline of one call.

    Args:
        files: the data directory.
        timeout: seconds from now.
    """

    def __init__(self, files: Files, timeout: float) -> None:
        self._files = files
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout

    def pause(self, what: str) -> None:
        """Wait one look.  Looked up as ``time.sleep`` each time, so that gevent's replacement is used.

        Raises:
            EmbeddedError: the time is up; ``what`` says what was waited for.
        """
        if time.monotonic() >= self._deadline:
            raise EmbeddedError(
                f"waited {self._timeout:g} s for {what} (embedded services in {self._files.root})."
                + tail(self._files.keeper_log)
            )
        time.sleep(_LOOK)


class Share:
    """This process's shared lock on ``users.lock``."""

    def __init__(self) -> None:
        self._fd = -1
        self._identity = (0, 0)

    def is_held(self, files: Files) -> bool:
        """Whether the lock is still ours, and still on the file that others see under this name."""
        return self._is_ours() and is_same_file(self._fd, files.users_lock)

    def take(self, files: Files, wait: Wait) -> None:
        """Take the lock, making the data directory where it is missing."""
        self.release()
        while self._fd < 0:
            files.prepare()
            fd = files.open(files.users_lock)
            try:
                while not try_lock(fd, fcntl.LOCK_SH):
                    # A keeper has it alone: for an instant to see whether it is needed, or because it winds down.
                    wait.pause("the previous servers to stop")
                # Not so where the directory was removed, or made anew, meanwhile.
                if is_same_file(fd, files.users_lock):
                    self._identity = identity(os.fstat(fd))
                    self._fd = fd
            finally:
                if self._fd < 0:
                    os.close(fd)

    def release(self) -> None:
        """Let go; may be called twice."""
        # Closed and not unlocked: an unlock would take the share of forked children with it.
        if self._is_ours():
            os.close(self._fd)
        self._fd = -1

    def _is_ours(self) -> bool:
        # Programs that turn into daemons close every descriptor, and the number may be another file's by now.
        if self._fd < 0:
            return False
        try:
            return identity(os.fstat(self._fd)) == self._identity
        except OSError:
            return False
