"""gunicorn -k gevent beside `manage.py runpuff`, on the sample project, in one run: a table of ratios.

    PUFF_EMBEDDED=1 python benchmarks/smoke.py [--seconds 5] [--connections 64] [--rounds 2]

Three servers, one worker each, serving the sample project and a bare Django (one view, no middleware):

* ``gunicorn+psycogreen``: what teams run today; Django's own backends, a PostgreSQL connection a request.
* ``gunicorn+pools``: gunicorn -k gevent serving the patched project, so with the same pools as runpuff.
* ``runpuff``: this project's server.

The load comes from wrk if it is installed, else from ``load.py``.  Rounds alternate between the servers, since
machines are noisy; the best round of each counts.  Only ratios mean something elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psycopg2

from puff_patch import embedded
from puff_patch.config import current

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "sample_django_project"
BENCHMARKS = ROOT / "benchmarks"
BIN = Path(sys.executable).parent
BARE = "/bare/hello/"
PAGES = (BARE, "/hello/", "/bench/mixed/", "/bench/orm/", "/bench/cache/", "/")


@dataclass
class Result:
    """One measurement."""

    rate: float
    p99_ms: float
    errors: int
    connections: int  # the most PostgreSQL connections seen meanwhile


@dataclass
class Contender:
    """A way to serve the sample project."""

    name: str
    command: list[str]
    bare: list[str]  # the command that serves bare.py instead
    environment: dict[str, str] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)


def gunicorn(application: str, port: int) -> list[str]:
    """gunicorn -k gevent as its documentation has it, without its access log."""
    return [
        str(BIN / "gunicorn"),
        *("--worker-class", "gevent", "--workers", "1", "--worker-connections", "2000"),
        *("--bind", f"127.0.0.1:{port}", "--log-level", "warning", application),
    ]


def contenders(port: int) -> list[Contender]:
    """The servers to compare, all on the same port, one at a time."""
    manage = [sys.executable, "manage.py", "runpuff", f"127.0.0.1:{port}", "--no-access-log"]
    stock = {"DJANGO_SETTINGS_MODULE": "stock_settings"}
    bare = gunicorn("bare:application", port)
    return [
        Contender("gunicorn+psycogreen", gunicorn("stock_wsgi:application", port), bare, stock),
        Contender("gunicorn+pools", gunicorn("mysite.wsgi:application", port), bare),
        Contender("runpuff", manage, [sys.executable, str(BENCHMARKS / "bare.py"), str(port)]),
    ]


_R = TypeVar("_R", bound="Running")


class Running:
    """A server that listens, until the end of the block."""

    def __init__(self, command: list[str], port: int, folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        self._port = port

    def __enter__(self: _R) -> _R:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    sys.exit(f"{self._process.args} did not start")
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def wrk(url: str, connections: int, seconds: float) -> tuple[float, float, int]:
    """Rate, p99 in milliseconds and errors, as wrk reports them."""
    out = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "10s", "--latency", url],
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 60,
    ).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", out)
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", out)
    if rate is None or p99 is None:
        raise RuntimeError(f"wrk printed something else:\n{out}")
    errors = sum(int(n) for n in re.findall(r"(?:connect|read|write|timeout) (\d+)", out))
    errors += sum(int(n) for n in re.findall(r"Non-2xx or 3xx responses: (\d+)", out))
    return float(rate[1]), float(p99[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[p99[2]], errors


def built_in(url: str, connections: int, seconds: float) -> tuple[float, float, int]:
    """The same from ``load.py``."""
    out = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "load.py"), url),
            *("--connections", str(connections), "--seconds", str(seconds)),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 60,
    ).stdout
    found = json.loads(out)
    return found["rate"], found["p99_ms"], int(found["errors"])


def measure(url: str, connections: int, seconds: float) -> Result:
    """Load one page, and watch PostgreSQL's connections meanwhile."""
    generate = wrk if shutil.which("wrk") else built_in
    try:
        urllib.request.urlopen(url, timeout=10).read()
    except urllib.error.URLError as error:
        sys.exit(f"{url}: {error}")
    watcher = subprocess.Popen(
        [sys.executable, __file__, "--watch-connections"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout is not None
    watcher.stdout.readline()  # it has its connection: under load there may be none left for it
    generate(url, connections, 1)  # warm up
    rate, p99, errors = generate(url, connections, seconds)
    most = int(watcher.communicate("", timeout=10)[0])
    return Result(rate, p99, errors, most)


def watch_connections() -> None:
    """Print the most client connections seen until standard input ends (run in a process of its own)."""
    import select

    # Its own database, so that it does not count itself.
    connection = psycopg2.connect(current().postgres_url(), application_name="puff-bench-watch")
    connection.autocommit = True
    cursor = connection.cursor()
    most = 0
    print("watching", flush=True)
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' "
            "AND application_name <> 'puff-bench-watch'"
        )
        most = max(most, cursor.fetchone()[0])
    print(most)


def table(rows: list[Contender], pages: tuple[str, ...]) -> str:
    """A Markdown table; ratios are to the contender in the row above the last but one."""
    lines = [
        "| page | server | requests/s | p99 ms | errors | PG connections | x psycogreen | x same pools |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    stock, same, _ = rows
    for page in pages:
        for row in rows:
            result = row.results[page]
            lines.append(
                f"| {page} | {row.name} | {result.rate:,.0f} | {result.p99_ms:,.1f} | {result.errors} | "
                f"{result.connections} | {result.rate / stock.results[page].rate:.2f} | "
                f"{result.rate / same.results[page].rate:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="of load for each page and round")
    parser.add_argument("--connections", type=int, default=64, help="keep-alive clients")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pages", nargs="+", default=PAGES)
    parser.add_argument("--watch-connections", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch_connections:
        watch_connections()
        return
    if current().embedded:
        embedded.ensure(current().data_dir, export=True)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{SAMPLE}{os.pathsep}{BENCHMARKS}",
        "DJANGO_DEBUG": "0",
        "DJANGO_SECRET_KEY": "only-for-this-benchmark",
        "DJANGO_ALLOWED_HOSTS": "127.0.0.1",
        "SAMPLE_BENCH": "1",
    }
    for command in (["migrate", "--verbosity", "0"], ["seed"]):
        subprocess.run(
            [sys.executable, "manage.py", *command],
            cwd=SAMPLE,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rows = contenders(port)
    pages = tuple(options.pages)
    for number in range(options.rounds):
        for contender in rows:
            for bare in (True, False):
                served = [page for page in pages if (page == BARE) == bare]
                if not served:
                    continue
                command = contender.bare if bare else contender.command
                with Running(command, port, SAMPLE, {**environment, **contender.environment}):
                    for page in served:
                        result = measure(f"http://127.0.0.1:{port}{page}", options.connections, options.seconds)
                        print(f"round {number + 1} {contender.name} {page}: {result}", file=sys.stderr, flush=True)
                        best = contender.results.get(page)
                        if best is None or result.rate > best.rate:
                            contender.results[page] = result
    generator = "wrk" if shutil.which("wrk") else "benchmarks/load.py (install wrk for higher rates)"
    print(
        f"\n{options.connections} keep-alive clients, {options.seconds:g} s a page, "
        f"best of {options.rounds} rounds, load from {generator}, Python {sys.version.split()[0]}\n"
    )
    print(table(rows, pages))


if __name__ == "__main__":
    main()
