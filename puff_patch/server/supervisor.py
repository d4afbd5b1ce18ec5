"""Several worker processes on one address: started, kept up, replaced and stopped by a supervisor.

The supervisor opens the listening sockets (see `puff_patch.server.group`) and closes none before the end, so a
connection that waits to be accepted is not lost with a worker: the next one takes it.  It starts each worker as a
fresh process with its own command line, so a worker patches and imports by itself, and what it loads is what the
files say then.  The supervisor never loads the application, and waits with the plain poll(2): no greenlet runs in
it, patched or not.

SIGTERM and SIGINT stop all workers gracefully, a second one cuts what still runs.  SIGHUP replaces them, one after
the other, each old one only when the new one can serve.
"""

from __future__ import annotations

import _socket
import array
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from gevent.monkey import get_original

from puff_patch.server.apps import Applications
from puff_patch.server.cpus import usable_cpus
from puff_patch.server.group import ListenerGroup
from puff_patch.server.link import CUT, GO, GROUP_SIGNALS, LEAVE, READY, REPLACE, STOP, VARIABLE, link
from puff_patch.server.notify import notify
from puff_patch.server.options import ServerError, ServerOptions
from puff_patch.server.serve import serve
from puff_patch.server.watcher import Watcher, watch

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

logger = logging.getLogger("puff_patch.server")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
# Seconds between looks at the clock, while something has a limit and while nothing has.
_TICK, _LONG_TICK = 0.1, 5.0
# The first worker that dies is followed by another at once, further ones of its kind after these seconds.
_FIRST_DELAY, _LAST_DELAY = 0.5, 10.0
# A worker that has served for so long was a good one.
_PROVEN_SECONDS = 10.0
# Beyond the time that its requests have, a worker needs some to close its pools.
_LAST_SECONDS = 5.0
# In development, nobody waits for the requests of an old program for long.
_RELOAD_GRACE = 5.0


def run(
    load: Callable[[], WSGIApplication | Applications],
    options: ServerOptions | None = None,
    *,
    command: Sequence[str] | None = None,
) -> int:
    """Serve an application until SIGTERM or SIGINT: in this process, or in workers if the options ask for them.

    In the latter case the command that started this process is run once for each worker, comes here again and
    serves.  `is_worker` tells the program which of the two it is.

    Args:
        load: returns the application; called where it is served.
        options: see :class:`ServerOptions`; None for the defaults.
        command: what to start a worker with, by default the command line of this process.

    Returns:
        The exit code for this process: 0 if every accepted request was answered.

    Raises:
        ServerError: see `puff_patch.server.serve`.
    """
    options = options or ServerOptions()
    if is_worker() or not options.supervised:
        return serve(load(), options)
    if command is None:
        if not sys.executable:
            raise ServerError("cannot start workers: this program does not know its Python (sys.executable)")
        command = [sys.executable, *sys.orig_argv[1:]]
    count = options.workers or usable_cpus()
    with contextlib.closing(ListenerGroup(options, count)) as listeners:
        return Supervisor(options, count, listeners, command).run()


def is_worker() -> bool:
    """Whether this process was started by a supervisor, to serve."""
    return link() is not None


@dataclass(eq=False)
class _Worker:
    """A worker process, as the supervisor sees it."""

    number: int
    pid: int
    link: _socket.socket
    generation: int
    began: float
    ready: bool = False
    serving_since: float = 0.0
    silent: bool = False
    unwanted: bool = False
    leaving: bool = False
    limit: float = field(default=float("inf"))

    def __str__(self) -> str:
        return f"Worker {self.number} (process {self.pid})"

    def tell(self, message: bytes) -> None:
        with contextlib.suppress(OSError):
            self.link.send(message)


@dataclass(eq=False)
class _Slot:
    """The place of one worker, and of the one that follows it."""

    number: int
    worker: _Worker | None = None
    successor: _Worker | None = None
    deaths: int = 0
    not_before: float = 0.0

    def is_starting(self) -> bool:
        return self.successor is not None or (self.worker is not None and not self.worker.ready)

    def lost(self, now: float, *, proven: bool) -> float:
        """Note a death; return after how many seconds to start another worker."""
        self.deaths = 1 if proven else self.deaths + 1
        delay = 0.0 if self.deaths == 1 else min(_LAST_DELAY, _FIRST_DELAY * 2 ** (self.deaths - 2))
        self.not_before = now + delay
        return delay


class Supervisor:
    """Starts workers and keeps them up; see the module.

    Args:
        options: of the server; ``worker_start_timeout``, ``graceful_timeout``, ``reload`` and ``reload_dirs`` are
            read here.
        count: how many workers there are to be.
        listeners: the sockets they accept from.
        command: starts a worker.
    """

    def __init__(
        self, options: ServerOptions, count: int, listeners: ListenerGroup, command: Sequence[str]
    ) -> None:
        self._options = options
        self._listeners = listeners
        self._command = list(command)
        self._slots = [_Slot(number + 1) for number in range(count)]
        self._leaving: list[_Worker] = []
        self._generation = 0
        # Until all workers of the start are ready they wait for each other.
        self._serving = False
        self._proven = False
        self._stopping = False
        self._failed = False
        self._waits_for_change = False
        self._code = 0
        self._had_terminal = os.isatty(0)
        self._came: list[int] = []
        self._watcher: Watcher | None = None

    def run(self) -> int:
        """Run until SIGTERM or SIGINT, or the first worker fails; return the exit code when all have ended."""
        with contextlib.ExitStack() as stack:
            wake = stack.enter_context(self._signals())
            if self._options.reload:
                self._watcher = stack.enter_context(watch(self._options.reload_dirs))
            try:
                while True:
                    self._act()
                    if self._stopping and not self._workers():
                        return self._code
                    self._wait(wake)
            finally:
                # There are some only if this failed: they hear of it, and end.
                for worker in self._workers():
                    worker.link.close()

    def _workers(self) -> list[_Worker]:
        held = (worker for slot in self._slots for worker in (slot.worker, slot.successor))
        return [worker for worker in (*held, *self._leaving) if worker is not None]

    # What happens

    @contextlib.contextmanager
    def _signals(self) -> Iterator[_socket.socket]:
        """Note signals within the block, and have each make the socket readable."""
        reader, writer = _socket.socketpair()
        for sock in (reader, writer):
            sock.setblocking(False)

        def note(signum: int, frame: FrameType | None) -> None:
            self._came.append(signum)

        # gevent's tells of SIGCHLD only when its loop runs.
        set_handler = get_original("signal", "signal")
        before = [(signum, set_handler(signum, note)) for signum in _SIGNALS]
        fd_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(fd_before)
            for signum, handler in before:
                set_handler(signum, signal.SIG_DFL if handler is None else handler)
            reader.close()
            writer.close()

    def _wait(self, wake: _socket.socket) -> None:
        poll: Any = get_original("select", "poll")()
        poll.register(wake.fileno(), select.POLLIN)
        for worker in self._workers():
            if not worker.silent:
                poll.register(worker.link.fileno(), select.POLLIN)
        busy = (
            self._stopping
            or self._leaving
            or any(slot.is_starting() or slot.worker is None or slot.worker.unwanted for slot in self._slots)
        )
        poll.poll((_TICK if busy or self._watcher is not None else _LONG_TICK) * 1000)
        with contextlib.suppress(BlockingIOError):
            wake.recv(4096)

    def _act(self) -> None:
        """Do all that is to be done now."""
        for worker in self._workers():
            self._hear(worker)
        self._reap()
        while self._came:
            self._on_signal(self._came.pop(0))
        if self._watcher is not None and not self._stopping and (changed := self._watcher.changes()):
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            _say(f"puff_patch: {changed[0]}{more} changed, reloading")
            self._reload()
        now = time.monotonic()
        for worker in self._workers():
            if now > worker.limit:
                worker.limit = float("inf")
                logger.warning("%s did not end in time: killing it", worker)
                self._kill(worker)
            elif not worker.ready and now - worker.began > self._options.worker_start_timeout:
                worker.began = float("inf")
                seconds = self._options.worker_start_timeout
                logger.error("%s is not ready after %g seconds: killing it", worker, seconds)
                self._kill(worker)
        if not self._stopping:
            self._start_missing(now)
            self._replace_next()
            self._listeners.accepted_by(
                slot.number - 1 for slot in self._slots if slot.worker is not None and slot.worker.ready
            )

    def _hear(self, worker: _Worker) -> None:
        try:
            said = worker.link.recv(64, socket.MSG_DONTWAIT)
        except OSError:
            return
        worker.silent = not said
        if READY in said and not worker.ready:
            worker.ready = True
            self._on_ready(worker)
        if REPLACE in said:
            worker.unwanted = True

    def _reap(self) -> None:
        for worker in self._workers():
            pid, status = get_original("os", "waitpid")(worker.pid, os.WNOHANG)
            if pid:
                # What it has said last.
                self._hear(worker)
                worker.link.close()
                self._on_death(worker, os.waitstatus_to_exitcode(status))

    def _on_signal(self, signum: int) -> None:
        if signum == signal.SIGHUP and self._had_terminal and not os.isatty(0):
            signum = signal.SIGTERM  # the terminal was closed
        if signum in (signal.SIGTERM, signal.SIGINT):
            self._stop()
        elif self._stopping:
            return
        elif signum == signal.SIGHUP:
            logger.info("Reloading: %d workers are replaced, one after the other", len(self._slots))
            self._reload()

    # What is done about it

    def _start_missing(self, now: float) -> None:
        for slot in self._slots:
            if slot.worker is None and now >= slot.not_before and not self._waits_for_change:
                slot.worker = self._start(slot)
            if not self._proven:
                return  # the first one shows whether they can be started at all

    def _replace_next(self) -> None:
        """Start one successor, if there is something to replace, and nothing else is being started."""
        if not self._serving or any(slot.is_starting() for slot in self._slots):
            return
        now = time.monotonic()
        for slot in self._slots:
            worker = slot.worker
            if worker is None or now < slot.not_before:
                continue
            if worker.unwanted or worker.generation < self._generation:
                slot.successor = self._start(slot)
                return

    def _start(self, slot: _Slot) -> _Worker | None:
        """Start a worker; return None if the system could not, which is logged."""
        ours, theirs = _socket.socketpair()
        try:
            fd = self._listeners.of(slot.number - 1).dup_fd()
            try:
                ours.sendmsg([b"l"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
            finally:
                get_original("os", "close")(fd)
            os.set_inheritable(theirs.fileno(), True)
            environ = {**os.environ, VARIABLE: str(theirs.fileno()), "PUFF_WORKERS": str(len(self._slots))}
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            pid = get_original("os", "posix_spawn")(
                self._command[0], self._command, environ, setsigmask=[*blocked, *GROUP_SIGNALS]
            )
        except OSError as exc:
            ours.close()
            if not self._proven:
                raise ServerError(f"cannot start a worker with {self._command[0]}: {exc}") from exc
            delay = slot.lost(time.monotonic(), proven=False) or _FIRST_DELAY
            slot.not_before = time.monotonic() + delay
            logger.error("Worker %d cannot be started: %s; the next try is %s", slot.number, exc, _when(delay))
            return None
        finally:
            theirs.close()
        return _Worker(slot.number, pid, ours, self._generation, time.monotonic())

    def _on_ready(self, worker: _Worker) -> None:
        if self._stopping or worker.leaving:
            worker.tell(STOP)
            return
        self._proven = True
        worker.serving_since = time.monotonic()
        for slot in self._slots:
            if slot.successor is worker:
                old, slot.worker, slot.successor = slot.worker, worker, None
                # Before the old one leaves: nobody has to wait.
                worker.tell(GO)
                if old is not None:
                    self._dismiss(old)
        if self._serving:
            worker.tell(GO)
        else:
            self._go_if_ready()
        logger.info("%s is ready after %.1f s", worker, worker.serving_since - worker.began)

    def _go_if_ready(self) -> None:
        """Have the workers of the start serve together, so that the first one does not get all clients."""
        workers = [slot.worker for slot in self._slots if slot.worker is not None and slot.worker.ready]
        if len(workers) == len(self._slots) or (self._failed and workers):
            self._serving = True
            for worker in workers:
                worker.tell(GO)
            _say(f"puff_patch is listening on {self._listeners.url}")
            notify("READY=1")

    def _on_death(self, worker: _Worker, code: int) -> None:
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {_name_of(-code)}"
        if worker in self._leaving:
            self._leaving.remove(worker)
            if code and worker.ready:
                logger.warning("%s %s", worker, how)
            if code and self._stopping and worker.ready:
                self._code = 1
            return
        now = time.monotonic()
        slot = next(slot for slot in self._slots if worker in (slot.worker, slot.successor))
        if worker.ready:
            proven = worker.serving_since > 0 and now - worker.serving_since > _PROVEN_SECONDS
            delay = slot.lost(now, proven=proven)
            slot.worker, slot.successor = slot.successor, None
            logger.warning("%s %s; another one is started %s", worker, how, _when(delay))
            return
        self._failed = True
        if slot.successor is worker:
            slot.successor = None
            if slot.worker is not None and slot.worker.unwanted:
                slot.lost(now, proven=False)
            else:
                # What the files say now cannot be run; the next SIGHUP or change tries again.
                for each in self._workers():
                    each.generation = self._generation
            logger.error(
                "%s, to replace another one, %s before it could serve. The old one serves on.", worker, how
            )
            return
        slot.worker = None
        if self._watcher is not None and not self._serving:
            self._waits_for_change = True
            logger.error("%s %s before it could serve. Waiting for a change.", worker, how)
        elif not self._proven:
            logger.error("%s %s before it could serve", worker, how)
            self._code = code if code > 0 else 1
            self._stopping = True
        else:
            delay = slot.lost(now, proven=False)
            logger.error("%s %s before it could serve; the next try is %s", worker, how, _when(delay))
            if not self._serving:
                self._go_if_ready()

    def _reload(self) -> None:
        self._generation += 1
        self._waits_for_change = False
        for slot in self._slots:
            slot.not_before = 0.0
            slot.deaths = 0
            successor, slot.successor = slot.successor, None
            if successor is not None:
                self._dismiss(successor)  # it may have loaded what has changed since
            worker = slot.worker
            if worker is not None and not worker.ready:
                slot.worker = None
                self._dismiss(worker)

    def _dismiss(self, worker: _Worker) -> None:
        """Have a worker end that others stand in for."""
        worker.leaving = True
        self._leaving.append(worker)
        if not worker.ready:
            self._kill(worker)
            return
        grace = self._options.graceful_timeout
        if self._watcher is not None and grace > _RELOAD_GRACE:
            grace = _RELOAD_GRACE
        worker.limit = time.monotonic() + grace + _LAST_SECONDS
        worker.tell(LEAVE)

    def _stop(self) -> None:
        workers = self._workers()
        if self._stopping:
            for worker in workers:
                worker.tell(CUT)
                worker.limit = time.monotonic() + _LAST_SECONDS
            return
        self._stopping = True
        notify("STOPPING=1")
        self._listeners.turn_away()
        limit = time.monotonic() + self._options.graceful_timeout + _LAST_SECONDS
        for slot in self._slots:
            slot.worker = slot.successor = None
        self._leaving = workers
        for worker in workers:
            worker.leaving = True
            worker.limit = limit
            if worker.ready:
                worker.tell(STOP)
            else:
                self._kill(worker)

    def _kill(self, worker: _Worker) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)


def _say(line: str) -> None:
    """Print a line; that nobody reads is no reason to end."""
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)


def _name_of(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _when(delay: float) -> str:
    return f"in {delay:g} s" if delay else "now"
