"""A server's life: start, serve until a signal, stop without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import resource
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import gevent
from gevent import get_hub
from gevent.event import Event

from puff_patch.runtime import Mailbox, WarmPool, aio
from puff_patch.runtime.watch import is_watched, unwatch_hub, watch_hub
from puff_patch.server import access_log
from puff_patch.server.admission import Admission, Refusal
from puff_patch.server.apps import Applications
from puff_patch.server.asgi import ASGIHandler
from puff_patch.server.exchange import ClientDisconnected, Exchange
from puff_patch.server.exchange_websocket import WebSocketExchange
from puff_patch.server.filters import Answer, Life, Responder
from puff_patch.server.filters.build import build_filters
from puff_patch.server.front import Front
from puff_patch.server.headers import CLOSE
from puff_patch.server.link import CUT, GO, LEAVE, READY, REPLACE, STOP, Link, link
from puff_patch.server.listener import Listener
from puff_patch.server.notify import notify
from puff_patch.server.options import ServerError, ServerOptions
from puff_patch.server.tls import TLS, check_tls
from puff_patch.server.websocket import WebSockets, no_application, upgrade_required
from puff_patch.server.wsgi import WSGIHandler

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

logger = logging.getLogger("puff_patch.server")

# A client that has connected or been told to close gets this long, in seconds, to send one more request.
_QUIET = 0.2
_POLL = 0.02
# The same for a worker whose successor serves already: nobody waits for it to end.
_LONG_QUIET = 1.0
# Where new clients cannot be turned away, the quiet may never come: then stop accepting after this long.
_UNFILTERED = 1.0
# For what is left after the limit: to unwind killed requests, and for the front's threads to end.
_LAST_SECONDS = 2.0
# Open files kept for everything that is not a client's connection.
_SPARE_FILES = 256


def serve(app: WSGIApplication | Applications, options: ServerOptions | None = None) -> int:
    """Serve an application until SIGTERM or SIGINT, in the calling process and its main thread.

    Requests of a WSGI application run on warm greenlets of the calling thread's hub, those of an ASGI application
    on the asyncio thread. At the signal new clients are turned away, WebSockets are closed, requests that have
    been accepted are answered, up to ``graceful_timeout``, then the ASGI application's lifespan ends and
    ``options.on_stop`` runs. A second signal cuts what still runs.

    One line with the address goes to stdout once connections are accepted. What blocks the hub meanwhile is
    logged, see ``puff_patch.watch_hub``.

    In a process that a supervisor has started (see `puff_patch.server.run`) it is a worker: it accepts from the
    socket that the supervisor listens on, and the supervisor says when to stop.

    Args:
        app: a WSGI application, or several of any kind; they should be cooperative, see ``puff_patch.patch_all``.
        options: see :class:`ServerOptions`; None for the defaults.

    Returns:
        The process's exit code: 0 if every accepted request was answered, 1 if some were cut.

    Raises:
        ServerError: it cannot listen on the address, a file of TLS cannot be used, it is not the main thread, the
            ASGI application failed to start, or Granian is missing or of an untested version.
    """
    options = options or ServerOptions()
    if not get_hub().main_hub:
        raise ServerError("serve() must be called in the main thread: only there can signals stop it")
    tls = check_tls(options)
    supervisor = link()
    listener = Listener(options, None if supervisor is None else supervisor.receive_listener())
    try:
        apps = app if isinstance(app, Applications) else Applications(wsgi=app)
        return _Server(apps, options, listener, tls, supervisor).run()
    finally:
        listener.close()
        if supervisor is not None:
            supervisor.close()


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
        ServerError: see `serve`.
    """
    options = options or ServerOptions(port=0, graceful_timeout=5.0)
    tls = check_tls(options)
    listener = Listener(options)
    try:
        apps = app if isinstance(app, Applications) else Applications(wsgi=app)
        server = _Server(apps, options, listener, tls, None)
        running = gevent.spawn(server.run, alone=False)
        # The listener holds the connections of clients that come before the front has started.
        gevent.sleep(0)
        if running.ready():
            running.get()
        try:
            yield listener.url
        finally:
            server.stop()
            running.get()
    finally:
        listener.close()


class _Server:
    def __init__(
        self,
        apps: Applications,
        options: ServerOptions,
        listener: Listener,
        tls: TLS | None,
        supervisor: Link | None,
    ) -> None:
        self._life = Life()
        connections, websockets = _affordable(
            options.max_connections, options.max_websockets if apps.websockets or apps.asgi else 0
        )
        try:
            self._filters = build_filters(options, self._life)
            self._websockets = WebSockets(apps.websockets, options, self._filters, limit=max(1, websockets))
        except (ValueError, ImportError) as exc:
            raise ServerError(str(exc)) from exc
        self._options = options
        self._listener = listener
        self._pool = WarmPool(options.max_greenlets)
        self._apps = apps
        self._handler = WSGIHandler(
            apps.wsgi or no_application, listener.address, multiprocess=supervisor is not None
        )
        self._asgi: ASGIHandler | None = None
        if apps.asgi is not None:
            self._asgi = ASGIHandler(
                apps,
                aio.get_thread().loop,
                answer=functools.partial(Mailbox.current().post, self._pool.submit, self._answer),
                filters=self._filters,
                check=lambda scope: self._admission.check(scope),
                is_others=lambda scope: self._websockets.find(scope) is not None,
                count=functools.partial(Mailbox.current().post, self._count_request)
                if supervisor is not None and options.max_requests
                else None,
                max_websockets=max(1, websockets),
                root_path=options.root_path,
            )
        self._front = Front(
            listener,
            self._on_request,
            http=options.http,
            max_connections=connections,
            client_timeout=options.client_timeout,
            idle_timeout=options.idle_timeout,
            max_head_size=options.max_head_size,
            max_body_size=options.max_body_size,
            http2_max_concurrent_streams=options.http2_max_concurrent_streams,
            tls=tls,
            filters=self._filters,
            on_websocket=self._on_websocket if apps.websockets else None,
            websocket_max_size=options.websocket_max_size,
            asgi=None if self._asgi is None else self._asgi.side,
        )
        self._admission = Admission(options, self._front.active)
        self._supervisor = supervisor
        self._replaced = False
        self._requests_left = -1
        if supervisor is not None and options.max_requests:
            self._requests_left = options.max_requests + random.randint(0, options.max_requests_jitter)
        self._go = Event()
        self._told = Event()
        self._forced = Event()

    def run(self, *, alone: bool = True) -> int:
        """Serve until told to stop: by a signal, if the server is ``alone`` in its process."""
        if self._options.access_log:
            access_log.enable(self._options.access_log_format)
        with ExitStack() as running:
            running.enter_context(Mailbox.current().hold())
            if self._supervisor is not None:
                running.enter_context(_watched())
                running.enter_context(_on_signals(self._ask_to_be_replaced, signal.SIGTERM))
                running.enter_context(self._supervisor.listening(self._on_message))
            elif alone:
                running.enter_context(_watched())
                running.enter_context(_on_signals(self.stop, signal.SIGTERM, signal.SIGINT))
            code = 0
            try:
                if self._start_asgi():
                    if self._supervisor is not None:
                        self._supervisor.say(READY)
                        self._go.wait()
                    self._front.start()
                    self._life.started = True
                    if alone and self._supervisor is None:
                        print(f"puff_patch is listening on {self._listener.url}", flush=True)
                        notify("READY=1")
                    self._told.wait()
                    code = self._stop()
            finally:
                self._pool.close()
                self._websockets.close()
                # Tests have a use for that thread after their server.
                if self._asgi is not None and alone:
                    aio.stop(_LAST_SECONDS)
                for hook in self._options.on_stop:
                    try:
                        hook()
                    except Exception:
                        logger.exception("%r failed while the server stopped", hook)
        return code

    def _on_request(self, exchange: Exchange) -> None:
        self._count_request()
        responder = None if self._filters is None else self._filters.begin(exchange.scope)
        if isinstance(responder, Answer) and responder.urgent:
            self._answer(responder, exchange)
        elif (refused := self._admission.check(exchange.scope)) is not None:
            self._refuse(exchange, refused)
        elif responder is not None:
            self._pool.submit(self._answer, responder, exchange)
        elif self._apps.wsgi is None and self._websockets.find(exchange.scope) is not None:
            self._pool.submit(self._answer, upgrade_required, exchange)
        else:
            self._pool.submit(self._handler, exchange)

    def _count_request(self) -> None:
        if self._requests_left > 0:
            self._requests_left -= 1
            if not self._requests_left:
                self._ask_to_be_replaced()

    def _refuse(self, exchange: Exchange, refused: Refusal) -> None:
        """Answer a request at once that is not let in; from then on it does not count."""
        status, headers, body = refused
        if self._handler.closing and exchange.scope["http_version"] != "2":
            headers.append(CLOSE)
        exchange.respond(status, headers, body)
        exchange.forget()
        if exchange.is_client_sending:
            gevent.spawn(_discard, exchange)
        else:
            exchange.release()

    def _on_websocket(self, exchange: WebSocketExchange) -> None:
        found = self._websockets.find(exchange.scope)
        if found is not None:
            self._websockets.begin(exchange, *found)
        else:
            self._websockets.refuse(exchange)

    def _answer(self, responder: Responder, exchange: Exchange) -> None:
        """Have a filter's answer sent instead of an application's."""
        handler, http2 = self._handler, exchange.scope["http_version"] == "2"
        if http2:
            handler.http2_running += 1
        else:
            handler.http1_begun += 1
        try:
            responder(exchange)
            if exchange.is_client_sending and not (isinstance(responder, Answer) and responder.urgent):
                exchange.discard_request()
        except ClientDisconnected:
            exchange.abort()
        except BaseException:
            exchange.abort()
            raise
        finally:
            exchange.release()
            if http2:
                handler.http2_running -= 1

    def stop(self) -> None:
        """Begin to stop; called again, cut what still runs."""
        self._on_message(CUT if self._told.is_set() else STOP)

    def _ask_to_be_replaced(self) -> None:
        # And not end at once: others, the supervisor too, may have got the same signal, and then nobody is left
        # who would take the connections that wait.
        if self._supervisor is not None:
            self._supervisor.say(REPLACE)

    def _on_message(self, message: bytes) -> None:
        if message == CUT:
            self._forced.set()
        if message != GO and not self._told.is_set():
            # Without a supervisor (b""), all its workers end.
            self._replaced = message == LEAVE
            self._told.set()
        # Who is told to stop before it serves does both.
        self._go.set()

    def _start_asgi(self) -> bool:
        """Start the ASGI application; False if a signal came first."""
        if self._asgi is None or self._options.lifespan == "off":
            return True
        starting = gevent.spawn(_outcome, self._asgi.lifespan.start())
        _wait_for_one(starting, self._told)
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
        if self._supervisor is None:
            notify("STOPPING=1")
        limit = time.monotonic() + self._options.graceful_timeout
        code = self._stop_requests(limit)
        if self._asgi is not None:
            self._stop_asgi(limit)
        return code

    def _stop_requests(self, limit: float) -> int:
        asgi = self._asgi
        limit_of_quiet = limit
        logger.info(
            "Stopping: %d requests are running, and %d WebSockets open",
            self._pool.running + self._pool.waiting + (asgi.requests_running if asgi else 0),
            self._websockets.running + (asgi.websockets_running if asgi else 0),
        )
        self._websockets.go_away()
        # From now on, whoever has a connection is asked to close it with the next response.
        self._handler.closing = True
        self._life.stopping = True
        if asgi is not None:
            asgi.closing = True
            asyncio.run_coroutine_threadsafe(asgi.close_websockets(), aio.get_thread().loop)
        if self._replaced:
            self._front.stop_accepting()
        elif not self._listener.turn_away():
            logger.info("New clients cannot be turned away on this platform; some may see a reset connection.")
            limit_of_quiet = min(limit, time.monotonic() + _UNFILTERED)
        self._wait_quiet(limit_of_quiet)
        self._front.stop()
        while not self._forced.is_set() and time.monotonic() < limit:
            if self._websockets.running:
                self._forced.wait(_POLL)
            elif self._front.wait_stopped(_POLL):
                if asgi is None or not asgi.running:
                    return 0
                self._forced.wait(_POLL)
        return self._cut()

    def _wait_quiet(self, limit: float) -> None:
        """Wait until no HTTP/1 request runs, and none came for a moment.

        One of HTTP/2 does not count: the front can tell its client, with GOAWAY, which requests it takes.
        """
        handler, asgi, pool = self._handler, self._asgi, self._pool
        quiet = _LONG_QUIET if self._replaced else _QUIET
        begun = -1
        quiet_since = 0.0
        while not self._forced.wait(_POLL):
            now = time.monotonic()
            running = pool.running + pool.waiting - handler.http2_running + (asgi.http1_running if asgi else 0)
            begun_now = handler.http1_begun + (asgi.http1_begun if asgi else 0)
            if running > 0 or begun_now != begun or (not self._replaced and self._listener.queued()):
                begun = begun_now
                quiet_since = now
            elif self._replaced and now - quiet_since >= _QUIET and not self._front.has_connections():
                return
            if now - quiet_since >= quiet or now >= limit:
                return

    def _cut(self) -> int:
        """End what has not ended in time."""
        cut = self._pool.kill(timeout=_LAST_SECONDS / 2) + self._websockets.kill(timeout=_LAST_SECONDS / 2)
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


def _discard(exchange: Exchange) -> None:
    """Hear a client out that was answered already, within limits."""
    try:
        exchange.discard_request()
    finally:
        exchange.release()


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
def _on_signals(callback: Callable[[], None], *signals: signal.Signals) -> Iterator[None]:
    """Have the hub call ``callback`` for the signals within the block."""
    # The loop's own watchers, for a handler of signal.signal() runs only when Python code does, and an idle
    # hub runs none.
    watchers = [get_hub().loop.signal(signum) for signum in signals]
    before = [(signum, signal.getsignal(signum)) for signum in signals]
    try:
        for watcher in watchers:
            watcher.start(callback)
        yield
    finally:
        for watcher in watchers:
            watcher.close()
        for signum, handler in before:
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _affordable(connections: int, websockets: int) -> tuple[int, int]:
    """Raise this process's limit of open files to have room for both; return how many of each fit.

    The front does not count WebSockets among its connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + websockets + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if raised > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections, websockets
    fitting = max(2, soft - min(_SPARE_FILES, soft // 2))
    websockets = min(websockets, fitting // 2)
    connections = min(connections, fitting - websockets)
    served = f"{connections} connections" + (f" and {websockets} WebSockets" if websockets else "")
    logger.info("At most %s are served at a time: the limit of open files is %d", served, soft)
    return connections, websockets
