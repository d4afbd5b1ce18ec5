"""Metrics for Prometheus: the statistics of every pool and of the hub, read when they are asked for.

Needs prometheus_client: ``pip install 'puff-patch[metrics]'``.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from puff_patch.pools.base import all_pools
from puff_patch.runtime import watch
from puff_patch.runtime.greenlets import warm_pools
from puff_patch.server.filters.metrics import LATENCY_BOUNDS, request_metrics

try:
    from prometheus_client import REGISTRY
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "puff_patch.metrics needs prometheus_client: pip install 'puff-patch[metrics]'", name=error.name
    ) from error

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_LABELS = ("pool", "kind")
# psycopg_pool's key, the metric's name, its help.
_GAUGES = (
    ("pool_min", "puff_pool_min_connections", "Connections kept open even if nobody needs them."),
    ("pool_max", "puff_pool_max_connections", "Connections that may be open at once in this process."),
    ("pool_size", "puff_pool_connections", "Connections open or being opened."),
    ("pool_available", "puff_pool_available_connections", "Connections that nobody uses."),
    ("requests_waiting", "puff_pool_requests_waiting", "Checkouts that wait for a connection."),
)
_COUNTERS = (
    ("requests_num", "puff_pool_requests", "Checkouts."),
    ("requests_queued", "puff_pool_requests_queued", "Checkouts that had to wait for a connection."),
    ("requests_wait_ms", "puff_pool_requests_wait_seconds", "Time that checkouts waited for a connection."),
    ("requests_errors", "puff_pool_requests_errors", "Checkouts that failed."),
    ("usage_ms", "puff_pool_usage_seconds", "Time that connections were in use."),
    ("returns_bad", "puff_pool_returns_bad", "Connections returned in a state in which they were not kept."),
    ("connections_num", "puff_pool_connections_opened", "Attempts to open a connection."),
    ("connections_ms", "puff_pool_connections_seconds", "Time spent on opening connections."),
    ("connections_errors", "puff_pool_connections_errors", "Failed attempts to open a connection."),
    ("connections_lost", "puff_pool_connections_lost", "Idle connections found broken."),
)


class PuffCollector(Collector):
    """Yields the metrics of this process's pools and hub as they are now."""

    def describe(self) -> Iterator[Metric]:
        """The metrics there can be, for their names."""
        yield from (GaugeMetricFamily(name, text, labels=_LABELS) for _, name, text in _GAUGES)
        yield from (CounterMetricFamily(name, text, labels=_LABELS) for _, name, text in _COUNTERS)
        yield from _greenlets()
        yield from _requests()
        yield from _hub()

    def collect(self) -> Iterator[Metric]:
        """The metrics of every pool, by its name and kind, and of the hub; times in seconds."""
        pools = [((pool.name, pool.kind), pool.get_stats()) for pool in all_pools()]
        for key, name, text in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            for labels, stats in pools:
                gauge.add_metric(labels, stats[key])
            yield gauge
        for key, name, text in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            for labels, stats in pools:
                counter.add_metric(labels, stats[key] / 1000 if key.endswith("_ms") else stats[key])
            yield counter
        yield from _greenlets()
        if request_metrics():
            yield from _requests()
        if watch.is_watched():
            yield from _hub()


def _greenlets() -> Iterator[Metric]:
    warm = warm_pools()
    running, size = sum(pool.running for pool in warm), sum(pool.size for pool in warm)
    greenlets = GaugeMetricFamily("puff_greenlets", "Warm greenlets that serve requests.", labels=["state"])
    greenlets.add_metric(["busy"], running)
    greenlets.add_metric(["idle"], max(0, size - running))
    yield greenlets
    yield GaugeMetricFamily(
        "puff_greenlets_jobs_waiting",
        "Requests that wait for a warm greenlet.",
        value=sum(pool.waiting for pool in warm),
    )


def _hub() -> Iterator[Metric]:
    seen = watch.hub_stats()
    yield CounterMetricFamily(
        "puff_hub_blocks", "Times that a greenlet held the hub for too long.", value=seen.blocks
    )
    yield CounterMetricFamily(
        "puff_hub_blocked_seconds", "Time that greenlets held the hub for too long.", value=seen.blocked_seconds
    )
    yield HistogramMetricFamily(
        "puff_hub_lag_seconds",
        "How late the hub was to do what it was given, measured once a second.",
        buckets=_buckets(watch.LAG_BOUNDS, list(seen.lag_classes)),
        sum_value=seen.lag_seconds,
    )


def _requests() -> Iterator[Metric]:
    servers = request_metrics()
    requests = CounterMetricFamily("puff_http_requests", "Requests that have ended.", labels=["method", "status"])
    counts: Counter[tuple[str, str]] = Counter()
    classes = [0] * (len(LATENCY_BOUNDS) + 1)
    for server in servers:
        counts.update(server.counts)
        classes = [mine + theirs for mine, theirs in zip(classes, server.latency_classes, strict=True)]
    for labels, number in sorted(counts.items()):
        requests.add_metric(labels, number)
    yield requests
    yield HistogramMetricFamily(
        "puff_http_request_seconds",
        "How long requests took, from their head to the end of their response.",
        buckets=_buckets(LATENCY_BOUNDS, classes),
        sum_value=sum(server.seconds for server in servers),
    )
    yield GaugeMetricFamily(
        "puff_http_requests_in_progress",
        "Requests that have begun and not ended.",
        value=sum(server.in_progress for server in servers),
    )


def _buckets(bounds: Sequence[float], classes: Sequence[int]) -> list[tuple[str, float]]:
    """Prometheus's cumulative buckets, from how many fell into each class."""
    return list(zip((*map(str, bounds), "+Inf"), accumulate(classes), strict=True))


_registered: weakref.WeakSet[CollectorRegistry] = weakref.WeakSet()


def register(registry: CollectorRegistry | None = None) -> None:
    """Add the metrics of pools and hub to a registry; does nothing if they are in it.

    Args:
        registry: prometheus_client's default registry if None.
    """
    registry = REGISTRY if registry is None else registry
    if registry not in _registered:
        registry.register(PuffCollector())
        _registered.add(registry)


def page(accept: str) -> tuple[bytes, str]:
    """The default registry of prometheus_client, with the pools and the hub in it.

    Args:
        accept: the value of the header Accept, which chooses the format.

    Returns:
        The page, and its content type.
    """
    register()
    encode, content_type = choose_encoder(accept)
    return encode(REGISTRY), content_type
