"""How a user's process starts the keeper."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from pathlib import Path

from puff_patch.embedded.errors import EmbeddedError
from puff_patch.embedded.files import Files, tail
from puff_patch.embedded.share import Wait


def start_keeper(files: Files, wait: Wait) -> None:
    """Start a keeper and wait for its report.

    It is "ready"; or "again", look again, because there is a keeper already or this one was told to stop; or what
    is wrong.

    Raises:
        EmbeddedError: what is wrong, or the wait was too long.
    """
    if not sys.executable:
        raise EmbeddedError("cannot start the keeper: this program does not know its Python (sys.executable).")
    command = [sys.executable, "-m", "puff_patch.embedded", "keep", str(files.root)]
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        with contextlib.ExitStack() as childs_ends:
            childs_ends.callback(os.close, writer)
            os.set_inheritable(writer, True)
            log = files.open_log(files.keeper_log)
            childs_ends.callback(os.close, log)
            # Not subprocess: gevent's insists on the hub of the main thread, which this may not be.
            child = os.posix_spawn(
                sys.executable,
                [*command, "--detach", f"--report={writer}"],
                _keeper_environment(),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                ],
            )
        report = b""
        while chunk := _read_some(reader, wait):
            report += chunk
    finally:
        os.close(reader)
    # The keeper is a child of this child, which ends at once.
    while not _is_reaped(child):
        wait.pause("the keeper to detach itself")
    if report not in (b"ready", b"again"):
        raise EmbeddedError(
            report.decode("utf-8", "replace")
            or f"the keeper of the embedded services ended without a word.{tail(files.keeper_log)}"
        )


def _read_some(fd: int, wait: Wait) -> bytes:
    """Read from a non-blocking pipe; ``b""`` at its end."""
    while True:
        try:
            return os.read(fd, 65536)
        except BlockingIOError:
            wait.pause("both servers to start")


def _is_reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return True  # a SIGCHLD handler, gevent's or the program's own, was faster


def _keeper_environment() -> dict[str, str]:
    # The keeper must import this very package, and nothing that happens to lie in the working directory.
    environ = {**os.environ, "PYTHONSAFEPATH": "1"}
    root = str(Path(__file__).resolve().parents[2])
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (environ.get("PYTHONPATH"), root)))
    return environ
