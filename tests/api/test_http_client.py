"""The HTTP client, against this project's own server and some that misbehave."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import trustme
from support.process import RAISES, TICKER, run_python
from support.servers import CountingHTTPServer

HERE = {"PYTHONPATH": str(Path(__file__).parent)}
HEAD = (
    RAISES
    + """
import puff_patch
puff_patch.patch_all()
import asyncio, gevent, socket
from puff_patch import join_all, spawn
from puff_patch.config import HttpClientOptions
from puff_patch.http import HttpClient, global_http_client, named_client
from puff_patch.runtime import aio
url = os.environ.get("URL")
def client(**options):
    return HttpClient("a test's", HttpClientOptions(base_url=url, **options))
def ports(responses):
    return {response.json()["port"] for response in responses}
"""
)


def test_requests_and_responses(http_app) -> None:
    run_python(
        HEAD
        + """
http = client(user_agent="tester/1")
response = http.post("/echo", json={"a": [1, "ö"]}, headers={"X-Mine": b"bytes"}, query={"q": "1 2"})
seen = response.json()
assert (response.status, response.ok, response.http_version) == (200, True, "HTTP/1.1")
assert seen["body"].encode("latin-1").decode() == '{"a":[1,"ö"]}' and seen["type"] == "application/json"
assert (seen["mine"], seen["query"], seen["agent"]) == ("bytes", "q=1+2", "tester/1")
assert response.headers["Content-Type"] == response.header("content-type") == b"application/json"
assert response.headers["x-twice"] == b"1, 2" and response.headers.getlist("X-Twice") == [b"1", b"2"]
assert response.header("missing") is None and "x-twice" in dict(response.headers)
assert response.body() == response.content == response.text().encode()

for method in ("get", "post", "put", "patch", "delete", "options"):
    assert getattr(http, method)("/echo").json()["method"] == method.upper()
assert http.head("/echo").content == b""
assert http.request("get", "/echo").json()["method"] == "GET"
assert http.json("PUT", "/echo", {"x-mine": "1"}, {"b": 1}, 5000).json()["body"] == '{"b":1}'
for raw in ({"body": b"raw"}, {"body": "raw"}, {"body_bytes": b"raw"}):
    assert http.post("/echo", **raw).json()["body"] == "raw"
form = http.post("/echo", data={"a": "1 2", "b": "ö"}).json()
assert (form["type"], form["body"]) == ("application/x-www-form-urlencoded", "a=1+2&b=%C3%B6")
files = http.post("/echo", data={"hello": "multi"}, files={"one": "text", "two": ("two.txt", b"bytes")}).json()
assert files["type"].startswith("multipart/form-data") and 'filename="two.txt"' in files["body"]
assert "one has one body" in str(raises(ValueError, http.post, "/", json=1, body=b"")).replace("a request", "one")

# Cookies are told of and not kept: one client serves everybody.
assert http.get("/cookie").cookies == {"a": "1", "b": "2"}
assert http.get("/echo").json()["cookie"] is None
assert http.get("/echo", headers={"Cookie": "c=3"}).json()["cookie"] == "c=3"
redirected = http.get("/redirect")
assert redirected.json()["query"] == "redirected" and redirected.url == url + "/echo?redirected"
assert http.get("/redirect", follow_redirects=False).status == 302
missing = http.get("/missing")
assert (missing.status, missing.ok, missing.text()) == (404, False, "nö")
import httpx
raises(httpx.HTTPStatusError, missing.raise_for_status)
raises(ValueError, missing.json)
assert redirected.raise_for_status() is redirected

free = socket.socket()
free.bind(("127.0.0.1", 0))
raises(httpx.ConnectError, http.get, f"http://127.0.0.1:{free.getsockname()[1]}/")
free.close()
assert named_client("default") is global_http_client and named_client("b") is named_client("b")
""",
        env={"URL": http_app.url},
    )


def test_the_seed(http_app) -> None:
    """Its block, and one of its tests, but for where the server is."""
    run_python(
        """
import puff_patch
puff_patch.patch_all()
"""
        + """
from puff.http import global_http_client

http_client = global_http_client


async def do_http_request():
    this_response = await http_client.post("http://localhost:7777/", json={"my_data": ["some", "json_data"]})
    return await this_response.json()


def do_http_request_greenlet():
    this_response = http_client.post("http://localhost:7777/", json={"my_data": ["some", "json_data"]})
    return this_response.json()
""".replace("http://localhost:7777", http_app.url)
        + """
import asyncio
from asgiref.sync import async_to_sync
from puff_patch.runtime.aio import run_coroutine
found = [
    do_http_request_greenlet(),
    async_to_sync(do_http_request)(),
    asyncio.run(do_http_request()),
    run_coroutine(do_http_request()),
]
assert [one["body"] for one in found] == ['{"my_data":["some","json_data"]}'] * 4
assert len({one["port"] for one in found}) == 1, "a connection for greenlets and event loops"
"""
    )


def test_connections_are_shared_and_bounded(http_app) -> None:
    run_python(
        HEAD
        + TICKER
        + """
from puff_patch.runtime import native
native._IDLE_SECONDS = 0.1
for options, protocol, expected in (
    ({}, "HTTP/1.1", 3),
    ({"http2_prior_knowledge": True}, "HTTP/2.0", 1),
):
    http = client(max_connections=3, max_keepalive=3, **options)
    assert len(ports(http.get("/echo") for _ in range(5))) == 1
    with Ticker() as ticker:
        found = join_all([spawn(http.get, "/sleep/0.02") for _ in range(60)], timeout=20)
    assert {response.json()["protocol"] for response in found} == {protocol}
    assert len(ports(found)) == expected, (protocol, ports(found))
    assert ticker.count >= 5, ticker.count
    async def main():
        found = await asyncio.gather(*(http.post("/sleep/0.01", json=n) for n in range(30)))
        assert [int((await response.json())["body"]) for response in found] == list(range(30))
        assert len(await http.get("/large")) if False else True
        return len({(await response.json())["port"] for response in found})
    for run in (asyncio.run, aio.run_coroutine):
        assert run(main()) <= expected
    assert len(http.get("/large").content) == 3_000_000
    # Native threads have connections of their own.
    threads = [puff_patch.spawn_blocking(http.get, "/echo") for _ in range(4)]
    assert {response.status for response in join_all(threads, timeout=20)} == {200}

    # They are closed when the thread ends.
    used = puff_patch.spawn_blocking(lambda: http.get("/echo").ok and http.client()).join()
    for _ in range(1000):
        if used.is_closed:
            break
        gevent.sleep(0.005)
    assert used.is_closed and not http.client().is_closed

    # A forked child does not use its parent's.
    mine = http.get("/echo").json()["port"]
    pid = os.fork()
    if pid == 0:
        os._exit(http.get("/echo").json()["port"] == mine)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert http.get("/echo").json()["port"] == mine
    # close_pools() closes them, and the client goes on.
    puff_patch.close_pools()
    assert http.get("/echo").json()["port"] != mine
used = http.client()
puff_patch.unpatch_all()
assert used.is_closed
""".replace('        assert len(await http.get("/large")) if False else True\n', ""),
        env={"URL": http_app.url},
    )


def test_time_outs_kills_and_cancellation(http_app) -> None:
    run_python(
        HEAD
        + """
import httpx
for options in ({}, {"http2_prior_knowledge": True}):
    http = client(**options)
    mine = http.get("/echo").json()["port"]
    # Others are on their way over the same connection, if it is HTTP/2; they are not to suffer.
    others = [spawn(http.post, "/sleep/0.3", json=n) for n in range(5)]
    gevent.sleep(0.05)
    started = time.monotonic()
    error = raises(httpx.TimeoutException, http.get, "/sleep/2", timeout_ms=50)
    assert "no response within 0.05 seconds" in str(error)
    raises(httpx.TimeoutException, http.get, "/sleep/2", timeout=0.05)
    with gevent.Timeout(0.05, False):
        http.get("/sleep/2")
        raise AssertionError
    greenlet = gevent.spawn(http.get, "/sleep/2")
    gevent.sleep(0.02)
    greenlet.kill()
    async def main():
        try:
            await asyncio.wait_for(http.get("/sleep/2"), 0.05)
        except asyncio.TimeoutError:
            return
        raise AssertionError
    asyncio.run(main())
    aio.run_coroutine(main())
    assert time.monotonic() - started < 3
    found = join_all(others, timeout=10)
    assert [response.json()["body"] for response in found] == list("01234")
    if options:
        assert ports(found) == {mine} == ports([http.get("/echo")])
    # What was given up left no place taken.
    for _ in range(5):
        gevent.spawn(http.get, "/sleep/2").kill()
    small = client(max_connections=1, **options)
    for _ in range(3):
        raises(httpx.TimeoutException, small.get, "/sleep/0.5", timeout_ms=30)
    assert small.get("/echo", timeout_ms=5000).status == 200
""",
        env={"URL": http_app.url},
    )


def test_http2_with_large_bodies_and_what_is_given_up(http_app) -> None:
    run_python(
        HEAD
        + """
import random
http = client(http2_prior_knowledge=True, timeout=10)
mine = http.get("/echo").json()["port"]

# More than the server lets a client send at once, from many at a time: all of them wait to be allowed more.
def send(n):
    body = bytes([n]) * 300_000
    return http.post("/echo", body=body).json()["body"] == body.decode("latin-1")
assert join_all([spawn(send, n) for n in range(20)], timeout=20) == [True] * 20

# More than the client lets the server send at once, all of it given up midway.
for _ in range(30):
    with gevent.Timeout(random.random() * 0.005, False):
        http.get("/large")
assert len(http.get("/large", timeout_ms=5000).content) == 3_000_000

# Whatever a request waits for when its time is over: a connection, a stream, its turn to read.
random.seed(4)
def first(http):
    with gevent.Timeout(random.random() * 0.02, False):
        http.post("/echo", json=1)
for _ in range(10):
    fresh = client(http2_prior_knowledge=True)
    join_all([spawn(first, fresh) for _ in range(40)], timeout=20)
    assert fresh.get("/echo", timeout_ms=5000).status == 200
    fresh.client().close()
done = []
def hurried():
    for _ in range(25):
        with gevent.Timeout(random.random() * 0.02, False):
            done.append(http.post("/sleep/0.002", body=b"x" * random.choice((0, 10, 100_000))).status)
join_all([spawn(hurried) for _ in range(20)], timeout=20)
assert set(done) <= {200}
found = join_all([spawn(http.post, "/echo", json=n) for n in range(30)], timeout=10)
assert [response.json()["body"] for response in found] == [str(n) for n in range(30)]
assert len(ports(found)) == 1
""",
        env={"URL": http_app.url},
    )


def test_servers_that_go_away(tmp_path: Path) -> None:
    run_python(
        HEAD
        + """
from conftest import App
import httpx
server = App()
url, port = server.url, int(server.url.rpartition(":")[2])
clients = [client(), client(http2_prior_knowledge=True)]
for http in clients:
    assert http.get("/echo").status == 200
server.kill()
for http in clients:
    raises(httpx.ConnectError, http.post, "/echo", json=1)
server = App(port)
# A request that may not be sent twice must not go over a connection that has ended.
for http in clients:
    assert http.post("/echo", json=1).json()["body"] == "1"
server.kill()

# One that takes requests and says nothing: HTTP/2 must not send everything there for ever.
from gevent.server import StreamServer
accepted = []
def silent(sock, address):
    accepted.append(address)
    while sock.recv(65536):
        pass
server = StreamServer(("127.0.0.1", 0), silent)
server.start()
url = f"http://127.0.0.1:{server.server_port}"
http = client(http2_prior_knowledge=True, timeout=0.3)
for _ in range(2):
    raises(httpx.TimeoutException, http.get, "/", timeout_ms=20)
assert len(accepted) == 1, "an impatient request says nothing of a connection"
raises(httpx.TimeoutException, http.get, "/")
raises(httpx.TimeoutException, http.get, "/")
assert len(accepted) == 2, accepted
# Connecting has its own limit: a full backlog.
listener = socket.create_server(("127.0.0.1", 0), backlog=0)
filler = [socket.socket() for _ in range(4)]
for sock in filler:
    sock.setblocking(False)
    sock.connect_ex(listener.getsockname())
gevent.sleep(0.02)
url = f"http://127.0.0.1:{listener.getsockname()[1]}"
raises(httpx.ConnectTimeout, client(connect_timeout=0.1).get, "/")
""",
        env=HERE,
    )


def test_tls_and_connections_closed_by_the_server(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server = CountingHTTPServer(context)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    run_python(
        HEAD
        + """
import httpx
http = client()
assert join_all([spawn(http.get, "/") for _ in range(20)], timeout=20)[0].status == 200
assert http.get("/").status == 200
raises(httpx.ConnectError, client().get, url.replace("127.0.0.1", "localhost"))
""",
        env={"URL": server.url, "SSL_CERT_FILE": str(tmp_path / "ca.pem")},
    )
    assert server.accepted <= 21
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_http2_is_agreed_on_over_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    (tmp_path / "hello.py").write_text("""\
def app(environ, start):
    start("200 OK", [])
    return [environ["SERVER_PROTOCOL"].encode()]
""")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"port": port, "ssl-certificate": "cert.pem", "ssl-keyfile": "key.pem", "interface": "wsgi"}
    # Granian's own command: all that matters is that it is a server of HTTP/2 over TLS.
    command = [sys.executable, "-m", "granian", "hello:app", *(f"--{k}={v}" for k, v in options.items())]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        run_python(
            HEAD
            + """
import httpx
http = client()
for _ in range(1000):
    try:
        response = http.get("/")
        break
    except httpx.ConnectError:
        time.sleep(0.02)
found = join_all([spawn(http.get, "/") for _ in range(30)], timeout=20)
assert {(one.http_version, one.text()) for one in found} == {("HTTP/2", "HTTP/2")}
assert len(http.client()._transport._pool.connections) == 1
assert client(http2=False).get("/").http_version == "HTTP/1.1"
puff_patch.close_pools()
""",
            env={"URL": f"https://127.0.0.1:{port}", "SSL_CERT_FILE": str(tmp_path / "ca.pem")},
        )
    finally:
        server.terminate()
        server.wait(20)


def test_without_patches_and_without_httpx(http_app) -> None:
    run_python(
        HEAD.replace("puff_patch.patch_all()", "")
        + """
assert global_http_client.get(url + "/echo").status == 200
async def main():
    found = await asyncio.gather(*(global_http_client.get(url + "/sleep/0.01") for _ in range(10)))
    return [(await response.json())["method"] for response in found]
assert asyncio.run(main()) == ["GET"] * 10
puff_patch.close_pools()
sys.modules["httpx"] = None
assert "puff-patch[http]" in str(raises(ImportError, client().get, "/echo"))
""",
        env={"URL": http_app.url},
    )
