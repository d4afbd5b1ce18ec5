"""A server's life: start, serve until a signal, stop without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import resource
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import gevent
from gevent import get_hub
from gevent.event import Event

from puff_patch.runtime import Mailbox, WarmPool, aio
from puff_patch.runtime.watch import is_watched, unwatch_hub, watch_hub
from puff_patch.server import access_log
from puff_patch.server.apps import Applications
from puff_patch.server.asgi import ASGIHandler
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

    Requests of a WSGI application run on warm greenlets of the calling thread's hub, those of an ASGI application
    on the asyncio thread. At the signal new clients are turned away, requests that have been accepted are
    answered, up to ``graceful_timeout``, then the ASGI application's lifespan ends and ``options.on_stop`` runs.
    A second signal cuts what still runs.

    One line with the address goes to stdout once connections are accepted. What blocks the hub meanwhile is
    logged, see ``puff_patch.watch_hub``.

    Args:
        app: a WSGI application, or several of any kind; they should be cooperative, see ``puff_patch.patch_all``.
        options: see :class:`ServerOptions`; None for the defaults.

    Returns:
        The process's exit code: 0 if every accepted request was answered, 1 if some were cut.

    Raises:
        ServerError: it cannot listen on the address, it is not the main thread, the ASGI application failed to
            start, or Granian is missing or of an untested version.
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


class _Server:
    def __init__(self, apps: Applications, options: ServerOptions, listener: Listener) -> None:
        if apps.websockets:
            raise ServerError("WebSocket handlers cannot be served for now")
        filters = [*options.filters]
        self._filters = Filters(filters) if filters else None
        self._options = options
        self._listener = listener
        self._pool = WarmPool(options.max_greenlets)
        self._wsgi: WSGIHandler | None = None
        if apps.wsgi is not None:
            self._wsgi = WSGIHandler(apps.wsgi, listener.address, access_log=options.access_log)
        self._asgi: ASGIHandler | None = None
        if apps.asgi is not None:
            self._asgi = ASGIHandler(
                apps,
                aio.get_thread().loop,
                answer=functools.partial(Mailbox.current().post, self._pool.submit, self._answer),
                filters=self._filters,
                access_log=options.access_log,
                root_path=options.root_path,
            )
        self._front = Front(
            listener,
            self._on_request,
            http=options.http,
            max_connections=_affordable(options.max_connections),
            client_timeout=options.client_timeout,
            filters=self._filters,
            asgi=None if self._asgi is None else self._asgi.side,
        )
        self._signals = 0
        self._signalled = Event()
        self._forced = Event()

    def run(self) -> int:
        if self._options.access_log:
            access_log.enable()
        with _on_signals(self._on_signal), Mailbox.current().hold(), _watched():
            code = 0
            try:
                if self._start_asgi():
                    self._front.start()
                    print(f"puff_patch is listening on {self._listener.url}", flush=True)
                    self._signalled.wait()
                    code = self._stop()
            finally:
                self._pool.close()
                if self._asgi is not None:
                    aio.stop(_LAST_SECONDS)
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
        assert self._wsgi is not None
        self._pool.submit(self._wsgi, exchange)

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

    def _start_asgi(self) -> bool:
        """Start the ASGI application; False if a signal came first."""
        if self._asgi is None or self._options.lifespan == "off":
            return True
        starting = gevent.spawn(_outcome, self._asgi.lifespan.start())
        _wait_for_one(starting, self._signalled)
        if not starting.ready():
            starting.kill()
            return False
        if starting.value is not None:
            raise starting.value
        return True

    def _stop_asgi(self, limit: float) -> None:
        """Stop the ASGI application."""
        assert self._asgi is not None
        stopping = gevent.spawn(_outcome, self._asgi.lifespan.stop())
        # It gets a moment even if its requests took all the time there was.
        seconds = max(limit - time.monotonic(), _LAST_SECONDS)
        _wait_for_one(stopping, self._forced, seconds)
        if not stopping.ready():
            logger.warning("The ASGI application's lifespan did not end in time")
            stopping.kill()
        elif stopping.value is not None:
            logger.error("The ASGI application failed to stop", exc_info=stopping.value)

    def _stop(self) -> int:
        limit = time.monotonic() + self._options.graceful_timeout
        code = self._stop_requests(limit)
        if self._asgi is not None:
            self._stop_asgi(limit)
        return code

    def _stop_requests(self, limit: float) -> int:
        asgi = self._asgi
        running = self._pool.running + self._pool.waiting + (asgi.running if asgi else 0)
        logger.info("Stopping: %d requests are running", running)
        # From now on, whoever has a connection is asked to close it with the next response.
        for handler in self._handlers():
            handler.closing = True
        if asgi is not None:
            asyncio.run_coroutine_threadsafe(asgi.close_websockets(), aio.get_thread().loop)
        filtered = self._listener.turn_away()
        if not filtered:
            logger.info("New clients cannot be turned away on this platform; some may see a reset connection.")
        self._wait_quiet(limit if filtered else min(limit, time.monotonic() + _UNFILTERED))
        self._front.stop()
        while not self._forced.is_set() and time.monotonic() < limit:
            if self._front.wait_stopped(_POLL):
                if asgi is None or not asgi.running:
                    return 0
                gevent.sleep(_POLL)
        return self._cut()

    def _handlers(self) -> list[WSGIHandler | ASGIHandler]:
        return [handler for handler in (self._wsgi, self._asgi) if handler is not None]

    def _wait_quiet(self, limit: float) -> None:
        """Wait until no HTTP/1 request runs, and none came for a moment.

        One of HTTP/2 does not count: the front can tell its client, with GOAWAY, which requests it takes.
        """
        wsgi, asgi, pool = self._wsgi, self._asgi, self._pool
        handlers = self._handlers()
        begun = -1
        quiet_since = 0.0
        while not self._forced.wait(_POLL):
            now = time.monotonic()
            running = pool.running + pool.waiting - (wsgi.http2_running if wsgi else 0)
            running += asgi.http1_running if asgi else 0
            begun_now = sum(handler.http1_begun for handler in handlers)
            if running > 0 or begun_now != begun or self._listener.queued():
                begun = begun_now
                quiet_since = now
            if now - quiet_since >= _QUIET or now >= limit:
                return

    def _cut(self) -> int:
        """End what has not ended in time."""
        cut = self._pool.kill(timeout=_LAST_SECONDS / 2)
        if self._asgi is not None:
            try:
                cut += aio.run_coroutine(self._asgi.cancel(), timeout=_LAST_SECONDS / 2)
            except TimeoutError:
                logger.warning("Some tasks of the ASGI application did not end when they were cancelled")
        connections = self._front.reset_connections()
        why = "a second signal came" if self._forced.is_set() else f"{self._options.graceful_timeout:g} s are over"
        logger.warning("Cut %d running requests and %d connections: %s", cut, connections, why)
        if not self._front.wait_stopped(_LAST_SECONDS / 2):
            logger.warning("The front's threads did not end in time")
        return 1


def _outcome(coroutine: Coroutine[Any, Any, None]) -> Exception | None:
    """Run a coroutine on the asyncio thread; return what it raises, which a greenlet would print."""
    try:
        aio.run_coroutine(coroutine)
    except Exception as error:  # noqa: BLE001 - raised or logged by the caller
        return error
    return None


def _wait_for_one(first: Any, second: Any, timeout: float | None = None) -> None:
    gevent.wait([first, second], timeout=timeout, count=1)


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
