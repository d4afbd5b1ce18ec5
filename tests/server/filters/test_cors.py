"""CORS, as a browser sees it."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlencode

import pytest
from server_process import ServerProcess, StartServer

from puff_patch.server.filters import CorsOptions

APP = "https://app.example.com"


@pytest.fixture(scope="module")
def server(start_module_server: StartServer) -> ServerProcess:
    """Named origins, with credentials."""
    return start_module_server(
        cors={
            "allow_origins": [APP],
            "allow_origin_regex": r"https://[a-z]+\.example\.org",
            "allow_methods": ["GET", "PUT"],
            "allow_headers": ["X-Token"],
            "allow_credentials": True,
            "expose_headers": ["X-Total", "X-Page"],
            "max_age": 77,
        }
    )


@pytest.fixture(scope="module")
def open_server(start_module_server: StartServer) -> ServerProcess:
    """Everybody, anything."""
    return start_module_server(cors={"allow_origins": ["*"], "allow_methods": ["*"], "allow_headers": ["*"]})


def preflight(
    server: ServerProcess, origin: str = APP, method: str = "PUT", headers: str = ""
) -> tuple[http.client.HTTPResponse, bytes]:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    if headers:
        asked["Access-Control-Request-Headers"] = headers
    return server.request("/no_such_path", "OPTIONS", headers=asked)


def of_cors(response: http.client.HTTPResponse) -> dict[str, str]:
    return {
        name.removeprefix("access-control-"): value
        for name, value in response.getheaders()
        if name.startswith("access-control-")
    }


@pytest.mark.parametrize("origin", [APP, "https://one.example.org"])
def test_allowed_origin_may_read(server: ServerProcess, origin: str) -> None:
    response, body = server.request("/hello", headers={"Origin": origin})
    assert body == b"hello\n"
    assert of_cors(response) == {
        "allow-origin": origin,
        "allow-credentials": "true",
        "expose-headers": "X-Total, X-Page",
    }
    assert response.headers["Vary"] == "Origin"


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://app.example.com",
        "https://app.example.com:8443",
        "https://app.example.com.evil.example",
        "https://one.example.org.evil.example",
        "https://evil.example?https://one.example.org",
        "null",
    ],
)
def test_other_origin_may_not(server: ServerProcess, origin: str) -> None:
    response, body = server.request("/hello", headers={"Origin": origin})
    assert (body, of_cors(response)) == (b"hello\n", {})
    response, body = preflight(server, origin)
    assert (response.status, body) == (400, b"Disallowed CORS origin\n")
    assert "allow-origin" not in of_cors(response)


def test_preflight_is_answered_by_the_server(server: ServerProcess) -> None:
    response, body = preflight(server, headers="x-token, Content-Type")
    assert (response.status, body) == (200, b"OK\n")
    found = of_cors(response)
    assert found["allow-origin"] == APP
    assert found["allow-credentials"] == "true"
    assert found["allow-methods"] == "GET, PUT"
    assert "x-token" in found["allow-headers"].split(", ")
    assert found["max-age"] == "77"
    assert "Origin" in response.headers.get_all("Vary", [])


def test_preflight_for_more_than_is_allowed(server: ServerProcess) -> None:
    assert preflight(server, method="DELETE")[1] == b"Disallowed CORS method\n"
    assert preflight(server, headers="X-Other")[1] == b"Disallowed CORS headers\n"


def test_request_of_the_same_site(server: ServerProcess) -> None:
    response, _ = server.request("/hello")
    assert of_cors(response) == {}
    assert response.headers["Vary"] == "Origin", "a cache must not show it to other origins"
    # OPTIONS that asks nothing is the application's.
    assert server.request("/hello", "OPTIONS")[1] == b"hello\n"


def test_an_error_can_be_read_too(server: ServerProcess) -> None:
    response, _ = server.request("/fail_early", headers={"Origin": APP})
    assert response.status == 500
    assert of_cors(response)["allow-origin"] == APP


def test_the_applications_own_headers_are_not_doubled(server: ServerProcess) -> None:
    own = {"Access-Control-Allow-Origin": "*", "Vary": "Cookie"}
    response, _ = server.request("/respond?" + urlencode({"headers": json.dumps(own)}), headers={"Origin": APP})
    assert response.headers.get_all("Access-Control-Allow-Origin") == [APP]
    assert response.headers.get_all("Vary") == ["Cookie", "Origin"]


def test_open_to_everybody(open_server: ServerProcess) -> None:
    response, _ = open_server.request("/hello", headers={"Origin": "https://any.example", "Cookie": "a=1"})
    assert of_cors(response) == {"allow-origin": "*"}
    assert "Vary" not in response.headers
    response, _ = preflight(open_server, "https://any.example", "DELETE", "X-Any, X-Other")
    assert response.status == 200
    assert of_cors(response)["allow-headers"] == "X-Any, X-Other"
    assert "PATCH" in of_cors(response)["allow-methods"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"allow_origins": ["*"], "allow_credentials": True}, "would let every site act as the user"),
        ({"allow_origins": ["app.example.com"]}, "an origin is a scheme, a host"),
        ({"allow_origins": [APP + "/"]}, "an origin is a scheme, a host"),
        ({"allow_origins": APP}, "allow_origins must be a list"),
        ({"allow_origin_regex": "("}, "no regular expression"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorsOptions(**wrong)
