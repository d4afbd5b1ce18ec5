"""Flask runs unmodified."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from threading import Thread

import httpx
from server_process import StartServer
from support.waiting import eventually

COMMAND = [sys.executable, "-W", "error", str(Path(__file__).with_name("flask_app.py"))]


def test_flask(start_server: StartServer) -> None:
    server = start_server(COMMAND)
    with httpx.Client(base_url=server.url, timeout=10) as client:
        found = client.get("/users/7?a=%C3%A9").json()
        assert found == {"number": 7, "url": f"{server.url}/users/7", "args": {"a": "é"}}
        assert client.get("/users/x").status_code == 404
        assert client.post("/users/7").status_code == 405

        # Cookies and sessions, redirects.
        assert client.get("/whoami").json() == {"user": None, "seen": None}
        answer = client.post("/login", data={"user": "zoë"})
        assert (answer.status_code, answer.headers["Location"]) == (302, "/whoami")
        assert client.get("/whoami").json() == {"user": "zoë", "seen": "yes"}

        # Uploads, also without a length, and the limit of Flask's own.
        content = b"\0\r\n--x" * 300_000
        form = {"files": {"file": ("ü.bin", content)}, "data": {"comment": "a comment"}}
        expected = {"name": "ü.bin", "sha256": hashlib.sha256(content).hexdigest(), "comment": "a comment"}
        assert client.post("/upload", **form).json() == expected
        request = client.build_request("POST", "/upload", **form)
        chunked = client.build_request(
            "POST",
            "/upload",
            content=iter([request.read()]),
            headers={"Content-Type": request.headers["Content-Type"]},
        )
        assert chunked.headers["Transfer-Encoding"] == "chunked"
        assert client.send(chunked).json() == expected
        assert client.post("/upload", files={"file": b"x" * 3_000_001}).status_code == 413

        # Downloads, whole, in part and not at all.
        answer = client.get("/download")
        assert answer.content == b"d" * 500_000
        assert "d.bin" in answer.headers["Content-Disposition"]
        answer = client.get("/download", headers={"Range": "bytes=10-19"})
        assert (answer.status_code, answer.content) == (206, b"d" * 10)
        assert client.get("/download", headers={"If-None-Match": '"tag"'}).status_code == 304

        # Errors.
        answer = client.get("/teapot")
        assert (answer.status_code, answer.text) == (418, "short and stout")
        assert "not you" in client.get("/forbidden").text
        answer = client.get("/broken")
        assert (answer.status_code, "Internal Server Error" in answer.text) == (500, True)
        server.wait_for_output("LookupError: broken in Flask")

        # Streams: whole, and of a client that leaves.
        assert client.get("/count?to=5").text == "0\n1\n2\n3\n4\n"
        with client.stream("GET", "/count?to=1000000") as stream:
            assert next(stream.iter_text())
        eventually(lambda: client.get("/ended").json() == ["count", "count"])

    # And all at the same time.
    lengths: list[int] = []

    def ask() -> None:
        lengths.append(len(httpx.get(f"{server.url}/count?to=50", timeout=10).text.split()))

    threads = [Thread(target=ask) for _ in range(10)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 3
    assert lengths == [50] * 10
    assert server.stop() == 0
