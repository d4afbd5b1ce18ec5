"""WebSockets of a Django project, served by runpuff."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest
from raw_websocket import RawWebSocket
from server_process import StartServer
from support.process import run_python
from test_runpuff import PROJECT, command
from websockets.sync.client import connect

PUFF = json.dumps({"websockets": {"/who": "project_websockets:who"}})


@pytest.fixture
def database(postgres_url: str) -> Iterator[dict[str, str]]:
    """The environment of a project with a database of its own."""
    name = "puff_websocket"
    with contextlib.closing(psycopg2.connect(postgres_url)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(f"CREATE DATABASE {name}")
        yield {
            "PROJECT_DATABASE": json.dumps({"ENGINE": "django_backend.postgresql"}),
            "PUFF_DEFAULT_POSTGRES_URL": urlsplit(postgres_url)._replace(path=f"/{name}").geturl(),
            "PUFF_POSTGRES_POOL_MAX_SIZE": "2",
            "PROJECT_PUFF": PUFF,
        }
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


def log_in(database: dict[str, str]) -> str:
    """Make the tables and a user; return the cookie of their session."""
    found: Any = run_python(
        f"""
        import os, sys
        sys.path.insert(0, {str(PROJECT)!r})
        os.environ["DJANGO_SETTINGS_MODULE"] = "project_settings"
        import puff_patch
        puff_patch.patch_all()
        import django
        django.setup()
        from django.contrib.auth import get_user_model
        from django.core.management import call_command
        from django.test import Client
        call_command("migrate", verbosity=0)
        client = Client()
        client.force_login(get_user_model().objects.create_user("ada"))
        report(client.cookies["sessionid"].value)
        """,
        env=database,
    )
    return f"sessionid={found}"


def test_user_and_session(start_server: StartServer, database: dict[str, str]) -> None:
    headers = {"Cookie": log_in(database)}
    server = start_server(command(), database)
    url = f"ws://127.0.0.1:{server.port}/who"
    with contextlib.ExitStack() as stack:
        # More than the pool has connections: one that waits for a message has none.
        sockets = [stack.enter_context(connect(url, additional_headers=headers)) for _ in range(6)]
        assert [ws.recv(timeout=10) for ws in sockets] == ["ada"] * 6
        assert server.request("/query")[1] == b"42"
        for number, ws in enumerate(sockets, 1):
            ws.send("message")
            assert ws.recv(timeout=10) == f"message {number}"
    with connect(url) as ws:
        assert ws.recv(timeout=10) == ""
    with connect(url, additional_headers={"Cookie": "sessionid=forged"}) as ws:
        assert ws.recv(timeout=10) == ""
    assert server.stop() == 0
    assert "Traceback" not in server.output()


def test_allowed_hosts(start_server: StartServer) -> None:
    server = start_server(
        command(), {"PROJECT_PUFF": PUFF, "PROJECT_DEBUG": "1", "PROJECT_NO_HOSTS": "1", "PROJECT_DATABASE": "{}"}
    )
    # As a name that an attacker's DNS has for this server, whose pages then are no foreign origin.
    with RawWebSocket(server, "/who", "Host: evil.example", "Origin: http://evil.example", without="Host") as ws:
        assert ws.status == 400
    server.wait_for_output("Invalid HTTP_HOST header: 'evil.example'")


def test_clear_errors_of_handlers() -> None:
    found = run_python(
        """
        from django.conf import settings
        from django.core.exceptions import ImproperlyConfigured
        from django_backend.websocket import get_handlers
        settings.configure()
        found = [get_handlers()]
        for named in (["/x"], {"x": "json:dumps"}, {"/x": "no_such.handler"}, {"/x": "sys.path"}, {"/x": None}):
            settings.PUFF = {"websockets": named}
            try:
                found.append(list(get_handlers()))
            except ImproperlyConfigured as error:
                found.append(str(error))
        settings.PUFF = {"websockets": {"/a": "json:dumps", "/b": "json.dumps", "/c": print}}
        report([*found, list(get_handlers())])
        """
    )
    assert found == [
        {},
        'settings.PUFF["websockets"] must name a handler for each path, as a dict does.',
        "settings.PUFF[\"websockets\"]: a path begins with '/', unlike 'x'.",
        "settings.PUFF[\"websockets\"]['/x'] is 'no_such.handler', which cannot be loaded: "
        "No module named 'no_such'",
        "settings.PUFF[\"websockets\"]['/x'] is 'sys.path', which is not callable.",
        "settings.PUFF[\"websockets\"]['/x'] is None, which is not callable.",
        ["/a", "/b", "/c"],
    ]
