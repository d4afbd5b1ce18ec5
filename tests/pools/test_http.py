"""The connections that sessions share are neither lost nor mixed up, whatever becomes of a request."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from support.process import run_python
from support.servers import CountingHTTPServer, ForwardProxy

PATCHED = """
import puff_patch; puff_patch.patch_all()
import gc, gevent, random, requests, warnings
warnings.simplefilter("ignore", ResourceWarning)  # dropping a response unclosed is what this is about
URL = os.environ["HTTP_URL"]
"""


def test_unread_responses_that_are_dropped_cost_nothing(http_server: CountingHTTPServer) -> None:
    run_python(
        PATCHED
        + """
for _ in range(10):
    assert requests.get(URL, stream=True, timeout=10).status_code == 200  # and never looked at again
for _ in range(5):
    response = requests.get(URL, stream=True, timeout=10)
    response.itself = response  # garbage of the kind that only the collector finds
    del response
    gc.collect()
# Both places are free.
held = [requests.get(URL, stream=True, timeout=10) for _ in range(2)]
assert [response.text for response in held] == ["-", "-"]
""",
        env={"HTTP_URL": http_server.url, "PUFF_HTTP_POOL_MAX_SIZE": "2", "PUFF_HTTP_POOL_TIMEOUT": "2"},
    )
    assert http_server.most_open <= 2


def test_interrupted_requests_cost_nothing(http_server: CountingHTTPServer) -> None:
    run_python(
        PATCHED
        + """
# Killed while they wait for the server, and while they wait for a connection.
slow = [gevent.spawn(requests.get, URL + "/slow", timeout=20) for _ in range(6)]
gevent.sleep(0.2)
gevent.killall(slow)
def hasty():
    try:
        with gevent.Timeout(random.random() * 0.01):
            requests.get(URL, timeout=20)
    except gevent.Timeout:
        pass
for _ in range(3):
    workers = [gevent.spawn(requests.get, URL, timeout=20) for _ in range(50)]
    gevent.sleep(random.random() * 0.02)
    gevent.killall(random.sample(workers, 25))
    gevent.joinall([*workers, *(gevent.spawn(hasty) for _ in range(25))], raise_error=True)
held = [requests.get(URL, stream=True, timeout=10) for _ in range(3)]
assert [response.text for response in held] == ["-"] * 3
""",
        env={"HTTP_URL": http_server.url, "PUFF_HTTP_POOL_MAX_SIZE": "3", "PUFF_HTTP_POOL_TIMEOUT": "10"},
    )


def test_a_time_out_tells_which_request_waited(http_server: CountingHTTPServer) -> None:
    run_python(
        PATCHED
        + """
held = requests.get(URL, stream=True, timeout=10)
try:
    requests.get(URL + "/other", timeout=10)
except requests.RequestException as error:
    assert error.request.url == URL + "/other"
    assert isinstance(error, (requests.ConnectionError, requests.Timeout))
else:
    raise AssertionError("a second connection")
held.close()
""",
        env={"HTTP_URL": http_server.url, "PUFF_HTTP_POOL_MAX_SIZE": "1", "PUFF_HTTP_POOL_TIMEOUT": "0.05"},
    )


def test_connections_with_different_verification_are_not_shared(http_server: CountingHTTPServer) -> None:
    """urllib3 keys connections by what was verified; the shared adapter must not lose that."""
    run_python(
        PATCHED
        + """
strict, lax = requests.Session(), requests.Session()
lax.verify = False
def pool_of(session):
    request = session.prepare_request(requests.Request("GET", "https://localhost:1/"))
    return session.get_adapter(request.url).get_connection_with_tls_context(request, session.verify)
assert pool_of(strict) is not pool_of(lax)
assert pool_of(strict) is pool_of(requests.Session())
""",
        env={"HTTP_URL": http_server.url},
    )


def test_statistics_and_closing(http_server: CountingHTTPServer) -> None:
    run_python(
        PATCHED
        + """
held = requests.get(URL, stream=True, timeout=10)
[(name, stats)] = puff_patch.stats().items()
assert name == URL, name
assert (stats["pool_size"], stats["pool_max"], stats["requests_num"]) == (1, 7, 1), stats
for _ in range(3):
    assert requests.get(URL, timeout=10).ok
stats = puff_patch.stats()[URL]
assert (stats["pool_size"], stats["pool_available"], stats["connections_num"]) == (2, 1, 2), stats
assert stats["requests_num"] == 4
with requests.get(URL, stream=True, timeout=10):
    time.sleep(0.02)
assert puff_patch.stats()[URL]["usage_ms"] >= 20
puff_patch.close_pools()
assert held.text == "-"
assert requests.get(URL, timeout=10).ok
puff_patch.close_pools()
""",
        env={"HTTP_URL": http_server.url, "PUFF_HTTP_POOL_MAX_SIZE": "7"},
    )
    assert http_server.accepted == 3


def test_whoever_authenticates_a_connection_has_it_to_himself(http_server: CountingHTTPServer) -> None:
    """As NTLM, Negotiate and Kerberos do: whatever comes over it afterwards counts as his."""
    run_python(
        PATCHED
        + """
class Ntlm(requests.auth.AuthBase):
    def __init__(self, name):
        self.name = name
    def __call__(self, request):
        request.register_hook("response", self.answer)
        return request
    def answer(self, response, **kwargs):
        # As requests-ntlm and its kin do it, past the session.
        if response.status_code != 401:
            return response
        for said in ("NTLM hello", f"NTLM I am {self.name}"):
            response.content
            response.raw.release_conn()
            request = response.request.copy()
            request.headers["Authorization"] = said
            response = response.connection.send(request, **kwargs)
        return response

def known(number):
    name = f"user{number}"
    with requests.Session() as session:
        session.auth = Ntlm(name)
        for _ in range(5):
            response = session.get(URL + "/ntlm", timeout=20)
            assert (response.status_code, response.text) == (200, name), response.text
def unknown():
    for _ in range(5):
        assert requests.get(URL + "/ntlm", timeout=20).status_code == 401
        assert requests.get(URL, timeout=20).ok
def by_hand():
    # The first request may be part of it already.
    session = requests.Session()
    for said in ("NTLM hello", "NTLM I am root"):
        response = session.get(URL + "/ntlm", headers={"Authorization": said}, timeout=20)
    assert response.text == "root"
    unknown()
    assert session.get(URL + "/ntlm", timeout=20).text == "root"
    session.close()
    assert session.get(URL + "/ntlm", timeout=20).status_code == 401
gevent.joinall(
    [gevent.spawn(known, number) for number in range(10)] + [gevent.spawn(unknown) for _ in range(10)]
    + [gevent.spawn(by_hand) for _ in range(5)],
    raise_error=True,
)
""",
        env={"HTTP_URL": http_server.url},
    )


def test_what_one_session_does_to_its_adapter_concerns_no_other(http_server: CountingHTTPServer) -> None:
    run_python(
        PATCHED
        + """
from urllib3.util import Retry
patient, other = requests.Session(), requests.Session()
adapter = patient.get_adapter(URL)
adapter.max_retries = Retry(total=5, status_forcelist=[503], backoff_factor=0.001)
assert patient.get(URL + "/flaky", timeout=10).status_code == 200
assert other.get(URL + "/flaky", timeout=10).status_code == 503
assert requests.get(URL + "/flaky", timeout=10).status_code == 503
assert requests.get(URL + "/flaky", timeout=10).status_code == 200
# An adapter of the caller's own
mounted = requests.Session()
own = requests.adapters.HTTPAdapter(max_retries=adapter.max_retries, pool_maxsize=1, pool_block=True)
mounted.mount("http://", own)
def ask():
    assert mounted.get(URL + "/flaky", timeout=10).status_code == 200
gevent.joinall([gevent.spawn(ask) for _ in range(3)], raise_error=True)
assert type(mounted.get_adapter(URL)) is requests.adapters.HTTPAdapter
mounted.close()
# Settings of the connections
adapter.init_poolmanager(5, 5, source_address=("127.0.0.2", 0))
def address(session):
    response = session.get(URL, stream=True, timeout=10)
    found = response.raw.connection.sock.getsockname()[0]
    response.content
    return found
assert address(patient) == "127.0.0.2"
assert address(other) == "127.0.0.1"
""",
        env={"HTTP_URL": http_server.url},
    )


def test_idle_connections_are_closed_in_time(http_server: CountingHTTPServer) -> None:
    run_python(
        PATCHED
        + """
held = [requests.get(URL, stream=True, timeout=10) for _ in range(3)]
for response in held:
    response.content
[stats] = puff_patch.stats().values()
assert (stats["pool_available"], stats["connections_num"]) == (3, 3), stats
assert requests.get(URL, timeout=10).ok
[stats] = puff_patch.stats().values()
assert (stats["requests_num"], stats["connections_num"]) == (4, 3), stats
with gevent.Timeout(5):
    while stats["pool_size"]:
        gevent.sleep(0.01)
        [stats] = puff_patch.stats().values()
""",
        env={"HTTP_URL": http_server.url, "PUFF_HTTP_POOL_MAX_IDLE": "0.1"},
    )


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An HTTPS server and, before it, a proxy; where they are, and whom to trust."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_OPTIONAL
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    authority.configure_trust(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in ("one", "other"):
        certificate = authority.issue_cert(f"{name}@example.org", common_name=name)
        certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / f"{name}.pem")
    server, proxy = CountingHTTPServer(context), ForwardProxy()
    for each in (server, proxy):
        threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield {"HTTPS_URL": server.url, "PROXY": f"127.0.0.1:{proxy.server_port}", "FOLDER": str(tmp_path)}
    for each in (server, proxy):
        each.shutdown()
        each.server_close()


def test_certificates(tls: dict[str, str]) -> None:
    run_python(
        PATCHED
        + """
import shutil, urllib3
URL, FOLDER = os.environ["HTTPS_URL"], os.environ["FOLDER"]
warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
def ask(path="/session", **options):
    return requests.get(URL + path, timeout=10, **options).text
CA = FOLDER + "/ca.pem"
assert len({ask(verify=CA) for _ in range(3)}) == 1
insecure = {ask(verify=False) for _ in range(3)}
assert len(insecure) == 1 and ask(verify=CA) not in insecure
# Idle connections that were verified otherwise are of no use to who trusts the usual authorities.
for _ in range(2):
    try:
        ask()
    except requests.exceptions.SSLError:
        pass
    else:
        raise AssertionError("trusted")
# Of the client
assert ask("/peer", verify=CA) == "-"
shutil.copy(FOLDER + "/one.pem", FOLDER + "/me.pem")
for _ in range(2):
    assert ask("/peer", verify=CA, cert=FOLDER + "/me.pem") == "one"
assert ask("/peer", verify=CA) == "-"
shutil.copy(FOLDER + "/other.pem", FOLDER + "/me.pem")
assert ask("/peer", verify=CA, cert=FOLDER + "/me.pem") == "other"
# urllib3 by itself, and many at once
with urllib3.PoolManager(ca_certs=CA) as manager:
    assert manager.request("GET", URL).status == 200
gevent.joinall([gevent.spawn(ask, verify=CA) for _ in range(20)], raise_error=True)
sizes = [stats["pool_size"] for name, stats in puff_patch.stats().items()]
assert max(sizes) <= 4, puff_patch.stats()
""",
        env={"HTTP_URL": "", "PUFF_HTTP_POOL_MAX_SIZE": "4", **tls},
    )


def test_proxies(tls: dict[str, str], http_server: CountingHTTPServer) -> None:
    run_python(
        PATCHED
        + """
FOLDER, PROXY = os.environ["FOLDER"], os.environ["PROXY"]
good, bad = ({scheme: f"http://me:{word}@{PROXY}" for scheme in ("http", "https")} for word in ("secret", "wrong"))
for url in (URL, os.environ["HTTPS_URL"]):
    def ask(proxies):
        return requests.get(url + "/session", proxies=proxies, verify=FOLDER + "/ca.pem", timeout=10)
    def use():
        # Through the tunnel of him who may, and never through it for him who may not
        assert ask(good).status_code == 200
        try:
            assert ask(bad).status_code == 407
        except requests.exceptions.ProxyError as error:
            assert "407" in str(error), error
        assert ask(None).status_code == 200
    gevent.joinall([gevent.spawn(use) for _ in range(20)], raise_error=True)
    assert len({ask(good).text for _ in range(3)}) == (1 if url != URL else 3)  # ours connects anew for http
# One that names no user any more is no friend of the one before.
session = requests.Session()
session.proxies = good
assert session.get(URL, timeout=10).ok
session.proxies = {"http": f"http://{PROXY}"}
assert session.get(URL, timeout=10).status_code == 407
assert max(stats["pool_size"] for stats in puff_patch.stats().values()) <= 4
""",
        env={"HTTP_URL": http_server.url, "PUFF_HTTP_POOL_MAX_SIZE": "4", **tls},
    )
