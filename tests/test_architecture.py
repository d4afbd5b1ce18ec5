"""Who may import whom; seen in the source, so that imports within functions count, too."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each room may import those of its own height and below.  `embedded` starts what the configuration asks for, so
# these two know each other.
RANKS = {
    "puff_patch.schema": 0,
    "puff_patch.config": 0,
    "puff_patch.embedded": 0,
    "puff_patch.runtime": 1,
    "puff_patch.pools": 2,
    "puff_patch.patches": 3,
}
CORE = sorted((ROOT / "puff_patch").rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str) -> Iterator[str]:
    """What a module imports, also by ``import_module("...")``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str | None:
    return next((room for room in RANKS if is_in(module, room)), None)


def faults(importer: str, source: str) -> list[str]:
    """The imports of a module of the core that it may not have."""
    found = []
    mine = room_of(importer)
    for imported in imports(source):
        theirs = room_of(imported)
        if is_in(imported, "django_backend"):
            wrong = True  # it stands on the core
        elif is_in(imported, "django"):
            wrong = importer != "puff_patch.patches.django"
        elif is_in(imported, "granian"):
            wrong = importer != "puff_patch.server.front"
        elif mine is not None and is_in(imported, "puff_patch"):
            # What is in no room (server, metrics, the face) stands above all rooms.
            wrong = theirs is None or RANKS[theirs] > RANKS[mine]
        else:
            wrong = False
        if wrong:
            found.append(f"{importer} imports {imported}")
    return found


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("puff_patch.pools.postgres", "def f():\n    from puff_patch.patches.base import Patch"),
        ("puff_patch.runtime.watch", "from puff_patch import pools"),
        ("puff_patch.config", "import puff_patch.runtime.mailbox"),
        ("puff_patch.pools.http", "import puff_patch"),
        ("puff_patch.patches.redis", "from django.core import cache"),
        ("puff_patch.metrics", "import importlib\nimportlib.import_module('granian.server')"),
        ("puff_patch.server.wsgi", "import django_backend"),
    ],
)
def test_a_fault_is_found(importer: str, source: str) -> None:
    assert len(faults(importer, source)) == 1


def test_arrows_point_one_way() -> None:
    assert len(CORE) > 50
    assert [fault for path in CORE for fault in faults(name_of(path), path.read_text(encoding="utf-8"))] == []


def test_every_room_exists() -> None:
    assert all(importlib.util.find_spec(room) for room in RANKS)
