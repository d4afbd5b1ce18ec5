"""Health and readiness, as a load balancer asks for them."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from server_process import ServerProcess, StartServer
from support.waiting import eventually

from puff_patch.server import ServerOptions

PATHS = {"health_path": "/-/health", "ready_path": "/-/ready"}


def answer(server: ServerProcess, path: str) -> tuple[int, Any]:
    response, body = server.request(path)
    assert response.headers["Cache-Control"] == "no-store"
    return response.status, json.loads(body)


def test_answered_while_every_greenlet_is_busy_and_not_logged(start_server: StartServer) -> None:
    server = start_server(**PATHS, max_greenlets=1, access_log=True, request_ids=True)
    with server.connect() as sock:
        sock.sendall(b"GET /nap?seconds=1 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        time.sleep(0.1)
        began = time.monotonic()
        for path in PATHS.values():
            assert answer(server, path) == (200, {"status": "ok"})
        assert server.request("/-/health", "HEAD")[1] == b""
        # With a body that nobody reads.
        assert server.request("/-/health", "POST", b"x" * 100)[0].status == 200
        assert time.monotonic() - began < 0.7
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
    server.request("/hello")
    assert "/-/" not in server.wait_for_output('"GET /hello')


def test_there_are_none_unless_asked_for(server: ServerProcess) -> None:
    for path in PATHS.values():
        assert server.request(path)[0].status == 404


def test_not_ready_while_it_stops(start_server: StartServer) -> None:
    server = start_server(**PATHS)
    prober, busy = server.http(), server.http()
    prober.request("GET", "/-/ready")
    assert prober.getresponse().read() == b'{"status": "ok"}\n'
    busy.request("GET", "/nap?seconds=1")
    eventually(lambda: server.json("/show_seen")["running"] == 1)
    server.signal()
    server.wait_for_output("Stopping")
    prober.request("GET", "/-/ready")
    response = prober.getresponse()
    assert (response.status, json.loads(response.read())) == (503, {"status": "stopping"})
    assert response.headers["Connection"] == "close"
    assert busy.getresponse().read() == b"slept"
    assert server.wait() == 0
    prober.close()
    busy.close()


def test_services(start_server: StartServer, services: Any) -> None:
    env = {**services.env(), "PUFF_DEAD_REDIS_URL": "redis://127.0.0.1:1"}
    server = start_server(env=env, **PATHS, ready_services=["postgres", "redis"], ready_timeout=20)
    assert answer(server, "/-/ready") == (200, {"status": "ok", "checks": {"postgres": "ok", "redis": "ok"}})

    with socket.create_server(("127.0.0.1", 0)) as silent:
        env["PUFF_SILENT_POSTGRES_URL"] = f"postgres://u@127.0.0.1:{silent.getsockname()[1]}/x"
        checks = ["redis", "redis:dead", "postgres:silent"]
        server = start_server(env=env, **PATHS, ready_services=checks, ready_timeout=1.5)
        began = time.monotonic()
        many = [server.http() for _ in range(5)]
        for connection in many:
            connection.request("GET", "/-/ready")
        for connection in many:
            response = connection.getresponse()
            found = {"redis": "ok", "redis:dead": "failed", "postgres:silent": "timeout"}
            assert (response.status, json.loads(response.read())) == (
                503,
                {"status": "unavailable", "checks": found},
            )
            connection.close()
        assert 1.5 <= time.monotonic() - began < 6
        assert answer(server, "/-/health")[0] == 200
        assert server.output().count("Not ready: the check redis:dead failed: ConnectionError") < 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"health_path": "health"}, "health_path must begin with '/'"),
        ({"ready_services": ("redis",)}, "need a ready_path"),
        ({"ready_path": "/r", "ready_timeout": 0}, "ready_timeout must be positive"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerOptions(**wrong)


def test_unknown_check_is_one_clear_error(start_server: StartServer) -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"error: ready_services takes 'postgres', 'redis', .* not 'mysql'"
    ):
        start_server(**PATHS, ready_services=["mysql"])
