"""The only way from a foreign thread (Rust, asyncio, a plain native thread) into a gevent hub.

One watcher and one deque per hub. ``hub.loop.run_callback_threadsafe`` is not used: libev's reference
count is changed there without the GIL, and at a few thousand calls a second the hub dies with ``LoopExit``.
``deque.append`` is atomic, and ``ev_async_send`` is the one libev call made for other threads.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gevent import get_hub
from gevent._hub_local import get_hub_if_exists
from gevent.hub import Hub

_ATTRIBUTE = "_puff_mailbox"


class Mailbox:
    """Calls posted by any thread, run in one hub, in the order each thread posted them.

    Get the one of the current thread's hub with :meth:`current`; do not build one yourself.
    """

    __slots__ = ("_closed", "_holds", "_hub", "_queue", "_watcher")

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._queue: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._holds = 0
        self._closed = False
        # Without a reference of its own an idle program may still end; see hold().
        self._watcher: Any = hub.loop.async_(ref=False)
        self._watcher.start(self._drain)

    @classmethod
    def current(cls) -> Mailbox:
        """Return the mailbox of the calling thread's hub, made at the first call.

        Call it in the thread that runs the hub, then give the mailbox to the other threads.
        """
        hub = get_hub()
        mailbox: Mailbox | None = getattr(hub, _ATTRIBUTE, None)
        if mailbox is None or mailbox.closed:
            mailbox = cls(hub)
            setattr(hub, _ATTRIBUTE, mailbox)
        return mailbox

    @classmethod
    def of(cls, hub: Hub) -> Mailbox | None:
        """The mailbox of any hub, if its thread has ever called `current`."""
        mailbox: Mailbox | None = getattr(hub, _ATTRIBUTE, None)
        return mailbox

    @property
    def closed(self) -> bool:
        """True once the hub is gone: nothing posted will ever run."""
        return self._closed or self._hub.loop is None or self._hub.dead

    def post(self, fn: Callable[..., object], *args: Any) -> bool:
        """Have ``fn(*args)`` called in the hub soon. Safe in any thread, never blocks, never raises.

        ``fn`` runs in the hub greenlet, so it must not block; to wait, start a greenlet in it. An exception
        it raises goes to the hub's error handler, and the next call runs all the same.

        Returns:
            True if the call is queued; False if the hub is gone, and then ``fn`` will not run.
        """
        if self._closed:
            return False
        self._queue.append((fn, args))
        try:
            self._watcher.send()
        except (ValueError, AttributeError, TypeError):
            # What gevent raises for a watcher of a destroyed loop (which of them depends on the loop's kind).
            self._closed = True
            self._queue.clear()
            return False
        return True

    def post_or_call(self, fn: Callable[..., object], *args: Any) -> None:
        """Call ``fn(*args)`` if this is the hub's own thread, else post it."""
        if get_hub_if_exists() is self._hub:
            fn(*args)
        else:
            self.post(fn, *args)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the hub's loop running within the block, though nothing but this mailbox can wake it.

        A server that waits for a foreign thread holds it; otherwise gevent sees no event that could ever
        come and raises ``LoopExit``. Use it in the hub's own thread.
        """
        self._holds += 1
        self._watcher.ref = True
        try:
            yield
        finally:
            self._holds -= 1
            if not self._holds and not self.closed:
                self._watcher.ref = False

    def _drain(self) -> None:
        queue = self._queue
        # Only what is here now: calls that post again must not keep the loop from its sockets and timers.
        for _ in range(len(queue)):
            fn, args = queue.popleft()
            try:
                fn(*args)
            except BaseException:  # noqa: BLE001 - whatever it is, the hub decides, as for its own callbacks
                self._hub.handle_error(fn, *sys.exc_info())
        if queue:
            self._watcher.send()
