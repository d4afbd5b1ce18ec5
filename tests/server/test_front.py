"""The contract with Granian: what server/front.py relies on. An upgrade that breaks it must fail here."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import get_hub
from gevent.event import Event
from server_process import read_all
from support.process import run_python

from puff_patch.runtime import Mailbox, aio
from puff_patch.server import ClientDisconnected, ServerError, ServerOptions
from puff_patch.server.exchange import Exchange
from puff_patch.server.exchange_async import AsyncExchange
from puff_patch.server.front import TESTED_VERSIONS, AsyncioSide, Front, check_version
from puff_patch.server.listener import Listener

OK = [(b"content-type", b"text/plain")]
GET = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


class Running:
    """A front in this process, whose requests run in greenlets, and clients of it in native threads."""

    def __init__(self, **options: Any) -> None:
        self.listener = Listener(ServerOptions(port=0))
        self.handler: Callable[[Exchange], object] = lambda exchange: exchange.respond(200, OK, b"hello")
        self.in_hub: list[bool] = []
        self.front = Front(self.listener, self.on_request, **options)
        self.front.start()

    def on_request(self, exchange: Exchange) -> None:
        self.in_hub.append(gevent.getcurrent() is get_hub())
        gevent.spawn(self.handler, exchange)

    def ask(self, client: Callable[[socket.socket], object]) -> Any:
        """Run ``client`` with a connection in a native thread, while the hub runs here; return its result."""
        mailbox, done, results = Mailbox.current(), Event(), []

        def run() -> None:
            try:
                with socket.create_connection(self.listener.address, 5) as sock:
                    results.append(client(sock))
            except Exception as exc:  # noqa: BLE001 - raised below, where the test sees it
                results.append(exc)
            mailbox.post(done.set)

        threading.Thread(target=run, daemon=True).start()
        with mailbox.hold():
            assert done.wait(10)
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    def get(self, request: bytes = GET) -> bytes:
        def client(sock: socket.socket) -> bytes:
            sock.sendall(request)
            return read_all(sock)

        answer: bytes = self.ask(client)
        return answer

    def stop(self) -> bool:
        self.front.stop()
        with Mailbox.current().hold():
            return self.front.wait_stopped(5)


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.front.reset_connections()
    assert made.stop()
    made.listener.close()


def test_installed_granian_is_of_the_tested_range() -> None:
    assert check_version() == metadata.version("granian")


@pytest.mark.parametrize("version", ["1.9.9", "2.8.6", "2.9.0", "2.10", "3.0.0rc1", "unknown"])
def test_other_versions_are_refused_with_one_clear_error(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ServerError, match=r"is tested with granian>=2\.8\.7,<2\.9, and Granian .* is installed"):
        check_version()


def test_missing_granian(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ServerError, match="pip install 'granian>="):
        check_version()


def test_changed_seam_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("granian._granian.WorkerSignal")
    listener = Listener(ServerOptions(port=0))
    try:
        with pytest.raises(ServerError, match=r"its seam is not as tested: .*WorkerSignal"):
            Front(listener, lambda exchange: None)
    finally:
        listener.close()


def test_tested_range_is_what_the_package_requires() -> None:
    required = [line for line in metadata.requires("puff-patch") or () if line.startswith("granian")]
    assert len(required) == 1
    assert f"<{TESTED_VERSIONS[1][0]}.{TESTED_VERSIONS[1][1]}" in required[0].replace(" ", "")


def test_request_comes_in_the_hub_with_an_asgi_scope(running: Running) -> None:
    scopes: list[dict[str, Any]] = []

    def handler(exchange: Exchange) -> None:
        scopes.append(exchange.scope)
        exchange.respond(200, OK, b"")

    running.handler = handler
    running.get(b"GET /a%20b?c=%20d HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nX-A: \xe9\r\nConnection: close\r\n\r\n")
    assert running.in_hub == [True]
    scope = scopes[0]
    assert scope["type"] == "http"
    assert scope["http_version"] == "1.1"
    assert scope["method"] == "GET"
    assert scope["scheme"] == "http"
    assert scope["raw_path"] == b"/a%20b"
    assert scope["query_string"] == b"c=%20d"
    assert scope["headers"] == [(b"host", b"h"), (b"x-a", b"1"), (b"x-a", b"\xe9"), (b"connection", b"close")]
    assert scope["client"][0] == "127.0.0.1"
    assert scope["client"][1].isdigit()


def test_request_that_cannot_even_be_taken_is_answered(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(exchange: Exchange) -> None:
        raise LookupError("failed in the hub")

    running.front._on_request = failing
    assert running.get().startswith(b"HTTP/1.1 500 ")
    assert "failed in the hub" in capsys.readouterr().err
    assert not running.front.active


def test_whole_response_is_sent_without_waiting(running: Running) -> None:
    # The hub cannot wait, so this raises if the front would.
    front_on_request = running.on_request
    running.front._on_request = lambda exchange: exchange.respond(200, OK, b"from the hub")
    assert running.get().endswith(b"\r\n\r\nfrom the hub")
    running.front._on_request = front_on_request


def test_body_is_received_in_parts_and_ends_with_nothing(running: Running) -> None:
    parts: list[bytes] = []

    def handler(exchange: Exchange) -> None:
        while part := exchange.receive():
            parts.append(part)
        parts.append(exchange.receive())
        exchange.respond(200, OK, b"")

    def client(sock: socket.socket) -> None:
        sock.sendall(b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 6\r\n\r\nabc")
        time.sleep(0.1)
        sock.sendall(b"def")
        sock.recv(1000)

    running.handler = handler
    running.ask(client)
    assert parts == [b"abc", b"def", b""]


def test_client_that_leaves_amid_its_body(running: Running) -> None:
    raised = Event()

    def handler(exchange: Exchange) -> None:
        try:
            exchange.receive()
            exchange.receive()
        except ClientDisconnected:
            raised.set()
            exchange.abort()

    running.handler = handler
    running.ask(lambda sock: sock.sendall(b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 6\r\n\r\nabc"))
    assert raised.wait(5)


def test_client_that_leaves_amid_the_response(running: Running) -> None:
    raised = Event()

    def handler(exchange: Exchange) -> None:
        exchange.start(200, OK)
        try:
            while True:
                exchange.send(b"part")
                gevent.sleep(0.01)
        except ClientDisconnected:
            raised.set()
            exchange.abort()

    def client(sock: socket.socket) -> None:
        sock.sendall(GET)
        sock.recv(1000)

    running.handler = handler
    running.ask(client)
    with Mailbox.current().hold():
        assert raised.wait(5)


def test_send_waits_for_the_client(running: Running) -> None:
    sent = [0]
    stopped = Event()

    def handler(exchange: Exchange) -> None:
        exchange.start(200, OK)
        try:
            while True:
                exchange.send(b"x" * 65536)
                sent[0] += 1
        except ClientDisconnected:
            exchange.abort()
            stopped.set()

    seen: list[int] = []

    def client(sock: socket.socket) -> None:
        sock.sendall(GET)
        time.sleep(0.5)
        seen.append(sent[0])
        time.sleep(0.3)
        seen.append(sent[0])

    running.handler = handler
    running.ask(client)
    with Mailbox.current().hold():
        assert stopped.wait(5)
    assert 0 < seen[0] == seen[1]


def test_stream_ends_with_end(running: Running) -> None:
    def handler(exchange: Exchange) -> None:
        exchange.start(200, OK)
        exchange.send(b"one")
        exchange.send(b"two")
        exchange.end()

    running.handler = handler
    head, body = running.get().split(b"\r\n\r\n", 1)
    assert b"transfer-encoding: chunked" in head
    assert body == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"


def test_malformed_header_is_an_error_and_another_response_can_follow(running: Running) -> None:
    def handler(exchange: Exchange) -> None:
        with pytest.raises(ValueError, match="malformed header: b'x': b'a"):
            exchange.respond(200, [(b"x", b"a\r\nb: c")], b"")
        with pytest.raises(ValueError, match="malformed header: b'a b'"):
            exchange.respond(200, [(b"a b", b"c")], b"")
        exchange.respond(503, OK, b"instead")

    running.handler = handler
    answer = running.get()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert answer.endswith(b"instead")


def test_an_error_of_the_front_is_survived_when_rust_is_asked_for_backtraces() -> None:
    """They cannot be taken on a greenlet: that crashed the process, above all if its hub began amid calls."""
    code = """
    import gevent
    from test_front import OK, Running
    def deep(levels, then):
        return then() if not levels else sorted([0], key=lambda _: deep(levels - 1, then) or 0)
    deep(int(os.environ["LEVELS"]), lambda: gevent.sleep(0))
    running = Running()
    def handler(exchange):
        try:
            exchange.respond(200, [(b"x", b"a\\r\\nb: c")], b"")
        except ValueError:
            exchange.respond(503, OK, b"instead")
    running.handler = handler
    for levels in range(30):
        deep(levels, running.get)
    running.front.reset_connections()
    assert running.stop()
    """
    here = Path(__file__).parent
    rust = {"RUST_BACKTRACE": "1", "RUST_LIB_BACKTRACE": None}
    for levels in (0, 20):
        run_python(code, env={**rust, "LEVELS": str(levels), "PYTHONPATH": f"{here}:{here.parent}"})


def test_abort_before_the_response_is_a_500(running: Running) -> None:
    running.handler = lambda exchange: exchange.abort()
    assert running.get().startswith(b"HTTP/1.1 500 ")


def test_abort_amid_the_response_cuts_it(running: Running) -> None:
    def handler(exchange: Exchange) -> None:
        exchange.start(200, OK)
        exchange.send(b"one")
        gevent.sleep(0.05)
        exchange.abort()

    running.handler = handler
    body = running.get().split(b"\r\n\r\n", 1)[1]
    assert body == b"3\r\none\r\n"


def test_stop_closes_idle_connections_and_finishes_the_others(running: Running) -> None:
    gate = Event()

    def handler(exchange: Exchange) -> None:
        running.front.stop()
        gevent.sleep(0.1)
        exchange.respond(200, OK, b"finished")
        gate.set()

    def client(sock: socket.socket) -> bytes:
        with socket.create_connection(running.listener.address, 5) as idle:
            time.sleep(0.1)
            sock.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            assert idle.recv(1) == b""
        return read_all(sock)

    running.handler = handler
    assert running.ask(client).endswith(b"finished")
    with Mailbox.current().hold():
        assert running.front.wait_stopped(5)


def test_reset_connections(running: Running) -> None:
    def handler(exchange: Exchange) -> None:
        assert running.front.reset_connections() == 1
        exchange.abort()

    running.handler = handler
    with pytest.raises(ConnectionResetError):
        running.get()


def test_log_of_granian_comes_through_the_hub(caplog: pytest.LogCaptureFixture, running: Running) -> None:
    with caplog.at_level(logging.WARNING, "puff_patch.server"):
        thread = threading.Thread(target=lambda: logging.getLogger("_granian.workers").warning("from Rust"))
        thread.start()
        thread.join(5)
        gevent.sleep(0.05)
    assert "from Rust" in caplog.text


def test_only_http_1_or_only_http_2() -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    for http_mode, request, expected in (("1", GET, b"HTTP/1.1 200"), ("2", preface, b"\x00\x00")):
        running = Running(http=http_mode)

        def client(sock: socket.socket, request: bytes = request) -> bytes:
            sock.sendall(request)
            return sock.recv(1000)

        try:
            assert running.ask(client).startswith(expected)
        finally:
            assert running.stop()
            running.listener.close()


def test_client_sees_a_server(running: Running) -> None:
    def client(sock: socket.socket) -> tuple[int, bytes]:
        sock.sendall(GET)
        response = http.client.HTTPResponse(sock)
        response.begin()
        return response.status, response.read()

    assert running.ask(client) == (200, b"hello")


def test_asyncio_side_does_without_the_hub() -> None:
    """Requests and what is awaited go between Granian's threads and the loop, also while the hub is blocked."""
    where: dict[str, list[int]] = {"takes": [], "request": [], "received": []}
    ended = threading.Event()

    def takes(scope: dict[str, Any]) -> bool:
        where["takes"].append(threading.get_ident())
        return bool(scope["path"] == "/loop")

    async def run(exchange: AsyncExchange) -> None:
        where["request"].append(threading.get_ident())
        parts = []
        while (message := await exchange.receive_message())["more_body"]:
            parts.append(message["body"])
        where["received"].append(threading.get_ident())
        exchange.start(200, [(b"content-length", b"8")])
        for part in (*parts, message["body"]):
            await exchange.send_part(part)
        exchange.end()
        exchange.finish()
        assert await exchange.receive_message() == {"type": "http.disconnect"}
        exchange.release()
        assert await exchange.receive_message() == {"type": "http.disconnect"}
        ended.set()

    tasks: list[Any] = []
    thread = aio.get_thread()
    side = AsyncioSide(
        thread.loop, takes, lambda exchange: tasks.append(thread.loop.create_task(run(exchange))), id
    )
    running = Running(asgi=side)
    head = b"POST /loop HTTP/1.1\r\nHost: h\r\nContent-Length: 8\r\nConnection: close\r\n\r\n"
    # In this thread, and so with the hub blocked: it is not patched.
    with socket.create_connection(running.listener.address, 5) as sock:
        sock.sendall(head + b"half")
        time.sleep(0.05)
        sock.sendall(b"half")
        assert read_all(sock).endswith(b"\r\n\r\nhalfhalf")
    assert ended.wait(5)
    assert where["request"] == where["received"] == [thread.ident]
    assert not {threading.get_ident(), thread.ident} & set(where["takes"])
    assert not running.in_hub
    # The other side is there as ever.
    assert running.get().endswith(b"hello")
    assert running.in_hub == [True]
    assert running.stop()
    running.listener.close()
    assert aio.stop()
