"""Locks and queues for which greenlets wait cooperatively, and native threads (the asyncio thread) natively.

gevent's are for greenlets.  A native thread that has to wait for one of theirs runs a hub of its own for it, which
is woken by a call that races (see `puff_patch.runtime.mailbox`): under contention, such as the hub's thread and
the asyncio thread both writing a log, it is not woken at all.  Here whoever has to wait leaves a ticket, and is
woken in the way of its own thread.
"""

from __future__ import annotations

import _thread
import functools
import time
from _queue import Empty
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from types import GenericAlias
from typing import Any

import gevent
from gevent import getcurrent
from gevent._hub_local import get_hub_if_exists
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import Waiter
from gevent.monkey import get_original

from puff_patch.runtime.mailbox import Mailbox

native_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")
_native_ident: Callable[[], int] = get_original("_thread", "get_ident")

# Threads that wait natively though somebody may have made them a hub.
native_threads: set[int] = set()

# Seconds that a callback of the hub, where no greenlet can wait, holds everything up for another thread's lock.
_HUB_PATIENCE = 1.0
# For gevent.Timeout, whose types do not know that False means to end the block silently.
_SILENT: Any = False


class _Ticket:
    """Somebody waits.

    Attributes:
        starving: it has been woken before, and somebody else was faster.
        given: what it waits for is its own now.
    """

    __slots__ = ("given", "starving")

    def __init__(self) -> None:
        self.starving = self.given = False

    def wait(self, timeout: float | None) -> bool:
        """Wait until it is woken; False if the time runs out first."""
        raise NotImplementedError

    def wake(self) -> None:
        """Safe in any thread."""
        raise NotImplementedError


class _NativeTicket(_Ticket):
    """A native thread waits."""

    __slots__ = ("_gate",)

    def __init__(self) -> None:
        super().__init__()
        self._gate = native_lock()
        self._gate.acquire()

    def wait(self, timeout: float | None) -> bool:
        woken: bool = self._gate.acquire(True, -1 if timeout is None else min(timeout, _thread.TIMEOUT_MAX))
        return woken

    def wake(self) -> None:
        self._gate.release()


class _HubTicket(_NativeTicket):
    """A callback of the hub waits: the greenlets of its thread cannot go on meanwhile, other threads can."""

    __slots__ = ()

    def wait(self, timeout: float | None) -> bool:
        if super().wait(_HUB_PATIENCE if timeout is None else min(timeout, _HUB_PATIENCE)):
            return True
        if timeout is not None and timeout <= _HUB_PATIENCE:
            return False
        raise BlockingSwitchOutError("Impossible to wait for a lock in the event loop callback")


class _GreenletTicket(_Ticket):
    """A greenlet waits."""

    __slots__ = ("_hub", "_mailbox", "_waiter")

    def __init__(self, hub: Any) -> None:
        super().__init__()
        self._hub: Any = hub
        self._mailbox = Mailbox.current()
        self._waiter: Waiter[None] = Waiter()

    def wake(self) -> None:
        hub: Any = get_hub_if_exists()
        if hub is self._hub:
            hub.loop.run_callback(self._waiter.switch, None)
        else:
            self._mailbox.post(self._waiter.switch, None)

    def wait(self, timeout: float | None) -> bool:
        # Without other threads nobody could wake an idle hub; then gevent says so with LoopExit.
        held = self._mailbox.hold() if _thread._count() else nullcontext()
        with held, gevent.Timeout(timeout, _SILENT):
            self._waiter.get()
            return True
        return False


def _ticket() -> _Ticket:
    hub = get_hub_if_exists()
    if hub is None or _native_ident() in native_threads:
        return _NativeTicket()
    return _HubTicket() if getcurrent() is hub else _GreenletTicket(hub)


class _Waiting:
    """Those who wait for one thing, in order."""

    __slots__ = ("_tickets",)

    def __init__(self) -> None:
        self._tickets: deque[_Ticket] = deque()

    def __bool__(self) -> bool:
        return bool(self._tickets)

    def next(self) -> _Ticket | None:
        """Whose turn it is, for the caller to wake, which must happen after the thing is there."""
        try:
            return self._tickets.popleft()
        except IndexError:
            return None

    def wake_one(self) -> None:
        """Wake whose turn it is."""
        ticket = self.next()
        if ticket is not None:
            ticket.wake()

    def wait(self, attempt: Callable[[], Any], timeout: float | None, give_back: Callable[[], object]) -> Any:
        """Try again and again until it succeeds or the time is over.

        Args:
            attempt: takes the thing if it is there; what it returns is false if it is not.
            timeout: seconds to wait at most.
            give_back: called if the greenlet is killed when it has just been given the thing.

        Returns:
            What the last attempt returned; True if the thing was given.
        """
        until = None if timeout is None else time.monotonic() + timeout
        leave, starving = self._tickets.append, False
        while True:
            ticket = _ticket()
            ticket.starving = starving
            leave(ticket)
            try:
                # Only now: who let go of the thing before the ticket was there has woken nobody.
                taken = attempt()
                left = None if until is None else until - time.monotonic()
                woken = not taken and (left is None or left > 0) and ticket.wait(left)
            except BaseException:
                if not self._withdraw(ticket) and ticket.given:
                    give_back()
                raise
            if not woken and not self._withdraw(ticket) and not ticket.given:
                self.wake_one()  # we were woken too late; others may need it
            if ticket.given:
                return True
            if taken or not woken:
                return taken
            if taken := attempt():
                return taken
            # Somebody was faster. Our turn is the next all the same, and then nobody can be.
            leave, starving = self._tickets.appendleft, True

    def _withdraw(self, ticket: _Ticket) -> bool:
        """Take back a ticket; False if somebody has taken it already."""
        try:
            self._tickets.remove(ticket)
        except ValueError:
            return False
        return True


class Lock:
    """As ``threading.Lock``."""

    __slots__ = ("__weakref__", "_attempt", "_native", "_waiting")

    def __init__(self) -> None:
        self._native = native_lock()
        self._attempt = functools.partial(self._native.acquire, False)
        self._waiting = _Waiting()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As that of ``threading.Lock``."""
        if timeout != -1:
            if not blocking:
                raise ValueError("can't specify a timeout for a non-blocking call")
            if timeout < 0:
                raise ValueError("timeout value must be a non-negative number")
            if timeout > _thread.TIMEOUT_MAX:
                raise OverflowError("timeout value is too large")
        if self._attempt():
            return True
        if blocking:
            taken: bool = self._waiting.wait(self._attempt, None if timeout == -1 else timeout, self.release)
            return taken
        _let_others_run()
        return False

    __enter__ = acquire

    def release(self) -> None:
        """As that of ``threading.Lock``."""
        waiting = self._waiting
        ticket = waiting.next() if waiting else None
        if ticket is not None and ticket.starving and self._native.locked():
            ticket.given = True  # without letting go of it
            ticket.wake()
            return
        self._native.release()
        if ticket is not None:
            ticket.wake()
        elif waiting:
            waiting.wake_one()

    def __exit__(self, *_: object) -> None:
        self.release()

    def locked(self) -> bool:
        """As that of ``threading.Lock``."""
        held: bool = self._native.locked()
        return held

    # For threading.Condition, which would otherwise try to acquire it.
    _is_owned = locked
    acquire_lock, release_lock, locked_lock = acquire, release, locked

    def _at_fork_reinit(self) -> None:
        self.__init__()  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"<{'locked' if self.locked() else 'unlocked'} puff_patch lock at {id(self):#x}>"


class SimpleQueue:
    """As ``queue.SimpleQueue``."""

    __slots__ = ("__weakref__", "_items", "_waiting")

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiting = _Waiting()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """As that of ``queue.SimpleQueue``."""
        self._items.append(item)
        if self._waiting:
            self._waiting.wake_one()

    def put_nowait(self, item: Any) -> None:
        """As that of ``queue.SimpleQueue``."""
        self.put(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """As that of ``queue.SimpleQueue``."""
        if timeout is not None and timeout < 0:
            raise ValueError("'timeout' must be a non-negative number")
        taken = self._attempt()
        if not taken and block:
            taken = self._waiting.wait(self._attempt, timeout, lambda: None)
        if not taken:
            raise Empty
        return taken[0]

    def get_nowait(self) -> Any:
        """As that of ``queue.SimpleQueue``."""
        return self.get(block=False)

    def empty(self) -> bool:
        """As that of ``queue.SimpleQueue``."""
        return not self._items

    def qsize(self) -> int:
        """As that of ``queue.SimpleQueue``."""
        return len(self._items)

    __class_getitem__: Any = classmethod(GenericAlias)

    def _attempt(self) -> tuple[Any] | None:
        try:
            return (self._items.popleft(),)
        except IndexError:
            return None


def _let_others_run() -> None:
    """So that who spins on a lock lets go on who holds it."""
    hub = get_hub_if_exists()
    if hub is not None and getcurrent() is not hub and _native_ident() not in native_threads:
        gevent.sleep()
