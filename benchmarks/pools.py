"""Pooled beside unpooled, as a table of ratios.

Measured are connect of psycopg2 and psycopg 3, a row of the Django ORM, cache.get and requests.get.

    PUFF_EMBEDDED=1 python benchmarks/pools.py [--seconds 1.5] [--rounds 3] [--cases psycopg2 ...]

Each operation is a greenlet of its own, as a request is in a server, one after the other or 64 at a time. A
contender runs in a fresh process; rounds alternate between the contenders, since machines are noisy, and the best
round of each counts.

* ``unpooled``: gevent with psycogreen, as teams run it today.
* ``pooled``: puff_patch.
* ``ThreadedConnectionPool``: psycopg2's own pool under gevent, behind a semaphore, for it raises when it is empty.
"""

# ruff: noqa: E402 - a contender imports everything else patched
from __future__ import annotations

import sys

CONTENDER = sys.argv[2] if sys.argv[1:2] == ["--run"] else ""
if CONTENDER == "pooled":
    import puff_patch

    puff_patch.patch_all()
elif CONTENDER:
    from gevent import monkey

    monkey.patch_all()
    from psycogreen.gevent import patch_psycopg

    patch_psycopg()

import argparse
import http.server
import json
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

CASES = {
    "psycopg2": ("connect, SELECT 1, close", ("unpooled", "ThreadedConnectionPool", "pooled")),
    "psycopg": ("psycopg 3: connect, SELECT 1, close", ("unpooled", "pooled")),
    "orm": ("Django: one row by primary key", ("unpooled", "pooled")),
    "cache": ("Django: cache.get", ("unpooled", "pooled")),
    "requests": ("requests.get", ("unpooled", "pooled")),
}
MODES = {"one by one": 1, "64 greenlets": 64}


def psycopg2_case() -> Callable[[], object]:
    """Connect, ask, close."""
    import psycopg2
    from gevent.lock import BoundedSemaphore
    from psycopg2.pool import ThreadedConnectionPool

    url = os.environ["PUFF_DEFAULT_POSTGRES_URL"]

    def ask(connection: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            assert cursor.fetchone() == (1,)

    def connect() -> None:
        connection = psycopg2.connect(url)
        try:
            ask(connection)
        finally:
            connection.close()

    if CONTENDER != "ThreadedConnectionPool":
        return connect
    pool, places = ThreadedConnectionPool(10, 10, url), BoundedSemaphore(10)

    def take() -> None:
        with places:
            connection = pool.getconn()
            try:
                ask(connection)
                connection.rollback()
            finally:
                pool.putconn(connection)

    return take


def psycopg_case() -> Callable[[], object]:
    """The same with psycopg 3."""
    import psycopg

    url = os.environ["PUFF_DEFAULT_POSTGRES_URL"]

    def connect() -> None:
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)

    return connect


def _django() -> None:
    import django
    from django.conf import settings
    from psycopg2.extensions import parse_dsn

    names = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
    parameters = parse_dsn(os.environ["PUFF_DEFAULT_POSTGRES_URL"])
    settings.configure(
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                **{names[key]: value for key, value in parameters.items() if key in names},
            }
        },
        CACHES={
            "default": {
                "BACKEND": "django.core.cache.backends.redis.RedisCache",
                "LOCATION": os.environ["PUFF_DEFAULT_REDIS_URL"],
            }
        },
        INSTALLED_APPS=["django.contrib.contenttypes"],
        USE_TZ=True,
    )
    django.setup()


def orm_case() -> Callable[[], object]:
    """A request that reads one row."""
    _django()
    from django.contrib.contenttypes.models import ContentType
    from django.core.management import call_command
    from django.core.signals import request_finished, request_started

    call_command("migrate", verbosity=0)
    key = ContentType.objects.get_or_create(app_label="bench", model="pools")[0].pk

    def request() -> None:
        request_started.send(None)
        assert ContentType.objects.get(pk=key).model == "pools"
        request_finished.send(None)

    return request


def cache_case() -> Callable[[], object]:
    """A request that reads one key."""
    _django()
    from django.core.cache import cache
    from django.core.signals import request_finished, request_started

    cache.set("bench:pools", "value", 600)

    def request() -> None:
        request_started.send(None)
        assert cache.get("bench:pools") == "value"
        request_finished.send(None)

    return request


def requests_case() -> Callable[[], object]:
    """One GET."""
    import requests

    url = os.environ["BENCH_HTTP_URL"]

    def get() -> None:
        assert requests.get(url, timeout=30).text == "ok"

    return get


class Handler(http.server.BaseHTTPRequestHandler):
    """Keeps connections alive."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\nok")

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


def serve() -> None:
    """Be the HTTP server, until standard input ends."""
    import threading

    http.server.ThreadingHTTPServer.request_queue_size = 256
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


def run(case: str, greenlets: int, seconds: float) -> None:
    """Be a contender; prints what was measured."""
    import gevent

    operation = globals()[f"{case}_case"]()
    times: list[float] = []

    def timed() -> None:
        started = time.perf_counter()
        operation()
        times.append(time.perf_counter() - started)

    def client(end: float) -> None:
        while time.perf_counter() < end:
            gevent.spawn(timed).get()

    def all_clients(duration: float) -> float:
        started = time.perf_counter()
        clients = [gevent.spawn(client, started + duration) for _ in range(greenlets)]
        gevent.joinall(clients, raise_error=True)
        return time.perf_counter() - started

    all_clients(0.3)
    times.clear()
    worked = time.process_time()
    took = all_clients(seconds)
    worked = time.process_time() - worked
    times.sort()
    count = len(times)
    print(
        json.dumps(
            [count / took, times[count // 2] * 1000, times[int(count * 0.99)] * 1000, worked / count * 1000]
        )
    )


def measure(case: str, contender: str, greenlets: int, seconds: float) -> list[float]:
    """Rate; p50, p99 and CPU time an operation in milliseconds."""
    done = subprocess.run(
        [sys.executable, __file__, "--run", contender, case, str(greenlets), str(seconds)],
        capture_output=True,
        text=True,
        timeout=seconds + 120,
    )
    if done.returncode:
        raise SystemExit(f"{case}, {contender}: {done.stderr}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    from puff_patch import embedded
    from puff_patch.config import current

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    if current().embedded:
        embedded.ensure(current().data_dir, export=True)
    os.environ["PUFF_DEFAULT_POSTGRES_URL"] = current().postgres_url()
    os.environ["PUFF_DEFAULT_REDIS_URL"] = current().redis_url()
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    os.environ["BENCH_HTTP_URL"] = server.stdout.readline().strip()
    best: dict[tuple[str, str, str], list[float]] = {}
    for number in range(options.rounds):
        for case in options.cases:
            for mode, greenlets in MODES.items():
                for contender in CASES[case][1]:
                    found = measure(case, contender, greenlets, options.seconds)
                    key = (case, mode, contender)
                    best[key] = max(best.get(key, found), found)
                    print(f"round {number + 1} {key}: {found}", file=sys.stderr, flush=True)
    server.communicate("")
    print(
        "| | | operations/s | x unpooled | p50 ms | p99 ms | CPU ms |\n| --- | --- | --: | --: | --: | --: | --: |"
    )
    for (case, mode, contender), (rate, p50, p99, cpu) in best.items():
        ratio = rate / best[case, mode, "unpooled"][0]
        print(
            f"| {CASES[case][0]}, {mode} | {contender} | {rate:,.0f} | {ratio:.2f} "
            f"| {p50:,.2f} | {p99:,.2f} | {cpu:.2f} |"
        )


if __name__ == "__main__":
    if CONTENDER:
        run(sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
    elif sys.argv[1:] == ["--serve"]:
        serve()
    else:
        main()
