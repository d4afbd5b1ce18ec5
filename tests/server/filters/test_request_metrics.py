"""Metrics of requests, and the page that shows them."""

from __future__ import annotations

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from server_process import ServerProcess, StartServer
from support.waiting import eventually

TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def server(start_module_server: StartServer) -> ServerProcess:
    return start_module_server(
        env={"PUFF_METRICS_TOKEN": "secret"}, metrics_path="/metrics", health_path="/-/health", compression={}
    )


def samples(server: ServerProcess) -> dict[tuple[str, ...], float]:
    response, body = server.request("/metrics", headers=TOKEN)
    assert response.status == 200
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse(body.decode())
        for sample in family.samples
    }


def test_requests_are_counted(server: ServerProcess) -> None:
    before = samples(server)
    for path, method in [
        ("/hello", "GET"),
        ("/hello", "GET"),
        ("/nap?seconds=0.15", "GET"),
        ("/none", "GET"),
        ("/fail_early", "POST"),
        ("/hello", "BREW"),
        ("/-/health", "GET"),
    ]:
        server.request(path, method)
    with server.connect() as gone:
        gone.sendall(b"GET /event_stream HTTP/1.1\r\nHost: h\r\n\r\n")
        eventually(lambda: samples(server)[("puff_http_requests_in_progress",)] == 2)  # and this one
        after = samples(server)
    name = "puff_http_requests_total"
    counted = {key[1:]: after[key] - before.get(key, 0) for key in after if key[0] == name}
    asked = counted.pop(("GET", "2xx"))
    assert asked >= 4  # as often as the page was shown, more
    assert counted == {("GET", "4xx"): 1, ("POST", "5xx"): 1, ("other", "2xx"): 1}
    buckets = {key[1]: value for key, value in after.items() if key[0] == "puff_http_request_seconds_bucket"}
    assert list(buckets.values()) == sorted(buckets.values())
    assert buckets["+Inf"] == after[("puff_http_request_seconds_count",)]
    assert buckets["+Inf"] - buckets["0.1"] >= 1, "the nap"
    assert after[("puff_http_request_seconds_sum",)] - before[("puff_http_request_seconds_sum",)] >= 0.15
    eventually(lambda: samples(server)[("puff_http_requests_in_progress",)] == 1)


def test_page(server: ServerProcess) -> None:
    response, body = server.request(
        "/metrics", headers={**TOKEN, "Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(body.decode())}
    assert {"puff_http_requests", "puff_http_request_seconds", "puff_greenlets"} <= names
    assert server.request("/metrics", headers={**TOKEN, "Accept-Encoding": "gzip"})[0].headers["Content-Encoding"]
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        response, body = server.request("/metrics", headers=headers)
        assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert b"puff_http" not in body
    assert server.request("/metrics", "POST", b"x", headers=TOKEN)[0].status == 405


def test_without_a_token_is_one_clear_error(start_server: StartServer) -> None:
    with pytest.raises(pytest.fail.Exception, match="set PUFF_METRICS_TOKEN to what Prometheus must send"):
        start_server(metrics_path="/metrics", env={"PUFF_METRICS_TOKEN": ""})
