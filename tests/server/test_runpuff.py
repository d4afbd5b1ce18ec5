"""manage.py runpuff, as a user runs it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, StartServer

PROJECT = Path(__file__).parent / "project"
STATIC = "/static/admin/css/base.css"
NOWHERE = json.dumps(
    {"ENGINE": "django.db.backends.postgresql", "NAME": "x", "HOST": "127.0.0.1", "PORT": "1", "USER": "x"}
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", str(PROJECT / "manage.py"), "runpuff", *(arguments or ("0",))]


def fail(*arguments: str, **env: str) -> str:
    """Run the command, which must fail with a clear error and no traceback; return the error."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=30, env={**os.environ, **env}, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "CommandError: " in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def debug_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The project with DEBUG on."""
    server = ServerProcess(command(), tmp_path_factory.mktemp("runpuff") / "stderr", {"PROJECT_DEBUG": "1"})
    yield server
    assert server.stop() == 0, server.output()


def test_serves_the_project(debug_server: ServerProcess) -> None:
    response, body = debug_server.request("/hello?name=world")
    assert (response.status, body) == (200, b"hello world")
    assert debug_server.request("/query")[1] == b"42"
    assert debug_server.request("/nothing")[0].status == 404


def test_stream(debug_server: ServerProcess) -> None:
    response, body = debug_server.request("/stream")
    assert response.headers["Transfer-Encoding"] == "chunked"
    assert body == b"".join(b"line %d\n" % number for number in range(100))


def test_upload(debug_server: ServerProcess) -> None:
    content = os.urandom(5_000_000)
    body = (
        b'--some-long-boundary\r\nContent-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
        b'--some-long-boundary\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        + content
        + b"\r\n--some-long-boundary--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=some-long-boundary"}
    answer = debug_server.json("/upload", method="POST", body=body, headers=headers)
    assert answer == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "field": "value"}


def test_client_that_leaves_amid_its_upload_is_no_server_error(debug_server: ServerProcess) -> None:
    with debug_server.connect() as sock:
        sock.sendall(
            b"POST /upload?left HTTP/1.1\r\nHost: h\r\n"
            b"Content-Type: multipart/form-data; boundary=some-long-boundary\r\n"
            b"Content-Length: 1000\r\n\r\n--some-long-boundary\r\n"
        )
    output = debug_server.wait_for_output("POST /upload?left")
    assert "failed" not in output


def test_static_files_and_access_log_in_debug(debug_server: ServerProcess) -> None:
    response, body = debug_server.request(STATIC)
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/css"
    assert int(response.headers["Content-Length"]) == len(body)
    debug_server.wait_for_output(f'"GET {STATIC} HTTP/1.1" 200 {len(body)} ')


def test_without_debug(start_server: StartServer) -> None:
    server = start_server(command())
    assert server.request("/hello?unlogged")[1] == b"hello you"
    assert server.request(STATIC)[0].status == 404
    assert "unlogged" not in server.output()


@pytest.mark.parametrize(
    ("arguments", "debug", "status"), [(["--nostatic"], True, 404), (["--insecure"], False, 200)]
)
def test_static_files_as_asked(start_server: StartServer, arguments: list[str], debug: bool, status: int) -> None:
    server = start_server(command("0", *arguments), {"PROJECT_DEBUG": "1"} if debug else {})
    assert server.request(STATIC)[0].status == status


@pytest.mark.parametrize(("argument", "debug"), [("--access-log", False), ("--no-access-log", True)])
def test_access_log_as_asked(start_server: StartServer, argument: str, debug: bool) -> None:
    server = start_server(command("0", argument), {"PROJECT_DEBUG": "1"} if debug else {})
    server.request("/hello?logged")
    server.request("/hello")
    assert server.stop() == 0
    assert ("/hello?logged" in server.output()) is (argument == "--access-log")


def test_prints_where_it_listens_and_what_is_not_migrated() -> None:
    process = subprocess.Popen(command("127.0.0.1:0"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        output = ""
        for line in process.stdout:
            output += line
            if "listening on http://127.0.0.1:" in line:
                break
        assert "unapplied migration(s)" in output
        assert "Quit the server with CONTROL-C" in output
    finally:
        process.terminate()
        assert process.wait(10) == 0
        process.stdout.close()


def test_workers_that_reload(start_server: StartServer, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns("__pycache__"))
    line = [
        sys.executable,
        "-W",
        "error",
        str(project / "manage.py"),
        "runpuff",
        "0",
        "--workers",
        "2",
        "--reload",
    ]
    server = start_server(line, {"PROJECT_APPLICATION": "project_wsgi.application"})
    assert server.request("/hello")[1] == b"hello you"
    urls = project / "project_urls.py"
    urls.write_text(urls.read_text().replace("hello {", "good morning {"))
    limit = time.monotonic() + 10
    while {server.request("/hello")[1] for _ in range(4)} != {b"good morning you"}:
        assert time.monotonic() < limit
    assert server.stop() == 0
    # Said once, and not by each worker.
    assert server.output().count("cannot be used") == 0
    assert "Traceback" not in server.output()


def test_checks_are_run_once_for_all_workers() -> None:
    process = subprocess.Popen(
        command("0", "--workers", "2"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        output = ""
        for line in process.stdout:
            output += line
            if "listening on http://127.0.0.1:" in line:
                process.terminate()
        assert output.count("Performing system checks") == 1
        assert output.count("unapplied migration(s)") == 1
        assert output.count("listening on") == 1
    finally:
        process.terminate()
        assert process.wait(10) == 0
        process.stdout.close()


def test_worker_that_cannot_load_the_application() -> None:
    error = fail("0", "--workers", "2", PROJECT_APPLICATION="no_such.application")
    assert error.count("No module named 'no_such'") == 1


def test_servers_that_share_a_port(start_server: StartServer) -> None:
    shared = {"PUFF_REUSE_PORT": "1"}
    first = start_server(command("0"), shared)
    second = start_server(command(str(first.port), "--workers", "2"), shared)
    assert second.port == first.port
    assert first.stop() == 0
    assert {second.request("/hello")[1] for _ in range(10)} == {b"hello you"}


def test_database_that_cannot_be_reached(start_server: StartServer) -> None:
    server = start_server(command(), {"PROJECT_DATABASE": NOWHERE, "PROJECT_DEBUG": "1"})
    lines = [line for line in server.output().splitlines() if "cannot be used now" in line]
    assert len(lines) == 1
    assert "Connection refused" in lines[0]
    assert "Traceback" not in server.output()
    assert server.request("/hello")[0].status == 200
    assert server.request("/query")[0].status == 500


def test_not_patched() -> None:
    error = fail(PROJECT_UNPATCHED="1")
    assert "puff_patch.patch_all() was not called" in error
    assert "manage.py" in error


def test_port_in_use(debug_server: ServerProcess) -> None:
    assert f"port {debug_server.port} is in use" in fail(str(debug_server.port))


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["nonsense:x"], {}, "'nonsense:x' is not a valid port number or address:port pair"),
        (["70000"], {}, "70000 is not a valid port number"),
        (["192.0.2.1:0"], {}, "the address is not one of this machine"),
        (["0", "--max-requests", "-1"], {}, "max_requests must not be negative"),
        (["0", "--max-greenlets", "0"], {}, "max_greenlets must be at least 1"),
        ([], {"PROJECT_NO_HOSTS": "1"}, "You must set settings.ALLOWED_HOSTS"),
        ([], {"PROJECT_APPLICATION": ""}, "settings.WSGI_APPLICATION is not set"),
        ([], {"PROJECT_APPLICATION": "no_such.application"}, "No module named 'no_such'"),
        ([], {"PROJECT_APPLICATION": "project_wsgi.missing"}, '"missing"'),
        ([], {"PROJECT_APPLICATION": "project_wsgi.number"}, "is not callable but int"),
        ([], {"PROJECT_PUFF": '{"websockets": {"/x": "no_such.handler"}}'}, "cannot be loaded: No module named"),
    ],
)
def test_clear_errors(arguments: list[str], env: dict[str, str], message: str) -> None:
    assert message in fail(*arguments, **env)


def test_debug_on_an_address_that_others_reach(debug_server: ServerProcess) -> None:
    told = "DEBUG is on, and 192.0.2.1 is not a loopback address"
    assert told in fail("192.0.2.1:0", PROJECT_DEBUG="1")
    assert told not in fail("192.0.2.1:0")
    assert "loopback" not in debug_server.output()


@pytest.mark.services
def test_embedded_services(start_server: StartServer, tmp_path: Path) -> None:
    engine: dict[str, Any] = {"ENGINE": "django_backend.postgresql"}
    env = {"PROJECT_DATABASE": json.dumps(engine), "PUFF_DATA_DIR": str(tmp_path / "puff"), "PROJECT_DEBUG": "1"}
    server = start_server(command("0", "--embedded"), env)
    assert server.request("/query")[1] == b"42"
    assert "cannot be used" not in server.output()
    assert server.stop() == 0, server.output()
