"""The server binaries that wheels bring: where they are, and whether they run."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from puff_patch.embedded.account import Account, let_pass, let_read, run

INSTALL = "pip install 'puff-patch[embedded]'"


def version_of(
    binary: Path, pattern: str, account: Account | None, *, trees: Sequence[Path] = ()
) -> tuple[int, ...] | str:
    """The version a server binary states, or why it states none.

    Args:
        binary: what to run with ``--version``.
        pattern: a regular expression with a group for each number.
        account: whom to run it as.
        trees: directories of a wheel to open to that account, if that is what it takes.
    """
    remedies: list[Callable[[], None]] = []
    if account is not None:
        for tree in trees:
            remedies += [partial(let_pass, account, tree), partial(let_read, tree)]
    while True:
        code, output = run([str(binary), "--version"], account, timeout=20)
        found = re.search(pattern, output)
        if code == 0 and found is not None:
            return tuple(int(part) for part in found.groups())
        if not remedies:
            return output.strip() or f"{binary} --version ended with code {code}"
        remedies.pop(0)()


def wheel_dir(package: str) -> Path | None:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])
