"""This project's HTTP server beside its peers, in one run, one worker each: tables of ratios.

    python benchmarks/server.py [--cases hello django http2 idle workers] [--seconds 3] [--rounds 3]

* ``hello``: a constant from WSGI, against gunicorn -k gevent and gevent.pywsgi.
* ``django``: a bare Django (one view, no middleware), against gunicorn -k gevent.
* ``http2``: the first one again over HTTP/2, from h2load, against HTTP/1.1 from h2load.
* ``idle``: 64 busy clients beside 10,000 that are connected and idle, against none of those.
* ``workers``: the bare Django from two workers, against one.

The load comes from wrk if it is installed, else from ``load.py``; HTTP/2 needs h2load (Debian: nghttp2-client).
Contenders take turns, since machines are noisy, and a ratio is the median of those of the rounds.  "CPU us" is
what the server's processes worked for one request, user and system: it hardly depends on who else is at work.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from smoke import BENCHMARKS, Running, built_in, gunicorn, wrk

CLIENTS = 64
HELLO, DJANGO = "/", "/bare/hello/"
# Takes a URL and seconds; returns requests a second, their p99 in milliseconds, and errors.
Load = Callable[[str, float], tuple[float, float, int]]


@dataclass(frozen=True)
class Contender:
    """A server, and how it is loaded."""

    name: str
    command: list[str]
    path: str
    load: Load
    idle: int = 0


@dataclass(frozen=True)
class Result:
    """One measurement."""

    rate: float
    p99_ms: float
    errors: int
    cpu_us: float  # of the server's processes, for one request
    rss_mb: float


class Measured(Running):
    """A server whose processes are looked at, too."""

    def used(self) -> tuple[float, float]:
        """Seconds of CPU and resident megabytes so far, of all its processes."""
        main = psutil.Process(self._process.pid)
        processes = [main, *main.children(recursive=True)]
        times = [process.cpu_times() for process in processes]
        return (
            sum(each.user + each.system for each in times),
            sum(process.memory_info().rss for process in processes) / 1e6,
        )


def http1(url: str, seconds: float) -> tuple[float, float, int]:
    """Rate, p99 in milliseconds and errors of keep-alive clients of HTTP/1.1."""
    return (wrk if shutil.which("wrk") else built_in)(url, CLIENTS, seconds)


def h2load(*options: str) -> Load:
    """The same from h2load."""

    def load(url: str, seconds: float) -> tuple[float, float, int]:
        out = subprocess.run(
            ["h2load", *options, "-c", str(CLIENTS), "-t", "1", "-D", f"{seconds:g}", "--log-file", LOG, url],
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds + 60,
        ).stdout
        rate, counts = re.search(r"([\d.]+) req/s", out), re.search(r"(\d+) failed, (\d+) errored", out)
        if rate is None or counts is None:
            raise RuntimeError(f"h2load printed something else:\n{out}")
        # A line a request: when it began, its status, microseconds.
        with open(LOG) as log:
            times = sorted(int(line.split()[2]) for line in log)
        os.unlink(LOG)
        p99 = times[int(len(times) * 0.99)] / 1000 if times else 0.0
        return float(rate[1]), p99, int(counts[1]) + int(counts[2])

    return load


LOG = f"/tmp/puff-h2load-{os.getpid()}.log"


def measure(contender: Contender, port: int, seconds: float) -> Result:
    """Start a contender, warm it up, load it."""
    url = f"http://127.0.0.1:{port}{contender.path}"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    with Measured(contender.command, port, BENCHMARKS, environment) as server:
        idle = None
        if contender.idle:
            idle = subprocess.Popen(
                [sys.executable, str(BENCHMARKS / "idle.py"), url, str(contender.idle)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert idle.stdout is not None
            if not idle.stdout.readline().startswith("open"):
                sys.exit(f"{contender.name}: the idle connections could not be opened")
        contender.load(url, 1)
        before, _ = server.used()
        rate, p99, errors = contender.load(url, seconds)
        after, rss = server.used()
        if idle is not None:
            said, _ = idle.communicate("\n", timeout=120)
            errors += json.loads(said)["errors"]
    return Result(rate, p99, errors, (after - before) / (rate * seconds) * 1e6, rss)


def cases(port: int, idle: int = 10_000) -> dict[str, list[Contender]]:
    """Who meets whom: the last of each is compared with the others."""

    def ours(name: str, load: Load = http1, *, idle: int = 0) -> Contender:
        return Contender(name, [sys.executable, "hello.py", "puff_patch", str(port)], HELLO, load, idle)

    def bare(name: str, *workers: str) -> Contender:
        return Contender(name, [sys.executable, "bare.py", str(port), *workers], DJANGO, http1)

    pywsgi = [sys.executable, "hello.py", "pywsgi", str(port)]
    return {
        "hello": [
            Contender("gevent.pywsgi", pywsgi, HELLO, http1),
            Contender("gunicorn -k gevent", gunicorn("hello:application", port), HELLO, http1),
            ours("puff_patch"),
        ],
        "django": [
            Contender("gunicorn -k gevent", gunicorn("bare:application", port), DJANGO, http1),
            bare("puff_patch"),
        ],
        "http2": [
            ours("HTTP/1.1", h2load("--h1")),
            ours("HTTP/2, 1 request at a time", h2load("-m", "1")),
            ours("HTTP/2, 10 at a time", h2load("-m", "10")),
        ],
        "idle": [ours("64 busy clients"), ours(f"and {idle:,} idle ones", idle=idle)],
        "workers": [bare("1 worker"), bare("2 workers", "2")],
    }


def missing(case: str) -> str:
    """What a case needs and is not there; empty if nothing."""
    if case == "http2" and shutil.which("h2load") is None:
        return "h2load is not installed (Debian: apt install nghttp2-client)"
    if case == "workers" and importlib.util.find_spec("puff_patch.server.supervisor") is None:
        return "this version serves from one worker only"
    return ""


def table(case: str, rows: list[Contender], results: list[list[Result]]) -> str:
    """A Markdown table of the medians over the rounds, in the order of the rows."""
    lines = [
        f"| {case} | requests/s | p99 ms | errors | CPU us | RSS MB | x |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for index, row in enumerate(rows):
        mine = [result[index] for result in results]
        ratio = statistics.median(result[-1].rate / result[index].rate for result in results)
        rate, p99, cpu, rss = (
            statistics.median(getattr(result, name) for result in mine)
            for name in ("rate", "p99_ms", "cpu_us", "rss_mb")
        )
        errors = sum(result.errors for result in mine)
        lines.append(
            f"| {row.name} | {rate:,.0f} | {p99:,.1f} | {errors} | {cpu:,.0f} | {rss:,.0f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    every = cases(port)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3, help="of load for each contender and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=list(every), default=list(every))
    options = parser.parse_args()
    generator = "wrk" if shutil.which("wrk") else "benchmarks/load.py, which is the limit (install wrk)"
    print(
        f"{CLIENTS} keep-alive clients, {options.seconds:g} s each, median of {options.rounds} rounds, load from "
        f"{generator}, Python {sys.version.split()[0]}, {os.cpu_count()} cores; x: the last row over this one"
    )
    for case in options.cases:
        if why := missing(case):
            print(f"\n{case}: left out, {why}")
            continue
        rows = every[case]
        results = []
        for number in range(options.rounds):
            results.append([measure(row, port, options.seconds) for row in rows])
            for row, result in zip(rows, results[-1], strict=True):
                print(f"round {number + 1} {case} {row.name}: {result}", file=sys.stderr, flush=True)
        print(f"\n{table(case, rows, results)}", flush=True)


if __name__ == "__main__":
    main()
