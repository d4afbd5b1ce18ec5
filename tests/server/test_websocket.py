"""WebSockets with handlers on greenlets, as clients see them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import ssl
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
from raw_websocket import BINARY, CLOSE, PING, PONG, TEXT, RawWebSocket, closing, frame
from server_process import ServerProcess, StartServer
from support.waiting import eventually
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from puff_patch.runtime import Mailbox
from puff_patch.server import ServerOptions
from puff_patch.server.websocket import WebSockets

APP = Path(__file__).parent / "websocket_app.py"


def command(**options: Any) -> list[str]:
    return [sys.executable, "-W", "error", str(APP), json.dumps({"port": 0, **options})]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """For tests that leave the server as it was."""
    process = ServerProcess(
        command(max_greenlets=4, max_queued=0), tmp_path_factory.mktemp("websocket") / "stderr"
    )
    yield process
    assert process.stop() == 0, process.output()


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One with tight limits."""
    options: dict[str, Any] = {
        "max_websockets": 2,
        "websocket_max_size": 1000,
        "websocket_origins": ["https://friend.example"],
        "websocket_require_origin": True,
        "client_timeout": 1.5,
        "access_log": True,
    }
    process = ServerProcess(command(**options), tmp_path_factory.mktemp("strict") / "stderr")
    yield process
    assert process.stop() == 0, process.output()


def url(server: ServerProcess, path: str) -> str:
    return f"ws://127.0.0.1:{server.port}{path}"


def friend(server: ServerProcess, path: str, **options: Any) -> Any:
    return connect(url(server, path), origin="https://friend.example", **options)


def refusal(server: ServerProcess, path: str, **options: Any) -> tuple[int, str]:
    """Status and body of the response to a handshake."""
    with pytest.raises(InvalidStatus) as caught, connect(url(server, path), **options):
        pass
    response = caught.value.response
    return response.status_code, bytes(response.body or b"").decode()


def ended(server: ServerProcess, name: str) -> Any:
    """How the handlers of a name ended, once one did."""
    return eventually(lambda: server.json("/seen")["ended"].get(name), 5, name)


def end_of(ws: ClientConnection) -> tuple[int, str]:
    """Receive the end; return its code and reason."""
    with pytest.raises(ConnectionClosed) as caught:
        ws.recv(timeout=10)
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code, caught.value.rcvd.reason


def test_echo(server: ServerProcess) -> None:
    with connect(url(server, "/echo"), max_size=None) as ws:
        for message in ("", "hällo \N{GRINNING FACE}", b"", b"\x00\xff", "x" * 300_000, b"y" * 1_000_000):
            ws.send(message)
            assert ws.recv(timeout=10) == message
        ws.send(["in ", "three ", "fragments"])
        assert ws.recv(timeout=10) == "in three fragments"
        assert ws.ping().wait(5)
    assert ws.close_code == 1000
    assert ended(server, "echo")[-1] == [1000, ""]


def test_what_a_handler_sees_of_the_handshake(server: ServerProcess) -> None:
    headers = {"X-Agent": "one", "Cookie": 'session=abc; theme="dark\\073"; session=second; junk'}
    target = "/about/a%20b/of/c%2Fd?x=1&x=2&empty="
    with connect(url(server, target), additional_headers=headers) as ws:
        seen = json.loads(ws.recv(timeout=10))
    assert seen.pop("client")[0] == "127.0.0.1"
    assert seen == {
        "path": "/about/a b/of/c/d",
        "params": {"room": "a b", "user": "c/d"},
        "query": {"x": "2", "empty": ""},
        "query_string": "x=1&x=2&empty=",
        "agent": "one",
        "cookies": {"session": "abc", "theme": "dark;"},
        "closed": False,
    }
    with connect(url(server, "/about/this/of/that")) as ws:
        assert ws.recv(timeout=10) == "this path itself"
    assert refusal(server, "/about/a/of") == (404, "Not Found\n")


@pytest.mark.parametrize("path", ["/about/{x", "/{a}/{a}", "/{a b}", "/}"])
def test_malformed_paths(path: str) -> None:
    Mailbox.current()
    with pytest.raises(ValueError, match=r"is like /chat/\{room\}, unlike"):
        WebSockets({path: lambda ws: None}, ServerOptions())


def test_subprotocol(server: ServerProcess) -> None:
    with connect(url(server, "/choose"), subprotocols=["v2", "v1"]) as ws:  # type: ignore[list-item]
        assert ws.subprotocol == "v1"
        assert json.loads(ws.recv(timeout=10)) == [["v2", "v1"], "v1"]
    with connect(url(server, "/echo"), subprotocols=["v1"]) as ws:  # type: ignore[list-item]
        assert ws.subprotocol is None


def test_handlers_that_fail_or_refuse(server: ServerProcess) -> None:
    with connect(url(server, "/fail")) as ws:
        ws.send("x")
        assert end_of(ws) == (1011, "")
    assert refusal(server, "/fail_first") == (500, "Internal Server Error\n")
    assert refusal(server, "/refuse") == (401, "who are you?")
    assert refusal(server, "/nothing") == (403, "Forbidden\n")
    assert refusal(server, "/elsewhere") == (404, "Not Found\n")
    output = server.wait_for_output("a bug before the handshake")
    assert "The WebSocket /fail failed" in output
    assert "RuntimeError: a bug in the handler" in output
    # Refused handshakes leave nothing behind.
    assert refusal(server, "/refuse") == (401, "who are you?")


def test_handler_closes(server: ServerProcess) -> None:
    with connect(url(server, "/goodbye")) as ws:
        assert ws.recv(timeout=10) == "the last"
        assert end_of(ws) == (4001, "enough")
    assert ended(server, "goodbye") == [[4001, "enough"]]


def test_receive_with_a_time_limit(server: ServerProcess) -> None:
    with connect(url(server, "/patience")) as ws:
        assert ws.recv(timeout=10) == "still there"
        ws.send("so am I")
        assert ws.recv(timeout=10) == "so am I"
        assert end_of(ws) == (1000, "")


@pytest.mark.parametrize(
    ("last", "wrong", "code"),
    [("json", "{", 1007), ("json", b"\xff", 1007), ("text", b"x", 1003), ("bytes", "x", 1003)],
)
def test_messages_of_a_kind(server: ServerProcess, last: str, wrong: str | bytes, code: int) -> None:
    with connect(url(server, f"/typed/{last}")) as ws:
        for message in ('{"ä":[1,null]}', "text", b"bytes"):
            ws.send(message)
            assert ws.recv(timeout=10) == message
        ws.send(wrong)
        assert end_of(ws)[0] == code


def test_many_greenlets_send_while_one_receives(server: ServerProcess) -> None:
    with connect(url(server, "/crowd")) as ws:
        received: list[str] = []
        for number in range(50):
            ws.send(f"message {number}")
        ws.send("end")
        for message in ws:
            assert isinstance(message, str)
            received.append(message)
    echoed = [message for message in received if len(message) < 100]
    assert echoed == [*(f"message {number}" for number in range(50)), "end"]
    # Each in one piece.
    assert sorted(message for message in received if len(message) >= 100) == [
        letter * 30_000 for letter in "abcdefgh" for _ in range(20)
    ]


def test_what_was_sent_before_the_close_comes_in_order(server: ServerProcess) -> None:
    with RawWebSocket(server, "/backlog", size=4096) as ws:
        received = [ws.receive() for _ in range(3501)]
        assert ws.closed_with() == 4004
    texts = [frame[1].decode().rstrip("x").rstrip() for frame in received if frame is not None]
    assert texts == [*map(str, range(3000)), "y" * 500_000, *map(str, range(500))]


def test_the_first_of_many_that_send_accepts(server: ServerProcess) -> None:
    with connect(url(server, "/all_at_once")) as ws:
        assert sorted(ws) == list("01234")


def test_one_greenlet_receives_at_a_time(server: ServerProcess) -> None:
    with connect(url(server, "/two_receivers")) as ws:
        assert ws.recv(timeout=10) == "another greenlet is receiving from this WebSocket"
        assert end_of(ws)[0] == 4003
    assert ended(server, "other") == [4003]


def test_killed_handler_closes_its_websocket(server: ServerProcess) -> None:
    with connect(url(server, "/wait")) as ws:
        server.json("/kill/wait")
        assert end_of(ws) == (1011, "")
    with connect(url(server, "/echo")) as ws:
        ws.send("x")
        ws.recv(timeout=10)
        server.json("/kill/echo")
        assert end_of(ws) == (1011, "")


def test_handler_that_waits_elsewhere_hears_of_the_end(server: ServerProcess) -> None:
    with connect(url(server, "/look_away")):
        pass
    with RawWebSocket(server, "/look_away") as ws:
        ws.send(frame(3))
        assert ws.closed_with() == 1002
    eventually(lambda: ended(server, "look_away") == [[1000, ""], [1005, ""]])
    assert "/look_away failed" not in server.output()


def test_websockets_do_not_count_as_requests(server: ServerProcess) -> None:
    async def run() -> None:
        sockets = [await connect_async(url(server, "/echo")) for _ in range(20)]  # and 4 requests at the most
        answer = await asyncio.to_thread(server.json, "/seen")
        assert answer["path"] == "/seen"
        for ws in sockets:
            await ws.send("x")
        assert [await ws.recv() for ws in sockets] == ["x"] * 20
        await asyncio.gather(*(ws.close() for ws in sockets))

    asyncio.run(asyncio.wait_for(run(), 20))


# Frames as clients may send them.


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536])
def test_lengths(server: ServerProcess, size: int) -> None:
    with RawWebSocket(server, "/echo") as ws:
        ws.send(frame(BINARY, b"z" * size))
        assert ws.receive() == (BINARY, b"z" * size)


def test_fragments_with_control_frames_between(server: ServerProcess) -> None:
    text = "grüße".encode()
    with RawWebSocket(server, "/echo") as ws:
        # A character, too, is cut in two.
        ws.send(frame(TEXT, text[:3], fin=False), frame(PING, b"p" * 125), frame(0, b"", fin=False))
        assert ws.receive() == (PONG, b"p" * 125)
        ws.send(frame(PONG, b"nobody asked"), frame(0, text[3:]), frame(PING))
        # The front answers the ping while the message is on its way through the handler.
        assert sorted([ws.receive(), ws.receive()], key=str) == [(TEXT, text), (PONG, b"")]
        for byte in frame(TEXT, b"byte by byte"):
            ws.send(bytes([byte]))
        assert ws.receive() == (TEXT, b"byte by byte")


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (closing(1000, b"done"), 1000),
        (closing(4999), 4999),
        (frame(CLOSE), 1005),
        (closing(1000) + frame(TEXT, b"after the end"), 1000),
    ],
    ids=str,
)
def test_close_of_the_client_is_answered(server: ServerProcess, frames: bytes, code: int) -> None:
    with RawWebSocket(server, "/wait") as ws:  # at once, whatever the handler does
        ws.send(frames)
        assert ws.closed_with() == code
    server.json("/kill/wait")


@pytest.mark.parametrize(
    "frames",
    [
        frame(TEXT, b"x", mask=False),
        frame(TEXT, b"x", rsv=4),
        frame(TEXT, b"x", rsv=1),
        frame(TEXT, b"\xff"),
        frame(TEXT, b"cut \xe2\x82"),
        frame(TEXT, b"surrogate \xed\xa0\x80"),
        frame(TEXT, b"a", fin=False) + frame(0, b"\xff"),
        frame(3, b"x"),
        frame(11),
        frame(PING, b"x", fin=False),
        frame(PING, b"x" * 126),
        frame(0, b"continues nothing"),
        frame(TEXT, b"x", fin=False) + frame(TEXT, b"not a continuation"),
        closing(999),
        closing(1005),
        closing(5000),
        closing(1000, b"\xff"),
        closing(1000, b"x" * 124),
        frame(CLOSE, b"x"),
        b"\x82\xff\x00\x00\x00\x00\x01\x10\x00\x00\x00\x00\x00\x00",  # 17 MiB to come
        b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",
    ],
    ids=lambda frames: frames[:12].hex(),
)
def test_frames_against_the_protocol_close_it(server: ServerProcess, frames: bytes) -> None:
    with RawWebSocket(server, "/echo") as ws:
        ws.send(frames)
        assert ws.closed_with() == 1002


def test_handshakes_that_are_none(server: ServerProcess) -> None:
    for without, status in (("Sec-WebSocket-Key", 400), ("Sec-WebSocket-Version", 400), ("Upgrade", 200)):
        with RawWebSocket(server, "/echo", without=without) as ws:  # without Upgrade it is the WSGI application's
            assert (ws.status, without) == (status, without)
    for hosts in (["Host: a.example", "Host: b.example"], ["Host:"], []):
        with RawWebSocket(server, "/echo", *hosts, without="Host") as ws:
            assert (ws.status, hosts) == (400, hosts)
    with RawWebSocket(server, "/echo", "Sec-WebSocket-Version: 12", without="Sec-WebSocket-Version") as ws:
        assert ws.status == 400
    with RawWebSocket(server, "/echo") as ws:
        assert ws.status == 101
        assert ws.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455, 1.3


# Limits.


def test_origins(server: ServerProcess, strict: ServerProcess) -> None:
    foreign = (403, "This origin may not open a WebSocket here.\n")
    own = f"http://127.0.0.1:{server.port}"
    port = server.port + 1 if server.port < 65535 else 1
    for origin in (
        "https://evil.example",
        f"http://127.0.0.1:{port}",
        "http://127.0.0.1",
        "null",
        "http://[",
        "x",
    ):
        assert refusal(server, "/echo", origin=origin) == foreign, origin
    for origin in (own, own.upper().replace("HTTP", "http"), own.replace("http:", "https:")):
        with connect(url(server, "/echo"), origin=origin):  # type: ignore[arg-type]
            pass
    for host, origin in (
        ("shop.example", "https://shop.example"),
        ("shop.example:443", "https://shop.example"),
        ("shop.example", "http://SHOP.example:80"),
    ):
        with RawWebSocket(server, "/echo", f"Host: {host}", f"Origin: {origin}", without="Host") as ws:
            assert (ws.status, host) == (101, host)
    with RawWebSocket(
        server, "/echo", "Host: shop.example:444", "Origin: https://shop.example", without="Host"
    ) as ws:
        assert ws.status == 403

    assert refusal(strict, "/echo") == (403, "The header Origin is missing.\n")
    assert refusal(strict, "/echo", origin="https://friend.example.evil.example") == foreign
    with friend(strict, "/echo"), friend(strict, "/echo"):
        pass
    assert "Refused a WebSocket of origin 'https://evil.example'" in server.output()


def test_large_messages_close_it(strict: ServerProcess) -> None:
    for message in (b"x" * 1001, "x" * 1001, "ä" * 501, ["x" * 600, "y" * 600]):
        with friend(strict, "/echo") as ws:
            for fitting in (b"x" * 1000, "ä" * 500):
                ws.send(fitting)
                assert ws.recv(timeout=10) == fitting
            ws.send(message)
            assert end_of(ws) == (1009, "the message has more than 1000 bytes")
    assert ended(strict, "echo")[-1] == [1009, "the message has more than 1000 bytes"]


def test_more_websockets_than_allowed(strict: ServerProcess) -> None:
    with friend(strict, "/echo") as first, friend(strict, "/echo") as second:
        for _ in range(3):
            assert refusal(strict, "/echo", origin="https://friend.example") == (503, "Service Unavailable\n")
        first.send("x")
        assert first.recv(timeout=10) == "x"
        second.close()

        def reopen() -> bool:
            with contextlib.suppress(InvalidStatus), friend(strict, "/echo"):
                return True
            return False

        assert eventually(reopen)
    output = strict.wait_for_output('"GET /echo HTTP/1.1" 503')
    assert '"GET /echo HTTP/1.1" 101' in output


def test_flood_that_nobody_reads_waits_at_the_client(server: ServerProcess) -> None:
    with RawWebSocket(server, "/wait", size=65536) as ws:
        ws.sock.settimeout(0.5)
        before = server.rss()
        sent = 0
        message = frame(BINARY, b"f" * 60_000)
        with contextlib.suppress(TimeoutError):
            while sent < 200_000_000:
                sent += ws.sock.send(message)
        # What the buffers of two kernels' ends take, and a little here.
        assert sent < 50_000_000
        assert server.rss() - before < 10
    server.json("/kill/wait")


def test_client_that_takes_nothing_is_cut(strict: ServerProcess) -> None:
    before = strict.rss()
    with RawWebSocket(strict, "/pour", "Origin: https://friend.example", size=4096) as slow:
        began = time.monotonic()
        code, reason = ended(strict, "pour")[-1]
        assert (code, reason) in [(1006, "the client took nothing for 1.5 seconds"), (1005, "")]  # or the kernel's
        assert time.monotonic() - began < 5
        assert strict.rss() - before < 15
        slow.sock.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while slow.sock.recv(65536):
                pass
    with RawWebSocket(strict, "/try_to_pour", "Origin: https://friend.example", size=4096):
        sent, closed = ended(strict, "tried")
        assert sent > 1
        assert not closed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's socket filters")
def test_clients_that_vanish_without_a_word_are_noticed(strict: ServerProcess) -> None:
    process = psutil.Process(strict.process.pid)

    def connections() -> int:
        return sum(1 for one in process.net_connections() if one.status == psutil.CONN_ESTABLISHED)

    eventually(lambda: connections() == 0)
    origin = "Origin: https://friend.example"
    with RawWebSocket(strict, "/echo", origin) as idle, RawWebSocket(strict, "/pour", origin) as busy:
        assert connections() == 2
        idle.vanish()
        busy.vanish()
        eventually(lambda: connections() == 0, 10)


def test_clients_that_come_and_go_anyhow_leave_nothing_behind(start_server: StartServer) -> None:
    server = start_server(command(client_timeout=3))
    process = psutil.Process(server.process.pid)
    limit = time.monotonic() + 1.5

    def come_and_go(seed: int) -> None:
        choice = random.Random(seed)
        while time.monotonic() < limit:
            with RawWebSocket(server, "/crowd", size=choice.choice([0, 4096])) as ws:
                ws.sock.settimeout(0.1)
                with contextlib.suppress(OSError):
                    for _ in range(choice.randrange(5)):
                        ws.send(choice.choice([frame(TEXT, b"x" * 1000), frame(PING), closing(1000), b"\x81\xfe"]))
                        ws.sock.recv(choice.choice([10, 65536]))
                if choice.random() < 0.5:  # reset
                    ws.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with ThreadPoolExecutor(16) as threads:
        for done in [threads.submit(come_and_go, seed) for seed in range(16)]:
            done.result()
    eventually(lambda: {one.status for one in process.net_connections()} == {psutil.CONN_LISTEN}, 10)
    assert server.stop() == 0
    output = server.output()
    assert "The WebSocket /crowd failed" not in output
    assert "StopIteration" not in output


# Beside and after.


def test_plain_requests(start_server: StartServer) -> None:
    server = start_server(command(only=True))
    response, body = server.request("/echo")
    assert (response.status, response.headers["Upgrade"]) == (426, "websocket")
    assert body == b"A WebSocket is served here.\n"
    assert server.request("/about/a/of/b", "POST", b"x")[0].status == 426
    assert server.request("/")[0].status == 404
    assert refusal(server, "/") == (404, "Not Found\n")
    with connect(url(server, "/echo")) as ws:
        ws.send("x")
        assert ws.recv(timeout=10) == "x"


def test_stop_tells_clients_and_waits_for_handlers(start_server: StartServer, tmp_path: Path) -> None:
    # And TLS makes no difference.
    authority, trust = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(trust)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    server = start_server(command(ssl_certfile=str(tmp_path / "cert.pem")))
    base = server.url.replace("https", "wss")
    with connect(f"{base}/clean_up", ssl=trust) as first, connect(f"{base}/echo", ssl=trust) as second:
        second.send("x" * 300_000)
        assert second.recv(timeout=10) == "x" * 300_000
        server.signal()
        assert end_of(first) == (1001, "the server stops")
        assert end_of(second) == (1001, "the server stops")
        assert server.wait() == 0
    assert "cleaned up after 1001: the server stops" in server.output()


def test_stop_kills_handlers_that_do_not_end(start_server: StartServer) -> None:
    server = start_server(command(graceful_timeout=0.5))
    with connect(url(server, "/stay")) as ws:
        assert ws.recv(timeout=10) == "here"
        server.signal()
        assert end_of(ws)[0] == 1001
        assert server.wait() == 1
    assert "Cut 1 running requests" in server.output()


def test_idle_websockets_stay_and_share_files_with_connections(start_server: StartServer) -> None:
    server = start_server(
        ["sh", "-c", 'ulimit -n 80; exec "$@"', "sh", *command(idle_timeout=0.4, max_websockets=1000)]
    )
    server.wait_for_output("At most 20 connections and 20 WebSockets are served at a time: the limit")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(RawWebSocket(server, "/echo")) for _ in range(20)]
        assert server.json("/seen")["path"] == "/seen"
        with RawWebSocket(server, "/echo") as more:
            assert more.status == 503
        time.sleep(1)  # an idle connection is closed by then
        for ws in sockets:
            ws.send(frame(TEXT, b"x"))
            assert ws.receive() == (TEXT, b"x")


def test_without_handlers_a_handshake_is_a_request(start_server: StartServer) -> None:
    server = start_server()
    with RawWebSocket(server, "/hello") as ws:
        assert ws.status == 200
        assert ws.body() == b"hello\n"


def test_options() -> None:
    for wrong in (
        {"max_websockets": 0},
        {"websocket_max_size": 65 * 1024 * 1024},
        {"websocket_origins": ("x.y",)},
    ):
        with pytest.raises(ValueError, match=r"at least 1|at most 67108864|looks like https"):
            ServerOptions(**wrong)  # type: ignore[arg-type]
    ServerOptions(websocket_origins=("*", "null", "https://a.b:1", "capacitor://localhost"))
