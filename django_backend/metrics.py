"""The metrics of this process over HTTP, for Prometheus: ``path("metrics", include("django_backend.metrics"))``.

They tell addresses of servers and names of databases, so they are shown only to whom sends
``Authorization: Bearer TOKEN`` with the token of the setting ``PUFF_METRICS_TOKEN`` (or the environment variable
of that name); with ``DEBUG`` on and no token set, to everybody.
"""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.utils.crypto import constant_time_compare
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from puff_patch.config import current
from puff_patch.metrics import page


@never_cache
@require_safe
def metrics(request: HttpRequest) -> HttpResponse:
    """The default registry of prometheus_client, with the pools and the hub in it, in the format asked for."""
    token = getattr(settings, "PUFF_METRICS_TOKEN", "") or current().metrics_token
    if not token and not settings.DEBUG:
        return HttpResponse("Set PUFF_METRICS_TOKEN to see the metrics.\n", status=403, content_type="text/plain")
    if token and not constant_time_compare(request.headers.get("Authorization", ""), f"Bearer {token}"):
        return HttpResponse(
            "Send the header 'Authorization: Bearer ' and PUFF_METRICS_TOKEN.\n",
            status=401,
            content_type="text/plain",
            headers={"WWW-Authenticate": "Bearer"},
        )
    body, content_type = page(request.headers.get("Accept", ""))
    return HttpResponse(body, content_type=content_type)


urlpatterns = [path("", metrics, name="puff-metrics")]
