"""``import puff``: programs written for Puff find this project under its names, unless a puff is installed.

Adds a finder to ``sys.meta_path``.  ``puff.redis`` *is* ``puff_patch.redis``, the very module, and so on; only
``puff`` itself and ``puff.contrib`` are modules of their own.  Nothing is imported before the program does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch

# By name alone: who imports whom in this project is not changed by what a program imports.
_FACE = "puff_patch"
_DJANGO = "django_backend.puff"
#: What a name stands for, and what a program misses where that is not there.
_TARGETS = {
    "puff.http": ("puff_patch.http", "the HTTP client"),
    "puff.json": ("puff_patch.json", "JSON"),
    "puff.redis": ("puff_patch.redis", "the Redis client"),
    "puff.postgres": ("puff_patch.postgres", "the PostgreSQL client"),
    "puff.graphql": ("puff_patch.graphql", "GraphQL in layers"),
    "puff.pubsub": ("puff_patch.pubsub", "multi-node pubsub"),
    "puff.task_queue": ("puff_patch.tasks", "the distributed task queue"),
    "puff.contrib.django": (_DJANGO, "the Django backends"),
}
_OWN = ("puff", "puff.contrib")


class PuffAliasPatch(Patch):
    """``import puff``."""

    name = "puff_alias"
    modules = ("sys",)

    def apply(self, module: ModuleType) -> None:
        """Add the finder; at `unpatch` it goes, with the modules that it found."""
        finder = _Finder()
        # Before the others: those would find the modules behind a name again, as further ones of that name.
        module.meta_path.insert(0, finder)
        self.ledger.on_restore(finder.remove)


class _Finder(MetaPathFinder):
    """Finds ``puff`` and what is below it."""

    def __init__(self) -> None:
        self._found: dict[str, ModuleType] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "puff":
            # Asked each time, and at most once: the answer is an import.
            return None if self._is_installed() else ModuleSpec(fullname, _Own(self), is_package=True)
        if not fullname.startswith("puff.") or sys.modules.get("puff") is not self._found.get("puff"):
            return None
        if fullname in _OWN:
            return ModuleSpec(fullname, _Own(self), is_package=True)
        behind, missing = _behind(fullname)
        return None if behind is None else ModuleSpec(fullname, _Alias(self, behind, missing))

    def _is_installed(self) -> bool:
        for finder in sys.meta_path:
            find: Any = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find("puff", None)
            # A folder that just happens to be called so has no origin.
            if spec is not None and spec.origin is not None:
                return True
        return False

    def keep(self, name: str, module: ModuleType) -> None:
        """Remember what was imported, to take it away."""
        self._found[name] = module

    def remove(self) -> None:
        """Find nothing more, and have what was found be gone."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name, module in self._found.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        self._found.clear()


class _Own(Loader):
    """Makes the modules that nothing else stands behind."""

    def __init__(self, finder: _Finder) -> None:
        self._finder = finder

    def exec_module(self, module: ModuleType) -> None:
        self._finder.keep(module.__name__, module)
        if module.__name__ != "puff":
            return
        face = import_module(_FACE)
        module.__doc__ = face.__doc__

        # The very objects, looked up when they are asked for.
        def __getattr__(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(f"module 'puff' has no attribute {name!r}")
            return getattr(face, name)

        vars(module).update(
            __getattr__=__getattr__,
            __dir__=lambda: sorted({*vars(module), *face.__all__}),
            __all__=list(face.__all__),
            Bytelike=str | bytes,
        )


class _Alias(Loader):
    """Puts another module in the place of the one that is imported, as a module may do itself."""

    def __init__(self, finder: _Finder, behind: str, missing: str) -> None:
        self._finder = finder
        self._behind = behind
        self._missing = missing

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if find_spec(self._behind) is None:
            raise NotImplementedError(f"{name}: {self._missing} is not part of this version of puff_patch")
        sys.modules[name] = behind = import_module(self._behind)
        self._finder.keep(name, behind)


def _behind(fullname: str) -> tuple[str | None, str]:
    """The module that a name stands for, and what it is; None if there is no such name."""
    name, below = fullname, ""
    while name not in _TARGETS:
        name, dot, last = name.rpartition(".")
        if not dot:
            return None, ""
        below = f".{last}{below}"
    target, what = _TARGETS[name]
    if below and _is_missing(target + below):
        return None, ""
    return target + below, what


def _is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:  # what it is below
        return True


PATCH = PuffAliasPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
