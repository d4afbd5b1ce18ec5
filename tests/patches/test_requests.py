"""Sessions share connections, and nothing else."""

from __future__ import annotations

from support.process import run_python
from support.servers import CountingHTTPServer

PATCHED = """
import puff_patch
puff_patch.patch_all()
import gevent, requests
URL = os.environ["HTTP_URL"]
"""


def run(code: str, server: CountingHTTPServer, **env: str) -> object:
    return run_python(PATCHED + code, env={"HTTP_URL": server.url, **env})


def test_requests_get_reuses_connections(http_server: CountingHTTPServer) -> None:
    run(
        """
for _ in range(5):
    requests.get(URL, timeout=10)
with requests.Session() as one:
    one.get(URL, timeout=10)
other = requests.Session()
other.get(URL, timeout=10)
one.close()
other.close()
# others go on after a close
assert requests.Session().get(URL, timeout=10).ok
""",
        http_server,
    )
    assert http_server.served == 8
    assert http_server.accepted == 1


def test_connections_are_bounded_and_all_get_served(http_server: CountingHTTPServer) -> None:
    run(
        """
greenlets = [gevent.spawn(requests.get, URL, timeout=10) for _ in range(60)]
gevent.joinall(greenlets, timeout=30)
assert all(greenlet.value.ok for greenlet in greenlets)
""",
        http_server,
        PUFF_HTTP_POOL_MAX_SIZE="3",
    )
    assert http_server.served == 60
    assert http_server.most_open <= 3


def test_cookies_and_adapters_stay_each_sessions_own(http_server: CountingHTTPServer) -> None:
    run(
        """
from requests.adapters import HTTPAdapter
one, other = requests.Session(), requests.Session()
one.get(URL + "/cookie", timeout=10)
assert one.get(URL, timeout=10).text == "who=me"
assert other.get(URL, timeout=10).text == "-"
assert requests.get(URL, timeout=10).text == "-"

class Mine(HTTPAdapter):
    sent = 0
    def send(self, *args, **kwargs):
        Mine.sent += 1
        return super().send(*args, **kwargs)

class MySession(requests.Session):
    def __init__(self):
        super().__init__()
        self.mount("http://", Mine())

mounted = requests.Session()
mounted.mount(URL, Mine())
for session in (mounted, MySession()):
    session.get(URL, timeout=10)
    session.close()
other.get(URL, timeout=10)
assert Mine.sent == 2, Mine.sent
""",
        http_server,
    )


def test_unread_responses_exhaust_the_pool_with_a_clear_error(http_server: CountingHTTPServer) -> None:
    message = run(
        """
held = [requests.get(URL, stream=True, timeout=10) for _ in range(2)]
try:
    requests.get(URL, timeout=10)
except requests.exceptions.ConnectTimeout as error:
    message = str(error)
held[0].content
assert requests.get(URL, timeout=10).ok
held[1].close()
report(message)
""",
        http_server,
        PUFF_HTTP_POOL_MAX_SIZE="2",
        PUFF_HTTP_POOL_TIMEOUT="0.1",
    )
    assert "127.0.0.1" in str(message)
    assert "all 2 (max_size)" in str(message)
    assert "0.1 s" in str(message)
    assert "PUFF_HTTP_POOL_MAX_SIZE" in str(message)


def test_a_pickled_session_keeps_its_own_and_shares_again(http_server: CountingHTTPServer) -> None:
    run(
        """
import pickle
session = requests.Session()
session.headers["X-Mine"] = "1"
session.get(URL + "/cookie", timeout=10)
copy = pickle.loads(pickle.dumps(session))
assert copy.get(URL, timeout=10).text == "who=me"
assert copy.headers["X-Mine"] == "1"
""",
        http_server,
    )
    assert http_server.accepted == 1


def test_a_forked_child_has_connections_of_its_own(http_server: CountingHTTPServer) -> None:
    run(
        """
session = requests.Session()
def ask():
    response = session.get(URL, stream=True, timeout=10)
    port = response.raw.connection.sock.getsockname()
    response.content
    return port
mine = ask()
assert ask() == mine
child = os.fork()
if not child:
    os._exit(0 if ask() != mine else 1)
assert os.waitpid(child, 0)[1] == 0
assert ask() == mine
""",
        http_server,
    )
    assert http_server.accepted == 2


def test_unpatching_closes_the_shared_connections(http_server: CountingHTTPServer) -> None:
    run(
        """
requests.get(URL, timeout=10)
def sockets():
    with os.scandir("/proc/self/fd") as entries:
        return [entry.name for entry in entries if "/socket:" in os.path.realpath(entry.path)]
assert len(sockets()) == 1
puff_patch.unpatch_all()
assert sockets() == [], sockets()
assert requests.get(URL, timeout=10).ok
""",
        http_server,
    )
