"""``puff serve`` and ``puff new``, and their Django side: ``settings.PUFF``, and puff.toml beside manage.py."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, read_all
from support.process import run

PUFF = ["-W", "error", "-m", "puff_patch.cli"]
APP = """
import os, time
assert time.sleep.__module__.startswith("gevent"), "patched before it is imported"

def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{environ['PATH_INFO']} {os.environ.get('SAID')}".encode()]
"""

Serve = Callable[..., ServerProcess]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts ``puff serve`` in a folder."""
    started: list[ServerProcess] = []

    def start(folder: Path, *arguments: str, **env: str) -> ServerProcess:
        monkeypatch.chdir(folder)
        log = tmp_path / f"stderr-{len(started)}"
        started.append(ServerProcess([sys.executable, *PUFF, "serve", *arguments], log, env))
        return started[-1]

    yield start
    for process in started:
        assert process.stop() == 0, process.output()


def new(folder: Path, name: str, *arguments: str) -> Path:
    done = run(["-m", "puff_patch.cli", "new", name, *arguments], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"cd {name} && " in done.stdout
    return folder / name


def test_three_lines_serve_and_the_environment_and_options_win(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "puff.toml").write_text('wsgi = "app:app"\nbind = "127.0.0.1:0"\naccess_log = true\n')
    (tmp_path / ".env").write_text(f"SAID=yes\nPUFF_BIND=unix:{tmp_path}/socket\n")
    with_env = serve(tmp_path)
    assert with_env.url == f"unix:{tmp_path}/socket"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/socket")
        client.sendall(b"GET /it HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        assert read_all(client).endswith(b"/it yes")
    with_env.wait_for_output('"GET /it HTTP/1.1" 200 ')
    with (tmp_path / "puff.toml").open("a") as file:
        file.write('[[graphql]]\nschema = "app.Schema"\nurl = "/graphql/"\n[[task_queue]]\nenable = true\n')
    by_option = serve(tmp_path, "--bind", "127.0.0.1:0", "--no-access-log", SAID="no")
    assert by_option.request("/x")[1] == b"/x no"
    assert by_option.stop() == 0
    assert "GET" not in by_option.output()
    # What is not there yet is told.
    assert "puff.toml, line 4: GraphQL comes in a later version; not served: /graphql/\n" in by_option.output()
    assert "puff.toml, line 7: tasks are run by a later version" in by_option.output()


@pytest.mark.parametrize(
    ("kind", "path", "answer"),
    [
        ("plain", "/there", "Hello from /there of mine"),
        ("flask", "/greet/you", '"Hello, you"'),
        ("fastapi", "/", "mine"),
    ],
)
def test_a_new_project_runs_at_once(tmp_path: Path, serve: Serve, kind: str, path: str, answer: str) -> None:
    folder = new(tmp_path, "mine", f"--{kind}")
    done = run(["-m", "puff_patch.cli", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"], cwd=folder)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    server = serve(folder, "--bind", "127.0.0.1:0")
    response, body = server.request(path)
    assert response.status == 200
    assert answer in body.decode()
    if kind == "plain":
        assert run(["-m", "puff_patch.cli", "hello"], cwd=folder).stdout == "Hello from mine\n"


@pytest.fixture
def django(tmp_path: Path) -> Path:
    return new(tmp_path, "mysite", "--django")


def manage(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run(["manage.py", *arguments], cwd=folder, env={"PUFF_EMBEDDED": "0", **env})


@pytest.mark.services
def test_a_new_django_project_runs_at_once(django: Path, serve: Serve, services: Any) -> None:
    env = {"PUFF_EMBEDDED": "0", **services.env()}
    shell = (
        "from django.core.cache import cache; cache.set('a', 1, 1);"
        "from django.db import connection; connection.ensure_connection();"
        "from puff_patch import stats; print(sorted(pool['pool_max'] for pool in stats().values()))"
    )
    with (django / "puff.toml").open("a") as file:
        file.write("pool_size = 33\n")  # of [[redis]], the last table
    puff_toml = django / "puff.toml"
    puff_toml.write_text(puff_toml.read_text().replace("[[postgres]]\n", "[[postgres]]\npool_size = 3\n"))
    done = run(["-m", "puff_patch.cli", "django", "shell", "-v0", "-c", shell], cwd=django, env=env)
    assert done.stdout == "[3, 33]\n", f"as puff.toml has it\n{done.stderr}"
    server = serve(django, "--bind", "127.0.0.1:0", "--skip-checks", **env)
    assert server.request("/")[1] == b"Hello from mysite\n"
    assert server.request("/static/admin/css/base.css")[0].status == 200, "in DEBUG, as runpuff has it"
    server.wait_for_output('"GET / HTTP/1.1" 200 ')


def test_settings_have_the_last_word_over_the_file_beside_manage_py(django: Path, tmp_path: Path) -> None:
    settings = django / "mysite" / "settings.py"
    with settings.open("a") as file:
        file.write("PUFF = {'max_greenlets': 7, 'postgres': [{'name': 'default', 'pool_size': 4}]}\n")
    (django / "puff.toml").write_text("max_greenlets = 5\nbacklog = 6\n")
    shell = (
        "from django_backend import conf; from puff_patch import config, serving; import json;"
        "options = serving.server_options(conf.read(), {});"
        "print(json.dumps([options.max_greenlets, options.backlog, config.current().postgres_pools]))"
    )
    # From elsewhere: the file is looked for beside manage.py, which is where BASE_DIR is.
    done = run([str(django / "manage.py"), "shell", "-v0", "-c", shell], cwd=tmp_path)
    assert json.loads(done.stdout) == [7, 6, {"default": {"max_size": 4}}], done.stderr
    (django / "puff.toml").write_text("[[postgres]]\nname = 'audit'\npool_sice = 3\n")
    told = manage(django, "check")
    assert told.returncode == 1
    assert (
        "(puff.E002) puff_patch cannot use its configuration: puff.toml, line 3: unknown key 'pool_sice'; did"
        in (told.stderr)
    )
    (django / "puff.toml").unlink()
    with settings.open("a") as file:
        file.write("PUFF = {'wokers': 7}\n")
    assert "settings.PUFF: unknown key 'wokers'" in manage(django, "check").stderr
    served = manage(django, "runpuff", "0")
    assert "CommandError: settings.PUFF: unknown key 'wokers'" in served.stderr
    assert "Traceback" not in served.stderr


def test_runpuff_takes_the_options_of_puff_serve(django: Path) -> None:
    theirs = manage(django, "runpuff", "--help").stdout
    ours = run(["-m", "puff_patch.cli", "serve", "--help"], cwd=django, env={"PUFF_EMBEDDED": "0"}).stdout

    def options(text: str) -> set[str]:
        return {word.strip(",") for word in text.split() if word.startswith("--")}

    of_services = {"--default-postgres-url", "--default-redis-url", "--data-dir", "--no-embedded"}
    of_services |= {"--slow-checkout-ms", "--blocked-hub-ms"}
    assert options(ours) - of_services <= options(theirs)


def test_a_django_project_of_the_seeds_kind_is_served_without_our_apps(django: Path, serve: Serve) -> None:
    settings = django / "mysite" / "settings.py"
    settings.write_text(settings.read_text().replace('    "django_backend",\n', ""))
    (django / "puff.toml").write_text('django = true\nwsgi = "mysite.wsgi.application"\n')
    assert serve(django, "--bind", "127.0.0.1:0").request("/")[1] == b"Hello from mysite\n"
    (django / "puff.toml").write_text("django = true\n")  # its settings name the application, too
    assert serve(django, "--bind", "127.0.0.1:0").request("/")[1] == b"Hello from mysite\n"
