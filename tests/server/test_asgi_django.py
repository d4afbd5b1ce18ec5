"""Django under ASGI: sync and async views, streaming, and the ORM on pooled connections."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from server_process import HERE, ServerProcess


@pytest.fixture(scope="module")
def server(services: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    command = [
        sys.executable,
        "-W",
        "error",
        str(HERE / "django_asgi_app.py"),
        f"puff-test-{uuid.uuid4().hex[:12]}",
    ]
    environment = {name: value for name, value in services.env().items() if value is not None}
    process = ServerProcess(command, tmp_path_factory.mktemp("django") / "stderr", environment)
    yield process
    assert process.stop() == 0, process.output()


def ask_many(server: ServerProcess, paths: list[str]) -> list[Any]:
    with httpx.Client(base_url=server.url, timeout=20) as client, ThreadPoolExecutor(40) as pool:
        return [answer.json() for answer in pool.map(client.get, paths)]


def test_views_of_both_kinds_side_by_side(server: ServerProcess) -> None:
    ask_many(server, ["/sync"])
    began = time.monotonic()
    answers = ask_many(server, ["/sync", "/async"] * 40)
    assert answers == [{"same": True, "on_loop": False}, {"one": 1, "on_loop": True}] * 40
    # 80 queries of 50 ms on 5 connections; one after the other it were 8 s.
    assert time.monotonic() - began < 5
    assert server.json("/show")["sessions"] <= 5
    assert server.request("/sync")[0].headers["X-Plain"] == "greenlet"
    assert ask_many(server, ["/chained"] * 40) == [{"same": True}] * 40


def test_request_and_response(server: ServerProcess) -> None:
    shown = server.json("/show")
    assert (shown["path"], shown["client"]) == ("/show", "127.0.0.1")
    assert server.json("/upload", method="POST", body=b"u" * 5_000_000) == {"size": 5_000_000}
    assert server.request("/stream?n=50")[1] == b"".join(b"%d\n" % number for number in range(50))
    assert server.request("/nowhere")[0].status == 404


@pytest.mark.parametrize("path", ["stream?n=100000", "long"])
def test_client_that_leaves_ends_the_view(server: ServerProcess, path: str) -> None:
    left = server.json("/show")["left"]
    with server.connect() as sock:
        sock.sendall(f"GET /{path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        time.sleep(0.2)
    limit = time.monotonic() + 5
    while server.json("/show")["left"] != [*left, path.partition("?")[0]]:
        assert time.monotonic() < limit, server.output()
        time.sleep(0.02)
    assert "Traceback" not in server.output()
