"""Greenlets that share a psycopg2 connection take turns, as threads do in libpq.

psycopg2 lets threads share a connection: one works, the others wait at a native lock.  A greenlet that waited
there would stop its whole thread, and with it the one that holds the lock, for ever.  So each waits its turn here
before it calls what may speak to the server.  Another thing that the native lock did goes with it: a thread that
has nothing to do for the server still let others run.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable
from typing import Any

import gevent
import psycopg2
from gevent._hub_local import get_hub_if_exists
from gevent.event import Event
from gevent.monkey import get_original
from greenlet import getcurrent
from psycopg2 import extensions

from puff_patch.runtime.mailbox import Mailbox

_allocate_lock: Callable[[], Any] = get_original("_thread", "RLock")


class _Waiter:
    """A greenlet that waits for its turn; woken through its own hub's mailbox if need be."""

    __slots__ = ("_event", "_hub", "_mailbox", "greenlet")

    def __init__(self) -> None:
        self.greenlet = getcurrent()
        self._event = Event()
        self._hub = gevent.get_hub()
        self._mailbox = Mailbox.current()

    def wait(self) -> None:
        with self._mailbox.hold():  # it may be another thread that wakes this one
            self._event.wait()

    def wake(self) -> bool:
        if get_hub_if_exists() is self._hub:
            self._event.set()
            return True
        return self._mailbox.post(self._event.set)


class Turn:
    """A reentrant lock of greenlets, of one thread or of several, that is handed on in the order of asking.

    gevent's own is not: a greenlet that runs one query after another would keep it from all others.
    """

    __slots__ = ("_depth", "_lock", "_owner", "_process", "_waiting")

    def __init__(self) -> None:
        self._lock = _allocate_lock()  # native, held for a few bytecodes and never over a switch
        self._owner: Any = None
        self._depth = 0
        self._process = os.getpid()
        self._waiting: deque[_Waiter] = deque()

    def acquire(self) -> bool:
        """Take the turn; says whether that took waiting."""
        me = getcurrent()
        with self._lock:
            if self._owner is None or self._owner is me:
                self._owner = me
                self._depth += 1
                return False
        waiter = _Waiter()
        with self._lock:
            if self._owner is None:
                self._owner, self._depth = me, 1
                return False
            self._waiting.append(waiter)
        try:
            waiter.wait()
        except BaseException:
            with self._lock:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                    raise
            self.release()
            raise
        return True

    @property
    def inherited(self) -> bool:
        """Whether this is a copy that a fork has made."""
        return self._process != os.getpid()

    @property
    def taken(self) -> bool:
        """Whether it is some greenlet's turn."""
        return self._owner is not None

    def release(self) -> None:
        """Hand the turn on."""
        with self._lock:
            self._depth -= 1
            if self._depth:
                return
            waiter = self._next()
        while waiter is not None and not waiter.wake():  # the thread it waited in has gone
            with self._lock:
                waiter = self._next()

    def _next(self) -> _Waiter | None:
        """Whose turn it is now; called under the lock."""
        if not self._waiting:
            self._owner, self._depth = None, 0
            return None
        waiter = self._waiting.popleft()
        self._owner, self._depth = waiter.greenlet, 1
        return waiter


def take_turn(connection: Any) -> Turn:
    """Wait until no other greenlet uses the connection.

    Returns:
        What to ``release()``.

    Raises:
        psycopg2.InterfaceError: the connection was closed while this greenlet waited.
    """
    turn: Turn | None = connection._puff_turn
    if turn is None:
        turn = vars(connection).setdefault("_puff_turn", Turn())
    if turn.acquire() and connection.closed:  # perhaps returned to its pool, where its session is no longer ours
        turn.release()
        raise psycopg2.InterfaceError("connection already closed")
    return turn


def is_taken(connection: Any) -> bool:
    """Whether some greenlet uses the connection now."""
    turn: Turn | None = connection._puff_turn
    return turn is not None and turn.taken


def is_inherited(connection: Any) -> bool:
    """Whether the connection is known to belong to the process that this one was forked from."""
    turn: Turn | None = getattr(connection, "_puff_turn", None)
    return turn is not None and turn.inherited


def in_turn(function: Callable[..., Any], connection_of: Callable[[Any], Any] = lambda self: self) -> Any:
    """``function``, a method of psycopg2's, for one greenlet at a time.

    Args:
        function: called with ``self`` first.
        connection_of: gives the connection that ``self`` belongs to.
    """

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        connection = connection_of(self)
        if connection is None:
            return function(self, *args, **kwargs)  # never initialised; psycopg2 says so
        turn = take_turn(connection)
        try:
            return function(self, *args, **kwargs)
        except BaseException:
            connection._puff_failed()
            raise
        finally:
            turn.release()

    return method


def property_in_turn(name: str) -> Any:
    """An attribute of psycopg2's connection whose setting may speak to the server."""
    attribute: Any = getattr(extensions.connection, name)
    return property(
        attribute.__get__, in_turn(lambda self, value: attribute.__set__(self, value)), None, attribute.__doc__
    )


def yielding(method: Callable[[Any], Any]) -> Any:
    """A commit or rollback that lets other greenlets run although there is nothing to end.

    A thread that does so in a loop leaves the others their share; without this a greenlet would not.
    """

    @functools.wraps(method)
    def yielding_method(self: Any) -> Any:
        idle = self.status == extensions.STATUS_READY
        result = method(self)
        if idle and getcurrent() is not gevent.get_hub():
            gevent.sleep(0)
        return result

    return yielding_method
