"""TLS: certificates made here, real clients, and what the server says of files it cannot use."""

from __future__ import annotations

import datetime
import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from server_process import ServerProcess, StartServer, read_all, sample_command

from puff_patch.server import ServerError, ServerOptions
from puff_patch.server.tls import check_tls

PASSWORD = "correct horse"


class Files:
    """A certificate authority's and its certificates' files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.ca = str(folder / "ca.pem")
        self.authority.cert_pem.write_to_path(self.ca)
        server = self.authority.issue_cert("127.0.0.1", "localhost")
        self.cert, self.key, self.both = (str(folder / name) for name in ("cert.pem", "key.pem", "both.pem"))
        server.private_key_and_cert_chain_pem.write_to_path(self.both)
        Path(self.cert).write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))
        server.private_key_pem.write_to_path(self.key)
        self.client = str(folder / "client.pem")
        self.authority.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(self.client)

    def encrypt_key(self, name: str = "PKCS8") -> str:
        """Write the key encrypted, return the path."""
        key = serialization.load_pem_private_key(Path(self.key).read_bytes(), None)
        path, form = self.folder / f"{name}.pem", getattr(serialization.PrivateFormat, name)
        encryption = serialization.BestAvailableEncryption(PASSWORD.encode())
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))
        return str(path)

    def context(self, cert: str | None = None) -> ssl.SSLContext:
        """A client's context that trusts the authority."""
        context = ssl.create_default_context(cafile=self.ca)
        if cert is not None:
            context.load_cert_chain(cert)
        return context

    def ask(self, server: ServerProcess, context: ssl.SSLContext | None = None, **options: bool) -> httpx.Response:
        with httpx.Client(verify=context or self.context(), **options) as client:
            return client.get(f"{server.url}/show_environ", timeout=10)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    command = sample_command(ssl_certfile=files.cert, ssl_keyfile=files.key)
    process = ServerProcess(command, tmp_path_factory.mktemp("server") / "stderr")
    yield process
    assert process.stop() == 0, process.output()


@pytest.mark.parametrize(("http2", "protocol"), [(False, "HTTP/1.1"), (True, "HTTP/2.0")])
def test_protocol_is_agreed_on_in_the_handshake(
    tls_server: ServerProcess, files: Files, http2: bool, protocol: str
) -> None:
    assert tls_server.url.startswith("https://127.0.0.1:")
    response = files.ask(tls_server, http1=not http2, http2=http2)
    environ = response.json()
    assert environ["SERVER_PROTOCOL"] == protocol
    assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    assert environ["wsgi.url_scheme"] == "https"
    assert environ["HTTPS"] == "on"
    assert environ["REMOTE_ADDR"] == "127.0.0.1"


def test_streams_and_bodies_go_over_http_2(tls_server: ServerProcess, files: Files) -> None:
    body = b"upload" * 300_000
    with httpx.Client(verify=files.context(), http2=True, timeout=20) as client:
        assert client.get(f"{tls_server.url}/stream?count=30&size=65536").content == b"x" * 30 * 65536
        assert client.post(f"{tls_server.url}/digest", content=body).json()["size"] == len(body)
        assert client.post(f"{tls_server.url}/digest", content=iter([body, body])).json()["size"] == 2 * len(body)
        # The stream is reset; the connection, and so the other streams on it, stays.
        with pytest.raises(httpx.RemoteProtocolError, match="StreamReset"):
            client.get(f"{tls_server.url}/fail_late")
        assert client.get(f"{tls_server.url}/hello").text == "hello\n"


@pytest.mark.parametrize(("oldest", "accepted"), [("1.2", True), ("1.3", False)])
def test_oldest_version(start_server: StartServer, files: Files, oldest: str, accepted: bool) -> None:
    server = start_server(ssl_certfile=files.both, ssl_min_version=oldest)
    context = files.context()
    assert files.ask(server, context).status_code == 200
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    if accepted:
        assert files.ask(server, context).status_code == 200
    else:
        with pytest.raises(httpx.ConnectError):
            files.ask(server, context)


@pytest.mark.parametrize("auth", ["optional", "required"])
def test_clients_with_certificates(start_server: StartServer, files: Files, auth: str, tmp_path: Path) -> None:
    server = start_server(ssl_certfile=files.both, ssl_ca_certs=files.ca, ssl_client_auth=auth)
    assert files.ask(server, files.context(files.client)).status_code == 200
    if auth == "optional":
        assert files.ask(server).status_code == 200
    else:
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            files.ask(server)
    # Somebody else's.
    (tmp_path / "other").mkdir()
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        files.ask(server, files.context(Files(tmp_path / "other").client))


@pytest.mark.parametrize("form", ["PKCS8", "TraditionalOpenSSL"])
def test_encrypted_key(start_server: StartServer, files: Files, form: str) -> None:
    key = files.encrypt_key(form)
    server = start_server(ssl_certfile=files.cert, ssl_keyfile=key, ssl_keyfile_password=PASSWORD)
    assert files.ask(server).status_code == 200


def test_who_speaks_no_tls_is_turned_away(tls_server: ServerProcess) -> None:
    for first in (b"GET /hello HTTP/1.1\r\nHost: h\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 100):
        with tls_server.connect() as sock:
            sock.sendall(first)
            try:
                assert b"hello" not in read_all(sock)
            except ConnectionResetError:
                pass


def test_handshake_that_never_ends_holds_up_nobody(tls_server: ServerProcess, files: Files) -> None:
    sockets = [tls_server.connect() for _ in range(100)]
    try:
        for sock in sockets:
            sock.sendall(b"\x16\x03\x01")
        assert files.ask(tls_server).status_code == 200
    finally:
        for sock in sockets:
            sock.close()


def test_server_that_ran_out_of_files_in_handshakes_recovers(start_server: StartServer, files: Files) -> None:
    command = sample_command(ssl_certfile=files.both, max_connections=50)
    server = start_server(["bash", "-c", 'ulimit -n 200; exec "$@"', "bash", *command])
    sockets = [server.connect() for _ in range(300)]
    try:
        for sock in sockets:
            sock.sendall(b"\x16\x03\x01")
        server.wait_for_output("No files are left to this process")
    finally:
        for sock in sockets:
            sock.close()
    assert files.ask(server).status_code == 200
    assert server.stop() == 0


def test_tls_over_a_unix_socket(start_server: StartServer, files: Files, tmp_path: Path) -> None:
    path = f"{tmp_path}/puff.sock"
    start_server(uds=path, ssl_certfile=files.both)
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(5)
        plain.connect(path)
        with files.context().wrap_socket(plain, server_hostname="localhost") as sock:
            sock.sendall(b"GET /show_environ HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            answer = read_all(sock)
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["wsgi.url_scheme"] == "https"


def test_bad_file_is_one_clear_error_at_the_start(files: Files) -> None:
    command = sample_command(ssl_certfile="/no/such.pem")
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "the certificate file /no/such.pem cannot be read: No such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_wrong_with_the_files_is_said(files: Files, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().private_key_pem.write_to_path(str(other))
    encrypted = files.encrypt_key()
    for options, message in [
        ({"ssl_certfile": files.key}, f"{files.key} holds no certificate in PEM form"),
        ({"ssl_certfile": files.cert}, f"{files.cert} holds no private key in PEM form. Name its file"),
        ({"ssl_certfile": files.cert, "ssl_keyfile": str(tmp_path)}, "cannot be read: Is a directory"),
        ({"ssl_certfile": files.cert, "ssl_keyfile": str(other)}, f"the key {other} is not the one of the cert"),
        ({"ssl_certfile": files.cert, "ssl_keyfile": encrypted}, "is encrypted. Give its ssl_keyfile_password"),
        (
            {"ssl_certfile": files.cert, "ssl_keyfile": encrypted, "ssl_keyfile_password": "no"},
            "cannot be opened with the ssl_keyfile_password given",
        ),
        (
            {"ssl_certfile": files.both, "ssl_ca_certs": files.key, "ssl_client_auth": "required"},
            f"{files.key} holds no CA certificates",
        ),
    ]:
        with pytest.raises(ServerError) as raised:
            check_tls(ServerOptions(**options))  # type: ignore[arg-type]
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_keys_that_the_front_would_die_of(files: Files, tmp_path: Path) -> None:
    weak = rsa.generate_private_key(65537, 1024)
    for key, number in ((ec.generate_private_key(ec.SECP521R1()), 1), (weak, 2)):
        path = tmp_path / f"{number}.pem"
        path.write_bytes(_self_signed(key))
        with pytest.raises(ServerError, match="of a kind that the front does not have"):
            check_tls(ServerOptions(ssl_certfile=str(path)))


def _self_signed(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssl_min_version": "1.1"}, 'ssl_min_version must be "1.2" or "1.3"'),
        ({"ssl_keyfile": "key.pem"}, "ssl_keyfile needs an ssl_certfile"),
        ({"ssl_certfile": "c", "ssl_client_auth": "required"}, "ssl_ca_certs goes with"),
        ({"ssl_certfile": "c", "ssl_client_auth": "maybe"}, "ssl_client_auth must be"),
    ],
)
def test_options_are_checked(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerOptions(**options)  # type: ignore[arg-type]


def test_password_is_not_shown() -> None:
    options = ServerOptions(ssl_certfile="c", ssl_keyfile_password=PASSWORD)
    assert PASSWORD not in repr(options)
