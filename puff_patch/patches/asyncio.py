"""asyncio: event loops that greenlets run, and the asyncio thread's way to greenlets.

* ``BaseEventLoop.run_forever``, which ``asyncio.run`` and everything like it come down to: the loop is running
  for its own greenlet only.  Its waits are cooperative already (gevent's selector), so loops in several greenlets
  run at once, beside everything else.
* ``BaseEventLoop.run_in_executor``: the default executor, which ``asyncio.to_thread`` uses too, is the greenlets.
* ``run_coroutine_threadsafe``: its future is one that greenlets wait for and the asyncio thread completes.
* The event loop "of the thread" is each greenlet's own.
* ``uvloop.Loop``, where that is imported, is asyncio's loop: uvloop's would hold up the greenlets of its thread.
* Sockets that loops make are plain ones: a loop never blocks on them, and gevent's belong to the hub of a thread.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import sys
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch


class AsyncioPatch(Patch):
    """Event loops in greenlets."""

    name = "asyncio"
    modules = ("asyncio", "uvloop")

    def apply(self, module: ModuleType) -> None:
        """Replace what of asyncio takes a thread to be a native thread."""
        from puff_patch.runtime import aio

        if module.__name__ == "uvloop":
            if aio.waits_cooperatively():
                self.ledger.replace(module, "Loop", asyncio.SelectorEventLoop, alias=True)
            return
        self._apply_running(module)
        self._apply_policy(module)
        self._apply_sockets(module)
        self.ledger.on_restore(_stop_thread)
        # The hub of this thread, the main one as a rule, is where the asyncio thread's calls go.
        aio.get_home()

    def _apply_running(self, module: ModuleType) -> None:
        from puff_patch.runtime.aio import in_thread, runs_greenlets
        from puff_patch.runtime.futures import HubExecutor
        from puff_patch.runtime.hub_loop import HubLoop
        from puff_patch.runtime.mailbox import Mailbox
        from puff_patch.runtime.running_loop import owned_by_greenlet

        base = module.base_events.BaseEventLoop
        run_forever, run_in_executor = base.run_forever, base.run_in_executor

        @functools.wraps(run_forever)
        def run_forever_in_greenlet(self: Any) -> None:
            if in_thread() or isinstance(self, HubLoop):
                run_forever(self)
                return
            with owned_by_greenlet():
                run_forever(self)

        @functools.wraps(run_in_executor)
        def run_in_greenlet(self: Any, executor: Any, func: Any, *args: Any) -> Any:
            unset = self._default_executor is None and not self._executor_shutdown_called
            if executor is None and unset and runs_greenlets(self):
                self._default_executor = HubExecutor(Mailbox.current())
            return run_in_executor(self, executor, func, *args)

        @functools.wraps(module.run_coroutine_threadsafe)
        def run_coroutine_threadsafe(coro: Any, loop: Any) -> Any:
            return _run_coroutine_threadsafe(coro, loop)

        self.ledger.replace(base, "run_forever", run_forever_in_greenlet)
        self.ledger.replace(base, "run_in_executor", run_in_greenlet)
        for owner in (module, module.tasks):
            self.ledger.replace(owner, "run_coroutine_threadsafe", run_coroutine_threadsafe)

    def _apply_policy(self, module: ModuleType) -> None:
        from gevent.local import local

        policy_class = getattr(module.events, "BaseDefaultEventLoopPolicy", None)
        if policy_class is None:
            policy_class = module.events._BaseDefaultEventLoopPolicy  # Python 3.14

        class Local(local):
            _loop = None
            _set_called = False

        self.ledger.replace(policy_class, "_Local", Local)
        # Made now, if nobody has yet: one made while we are in force would outlive unpatch() with our class.
        module.events._init_event_loop_policy()
        policy = module.events._event_loop_policy
        if hasattr(policy, "_local"):
            mine = Local()
            vars(mine).update(vars(policy._local))
            self.ledger.replace(policy, "_local", mine, alias=True)

    def _apply_sockets(self, module: ModuleType) -> None:
        plain = _PlainSockets()
        for owner in (module.base_events, module.selector_events, module.unix_events):
            self.ledger.replace(owner, "socket", plain, alias=True)


class _PlainSockets(ModuleType):
    """The socket module with the class that was there before gevent's."""

    def __init__(self) -> None:
        super().__init__("socket")

    def __getattr__(self, name: str) -> Any:
        if name in ("socket", "socketpair"):
            return _plain_socket_class() if name == "socket" else _plain_socketpair
        return getattr(socket, name)


@functools.cache
def _plain_socket_class() -> Any:
    from gevent.monkey import get_original

    plain = get_original("socket", "socket")
    if plain is socket.socket:
        return plain

    class Socket(plain):  # type: ignore[misc, valid-type]
        """What it accepts is plain, too."""

        __slots__ = ()

        def accept(self) -> tuple[Any, Any]:
            fd, address = self._accept()
            return type(self)(self.family, self.type, self.proto, fileno=fd), address

        def dup(self) -> Any:
            import _socket

            return type(self)(self.family, self.type, self.proto, fileno=_socket.dup(self.fileno()))

    Socket.__name__ = Socket.__qualname__ = "socket"
    return Socket


def _plain_socketpair(*args: Any) -> Any:
    import _socket

    plain = _plain_socket_class()
    args = args or (socket.AF_UNIX,)
    return tuple(plain(end.family, end.type, end.proto, fileno=end.detach()) for end in _socket.socketpair(*args))


def _run_coroutine_threadsafe(coroutine: Any, loop: Any) -> Any:
    from puff_patch.runtime.futures import HubFuture

    if not asyncio.iscoroutine(coroutine):
        raise TypeError("A coroutine object is required")
    future = HubFuture()

    def start() -> None:
        try:
            asyncio.futures._chain_future(asyncio.ensure_future(coroutine, loop=loop), future)  # type: ignore[attr-defined]
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            raise

    loop.call_soon_threadsafe(start)
    return future


def _stop_thread() -> None:
    aio = sys.modules.get("puff_patch.runtime.aio")
    if aio is not None:
        aio.stop()


PATCH = AsyncioPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
