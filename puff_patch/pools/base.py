"""A bounded, cooperative pool: everything that does not depend on what is pooled.

The pool counts *slots*.  A slot is the right to have one connection open, so the number of connections can
never pass ``max_size``: a checkout gets a slot (perhaps still empty) and only then connects.  Names, options,
statistics and errors follow psycopg_pool (https://www.psycopg.org/psycopg3/docs/api/pool.html).

Two things differ from psycopg_pool, both because programs that never heard of a pool run on this one:

* A connection is opened in the greenlet that asks for it, so an unreachable server raises the driver's own
  error at once instead of a time-out much later.
* Cleaning a returned connection happens off the returner's path: in the background if nobody waits, else in
  the greenlet that gets it next.

Locking: `_lock` is a native lock held for a few bytecodes and never over a switch, so it serves greenlets and
real threads alike.  It is reentrant, because the garbage collector may strike inside such a section and run a
finalizer that takes or returns a connection; the sections are written so that this does no harm: between a look
and the act upon it nothing is allocated.

Background work (resets, refills, pruning) runs in the main thread's hub only, once the pool has been used there:
the hub of another thread may die with it, in the midst of a reset, and what it held would be lost.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import time
import weakref
from collections import deque
from collections.abc import Callable
from operator import itemgetter
from typing import Any, ClassVar, Generic, TypeVar

import gevent
from gevent._hub_local import get_hub_if_exists
from gevent.event import Event
from gevent.monkey import get_original
from greenlet import getcurrent, greenlet

from puff_patch.config import PoolOptions, current
from puff_patch.pools.holders import describe_holders
from puff_patch.pools.sockets import cut_off
from puff_patch.runtime.mailbox import Mailbox

C = TypeVar("C")

logger = logging.getLogger("puff_patch.pools")

_allocate_lock: Callable[[], Any] = get_original("_thread", "RLock")
# Seconds between two warnings of a pool about slow checkouts.
_SLOW_AT_MOST_EVERY = 60.0
# Seconds between attempts to bring a pool back to min_size: doubled from the first to the second, jittered.
_REFILL_FIRST, _REFILL_MOST = 0.5, 30.0


class PoolError(Exception):
    """The base of what a pool itself raises; drivers mix in their own OperationalError."""


class PoolTimeout(PoolError):
    """No connection came free in time."""


class TooManyRequests(PoolError):
    """`max_waiting` checkouts wait already."""


class PoolClosed(PoolError):
    """The pool was closed."""


class Discard(Exception):
    """Raised by a driver's `_reset` or `_check`: the connection is not fit to be handed on."""


class Slot(Generic[C]):
    """The right to one open connection, and the connection once there is one."""

    __slots__ = (
        "connection",
        "dirty",
        "epoch",
        "expires_at",
        "generation",
        "holder",
        "leased_at",
        "returned_at",
    )

    def __init__(self, generation: int) -> None:
        self.connection: C | None = None
        self.generation = generation
        self.dirty = False
        self.epoch = 0
        self.expires_at = 0.0
        self.holder: weakref.ref[greenlet] | None = None  # who took it last
        self.leased_at = 0.0
        self.returned_at = 0.0

    def is_held_here(self) -> bool:
        """Whether it is the calling greenlet that has it leased."""
        return self.holder is not None and self.holder() is getcurrent()


class _Request(Generic[C]):
    """A checkout that waits; woken through its own hub's mailbox when another thread serves it."""

    __slots__ = ("_event", "_hub", "_mailbox", "error", "slot")

    def __init__(self) -> None:
        self.slot: Slot[C] | None = None
        self.error: BaseException | None = None
        self._event = Event()
        self._hub = gevent.get_hub()
        self._mailbox = Mailbox.current()

    def wait(self, timeout: float) -> None:
        self._event.wait(timeout)

    def wake(self) -> bool:
        """Says whether there is somebody to be woken: the thread that waits may have ended."""
        if get_hub_if_exists() is self._hub:
            self._event.set()
            return True
        return self._mailbox.post(self._event.set)


class Pool(Generic[C]):
    """A bounded pool; subclasses say how to connect, reset, check and close.

    Args:
        name: what error messages and statistics call the pool.  Never a password.
        options: sizes and time-outs, see `PoolOptions`.
    """

    #: The error classes raised; a driver's pool names subclasses of the driver's OperationalError here.
    PoolTimeout: ClassVar[type[PoolTimeout]] = PoolTimeout
    TooManyRequests: ClassVar[type[TooManyRequests]] = TooManyRequests
    PoolClosed: ClassVar[type[PoolClosed]] = PoolClosed
    #: What is pooled, for whoever sums statistics up.
    kind: ClassVar[str] = "other"
    #: How a user raises max_size, for the message of `PoolTimeout`.
    how_to_grow: ClassVar[str] = "raise max_size"
    #: Whether `_reset` has anything to do.  If not, the connection returned last is the next to be handed out.
    needs_reset: ClassVar[bool] = True

    def __init__(self, name: str, options: PoolOptions) -> None:
        self.options = options
        self._slow_after = current().slow_checkout_ms / 1000
        self._closed = False
        self._generation = 0  # one more in every forked child
        self._epoch = 0  # one more at every drain()
        self._start()
        self.name = _register(self, name)

    def _start(self) -> None:
        self._lock = _allocate_lock()
        self._clean: list[Slot[C]] = []  # ready to be handed out; the last returned goes first
        self._dirty: deque[Slot[C]] = deque()  # returned, to be reset
        self._requests: deque[_Request[C]] = deque()
        self._leased: set[Slot[C]] = set()  # never looked into under the lock, only for diagnosis
        self._all: weakref.WeakSet[Any] = weakref.WeakSet()  # every open connection, leased ones too
        self._size = 0
        self._home: Mailbox | None = None  # where background work runs, and the only user of the next three
        self._janitors = 0
        self._refilling = False
        self._pruner: Any = None
        # `counters[key] += a local` is atomic under the GIL: no call, no jump back between load and store.
        self._counters = dict.fromkeys(_COUNTERS, 0.0)
        self._slow_told_at = float("-inf")
        self._slow_untold = 0

    # What a driver provides

    def _connect(self) -> C:
        """Open a connection; raises the driver's error."""
        raise NotImplementedError

    def _reset(self, connection: C) -> None:
        """Make a returned connection as good as new, or raise."""
        raise NotImplementedError

    def _check(self, connection: C) -> bool:
        """Whether an idle connection may be handed out; must not wait for the network."""
        raise NotImplementedError

    def _is_free(self, slot: Slot[C]) -> bool:
        """Whether nobody but the pool refers to the slot's connection; called under the lock."""
        return True

    def _close(self, connection: C) -> None:
        """Close without waiting for the server."""
        raise NotImplementedError

    def _wait_for_room(self) -> None:
        """Wait until the server has room for one more: a connection closed here may still be open there."""

    def _fileno(self, connection: C) -> int | None:
        """The descriptor of its socket; None if it has none."""
        return None

    def _keeps_over_fork(self, connection: C) -> bool:
        """Whether a forked child may go on using it."""
        return False

    def _abandon(self, connection: C) -> None:
        """In a forked child: forget the parent's connection without a word on its socket."""
        raise NotImplementedError

    # Checkout and return

    def checkout(self, timeout: float | None = None) -> Slot[C]:
        """Take a slot with a live, clean connection; the caller moves the connection out of the slot.

        While leased, the pool keeps no reference to the connection, so that one which is dropped without
        being returned is garbage collected (see `reclaim`).

        Args:
            timeout: seconds to wait for a free slot; the pool's own by default.

        Raises:
            PoolTimeout, TooManyRequests, PoolClosed: see there.
            Exception: whatever the driver raises when it cannot connect.
        """
        _notice_fork()
        started = time.monotonic()
        slot = self._take(self.options.timeout if timeout is None else timeout, started)
        try:
            self._prepare(slot)
        except BaseException as error:
            self._discard_connection(slot)
            self._give_back(slot)
            if isinstance(error, Exception):
                self._counters["requests_errors"] += 1
            raise
        self._begin_lease(slot)
        return slot

    def checkout_from(self, other: Pool[C]) -> Slot[C]:
        """Take a place here for a connection of another pool, whose own place is free again at once.

        Raises:
            PoolTimeout, TooManyRequests, PoolClosed: of either pool.
            Exception: whatever the driver raises when it cannot connect.
        """
        _notice_fork()
        slot = self._take(self.options.timeout, time.monotonic())
        try:
            self._discard_connection(slot)
            lease = other.checkout()
        except BaseException:
            self._give_back(slot)
            raise
        slot.connection, slot.dirty = lease.connection, lease.dirty
        slot.epoch, slot.expires_at = self._epoch, lease.expires_at
        self._all.add(slot.connection)
        other.reclaim(lease)
        self._begin_lease(slot)
        return slot

    def checkin(self, slot: Slot[C], connection: C, *, reusable: bool = True) -> None:
        """Return a slot taken with `checkout`.  Never waits, never raises for a broken connection.

        Args:
            slot: what `checkout` returned.
            connection: the connection that was in it.
            reusable: False closes the connection instead of keeping it.
        """
        _notice_fork()
        now = time.monotonic()
        if slot.generation != self._generation:
            return  # leased before a fork, returned after it: the child has no share in it
        slot.connection = connection
        self._end_lease(slot, now)
        if not reusable:
            self._counters["returns_bad"] += 1
        if not reusable or self._closed or slot.epoch != self._epoch or now >= slot.expires_at:
            self._discard_connection(slot)
        else:
            slot.dirty = self.needs_reset
            slot.returned_at = now
        self._give_back(slot)

    def checkin_broken(self, slot: Slot[C]) -> None:
        """Return a slot whose connection has ended by itself; the program may still look at it."""
        if self.owns(slot):
            self._counters["returns_bad"] += 1
            self.reclaim(slot)

    def owns(self, slot: Slot[C]) -> bool:
        """Whether the slot was taken in this process, and not before a fork in the parent."""
        return slot.generation == self._generation

    def reclaim(self, slot: Slot[C]) -> None:
        """Free the slot of a connection that is the pool's no more: garbage collected without being returned, say.

        Safe in a finalizer: never switches.
        """
        slot.connection = None
        if self.owns(slot):
            self._end_lease(slot, time.monotonic())
        self._give_back(slot)

    def _begin_lease(self, slot: Slot[C]) -> None:
        slot.leased_at = time.monotonic()
        slot.holder = weakref.ref(getcurrent())
        self._leased.add(slot)

    def _end_lease(self, slot: Slot[C], now: float) -> None:
        self._leased.discard(slot)
        self._counters["usage_ms"] += (now - slot.leased_at) * 1000

    def _take(self, timeout: float, started: float) -> Slot[C]:
        self._counters["requests_num"] += 1
        request: _Request[C] | None = None
        while True:
            with self._lock:
                slot = self._take_at_once()
                if slot is not None:
                    return slot
                if self.options.max_waiting and len(self._requests) >= self.options.max_waiting:
                    self._counters["requests_errors"] += 1
                    raise self.TooManyRequests(
                        f"the pool {self.name} has {len(self._requests)} requests waiting already "
                        f"(max_waiting={self.options.max_waiting})"
                    )
                if request is not None:
                    self._requests.append(request)
                    break
            # Made without the lock, for it is much to allocate; then look again.
            request = _Request()
        self._counters["requests_queued"] += 1
        try:
            self._wait(request, timeout, started)
        except BaseException:
            self._withdraw(request)
            if request.slot is not None:
                self._give_back(request.slot)
            raise
        self._withdraw(request)
        now = time.monotonic()
        self._counters["requests_wait_ms"] += (now - started) * 1000
        if request.slot is not None:
            return request.slot
        self._counters["requests_errors"] += 1
        if request.error is not None:
            raise request.error
        raise self.PoolTimeout(
            f"no connection of the pool {self.name} came free within {timeout:g} s: all "
            f"{self.options.max_size} (max_size) are in use and {len(self._requests)} other requests wait. "
            f"Hold connections for less long, or {self.how_to_grow}."
            f"{describe_holders(self._leased, now, most=1)}"
        )

    def _wait(self, request: _Request[C], timeout: float, started: float) -> None:
        """Wait until the request is served or the time is over; try and tell what can be on the way."""
        # After half of the patience see whether leases lie in garbage that nobody has collected.
        steps: list[tuple[float, Callable[[], object]]] = [(timeout / 2, _collect_garbage)]
        if 0 < self._slow_after < timeout:
            steps.append((self._slow_after, lambda: self._warn_of_slow_checkout(started)))
        for at, act in sorted(steps, key=itemgetter(0)):
            request.wait(max(0.0, started + at - time.monotonic()))
            if request.slot is not None or request.error is not None:
                return
            act()
        request.wait(max(0.0, started + timeout - time.monotonic()))

    def _warn_of_slow_checkout(self, started: float) -> None:
        now = time.monotonic()
        if now - self._slow_told_at < _SLOW_AT_MOST_EVERY:
            self._slow_untold += 1
            return
        self._slow_told_at = now
        untold, self._slow_untold = self._slow_untold, 0
        more = f"  {untold} more waited as long since the last such warning." if untold else ""
        logger.warning(
            "pool %s: a checkout waits for %.1f s already: %d of max_size=%d connections are in use, %d requests "
            "wait.%s%s",
            self.name,
            now - started,
            self._size - len(self._clean) - len(self._dirty),
            self.options.max_size,
            len(self._requests),
            more,
            describe_holders(self._leased, now),
        )

    def _take_at_once(self) -> Slot[C] | None:
        """A slot that can be had without waiting; called under the lock."""
        if self._closed:
            raise self.PoolClosed(f"the pool {self.name} is closed")
        slot = self._pop_idle(self._is_free)
        if slot is None and self._size < self.options.max_size:
            self._size += 1
            slot = Slot(self._generation)
        return slot or self._pop_idle()

    def _pop_idle(self, fit: Callable[[Slot[C]], bool] | None = None) -> Slot[C] | None:
        """An idle slot, the last returned first; one that awaits its reset if there is no other."""
        for slots in (self._clean, self._dirty):
            for slot in reversed(tuple(slots)):
                if (fit is None or fit(slot)) and slot in slots:
                    slots.remove(slot)
                    return slot
        return None

    def _withdraw(self, request: _Request[C]) -> None:
        """Leave the queue; afterwards ``request.slot`` is final."""
        if request.slot is not None or request.error is not None:
            return
        with self._lock:
            if request in self._requests:
                self._requests.remove(request)

    def _prepare(self, slot: Slot[C]) -> None:
        """Leave a connection in the slot that is alive and clean, opening one if need be."""
        while slot.connection is not None:
            if self._usable(slot):
                return
            self._refill_slot_from_idle(slot)
        self._open(slot)

    def _usable(self, slot: Slot[C]) -> bool:
        """Whether the slot's connection is fit for a lease; if not, it is gone afterwards."""
        assert slot.connection is not None
        if time.monotonic() >= slot.expires_at:
            self._discard_connection(slot)
            return False
        if slot.dirty and not self._clean_up(slot):
            return False
        if self._is_free(slot) and self._check(slot.connection):
            return True
        self._counters["connections_lost"] += 1
        self._discard_connection(slot)
        return False

    def _refill_slot_from_idle(self, slot: Slot[C]) -> None:
        """Move another idle connection into this emptied slot, if there is one: cheaper than connecting."""
        with self._lock:
            other = self._pop_idle(self._is_free)
            if other is None:
                return
            self._size -= 1
        slot.connection, slot.dirty = other.connection, other.dirty
        slot.epoch, slot.expires_at, slot.returned_at = other.epoch, other.expires_at, other.returned_at

    def _open(self, slot: Slot[C]) -> None:
        self._wait_for_room()
        started = time.monotonic()
        self._counters["connections_num"] += 1
        slot.epoch = self._epoch  # as of now: a drain in the meantime means this connection, too
        try:
            slot.connection = self._connect()
        except Exception:
            self._counters["connections_errors"] += 1
            raise
        self._all.add(slot.connection)
        now = time.monotonic()
        self._counters["connections_ms"] += (now - started) * 1000
        slot.dirty = False
        # Jitter as psycopg_pool has it, so that a pool filled at once is not replaced at once.
        slot.expires_at = now + self.options.max_lifetime * random.uniform(0.95, 1.0)

    def _clean_up(self, slot: Slot[C]) -> bool:
        """Reset the slot's connection; False if it had to be discarded."""
        assert slot.connection is not None
        try:
            self._reset(slot.connection)
        except Discard:
            self._counters["returns_bad"] += 1
        except Exception as error:  # noqa: BLE001  any failure means one thing: do not hand this one on
            self._counters["returns_bad"] += 1
            logger.info("pool %s: a returned connection could not be reset: %s", self.name, error)
        else:
            slot.dirty = False
            return True
        self._discard_connection(slot)
        return False

    def _discard_connection(self, slot: Slot[C]) -> None:
        connection, slot.connection = slot.connection, None
        slot.dirty = False
        if connection is None:
            return
        if slot.generation == self._generation:
            self._close(connection)
        else:
            self._abandon(connection)

    def _give_back(self, slot: Slot[C]) -> None:
        """Hand the slot to the first in the queue, or keep its connection, or let it go."""
        if slot.generation != self._generation:
            return  # the parent's
        while True:
            request = doomed = None
            with self._lock:
                if self._closed or slot.epoch != self._epoch:
                    doomed, slot.connection = slot.connection, None  # while it was being opened or reset
                empty, dirty = slot.connection is None, slot.dirty
                if self._requests:
                    # Also an empty slot is worth having: its new holder connects by itself.
                    request = self._requests.popleft()
                    request.slot = slot
                elif empty:
                    self._size -= 1
                elif dirty:
                    self._dirty.append(slot)
                else:
                    self._clean.append(slot)
            if doomed is not None:
                self._close(doomed)
            if request is None:
                break
            if request.wake():
                return
            request.slot = None  # the thread it waited in has gone
        if empty:
            if self._size < self.options.min_size and not self._closed:
                self._at_home(self._refill)
        else:
            if dirty:
                self._at_home(self._send_janitor)
            if self._pruner is None:
                self._at_home(self._plan_prune)

    # In the background

    def _at_home(self, call: Callable[[], object]) -> None:
        # A finalizer may be running in any thread; one without a hub must not get one for it, nobody would end it.
        hub = get_hub_if_exists()
        if hub is not None and hub.main_hub:
            self._home = Mailbox.current()
            call()
        elif self._home is not None:
            self._home.post(call)

    def _send_janitor(self) -> None:
        # As many as there is work for, up to a few: resets wait for the server, not for each other.
        if self._janitors < min(len(self._dirty), 4):
            self._janitors += 1
            gevent.spawn(self._janitor, self._generation)

    def _janitor(self, generation: int) -> None:
        try:
            while generation == self._generation:
                with self._lock:
                    slot = self._dirty.popleft() if self._dirty else None
                if slot is None:
                    return
                try:
                    self._clean_up(slot)
                except BaseException:
                    self._discard_connection(slot)
                    raise
                finally:
                    self._give_back(slot)
        finally:
            if generation == self._generation:
                self._janitors -= 1

    def open(self) -> None:
        """Begin to open `min_size` connections in the background."""
        gevent.get_hub()
        self._at_home(self._refill)

    def _refill(self) -> None:
        if self._size < self.options.min_size and not self._refilling and not self._closed:
            self._refilling = True
            gevent.spawn(self._refill_until_full, self._generation)

    def _refill_until_full(self, generation: int) -> None:
        pause = _REFILL_FIRST
        try:
            while generation == self._generation and not self._closed:
                with self._lock:
                    if self._size >= self.options.min_size:
                        return
                    self._size += 1
                slot: Slot[C] = Slot(self._generation)
                try:
                    self._open(slot)
                    slot.returned_at = time.monotonic()
                    pause = _REFILL_FIRST
                except Exception as error:  # noqa: BLE001  told, counted and tried again
                    logger.warning("pool %s: cannot open a connection, will retry: %s", self.name, error)
                    failed = True
                else:
                    failed = False
                finally:
                    self._give_back(slot)
                if failed:
                    gevent.sleep(pause * random.uniform(0.8, 1.2))
                    pause = min(pause * 2, _REFILL_MOST)
        finally:
            if generation == self._generation:
                self._refilling = False

    def _plan_prune(self) -> None:
        if self._pruner is None:
            # ref=False: an idle pool does not keep a finished program alive.  Nor does the timer keep the pool.
            self._pruner = gevent.get_hub().loop.timer(self.options.max_idle, ref=False)
            self._pruner.start(_prune_if_alive, weakref.ref(self), self._generation)

    def _prune(self, generation: int) -> None:
        """Close what has not been used for `max_idle` seconds; come again while anything is idle."""
        if generation != self._generation:
            return
        self._pruner = None
        now = time.monotonic()
        stale: list[Slot[C]] = []
        with self._lock:
            for slot in tuple(self._clean):  # the longest unused is first
                if self._size <= self.options.min_size or now - slot.returned_at < self.options.max_idle:
                    break
                if slot in self._clean:
                    self._clean.remove(slot)
                    self._size -= 1
                    stale.append(slot)
            more = bool(self._clean or self._dirty)
        for slot in stale:
            self._discard_connection(slot)
        if more:
            self._plan_prune()

    # Life and statistics

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Close idle connections now and leased ones at their return; waiting requests get `PoolClosed`."""
        self._closed = True
        self.drain()
        with self._lock:
            while self._requests:
                request = self._requests.popleft()
                request.error = self.PoolClosed(f"the pool {self.name} was closed while this request waited")
                request.wake()
        _forget(self)

    def drain(self) -> None:
        """Close idle connections now and leased ones at their return; new ones take their place."""
        self._epoch += 1
        self.close_idle()

    def close_idle(self) -> None:
        """Close idle connections now; leased ones are left alone."""
        with self._lock:
            slots = []
            while (slot := self._pop_idle()) is not None:
                self._size -= 1
                slots.append(slot)
        for slot in slots:
            self._discard_connection(slot)
        if self._size < self.options.min_size and not self._closed:
            self._at_home(self._refill)

    def idle(self) -> list[C]:
        """The connections nobody uses now."""
        return [slot.connection for slot in (*self._clean, *self._dirty) if slot.connection is not None]

    def get_stats(self) -> dict[str, int]:
        """Counters and gauges under psycopg_pool's keys; times in milliseconds."""
        return {
            "pool_min": self.options.min_size,
            "pool_max": self.options.max_size,
            "pool_size": self._size,
            "pool_available": len(self._clean) + len(self._dirty),
            "requests_waiting": len(self._requests),
            **{key: int(value) for key, value in self._counters.items()},
        }

    def pop_stats(self) -> dict[str, int]:
        """As `get_stats`; the counters start anew from zero."""
        stats = self.get_stats()
        for key in _COUNTERS:
            taken = stats[key]
            # Taken off, not set to zero: another thread may have counted in the meantime.
            self._counters[key] -= taken
        return stats

    def _after_fork_in_child(self) -> None:
        for connection in list(self._all):
            descriptor = None if self._keeps_over_fork(connection) else self._fileno(connection)
            if descriptor is not None and descriptor >= 0:
                cut_off(descriptor)
        inherited = [*self._clean, *self._dirty]
        self._generation += 1
        self._start()
        for slot in inherited:
            if slot.connection is not None:
                self._abandon(slot.connection)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self._size}/{self.options.max_size}>"


_COUNTERS = (
    "requests_num",
    "requests_queued",
    "requests_wait_ms",
    "requests_errors",
    "usage_ms",
    "returns_bad",
    "connections_num",
    "connections_ms",
    "connections_errors",
    "connections_lost",
)


def _prune_if_alive(reference: weakref.ref[Pool[Any]], generation: int) -> None:
    pool = reference()
    if pool is not None:
        gevent.spawn(pool._prune, generation)


# Seconds between two garbage collections made for want of connections: each stops the whole process.
_COLLECT_AT_MOST_EVERY = 10.0
_collected_at = 0.0


def _collect_garbage() -> None:
    """Free leases that were dropped inside reference cycles (tracebacks, for one)."""
    global _collected_at
    now = time.monotonic()
    if now - _collected_at >= _COLLECT_AT_MOST_EVERY:
        _collected_at = now
        gc.collect()


# By name.  Not a WeakSet: that one cannot be iterated over while another thread adds to it.
_pools: weakref.WeakValueDictionary[str, Pool[Any]] = weakref.WeakValueDictionary()
# By id(): their names may be taken again, and their leases may still be out.
_closed_pools: weakref.WeakValueDictionary[int, Pool[Any]] = weakref.WeakValueDictionary()
_pools_lock = _allocate_lock()
_fork_hook_installed = False


def _register(pool: Pool[Any], name: str) -> str:
    """Add an open pool under its name, which is returned: two pools of one server are told apart by a number."""
    follow_forks()
    with _pools_lock:
        number, candidate = 1, name
        while candidate in _pools:
            number += 1
            candidate = f"{name} ({number})"
        _pools[candidate] = pool
        return candidate


def _forget(pool: Pool[Any]) -> None:
    with _pools_lock:
        _closed_pools[id(pool)] = pool
        if _pools.get(pool.name) is pool:
            del _pools[pool.name]


_process = 0
_in_child: list[Callable[[], None]] = []


def follow_forks(in_child: Callable[[], None] | None = None) -> None:
    """See to it that a forked child starts afresh; ``in_child`` is called there, too."""
    global _process, _fork_hook_installed
    if not _fork_hook_installed:
        _process = os.getpid()
        os.register_at_fork(after_in_child=_after_fork_in_child)
        _fork_hook_installed = True
    if in_child is not None and in_child not in _in_child:
        _in_child.append(in_child)


def _after_fork_in_child() -> None:
    global _pools_lock, _process
    _pools_lock = _allocate_lock()  # another thread of the parent may have held it
    _process = os.getpid()
    for pool in [*_alive(_pools), *_alive(_closed_pools)]:
        pool._after_fork_in_child()
    for in_child in _in_child:
        in_child()


def _notice_fork() -> None:
    # A program in C (uWSGI) forks without a word to Python.
    if os.getpid() != _process:
        _after_fork_in_child()


def all_pools() -> list[Pool[Any]]:
    """The open pools of this process, by name."""
    return sorted(_alive(_pools), key=lambda pool: pool.name)


def _alive(pools: weakref.WeakValueDictionary[Any, Pool[Any]]) -> list[Pool[Any]]:
    return [pool for reference in pools.valuerefs() if (pool := reference()) is not None]
