"""Random and damaged bytes for the server's front: it must neither hang, nor fail, nor grow.

    python tests/soak/front_soak.py [STRINGS]

Each string goes over a connection of its own, whose sending side is then closed. Half of them are requests with a
few bytes changed, the others noise, noise after the beginning of HTTP/2, and damaged frames. Exits with 0 if each
connection ended in time, no response was a 5xx, and the server has no more memory, files and threads afterwards.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO

import psutil

SAMPLE_APP = Path(__file__).parent.parent / "server" / "sample_app.py"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Seconds for a connection to end.  The server's own time-outs are longer.
PATIENCE = 10.0
ROOM_MB = 30
BATCH = 50
REQUESTS = [
    b"GET /hello?a=b HTTP/1.1\r\nHost: h\r\nCookie: a=b\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\nContent-Type: text/plain\r\n\r\n0123456789",
    b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\na\r\n0123456789\r\n0\r\n\r\n",
    b"HEAD http://h/hello HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2,
    b"PUT /unread HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
]
# SETTINGS, HEADERS of "GET /" with HPACK, DATA, RST_STREAM, WINDOW_UPDATE.
FRAMES = [
    b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"\x00\x00\x05\x01\x05\x00\x00\x00\x01\x82\x84\x86\x41\x00",
    b"\x00\x00\x03\x00\x01\x00\x00\x00\x01abc",
    b"\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x08",
    b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x10\x00",
]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A few bytes of it changed, left out, doubled, or moved."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(result) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            result[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del result[at : at + rng.randint(1, 8)]
        elif kind == 2:
            result[at:at] = rng.choice([b"\r\n", b"\n", b"\0", b" ", b":", b"\t", b"\xff", b"chunked", b"9" * 20])
        else:
            result[at:at] = result[: rng.randrange(len(result) + 1)]
    return bytes(result)


def strings(seed: int, count: int) -> list[bytes]:
    """What to send; the same for the same seed."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        if number % 2:
            made.append(damaged(rng, rng.choice(REQUESTS)))
        elif number % 4:
            made.append(rng.randbytes(rng.randint(1, 300)))
        elif number % 8:
            made.append(PREFACE + rng.randbytes(rng.randint(1, 300)))
        else:
            made.append(PREFACE + FRAMES[0] + damaged(rng, b"".join(rng.choices(FRAMES, k=rng.randint(1, 6)))))
    return made


def send(port: int, batch: list[bytes]) -> Counter[int]:
    """Send each string on a connection of its own, wait for its end; return the statuses of HTTP/1 that came."""
    sockets = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in batch]
    for sock, data in zip(sockets, batch, strict=True):
        # The server may have heard enough before the end.
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
    # To the front a client that closes its side has left, whatever it has asked before.
    time.sleep(0.02)
    statuses: Counter[int] = Counter()
    for sock, data in zip(sockets, batch, strict=True):
        received = b""
        try:
            with sock:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
                while part := sock.recv(65536):
                    received += part
        except TimeoutError:
            raise AssertionError(f"the connection did not end: {data!r}") from None
        except ConnectionError:
            pass
        found = [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", received)]
        assert all(status < 500 for status in found), (data, received)
        statuses.update(found)
    return statuses


def send_all(port: int, made: list[bytes]) -> Counter[int]:
    """Send every string."""
    statuses: Counter[int] = Counter()
    for at in range(0, len(made), BATCH):
        statuses.update(send(port, made[at : at + BATCH]))
    return statuses


def weigh(process: psutil.Process) -> tuple[float, int, int]:
    """Megabytes, open files and threads of the server."""
    return process.memory_info().rss / 1e6, process.num_fds(), process.num_threads()


def main(count: int) -> None:
    with tempfile.TemporaryFile("w+") as log:
        run(count, log)


def run(count: int, log: IO[str]) -> None:
    command = [sys.executable, str(SAMPLE_APP), json.dumps({"port": 0})]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    try:
        port = int(server.stdout.readline().rsplit(":", 1)[1])
        process = psutil.Process(server.pid)
        # What is made once, and the allocator's reserves, come before the first look.
        send_all(port, strings(0, max(200, min(count // 5, 5000))))
        before = weigh(process)
        began = time.monotonic()
        seen = send_all(port, strings(1, count))
        seconds = time.monotonic() - began
        assert send(port, REQUESTS[:1]) == {200: 1}
        limit = time.monotonic() + 5
        while weigh(process)[1] > before[1] and time.monotonic() < limit:
            time.sleep(0.05)
        after = weigh(process)
        print(f"{count} strings in {seconds:.1f} s; responses: {dict(sorted(seen.items()))}")
        print("MB, open files, threads: {:.1f}, {}, {} before and {:.1f}, {}, {} after".format(*before, *after))
        assert after[0] - before[0] < ROOM_MB
        assert after[1] <= before[1]
        # Threads that run Python for the front come and go with its need of them.
        assert after[2] <= before[2] + 4
        assert seen[200]
        assert seen[400]
    finally:
        server.terminate()
        server.communicate(timeout=40)
        log.seek(0)
        errors = log.read()
    assert server.returncode == 0, errors
    assert "Traceback" not in errors, errors


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
