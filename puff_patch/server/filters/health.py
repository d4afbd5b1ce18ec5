"""Health and readiness for load balancers and orchestrators.

Health: the process lives and its hub turns; if not, restart it.  Readiness: send it requests; not before it has
started, not while it stops, and not while a service that it cannot do without does not answer.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import gevent

from puff_patch import config
from puff_patch.server.filters.base import Answer, Filter, Life, Responder, Scope

if TYPE_CHECKING:
    from puff_patch.server.exchange import Exchange

logger = logging.getLogger("puff_patch.server")

Check = Callable[[], object]
"""Raises if a service does not work; runs on a greenlet."""

# However many ask, the services are asked once in this time, in seconds.
_KEPT = 1.0
_HEADERS = ((b"content-type", b"application/json"), (b"cache-control", b"no-store"))


def _answer(status: int, value: dict[str, object], *, urgent: bool = True) -> Answer:
    return Answer(status, _HEADERS, json.dumps(value).encode() + b"\n", urgent=urgent)


_HEALTHY = _answer(200, {"status": "ok"})
_STARTING = _answer(503, {"status": "starting"})
_STOPPING = _answer(503, {"status": "stopping"})


def named_check(service: str) -> Check:
    """The check of a service by name: ``postgres``, ``redis``, or of several ``postgres:reporting``.

    Raises:
        ValueError: it is neither.
    """
    kind, _, name = service.partition(":")
    checks = {"postgres": _check_postgres, "redis": _check_redis}
    if kind not in checks:
        raise ValueError(
            f"ready_services takes 'postgres', 'redis', 'postgres:NAME' and 'redis:NAME', not {service!r}"
        )
    return lambda: checks[kind](name or "default")


class Health(Filter):
    """Answers at two paths, whatever waits for a greenlet; not logged, and not counted.

    Args:
        health_path: where 200 says that the hub turns; empty for nowhere.
        ready_path: where 200 says that requests may come, and 503 that they should not; empty for nowhere.
        checks: what must not fail for the latter, by the name to tell.
        timeout: seconds that all checks together may take.
        life: the server's.
    """

    def __init__(
        self, health_path: str, ready_path: str, checks: Mapping[str, Check], timeout: float, life: Life
    ) -> None:
        self._health_path = health_path
        self._ready_path = ready_path
        self._checks = dict(checks)
        self._timeout = timeout
        self._life = life
        self._asking: gevent.Greenlet[[], Answer] | None = None
        self._asked = 0.0

    def begin(self, scope: Scope) -> Responder | None:
        path = scope["path"]
        if path == self._health_path and path:
            return _HEALTHY
        if path != self._ready_path or not path:
            return None
        if self._life.stopping:
            return _STOPPING
        if not self._life.started:
            return _STARTING
        return self._ask if self._checks else _HEALTHY

    def _ask(self, exchange: Exchange) -> None:
        now = time.monotonic()
        asking = self._asking
        if asking is None or (asking.ready() and now - self._asked > _KEPT):
            self._asked = now
            asking = self._asking = gevent.spawn(self._run_checks)
        answer: Answer = asking.get()
        (_STOPPING if self._life.stopping else answer)(exchange)

    def _run_checks(self) -> Answer:
        running = {name: gevent.spawn(_succeeds, name, check) for name, check in self._checks.items()}
        gevent.joinall(list(running.values()), timeout=self._timeout)
        found: dict[str, object] = {}
        for name, greenlet in running.items():
            if greenlet.ready():
                found[name] = "ok" if greenlet.value else "failed"
            else:
                logger.warning("Not ready: the check %s took more than %g seconds", name, self._timeout)
                found[name] = "timeout"
        gevent.killall(list(running.values()), block=False)
        self._asked = time.monotonic()
        if all(result == "ok" for result in found.values()):
            return _answer(200, {"status": "ok", "checks": found})
        return _answer(503, {"status": "unavailable", "checks": found})


def _succeeds(name: str, check: Check) -> bool:
    try:
        check()
    except Exception as exc:  # noqa: BLE001 - whatever it is, the service cannot be used
        # Not to the client: it names addresses and users.
        logger.warning("Not ready: the check %s failed: %s: %s", name, type(exc).__name__, exc)
        return False
    return True


def _check_postgres(name: str) -> None:
    import psycopg2

    connection = psycopg2.connect(config.current().postgres_url(name))
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    finally:
        connection.close()


def _check_redis(name: str) -> None:
    import redis

    client = redis.Redis.from_url(config.current().redis_url(name))
    try:
        client.ping()
    finally:
        client.close()
