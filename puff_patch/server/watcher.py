"""Which files of a program have changed: asked for now and then, for ``--reload``.

With watchfiles (``pip install 'puff-patch[reload]'``) the system tells, otherwise the files are looked at.
"""

from __future__ import annotations

import logging
import os
import site
import sys
import sysconfig
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from gevent.monkey import get_original

from puff_patch.server.options import ServerError

logger = logging.getLogger("puff_patch.server")

# What a program is made of; and of the folders of templates, every file.
_SUFFIXES = frozenset({".py", ".toml", ".env", ".html", ".graphql"})
_TEMPLATE_FOLDERS = frozenset({"templates", "jinja2"})
_NOT_OURS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})

# Seconds between looks; looking takes at most this part of the time.
_PAUSE, _SHARE = 0.3, 0.1
# An editor, or a checkout of git's, writes several files; wait so long for the next, and so long in all.
_QUIET, _LONGEST = 0.1, 1.0


class Watcher(Protocol):
    """Tells which files have changed."""

    def changes(self) -> list[str]:
        """Return the paths changed since the last call; waits only for others that change at the same time."""


@contextmanager
def watch(folders: Iterable[str] = ()) -> Iterator[Watcher]:
    """Watch a program's files within the block.

    Args:
        folders: what to watch, with all that is below; by default what `program_folders` gives.

    Raises:
        ServerError: one of them is no folder.
    """
    watched = [os.path.realpath(folder) for folder in folders] or program_folders()
    for folder in watched:
        if not os.path.isdir(folder):
            raise ServerError(f"cannot watch {folder} for changes: there is no such folder")
    events = _events(watched)
    if events is None:
        yield Poller(watched)
        return
    with closing(events):
        yield _Events(events)


def _events(watched: list[str]) -> Generator[set[tuple[Any, str]], None, None] | None:
    """What watchfiles sees; None where it is not installed, or cannot see anything."""
    try:
        import watchfiles
    except ImportError:
        return None
    events = watchfiles.watch(
        *watched,
        watch_filter=lambda _, path: is_of_program(path, watched),
        yield_on_timeout=True,
        raise_interrupt=False,
        debounce=int(_LONGEST * 1000),
        step=int(_QUIET * 1000),
        rust_timeout=1,
    )
    try:
        next(events)  # it begins now
    except (OSError, RuntimeError) as exc:
        logger.warning("watchfiles cannot watch, so files are looked at again and again: %s", exc)
        return None
    return events


def program_folders() -> list[str]:
    """The working directory and the folders of the import path, but for Python's own and those within others."""
    paths = sysconfig.get_paths()
    pythons = {os.path.realpath(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    pythons |= {os.path.realpath(folder) for folder in site.getsitepackages()}
    found: list[str] = []
    for folder in sorted({os.path.realpath(entry or ".") for entry in (".", *sys.path)}):
        inside = any(os.path.commonpath([folder, outer]) == outer for outer in (*pythons, *found))
        if os.path.isdir(folder) and not inside:
            found.append(folder)
    return found


def is_of_program(path: str, folders: Iterable[str]) -> bool:
    """Whether a file below one of the folders is one to watch."""
    name = os.path.basename(path)
    for folder in folders:
        if path.startswith(folder + os.sep):
            parts = Path(path[len(folder) + 1 :]).parent.parts
            return not any(_is_foreign(part) for part in parts) and (
                name.startswith(".env")
                or os.path.splitext(name)[1] in _SUFFIXES
                or not _TEMPLATE_FOLDERS.isdisjoint(parts)
            )
    return False


def _is_foreign(folder: str) -> bool:
    return folder in _NOT_OURS or folder.startswith(".")


class _Events:
    """What watchfiles sees."""

    def __init__(self, events: Iterator[set[tuple[Any, str]]]) -> None:
        self._events = events

    def changes(self) -> list[str]:
        return sorted(_shown(path) for _, path in next(self._events, set()))


class Poller:
    """Looks at the files again and again."""

    def __init__(self, folders: list[str]) -> None:
        self._folders = folders
        self._seen = self._look()

    def changes(self) -> list[str]:
        """See `Watcher.changes`."""
        if time.monotonic() < self._next:
            return []
        before, self._seen = self._seen, self._look()
        if before == self._seen:
            return []
        limit = time.monotonic() + _LONGEST
        while time.monotonic() < limit:
            get_original("time", "sleep")(_QUIET)
            last, self._seen = self._seen, self._look()
            if last == self._seen:
                break
        changed = dict(before.items() ^ self._seen.items())
        return sorted(map(_shown, changed))

    def _look(self) -> dict[str, tuple[int, int]]:
        """Note when each file was changed and how long it is."""
        began = time.monotonic()
        found: dict[str, tuple[int, int]] = {}
        for top in self._folders:
            folders = [(top, False)]
            while folders:
                folder, of_templates = folders.pop()
                try:
                    with os.scandir(folder) as entries:
                        self._note(entries, folders, found, of_templates)
                except OSError:
                    continue  # gone, or not to be read
        ended = time.monotonic()
        self._next = ended + max(_PAUSE, (ended - began) / _SHARE)
        return found

    def _note(
        self,
        entries: Iterable[os.DirEntry[str]],
        folders: list[tuple[str, bool]],
        found: dict[str, tuple[int, int]],
        of_templates: bool,
    ) -> None:
        inside: list[tuple[str, bool]] = []
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if not _is_foreign(entry.name):
                    inside.append((entry.path, of_templates or entry.name in _TEMPLATE_FOLDERS))
            elif entry.name == "pyvenv.cfg":
                return  # a virtual environment
            elif of_templates or entry.name.startswith(".env") or os.path.splitext(entry.name)[1] in _SUFFIXES:
                try:
                    status = entry.stat()
                except OSError:
                    continue
                found[entry.path] = status.st_mtime_ns, status.st_size
        folders += inside


def _shown(path: str) -> str:
    """The path as one would type it."""
    shown = os.path.relpath(path)
    return path if shown.startswith("..") else shown
