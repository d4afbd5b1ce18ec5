"""Metrics of requests, and the page that shows them with all others to Prometheus."""

from __future__ import annotations

import hmac
import weakref
from bisect import bisect_left
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gevent.monkey import get_original

from puff_patch.server.filters.base import Answer, Filter, Responder, Scope, header

if TYPE_CHECKING:
    from puff_patch.server.exchange import Exchange

_allocate_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")

LATENCY_BOUNDS = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0)
"""Upper bounds of the latency classes in seconds; above the last one there is one more class."""

_METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
_STATUS_CLASSES = ("none", "1xx", "2xx", "3xx", "4xx", "5xx", "6xx", "7xx", "8xx", "9xx")


class RequestMetrics(Filter):
    """Counts requests: by method and class of status, by how long they took, and those in progress.

    Attributes:
        in_progress: requests that have begun and not ended.
        counts: how many have ended, by method and class of status (``"none"`` where the client left before).
        latency_classes: how many of them took how long, see `LATENCY_BOUNDS`.
        seconds: how long they took together.
    """

    def __init__(self) -> None:
        # A plain one, and never held for longer than it takes to count: see `Filter` for the two threads.
        self._lock = _allocate_lock()
        self.in_progress = 0
        self.counts: dict[tuple[str, str], int] = {}
        self.latency_classes = [0] * (len(LATENCY_BOUNDS) + 1)
        self.seconds = 0.0
        _live.add(self)

    def begin(self, scope: Scope) -> Responder | None:
        with self._lock:
            self.in_progress += 1
        scope["puff.counted"] = perf_counter()
        return None

    def end(self, scope: Scope, status: int, size: int) -> None:
        began = scope.get("puff.counted")
        if began is None:
            return
        took = perf_counter() - began
        method = scope["method"]
        key = (method if method in _METHODS else "other", _STATUS_CLASSES[status // 100])
        with self._lock:
            self.in_progress -= 1
            self.counts[key] = self.counts.get(key, 0) + 1
            self.latency_classes[bisect_left(LATENCY_BOUNDS, took)] += 1
            self.seconds += took


_live: weakref.WeakSet[RequestMetrics] = weakref.WeakSet()


def request_metrics() -> list[RequestMetrics]:
    """Those of this process's servers."""
    return list(_live)


class MetricsPage(Filter):
    """Shows the default registry of prometheus_client at a path, to whom sends the token.

    Args:
        path: where.
        token: what must come as ``Authorization: Bearer TOKEN``.

    Raises:
        ImportError: prometheus_client is not installed; the message says what to install.
    """

    def __init__(self, path: str, token: str) -> None:
        from puff_patch import metrics

        metrics.register()
        self._page = metrics.page
        self._path = path
        self._wanted = f"Bearer {token}".encode()

    def begin(self, scope: Scope) -> Responder | None:
        if scope["path"] != self._path:
            return None
        if scope["method"] not in ("GET", "HEAD"):
            return Answer.text(405, "Method Not Allowed", (b"allow", b"GET, HEAD"))
        given = header(scope["headers"], b"authorization") or b""
        if not hmac.compare_digest(given, self._wanted):
            return Answer.text(
                401,
                "Send the header 'Authorization: Bearer ' and PUFF_METRICS_TOKEN.",
                (b"www-authenticate", b"Bearer"),
            )
        return self._show

    def _show(self, exchange: Exchange) -> None:
        accept = header(exchange.scope["headers"], b"accept") or b""
        page, content_type = self._page(accept.decode("latin-1"))
        headers = ((b"content-type", content_type.encode()), (b"cache-control", b"no-store"))
        Answer(200, headers, page)(exchange)
