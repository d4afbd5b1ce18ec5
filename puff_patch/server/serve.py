"""A server's life: start, serve until a signal, stop without losing a request."""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import gevent
from gevent import get_hub
from gevent.event import Event

from puff_patch.runtime import Mailbox, WarmPool
from puff_patch.runtime.watch import is_watched, unwatch_hub, watch_hub
from puff_patch.server import access_log
from puff_patch.server.apps import Applications
from puff_patch.server.filters import Filters, Responder
from puff_patch.server.front import ClientDisconnected, Exchange, Front
from puff_patch.server.listener import Listener
from puff_patch.server.options import ServerError, ServerOptions
from puff_patch.server.wsgi import WSGIHandler

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

logger = logging.getLogger("puff_patch.server")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A client that has connected or been told to close gets this long, in seconds, to send one more request.
_QUIET = 0.2
_POLL = 0.02
# Where new clients cannot be turned away, the quiet may never come: then stop accepting after this long.
_UNFILTERED = 1.0
# For what is left after the limit: to unwind killed requests, and for the front's threads to end.
_LAST_SECONDS = 2.0
# Open files kept for everything that is not a client's connection.
_SPARE_FILES = 256


def serve(app: WSGIApplication | Applications, options: ServerOptions | None = None) -> int:
    """Serve an application until SIGTERM or SIGINT, in the calling process and its main thread.

    Requests run on warm greenlets of the calling thread's hub. At the signal new clients are turned away,
    requests that have been accepted are answered, up to ``graceful_timeout``, then ``options.on_stop`` runs.
    A second signal cuts what still runs.

    One line with the address goes to stdout once connections are accepted. What blocks the hub meanwhile is
    logged, see ``puff_patch.watch_hub``.

    Args:
        app: a WSGI application, or several of any kind; they should be cooperative, see ``puff_patch.patch_all``.
        options: see :class:`ServerOptions`; None for the defaults.

    Returns:
        The process's exit code: 0 if every accepted request was answered, 1 if some were cut.

    Raises:
        ServerError: it cannot listen on the address, it is not the main thread, or Granian is missing or of
            an untested version.
    """
    options = options or ServerOptions()
    if not get_hub().main_hub:
        raise ServerError("serve() must be called in the main thread: only there can signals stop it")
    listener = Listener(options)
    try:
        apps = app if isinstance(app, Applications) else Applications(wsgi=app)
        return _Server(apps, options, listener).run()
    finally:
        listener.close()


@contextlib.contextmanager
def serving(app: WSGIApplication | Applications, options: ServerOptions | None = None) -> Iterator[str]:
    """Serve an application beside the block, in the same process: for tests.

    Requests run on greenlets of the calling thread's hub, so they are answered while the block waits,
    cooperatively.  At its end the server stops as `serve` does; signals are not its business.

    Args:
        app: see `serve`.
        options: see `serve`.

    Yields:
        Where it listens, such as ``http://127.0.0.1:41231``.

    Raises:
        ServerError: it cannot listen on the address, or Granian is missing or of an untested version.
    """
    options = options or ServerOptions(port=0, graceful_timeout=5.0)
    listener = Listener(options)
    try:
        server = _Server(app if isinstance(app, Applications) else Applications(wsgi=app), options, listener)
        running = gevent.spawn(server.run, alone=False)
        # The listener holds the connections of clients that come before the front has started.
        gevent.sleep(0)
        if running.ready():
            running.get()
        try:
            yield listener.url
        finally:
            server._on_signal()
            running.get()
    finally:
        listener.close()


class _Server:
    def __init__(self, apps: Applications, options: ServerOptions, listener: Listener) -> None:
        if apps.wsgi is None or apps.asgi is not None or apps.websockets:
            raise ServerError("only a WSGI application can be served for now")
        filters = [*options.filters]
        self._filters = Filters(filters) if filters else None
        self._options = options
        self._listener = listener
        self._pool = WarmPool(options.max_greenlets)
        self._handler = WSGIHandler(apps.wsgi, listener.address, access_log=options.access_log)
        self._front = Front(
            listener,
            self._on_request,
            http=options.http,
            max_connections=_affordable(options.max_connections),
            client_timeout=options.client_timeout,
            filters=self._filters,
        )
        self._signals = 0
        self._signalled = Event()
        self._forced = Event()

    def run(self, *, alone: bool = True) -> int:
        """Serve until told to stop: by a signal, if the server is ``alone`` in its process."""
        if self._options.access_log:
            access_log.enable()
        with contextlib.ExitStack() as within:
            within.enter_context(Mailbox.current().hold())
            if alone:
                within.enter_context(_on_signals(self._on_signal))
                within.enter_context(_watched())
            self._front.start()
            print(f"puff_patch is listening on {self._listener.url}", flush=True)
            self._signalled.wait()
            try:
                code = self._stop()
            finally:
                self._pool.close()
                for hook in self._options.on_stop:
                    try:
                        hook()
                    except Exception:
                        logger.exception("%r failed while the server stopped", hook)
        return code

    def _on_request(self, exchange: Exchange) -> None:
        if self._filters is not None:
            responder = self._filters.begin(exchange.scope)
            if responder is not None:
                self._pool.submit(self._answer, responder, exchange)
                return
        self._pool.submit(self._handler, exchange)

    def _answer(self, responder: Responder, exchange: Exchange) -> None:
        try:
            responder(exchange)
        except ClientDisconnected:
            exchange.abort()
        except BaseException:
            exchange.abort()
            raise
        finally:
            exchange.release()

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals == 1:
            self._signalled.set()
        else:
            self._forced.set()

    def _stop(self) -> int:
        limit = time.monotonic() + self._options.graceful_timeout
        logger.info("Stopping: %d requests are running", self._pool.running + self._pool.waiting)
        # From now on, whoever has a connection is asked to close it with the next response.
        self._handler.closing = True
        filtered = self._listener.turn_away()
        if not filtered:
            logger.info("New clients cannot be turned away on this platform; some may see a reset connection.")
        self._wait_quiet(limit if filtered else min(limit, time.monotonic() + _UNFILTERED))
        self._front.stop()
        while not self._forced.is_set() and time.monotonic() < limit:
            if self._front.wait_stopped(_POLL):
                return 0
        return self._cut()

    def _wait_quiet(self, limit: float) -> None:
        """Wait until no HTTP/1 request runs, and none came for a moment.

        One of HTTP/2 does not count: the front can tell its client, with GOAWAY, which requests it takes.
        """
        handler, pool = self._handler, self._pool
        begun = -1
        quiet_since = 0.0
        while not self._forced.wait(_POLL):
            now = time.monotonic()
            running = pool.running + pool.waiting - handler.http2_running
            if running > 0 or handler.http1_begun != begun or self._listener.queued():
                begun = handler.http1_begun
                quiet_since = now
            if now - quiet_since >= _QUIET or now >= limit:
                return

    def _cut(self) -> int:
        """End what has not ended in time."""
        cut = self._pool.kill(timeout=_LAST_SECONDS / 2)
        connections = self._front.reset_connections()
        why = "a second signal came" if self._forced.is_set() else f"{self._options.graceful_timeout:g} s are over"
        logger.warning("Cut %d running requests and %d connections: %s", cut, connections, why)
        if not self._front.wait_stopped(_LAST_SECONDS / 2):
            logger.warning("The front's threads did not end in time")
        return 1


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Warn within the block of what blocks the hub, unless that is turned off."""
    if is_watched():
        yield
        return
    watch_hub()
    try:
        yield
    finally:
        unwatch_hub()


@contextlib.contextmanager
def _on_signals(callback: Callable[[], None]) -> Iterator[None]:
    """Have the hub call ``callback`` for SIGTERM and SIGINT within the block."""
    # The loop's own watchers, for a handler of signal.signal() runs only when Python code does, and an idle
    # hub runs none.
    watchers = [(signum, get_hub().loop.signal(signum)) for signum in _SIGNALS]
    before = [(signum, signal.getsignal(signum)) for signum in _SIGNALS]
    try:
        for _, watcher in watchers:
            watcher.start(callback)
        yield
    finally:
        for _, watcher in watchers:
            watcher.close()
        for signum, handler in before:
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _affordable(connections: int) -> int:
    """Raise this process's limit of open files to have room for the connections; return how many fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if raised > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    fitting = max(1, soft - min(_SPARE_FILES, soft // 2))
    logger.info("At most %d connections are served at a time: the limit of open files is %d", fitting, soft)
    return fitting
