"""The connections that sessions share are neither lost nor mixed up, whatever becomes of a request."""

from __future__ import annotations

from support.process import run_python
from support.servers import CountingHTTPServer

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
from puff_patch.pools.http import shared_adapter
strict, lax = requests.Session(), requests.Session()
lax.verify = False
def pool_of(session):
    request = session.prepare_request(requests.Request("GET", "https://localhost:1/"))
    return shared_adapter().get_connection_with_tls_context(request, session.verify)
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
