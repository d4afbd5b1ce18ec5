"""A FastAPI application on uvicorn and on this project's server, side by side, one worker each.

Usage: python benchmarks/asgi.py [--seconds 5] [--rounds 2] [--connections 64]

Endpoints: ``async def``, ``def`` that sleeps 10 ms, and a chain of sync_to_async, async_to_sync and
asyncio.to_thread that sleeps 10 ms.  uvicorn has uvloop and httptools.  The best of the rounds counts; servers
take turns.  Needs ``wrk``, or uses ``load.py``.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from smoke import built_in, wrk

BENCHMARKS = Path(__file__).resolve().parent
PAGES = ("/async", "/def", "/chain")


def servers(port: int) -> dict[str, list[str]]:
    """The commands, by name."""
    uvicorn = ["uvicorn", "asgi_app:app", "--port", str(port), "--no-access-log", "--log-level", "warning"]
    return {
        "uvicorn": [sys.executable, "-m", *uvicorn, "--loop", "uvloop", "--http", "httptools"],
        "puff_patch": [sys.executable, "asgi_app.py", str(port)],
    }


def free_port() -> int:
    """A port nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def measure(
    command: list[str], port: int, page: str, connections: int, seconds: float
) -> tuple[float, float, int]:
    """Rate, p99 in milliseconds and errors of one page."""
    process = subprocess.Popen(command, cwd=BENCHMARKS, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{command} did not start")
                time.sleep(0.05)
        load = wrk if shutil.which("wrk") else built_in
        url = f"http://127.0.0.1:{port}{page}"
        load(url, connections, 1)
        return load(url, connections, seconds)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="of load for each endpoint and round")
    parser.add_argument("--connections", type=int, default=64, help="keep-alive clients")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    best: dict[tuple[str, str], tuple[float, float, int]] = {}
    for _ in range(options.rounds):
        for page in PAGES:
            port = free_port()
            for name, command in servers(port).items():
                found = measure(command, port, page, options.connections, options.seconds)
                best[page, name] = max(found, best.get((page, name), found))
    print(f"{options.connections} keep-alive clients, Python {sys.version.split()[0]}\n")
    print(
        "| endpoint | server | requests/s | p99 ms | errors | x uvicorn |\n| --- | --- | --: | --: | --: | --: |"
    )
    for (page, name), (rate, p99, errors) in best.items():
        ratio = rate / best[page, "uvicorn"][0]
        print(f"| {page} | {name} | {rate:,.0f} | {p99:,.1f} | {errors} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
