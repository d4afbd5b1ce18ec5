"""The load generator that benchmarks fall back to counts what a server really answered."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

LOAD = Path(__file__).resolve().parent.parent / "benchmarks" / "load.py"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers every third request with an error."""

    protocol_version = "HTTP/1.1"
    served = 0

    def do_GET(self):
        type(self).served += 1
        self.send_response(503 if self.served % 3 == 0 else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *args):
        """Quiet."""


def test_it_counts_requests_and_errors():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        done = subprocess.run(
            [
                *(sys.executable, str(LOAD), f"http://127.0.0.1:{server.server_port}/"),
                *("--connections", "4", "--seconds", "0.5"),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    found = json.loads(done.stdout)
    # Up to one request a connection may still be under way when it stops.
    assert Handler.served - 4 <= found["requests"] <= Handler.served
    assert abs(found["errors"] - found["requests"] / 3) <= 5
    assert 0 < found["p50_ms"] <= found["p99_ms"]
