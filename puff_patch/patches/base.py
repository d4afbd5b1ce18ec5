"""What every patch has in common: the ledger of originals and the life of a patch.

A patch replaces attributes of one library.  It does so only through the `Ledger`, which keeps the first
original of each, so that `unpatch` puts back the very objects that were there.  A library that is not imported
yet is patched when it is (a post-import hook), so that ``patch_all()`` costs nothing for what a program never
uses.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import wrapt
import zope.event

_MISSING: Any = object()


class UnsupportedVersion(ImportError):
    """The installed version of a library is older than what its patch is written for."""


@dataclass(frozen=True)
class WillPatch:
    """Sent through `zope.event` before a patch is applied; raise `DoNotPatch` from a subscriber to veto it."""

    name: str


@dataclass(frozen=True)
class DidPatch:
    """Sent through `zope.event` after a patch was applied."""

    name: str


@dataclass(frozen=True)
class DidUnpatch:
    """Sent through `zope.event` after a patch was undone."""

    name: str


class DoNotPatch(BaseException):
    """Raised by a subscriber of `WillPatch` to leave that library alone (the name is gevent's)."""


class Ledger:
    """The originals of what one patch replaced; the first saved wins."""

    def __init__(self) -> None:
        self._originals: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._aliases: set[tuple[int, str]] = set()
        self._undo: list[Callable[[], None]] = []

    def replace(self, owner: Any, name: str, replacement: Any, *, alias: bool = False) -> Any:
        """Set ``owner.name``, keep and return the original (None if the owner did not define it itself).

        Args:
            owner: a module or class.
            name: the attribute.
            replacement: what it is from now on.
            alias: whether only this one name is meant, so that who holds the original holds it by right.
        """
        # vars() and not getattr(): a class attribute may be a descriptor, or inherited.
        original = vars(owner).get(name, _MISSING)
        self.record(owner, name, original)
        if alias:
            self._aliases.add((id(owner), name))
        setattr(owner, name, replacement)
        return None if original is _MISSING else original

    def record(self, owner: Any, name: str, original: Any) -> None:
        """Remember an original that something else has replaced."""
        self._originals.setdefault((id(owner), name), (owner, name, original))

    def forget(self, owner: Any, name: str) -> None:
        """Remember that ``owner.name`` did not exist and is to be removed again."""
        self.record(owner, name, _MISSING)

    def on_restore(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` at `restore`, for what is not an attribute."""
        self._undo.append(undo)

    def restore(self) -> None:
        """Put every original back, the last replaced first."""
        while self._undo:
            self._undo.pop()()
        for owner, name, original in reversed(list(self._originals.values())):
            if original is _MISSING:
                if name in vars(owner):
                    delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._originals.clear()
        self._aliases.clear()

    def originals(self) -> Iterator[tuple[Any, str, Any]]:
        """Each (owner, attribute, original) that nobody should use now; what had no original is left out."""
        for key, (owner, name, original) in self._originals.items():
            if original is not _MISSING and key not in self._aliases:
                yield owner, name, original


class Patch:
    """One library rewired.  A subclass names the library and says what it replaces in `apply`."""

    #: The switch of `patch_all`, and the name for `is_patched`.
    name: ClassVar[str]
    #: The modules whose import the patch waits for; each calls `apply` once.
    modules: ClassVar[tuple[str, ...]]
    #: The distribution and the oldest version the patch is written for; None for the standard library.
    requires: ClassVar[tuple[str, tuple[int, ...]] | None] = None

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._wanted = False
        self._applied: set[str] = set()
        self._hooked = False

    def apply(self, module: ModuleType) -> None:
        """Replace what must be replaced in a freshly imported module, through `self.ledger`.

        Import nothing here that imports the library: it may be one of our own pools that is importing it now.
        """
        raise NotImplementedError

    def patch(self) -> bool:
        """Apply to what is imported already and wait for the rest; a second call does nothing.

        Returns:
            Whether the patch is in force; False if a subscriber of `WillPatch` vetoed it.

        Raises:
            UnsupportedVersion: the library is too old.
        """
        if self._wanted:
            return True
        try:
            zope.event.notify(WillPatch(self.name))
        except DoNotPatch:
            return False
        self._wanted = True
        try:
            for module_name in self.modules:
                module = sys.modules.get(module_name)
                if module is not None:
                    self._apply_once(module)
        except BaseException:
            self._undo()
            raise
        if not self._hooked:
            self._hooked = True
            for module_name in self.modules:
                wrapt.register_post_import_hook(self._on_import, module_name)
        zope.event.notify(DidPatch(self.name))
        return True

    def unpatch(self) -> None:
        """Put back every original; does nothing if the patch is not in force."""
        if not self._wanted:
            return
        self._undo()
        zope.event.notify(DidUnpatch(self.name))

    def is_patched(self) -> bool:
        """Whether the patch is in force, or will be as soon as the library is imported."""
        return self._wanted

    def _undo(self) -> None:
        self._wanted = False
        self._applied.clear()
        self.ledger.restore()

    def _on_import(self, module: ModuleType) -> None:
        # The hook outlives unpatch(), wrapt has no way to take one back.
        if self._wanted:
            self._apply_once(module)

    def _apply_once(self, module: ModuleType) -> None:
        if module.__name__ not in self._applied:
            self._check_version()
            self._applied.add(module.__name__)
            self.apply(module)

    def _check_version(self) -> None:
        if self.requires is None:
            return
        distributions, oldest = self.requires
        for distribution in distributions.split("|"):
            try:
                installed = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
            numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
            if numbers < oldest:
                wanted = ".".join(map(str, oldest))
                raise UnsupportedVersion(
                    f"puff_patch needs {distribution} {wanted} or newer, {installed} is installed: "
                    f"upgrade it, or leave it alone with patch_all({self.name}=False)"
                )
            return
