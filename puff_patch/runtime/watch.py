"""The watch over the hub: what held it up, for how long, and where.

A native thread looks at the hub's thread a few times in the time that a greenlet may hold it.  It reads what is
there anyway: libev's count of its iterations, and the stack of that thread.  So the hub itself does nothing for
it and an idle one is not woken, but once a second for a measurement of its lag.

* The innermost frame is the one of ``Hub.run``: the hub waits in epoll.  All is well.
* The iteration is another one than at the last look, or another greenlet has the thread (another outermost frame,
  or a warm greenlet began another job): all is well, too.  Many short turns are no block.
* Else what had the thread at the last look has it still: the time since then is counted as held.

Time is counted with care, so that a starved or suspended process blames nobody: of a look that comes late only
the time that the hub's thread really worked (its CPU clock) counts in full.  The same clock finds C code that
holds the GIL, during which the watch cannot look at all: it waits for the GIL then, in steps of the interpreter's
switch interval, and the kernel counts these, so that it is not mistaken for a watch that had no CPU to look with.

gevent's own monitor thread is not used, because it needs ``greenlet.settrace``: a call at every switch, and the
only one of its kind, which debuggers and coverage want as well.

Nothing is logged from the watching thread if that can be helped: log handlers may do anything, and what they do
is made for the hub.  The report is handed to the hub when the block is over; only of a long one is told from here.
"""

from __future__ import annotations

import atexit
import logging
import os
import resource
import sys
import time
import traceback
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

import gevent
from gevent._hub_local import get_hub_if_exists  # type: ignore[attr-defined,unused-ignore]
from gevent.monkey import get_original

from puff_patch.config import BLOCKED_HUB_MS, current
from puff_patch.runtime.greenlets import warm_pools
from puff_patch.runtime.mailbox import Mailbox
from puff_patch.runtime.stacks import describe, thread_stack, user_frame

logger = logging.getLogger("puff_patch.hub")

_start_new_thread: Callable[..., int] = get_original("_thread", "start_new_thread")
_allocate_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")
_get_ident: Callable[[], int] = get_original("_thread", "get_ident")

# Looks in the time that a greenlet may hold the hub: more cost more, fewer measure worse.
_LOOKS = 5
# A watch that was kept from the GIL has gone to sleep for it more often than this.
_GIL_WAITS = 4
# Seconds after which a block is told of though it is not over.
_LONG = 2.0
# Seconds between two warnings about one place.
_AT_MOST_EVERY = 60.0
# Places remembered for that, and the frames shown of a stack.
_PLACES, _FRAMES = 1000, 30
_LAG_EVERY = 1.0
# Seconds that `unwatch_hub` waits for the thread, which ends at once but for a log handler that hangs.
_STOP_SECONDS = 2.0

#: Upper bounds, in seconds, of the classes in which measured lags are counted.
LAG_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class HubStats:
    """What was seen of the hub since the process began to watch it."""

    __slots__ = ("blocked_seconds", "blocks", "lag_classes", "lag_seconds")

    def __init__(self) -> None:
        self.blocks = 0
        self.blocked_seconds = 0.0
        self.lag_seconds = 0.0
        self.lag_classes = [0] * (len(LAG_BOUNDS) + 1)


class _Block:
    """What has had the hub's thread for some time."""

    __slots__ = ("key", "outermost", "place", "seconds", "stack", "told", "where")

    def __init__(self, key: tuple[int, int], seconds: float) -> None:
        self.key = key
        self.outermost: list[FrameType] | None = None  # to know the greenlet again, from the second look on
        self.seconds = seconds
        self.place: tuple[str, str] | None = None  # set once it has been too long
        self.where = ""
        self.stack = ""
        self.told = False


class _Watch:
    """One thread that watches one hub."""

    def __init__(self, hub: Any, threshold: float, stats: HubStats) -> None:
        self.hub = hub
        self.threshold = threshold
        self.stats = stats
        self._loop = hub.loop
        self._run_code = type(hub).run.__code__
        self._mailbox = Mailbox.current()
        self._ident = _get_ident()
        self._cpu_clock = time.pthread_getcpuclockid(self._ident)
        self._period = threshold / _LOOKS
        self._looked_at = time.monotonic()
        self._cpu = time.clock_gettime(self._cpu_clock)
        self._waits = float("inf")
        self._block: _Block | None = None
        self._told: dict[object, float] = {}
        self._reports: deque[tuple[float, str, str]] = deque()  # that the hub has still to log
        self._lag_asked_at = self._looked_at
        self._lag_pending = False
        self._stop, self._stopped = _allocate_lock(), _allocate_lock()
        self._stop.acquire()
        self._stopped.acquire()
        _start_new_thread(self._run, ())

    def stop(self) -> None:
        """End the thread and wait for that; what it found last is told now."""
        self._stop.release()
        self._stopped.acquire(True, _STOP_SECONDS)
        self._end_block()
        self._tell()

    def _run(self) -> None:
        try:
            while not self._stop.acquire(True, self._period):
                if self._loop is not self.hub.loop or self.hub.dead:
                    return
                self._look()
        except ValueError:
            if self._loop is self.hub.loop:  # not what a destroyed loop raises
                logger.exception("the watch over the hub ended")
        finally:
            # A log handler may have made this thread a hub.
            mine = get_hub_if_exists()
            if mine is not None:
                mine.destroy(destroy_loop=True)
            self._stopped.release()

    def _look(self) -> None:
        now, cpu = time.monotonic(), time.clock_gettime(self._cpu_clock)
        passed, worked = now - self._looked_at, cpu - self._cpu
        waits = _voluntary_switches()
        waited = waits - self._waits
        self._looked_at, self._cpu, self._waits = now, cpu, waits
        if now - self._lag_asked_at >= _LAG_EVERY and not self._lag_pending:
            self._lag_asked_at, self._lag_pending = now, True
            self._mailbox.post(self._take_lag, now)
        innermost = sys._current_frames().get(self._ident)
        waits = innermost is not None and innermost.f_code is self._run_code
        del innermost
        if waits or not self.hub:  # a hub that has never run keeps nobody waiting
            self._give_over()
            return
        key = (self._loop.iteration, sum(pool.begun for pool in warm_pools() if pool.hub is self.hub))
        # If the hub's thread has worked while this one could not look, something held the GIL; and whoever let go
        # of it only now is still there.
        blind = worked if passed > self._period + self.threshold / 2 and waited > _GIL_WAITS else 0.0
        block = self._block
        same = block is not None and block.key == key
        if not same and blind < self.threshold:
            self._give_over()
            self._block = _Block(key, blind)
            return
        stack = thread_stack(self._ident)
        try:
            outermost = stack[-1:]
            if block is None or not same or (block.outermost is not None and block.outermost != outermost):
                self._give_over()
                block = self._block = _Block(key, blind)
            else:
                block.seconds += max(min(passed, 2 * self._period), min(worked, passed))
            block.outermost = outermost
            self._judge(block, stack, now)
        finally:
            self._let_go(stack)

    def _judge(self, block: _Block, stack: list[FrameType], now: float) -> None:
        """See whether a block is too long by now; ``stack`` is its own."""
        if block.seconds < self.threshold:
            return
        late = block.seconds >= max(_LONG, self.threshold)
        if block.place is None or (late and not block.told):
            index = user_frame(stack)
            at = stack[index or 0].f_code if stack else None
            block.place = (at and (at.co_filename, at.co_name)) or ("", "")
            block.where = describe(stack)
            lines = traceback.StackSummary.extract(
                [(frame, frame.f_lineno) for frame in reversed(stack[:_FRAMES])]
            )
            block.stack = "".join(lines.format()).rstrip()
        if late and not block.told and self._may_tell(block, now):
            block.told = True
            logger.warning(
                "the hub has been blocked for %.2f s and still is, by %s\n%s",
                block.seconds,
                block.where,
                block.stack,
            )

    def _let_go(self, frames: list[FrameType] | None) -> None:
        """Forget frames in the hub's thread: what dies with one (a watcher, a connection) must not die in this."""
        if frames:
            self._mailbox.post(frames.clear)

    def _give_over(self) -> None:
        """What had the thread has it no more: have the hub tell of it if that was too long."""
        block = self._block
        if block is not None:
            self._let_go(block.outermost)
            self._end_block()
            if self._reports:
                self._mailbox.post(gevent.spawn, self._tell)  # a log handler may wait, the hub may not

    def _end_block(self) -> None:
        block, self._block = self._block, None
        if block is None or block.place is None:
            return
        self.stats.blocks += 1
        self.stats.blocked_seconds += block.seconds
        now = time.monotonic()
        if block.told or self._may_tell(block, now):
            self._reports.append((block.seconds, block.where, block.stack))

    def _tell(self) -> None:
        while self._reports:
            logger.warning("the hub was blocked for %.2f s by %s\n%s", *self._reports.popleft())

    def _may_tell(self, block: _Block, now: float) -> bool:
        place = (block.place, block.seconds >= _LONG)  # short ones must not hide a long one
        at = self._told.get(place)
        if at is not None and now - at < _AT_MOST_EVERY:
            return False
        if len(self._told) >= _PLACES:
            self._told.clear()
        self._told[place] = now
        return True

    def _take_lag(self, asked_at: float) -> None:
        lag = time.monotonic() - asked_at
        self._lag_pending = False
        self.stats.lag_seconds += lag
        self.stats.lag_classes[bisect_left(LAG_BOUNDS, lag)] += 1


def _voluntary_switches() -> float:
    """How often the calling thread has gone to sleep so far; boundless growth where the platform does not tell."""
    if sys.platform.startswith("linux"):
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    return time.monotonic() / sys.getswitchinterval()


_watch: _Watch | None = None
_stats = HubStats()
_hooked = False


def watch_hub(blocked_ms: float | None = None) -> None:
    """See `puff_patch.watch_hub`."""
    global _watch, _hooked
    if blocked_ms is None:
        configured = current().blocked_hub_ms
        blocked_ms = BLOCKED_HUB_MS if configured is None else configured
    if not 0 <= blocked_ms < float("inf"):
        raise ValueError(f"blocked_ms must be a number of milliseconds, 0 for never, not {blocked_ms}")
    unwatch_hub()
    if blocked_ms == 0:
        return
    hub = gevent.get_hub()
    if hub.loop.iteration < 0:
        logger.warning("the hub is not watched: gevent's libuv loop does not count its iterations")
        return
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_after_fork_in_child)
        atexit.register(unwatch_hub)
    _watch = _Watch(hub, blocked_ms / 1000, _stats)


def unwatch_hub() -> None:
    """See `puff_patch.unwatch_hub`."""
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.stop()


def is_watched() -> bool:
    """Whether a hub of this process is watched."""
    return _watch is not None


def hub_stats() -> HubStats:
    """What was seen of the hub of this process so far, all zero if it was never watched."""
    return _stats


def _after_fork_in_child() -> None:
    global _watch, _stats
    watch, _watch = _watch, None
    _stats = HubStats()
    hub = get_hub_if_exists()
    if watch is not None and hub is not None:
        # When the hub runs, and not now: a child that only calls exec() needs no thread.
        hub.loop.run_callback(_watch_again, os.getpid(), watch.threshold * 1000)


def _watch_again(pid: int, blocked_ms: float) -> None:
    if _watch is None and os.getpid() == pid:
        watch_hub(blocked_ms)
