"""redis-py's Sentinel and Cluster clients after `patch_all`, with real servers."""

from __future__ import annotations

import uuid
from pathlib import Path

from support.process import run_python
from support.redis_servers import running_cluster, running_sentinel

PATCHED = """
import puff_patch; puff_patch.patch_all()
import gevent, redis
TAG = os.environ["TAG"]
ticks = 0
def tick():
    global ticks
    while True:
        ticks += 1
        gevent.sleep(0.001)
gevent.spawn(tick)
def connections(port):
    pool = redis.ConnectionPool(port=port, decode_responses=True)
    try:
        return sum(each["name"] == TAG for each in redis.Redis(connection_pool=pool).client_list())
    finally:
        pool.disconnect()
"""


def tag() -> str:
    return f"puff-test-{uuid.uuid4().hex[:12]}"


def test_sentinel(tmp_path: Path) -> None:
    with running_sentinel(tmp_path, "service") as port:
        run_python(
            PATCHED
            + """
from redis.sentinel import Sentinel, SentinelConnectionPool
sentinel = Sentinel([("127.0.0.1", int(os.environ["PORT"]))], socket_timeout=5)
options = {"client_name": TAG, "max_connections": 2, "decode_responses": True}
master, replica = sentinel.master_for("service", **options), sentinel.slave_for("service", **options)
assert isinstance(master.connection_pool, SentinelConnectionPool)
old = sentinel.discover_master("service")
def use(number):
    master.set(f"{TAG}:{number}", number)
    assert master.get(f"{TAG}:{number}") == str(number)
    assert replica.info("replication")["role"] == "slave"
def all_use():
    gevent.joinall([gevent.spawn(use, number) for number in range(50)], timeout=20, raise_error=True)
while ticks <= 5:  # for good, if no other greenlet gets its turn
    all_use()
assert 1 <= connections(old[1]) <= 2
# Waiting commands have connections of their own here, too.
waiting = [gevent.spawn(master.blpop, TAG, 20) for _ in range(5)]
gevent.sleep(0.05)
with gevent.Timeout(5):
    use(0)
    master.rpush(TAG, *range(5))
gevent.joinall(waiting, timeout=5, raise_error=True)
# A fail-over is followed.
admin = redis.Redis(port=old[1], retry=None)
try:
    admin.shutdown(nosave=True)
except redis.ConnectionError:
    pass
admin.close()
with gevent.Timeout(30):
    while True:
        try:
            master.set(TAG, 1)
            break
        except (redis.ConnectionError, redis.TimeoutError):
            gevent.sleep(0.02)
new = sentinel.discover_master("service")
assert master.connection_pool.master_address == new != old
gevent.joinall([gevent.spawn(master.set, f"{TAG}:{n}", n) for n in range(50)], timeout=20, raise_error=True)
assert 1 <= connections(new[1]) <= 2 + 2, "of the master, and of the replica that it was"
names = set(puff_patch.stats())
assert {"sentinel://service/master", "sentinel://service/replica", "sentinel://service/master blocking"} <= names
# A class that the caller names is the caller's.
own = sentinel.master_for("service", connection_pool_class=SentinelConnectionPool)
assert type(own.connection_pool) is SentinelConnectionPool and own.ping()
for client in (own, master, replica, *sentinel.sentinels):
    client.close()
puff_patch.unpatch_all()
assert type(sentinel.master_for("service").connection_pool) is SentinelConnectionPool
""",
            env={"TAG": tag(), "PORT": str(port)},
        )


def test_cluster(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as ports:
        run_python(
            PATCHED
            + """
from redis.cluster import RedisCluster
PORTS = [int(port) for port in os.environ["PORTS"].split()]
options = {"client_name": TAG, "max_connections": 2, "decode_responses": True}
clusters = [
    RedisCluster.from_url(f"redis://127.0.0.1:{PORTS[0]}", **options),
    RedisCluster(host="127.0.0.1", port=PORTS[1], **options),
]
for cluster in clusters:
    def use(number):
        key = f"{TAG}:{number}"
        cluster.set(key, number)
        assert cluster.get(key) == str(number)
    before = ticks
    workers = [gevent.spawn(use, number) for number in range(100)]
    most = dict.fromkeys(PORTS, 0)
    while not all(worker.dead for worker in workers):
        for port in PORTS:
            most[port] = max(most[port], connections(port))
    gevent.joinall(workers, raise_error=True)
    assert all(1 <= number <= 2 + 1 for number in most.values()), most  # one more asked for the topology
    # Pipelines hold connections of several nodes, and ask for more meanwhile, but not for each other's.
    def use_pipeline(number):
        key = f"{TAG}:{number}"
        pipeline = cluster.pipeline()
        pipeline.incr(key)
        pipeline.delete(key)
        for other in range(8):
            pipeline.get(f"{key}:{other}")
        assert pipeline.execute() == [number + 1, 1, *[None] * 8]
        use(number)
    gevent.joinall([gevent.spawn(use_pipeline, n) for n in range(60)], timeout=20, raise_error=True)
    assert ticks > before + 5
    # Waiting commands and subscriptions have connections of their own.
    waiting = [gevent.spawn(cluster.blpop, TAG, 20) for _ in range(8)]
    subscriptions = [cluster.pubsub() for _ in range(4)]
    for subscription in subscriptions:
        subscription.subscribe(TAG)
    gevent.sleep(0.05)
    with gevent.Timeout(5):
        gevent.joinall([gevent.spawn(use, number) for number in range(30)], raise_error=True)
        cluster.rpush(TAG, *range(8))
    gevent.joinall(waiting, timeout=5, raise_error=True)
    for subscription in subscriptions:
        subscription.close()
    cluster.disconnect_connection_pools()

# While a slot moves, keys are asked for where they are (ASK), and afterwards there (MOVED).
cluster = clusters[0]
slot = cluster.keyslot(TAG)
source = cluster.get_node_from_key(TAG)
target = next(node for node in cluster.get_primaries() if node.port != source.port)
direct = {node.port: redis.Redis(port=node.port, decode_responses=True) for node in (source, target)}
source_id, target_id = (direct[node.port].execute_command("CLUSTER", "MYID") for node in (source, target))
direct[target.port].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
direct[source.port].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
gevent.joinall([gevent.spawn(cluster.set, TAG, "asked") for _ in range(20)], raise_error=True)
assert cluster.get(TAG) == "asked"
for node in (target, source):
    direct[node.port].execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
reads = [gevent.spawn(cluster.get, TAG) for _ in range(20)]
gevent.joinall(reads, raise_error=True)
assert {read.value for read in reads} == {"asked"}
assert cluster.get_node_from_key(TAG).port == target.port
for client in (*direct.values(), *clusters):
    client.close()
for each in clusters:
    each.disconnect_connection_pools()
""",
            env={"TAG": tag(), "PORTS": " ".join(map(str, ports))},
        )
