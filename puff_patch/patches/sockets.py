"""The standard library: sockets, DNS, time, threads, locks, subprocesses, ... become cooperative (gevent).

Replaces what ``gevent.monkey.patch_all()`` replaces.  gevent has no way back, so what it did is found by
comparing the modules before and after, and goes into the ledger like every other patch.
"""

from __future__ import annotations

import _thread
import importlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch
from puff_patch.patches.processes import make_locks_cooperative, make_pipes_cooperative, make_reliable
from puff_patch.patches.threads import make_thread_safe, our_locks

# Every module that gevent.monkey, up to 26.x, writes to.
_TOUCHED = (
    "_thread",
    "_threading_local",
    "builtins",
    "concurrent.futures.thread",
    "contextvars",
    "logging",
    "os",
    "queue",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "sys",
    "threading",
    "time",
)


def _touched() -> list[Any]:
    """The modules of `_TOUCHED`, and those of their classes that gevent changes in place."""
    modules = [importlib.import_module(name) for name in _TOUCHED]
    selectors = sys.modules["selectors"]
    return [*modules, *(value for value in vars(selectors).values() if isinstance(value, type))]


class SocketsPatch(Patch):
    """gevent's monkey patch, made reversible."""

    name = "sockets"
    # sys is always imported: applied at once
    modules = ("sys", "multiprocessing.connection", "multiprocessing.synchronize")

    def apply(self, module: ModuleType) -> None:
        """Run gevent's patch and record what it replaced; and what it leaves out, see `processes`."""
        if module.__name__ == "multiprocessing.connection":
            make_pipes_cooperative(module, self.ledger)
        elif module.__name__ == "multiprocessing.synchronize":
            make_locks_cooperative(module, self.ledger)
        else:
            self._apply_gevent()

    def _apply_gevent(self) -> None:
        import gevent.monkey
        from gevent.monkey import _state  # type: ignore[attr-defined]

        if _thread._count():
            self._wait_for_native_threads()
        before = [(owner, dict(vars(owner))) for owner in _touched()]
        # gevent's own ledger.  If somebody patched before us (gunicorn -k gevent does), there is nothing left
        # to replace here, and theirs stays when we unpatch.
        saved = {name: dict(originals) for name, originals in _state.saved.items()}

        def restore_saved() -> None:
            _state.saved.clear()
            _state.saved.update(saved)

        self.ledger.on_restore(restore_saved)
        self._remember_threads()
        try:
            with warnings.catch_warnings(), _lazy_objects_left_alone(), our_locks():
                # `warn_of_captured` says it, too, and of all modules.
                warnings.filterwarnings("ignore", "Monkey-patching ssl", gevent.monkey.MonkeyPatchWarning)
                # The standard library's own, on our locks, are for all threads.
                theirs = {} if saved else {"Event": False, "queue": False}
                gevent.monkey.patch_all(**theirs)
        finally:
            for owner, attributes in before:
                self._record_changes(owner, attributes)
        make_reliable(self.ledger)
        make_thread_safe([owner for owner, _ in before], self.ledger)

    def _wait_for_native_threads(self) -> None:
        """Let greenlets wait for what only a thread started earlier can bring, as in a worker of pytest-xdist.

        gevent knows of sockets and timers; where there are none it raises LoopExit.
        """
        from puff_patch.runtime.mailbox import Mailbox

        held = ExitStack()
        held.enter_context(Mailbox.current().hold())
        self.ledger.on_restore(held.close)

    def _record_changes(self, owner: Any, attributes: dict[str, Any]) -> None:
        for attribute, original in attributes.items():
            if vars(owner).get(attribute, self) is not original:
                self.ledger.record(owner, attribute, original)
        for attribute in vars(owner).keys() - attributes.keys():
            self.ledger.forget(owner, attribute)

    def _remember_threads(self) -> None:
        """gevent also rewrites the objects of threads, the table of them, and log handlers' locks."""
        main = threading.main_thread()
        state = dict(vars(main))
        active: dict[int | None, Any] = dict(threading._active)  # type: ignore[attr-defined]
        joins = [thread for thread in active.values() if thread is not main and "join" not in vars(thread)]
        dangling = main in threading._dangling  # type: ignore[attr-defined]
        handlers = [
            (handler, handler.lock)
            for reference in logging._handlerList  # type: ignore[attr-defined]
            if (handler := reference()) is not None
        ]

        def restore() -> None:
            patched_ident = main.ident
            vars(main).clear()
            vars(main).update(state)
            table: dict[int | None, Any] = threading._active  # type: ignore[attr-defined]
            table.pop(patched_ident, None)
            for ident, thread in active.items():
                if thread is main or thread.is_alive():
                    table[ident] = thread
            for thread in joins:
                vars(thread).pop("join", None)
            if dangling:
                threading._dangling.add(main)  # type: ignore[attr-defined]
            for handler, lock in handlers:
                handler.lock = lock

        self.ledger.on_restore(restore)


class PatchedTooLateWarning(RuntimeWarning):
    """A module imported before `patch_all` holds on to what was replaced."""


_HARMLESS_BASES = (None, "threading.Thread")


@contextmanager
def _lazy_objects_left_alone() -> Iterator[None]:
    """gevent asks ``isinstance()`` of every object there is, which makes Django's settings, for one, load.

    For an object of another type than it shows (``__class__``), the type itself is asked meanwhile.
    """
    module = importlib.import_module("gevent.monkey._patch_thread_common")
    vars(module)["isinstance"] = lambda value, kinds: issubclass(type(value), kinds)
    try:
        yield
    finally:
        vars(module).pop("isinstance", None)


def captured(originals: Iterable[tuple[Any, str, Any]], mine: frozenset[str]) -> list[str]:
    """The modules imported by now that hold an original under a name of their own, with that name.

    Found are the original itself (``from time import sleep``), a class derived from it (``class Local(local)``)
    and an instance of it (``lock = Lock()``), of each module the first.  What the program itself has made before
    it patched, it has made on purpose.

    Args:
        originals: what was replaced, as `Ledger.originals` gives it.
        mine: top-level packages that may hold originals, because the patches rely on them.
    """
    wanted: dict[int, str] = {}
    owners = set()
    for owner, attribute, original in originals:
        if callable(original) and getattr(original, "__module__", None) != "builtins":
            wanted.setdefault(id(original), f"{owner.__name__}.{attribute}")
        owners.add(getattr(owner, "__module__", owner.__name__))
    late: dict[str, str] = {}
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if not isinstance(module, ModuleType) or name in owners or top in mine or top in sys.stdlib_module_names:
            continue
        if sys.modules.get(module.__name__) is module and module.__name__ != name:
            continue  # a second name of it, as requests.packages.urllib3
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("__"):
                continue
            # type() and not isinstance(), which would load what is lazy.
            derived = issubclass(type(value), type) and value.__module__ == name
            made_of = [*(value.__bases__ if derived else ()), *(() if name == "__main__" else (type(value),))]
            names = [wanted.get(id(part)) for part in made_of]
            # A Thread of one's own runs on a greenlet all the same.
            found = wanted.get(id(value)) or next((each for each in names if each not in _HARMLESS_BASES), None)
            if found:
                late.setdefault(name, f"{name}.{attribute} (was {found})")
    return sorted(late.values())


def warn_of_captured(originals: Iterable[tuple[Any, str, Any]], mine: frozenset[str]) -> None:
    """Warn once of what `captured` finds; same arguments."""
    if late := captured(originals, mine):
        warnings.warn(
            "puff_patch.patch_all() was called too late: these modules were imported before it and still use "
            f"the blocking originals: {shortened(late)}. Make `import puff_patch; "
            "puff_patch.patch_all()` the first lines of the program (manage.py, wsgi.py), and of the __init__.py "
            "of its package if that imports anything; or start it with `python -m puff_patch`.",
            PatchedTooLateWarning,
            stacklevel=3,
        )


def shortened(late: list[str]) -> str:
    """The first few of what `captured` found, for a message."""
    more = f" and {len(late) - 5} more modules" if len(late) > 5 else ""
    return f"{', '.join(late[:5])}{more}"


PATCH = SocketsPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
