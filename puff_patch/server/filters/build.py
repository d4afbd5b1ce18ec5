"""The filters of a server, from its options, in the order in which they work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puff_patch import config
from puff_patch.server.filters.access import AccessLog
from puff_patch.server.filters.base import Filter, Filters, Life
from puff_patch.server.filters.compression import Compression
from puff_patch.server.filters.cors import Cors
from puff_patch.server.filters.health import Health, named_check
from puff_patch.server.filters.metrics import MetricsPage, RequestMetrics
from puff_patch.server.filters.proxies import TrustedProxies
from puff_patch.server.filters.request_ids import RequestIds
from puff_patch.server.filters.static import Static

if TYPE_CHECKING:
    from puff_patch.server.options import ServerOptions


def build_filters(options: ServerOptions, life: Life) -> Filters | None:
    """What the options ask for; None if that is nothing, which then costs nothing.

    Raises:
        ValueError: what they ask for cannot be had; the message says why.
        ImportError: a library is missing that they need.
    """
    filters: list[Filter] = []
    # First who asks, for all others.
    if options.trusted_proxies:
        filters.append(TrustedProxies(options.trusted_proxies, options.proxy_headers))
    # Before what logs and counts.
    if options.health_path or options.ready_path:
        checks = {service: named_check(service) for service in options.ready_services}
        checks |= {getattr(check, "__name__", repr(check)): check for check in options.ready_checks}
        filters.append(Health(options.health_path, options.ready_path, checks, options.ready_timeout, life))
    if options.request_ids:
        filters.append(RequestIds())
    if options.access_log:
        filters.append(AccessLog(options.access_log_format))
    if options.metrics_path:
        token = config.current().metrics_token
        if not token:
            raise ValueError(
                f"the metrics at {options.metrics_path} tell addresses and names: set PUFF_METRICS_TOKEN to what "
                "Prometheus must send to see them"
            )
        filters += [RequestMetrics(), MetricsPage(options.metrics_path, token)]
    # It sees a response's head when all others have had their way.
    if options.compression is not None:
        filters.append(Compression(options.compression))
    if options.cors is not None:
        filters.append(Cors(options.cors))
    filters += options.filters
    if options.static:
        filters.append(Static(options.static))
    return Filters(filters, life) if filters else None
