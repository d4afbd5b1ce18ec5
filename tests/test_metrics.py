"""The metrics, as Prometheus would read them."""

from __future__ import annotations

from support.process import run_python

READ = """
import puff_patch
puff_patch.patch_all()
import gevent
from prometheus_client import CollectorRegistry, REGISTRY, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

import puff_patch.metrics

def read(registry):
    families = {family.name: family for family in parse(generate_latest(registry).decode())}
    strict = {family.name for family in parse_openmetrics(generate_openmetrics(registry).decode())}
    assert strict >= {name for name in families if not name.endswith("_created")}, (strict, families)
    return families

def value(family, sample, **labels):
    [found] = [s.value for s in family.samples if s.name == sample and s.labels == labels]
    return found
"""


def test_pools_and_hub_as_metrics(services, http_server) -> None:
    run_python(
        READ
        + """
import psycopg2, redis, requests

registry = CollectorRegistry()
puff_patch.metrics.register(registry)
puff_patch.metrics.register(registry)  # once is enough
assert not any(family.samples for name, family in read(registry).items() if name.startswith("puff_pool"))
assert "puff_hub_blocks" not in read(registry), "nobody watches it"

held = psycopg2.connect(os.environ["PUFF_DEFAULT_POSTGRES_URL"])
waits = gevent.spawn(psycopg2.connect, os.environ["PUFF_DEFAULT_POSTGRES_URL"])
gevent.sleep(0.05)
client = redis.Redis.from_url(os.environ["PUFF_DEFAULT_REDIS_URL"])
client.ping()
assert requests.get(os.environ["HTTP_URL"], timeout=10).ok
families = read(registry)
kinds = {(sample.labels["kind"], sample.labels["pool"]) for sample in families["puff_pool_connections"].samples}
assert {kind for kind, name in kinds} == {"postgres", "redis", "http"}, kinds
assert {name for kind, name in kinds} == set(puff_patch.stats())
[name] = [name for kind, name in kinds if kind == "postgres"]
labels = {"pool": name, "kind": "postgres"}
assert value(families["puff_pool_max_connections"], "puff_pool_max_connections", **labels) == 1
assert value(families["puff_pool_requests_waiting"], "puff_pool_requests_waiting", **labels) == 1
assert families["puff_pool_requests"].type == "counter"
assert value(families["puff_pool_requests"], "puff_pool_requests_total", **labels) == 2
held.close()
waits.get(timeout=10).close()
families = read(registry)
seconds = value(families["puff_pool_requests_wait_seconds"], "puff_pool_requests_wait_seconds_total", **labels)
assert 0.05 <= seconds < 10, seconds

puff_patch.watch_hub(50)
def spin():
    limit = time.thread_time() + 0.3
    while time.thread_time() < limit:
        pass
import logging
logging.getLogger("puff_patch.hub").setLevel(logging.ERROR)
gevent.sleep(1.3)  # for one measurement of the lag
gevent.spawn(spin).join()
gevent.sleep(0.1)
families = read(registry)
assert value(families["puff_hub_blocks"], "puff_hub_blocks_total") >= 1
assert 0.2 < value(families["puff_hub_blocked_seconds"], "puff_hub_blocked_seconds_total") < 5
assert families["puff_hub_lag_seconds"].type == "histogram"
count = value(families["puff_hub_lag_seconds"], "puff_hub_lag_seconds_count")
assert count == value(families["puff_hub_lag_seconds"], "puff_hub_lag_seconds_bucket", le="+Inf") >= 1
assert set(read(registry.restricted_registry(["puff_hub_blocks_total"]))) == {"puff_hub_blocks"}
""",
        env={
            **services.env(),
            "HTTP_URL": http_server.url,
            "PUFF_POSTGRES_POOL_MAX_SIZE": "1",
        },
    )


def test_says_what_to_install() -> None:
    run_python(
        """
        sys.modules["prometheus_client"] = None
        import puff_patch
        try:
            import puff_patch.metrics
        except ImportError as error:
            assert "pip install 'puff-patch[metrics]'" in str(error), error
        else:
            raise AssertionError("imported")
        """
    )


def test_the_view_shows_the_metrics_to_whom_has_the_token() -> None:
    run_python(
        """
        import puff_patch
        puff_patch.patch_all()
        import django
        from django.conf import settings
        from django.urls import include, path
        settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="x", ALLOWED_HOSTS=["*"], USE_TZ=True)
        django.setup()
        import logging
        logging.getLogger("django.request").setLevel(logging.ERROR)
        urlpatterns = [path("metrics", include("django_backend.metrics"))]
        from django.test import Client
        client = Client()

        refused = client.get("/metrics")
        assert refused.status_code == 403 and b"PUFF_METRICS_TOKEN" in refused.content
        settings.DEBUG = True
        assert client.get("/metrics").status_code == 200
        for source in ("environment", "settings"):
            for settings.DEBUG in (True, False):
                if source == "environment":
                    os.environ["PUFF_METRICS_TOKEN"] = "s3cret"
                else:
                    os.environ["PUFF_METRICS_TOKEN"] = "other"
                    settings.PUFF_METRICS_TOKEN = "s3cret"
                for wrong in ("", "Bearer x", "s3cret", "é"):
                    answer = client.get("/metrics", headers={"authorization": wrong})
                    assert answer.status_code == 401 and answer["WWW-Authenticate"] == "Bearer", answer
                    assert b"puff_" not in answer.content
                shown = client.get("/metrics", headers={"authorization": "Bearer s3cret"})
                assert shown.status_code == 200 and shown["Content-Type"].startswith("text/plain"), shown
                assert b"puff_greenlets" in shown.content
                assert "no-store" in shown["Cache-Control"]
        shown = client.get("/metrics", headers={
            "authorization": "Bearer s3cret", "accept": "application/openmetrics-text; version=1.0.0"})
        assert shown["Content-Type"].startswith("application/openmetrics-text"), shown["Content-Type"]
        assert shown.content.endswith(b"# EOF\\n")
        assert client.post("/metrics").status_code == 405
        """
    )
