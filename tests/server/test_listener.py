"""Where the server listens, and what it says when it cannot."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, StartServer, read_all, sample_command

from puff_patch.server import ServerError, ServerOptions
from puff_patch.server.listener import Listener


def test_port_in_use(server: ServerProcess) -> None:
    done = subprocess.run(sample_command(port=server.port), capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert f"port {server.port} is in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "192.0.2.1"}, "the address is not one of this machine"),
        ({"host": "no such host"}, "the host is not known"),
        ({"uds": "/no/such/folder/puff.sock"}, "No such file or directory"),
    ],
)
def test_clear_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ServerError, match=message):
        Listener(ServerOptions(**{"port": 0, **options}))


def test_permission_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    import _socket

    class Denied(_socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("puff_patch.server.listener._socket.socket", Denied)
    with pytest.raises(ServerError, match="Ports below 1024 need a privilege"):
        Listener(ServerOptions(port=80))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"http": "3"}, "http must be"),
        ({"port": 70000}, "port must be"),
        ({"max_greenlets": 0}, "max_greenlets must be"),
        ({"client_timeout": 0}, "client_timeout must be"),
        ({"graceful_timeout": -1}, "graceful_timeout must not"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerOptions(**options)


def test_two_listeners_share_a_port_only_if_asked_to() -> None:
    first = Listener(ServerOptions(port=0, reuse_port=True))
    try:
        port = first.address[1]
        Listener(ServerOptions(port=port, reuse_port=True)).close()
        with pytest.raises(ServerError, match="in use"):
            Listener(ServerOptions(port=port))
    finally:
        first.close()


def test_ipv6(start_server: StartServer) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    server = start_server(host="::1")
    assert server.url.startswith("http://[::1]:")
    with socket.create_connection(("::1", server.port), 5) as sock:
        sock.sendall(b"GET /show_environ HTTP/1.0\r\n\r\n")
        assert b'"REMOTE_ADDR": "::1"' in read_all(sock)
    # A response of HTTP/1.0 that fails is reset, for which the peer's address must be recognised.
    with socket.create_connection(("::1", server.port), 5) as sock:
        sock.sendall(b"GET /fail_late HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            read_all(sock)


def test_stale_unix_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "puff.sock")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    listener = Listener(ServerOptions(uds=path))
    with pytest.raises(ServerError, match="another server uses it"):
        Listener(ServerOptions(uds=path))
    listener.close()
    assert not Path(path).exists()


def test_file_in_the_place_of_a_unix_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(ServerError):
        Listener(ServerOptions(uds=str(path)))
    assert path.read_text() == "precious"


def test_turned_away_clients_do_not_reach_the_queue() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("the kernel cannot drop SYN packets here")
    listener = Listener(ServerOptions(port=0))
    waiting = socket.create_connection(listener.address, 5)
    try:
        assert listener.queued() == 1
        assert listener.turn_away()
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.address, 0.3)
        assert listener.queued() == 1
        # Who was there before is not harmed.
        waiting.sendall(b"data")
    finally:
        waiting.close()
        listener.close()


def test_removed_unix_socket_of_a_successor_stays(tmp_path: Path) -> None:
    path = tmp_path / "puff.sock"
    first = Listener(ServerOptions(uds=str(path)))
    path.unlink()
    second = Listener(ServerOptions(uds=str(path)))
    first.turn_away()
    first.close()
    assert path.exists()
    second.close()
