"""Redis servers of a test's own: a cluster, and a master with its replica under a Sentinel."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import redis

from puff_patch.embedded.redis import Redis as EmbeddedRedis


class Servers:
    """Starts servers in a folder, and stops them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.binary = next(path for path, _ in EmbeddedRedis._candidates())
        self._running: list[subprocess.Popen[bytes]] = []
        self.clients: list[redis.Redis] = []

    def start(self, *options: str, config: str = "", sentinel: bool = False) -> int:
        """A server on a free port; returns the port when it answers."""
        port = free_port()
        home = self.folder / str(port)
        home.mkdir(parents=True)
        file = home / "redis.conf"
        file.write_text(f'port {port}\nbind 127.0.0.1\ndir "{home}"\n{config}')
        if not sentinel:
            options = ("--save", "", "--appendonly", "no", *options)
        argv = [str(self.binary), str(file), *options, *(["--sentinel"] if sentinel else [])]
        with open(home / "log", "wb") as log:
            self._running.append(subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        pool = redis.ConnectionPool(host="127.0.0.1", port=port, decode_responses=True, protocol=2)
        client = redis.Redis(connection_pool=pool)
        self.clients.append(client)

        def answers() -> bool:
            with contextlib.suppress(redis.ConnectionError):
                return bool(client.ping())
            return False

        until(answers, f"the server on port {port} answers")
        return port

    def close(self) -> None:
        for client in self.clients:
            client.connection_pool.disconnect()
        for server in self._running:
            server.kill()
        for server in self._running:
            server.wait(10)


def free_port() -> int:
    """One whose cluster bus, at 10000 above, is free, too."""
    while True:
        port = random.randrange(20000, 30000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for each in (port, port + 10000):
                stack.enter_context(socket.create_server(("127.0.0.1", each)))
            return port


def until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"did not happen within {seconds:g} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def running_cluster(folder: Path, masters: int = 3) -> Iterator[list[int]]:
    """The ports of a cluster of masters that share the slots."""
    servers = Servers(folder)
    try:
        ports = [
            servers.start("--cluster-enabled", "yes", "--cluster-node-timeout", "2000") for _ in range(masters)
        ]
        bounds = [16384 * number // masters for number in range(masters + 1)]
        for number, client in enumerate(servers.clients):
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            client.execute_command("CLUSTER ADDSLOTS", *range(bounds[number], bounds[number + 1]))
            client.execute_command("CLUSTER MEET", "127.0.0.1", ports[0])
        for client in servers.clients:
            until(
                lambda client=client: (
                    client.cluster("INFO")["cluster_state"] == "ok"
                    and int(client.cluster("INFO")["cluster_known_nodes"]) == masters
                ),
                "all nodes know each other",
            )
        yield ports
    finally:
        servers.close()


@contextlib.contextmanager
def running_sentinel(folder: Path, service: str) -> Iterator[int]:
    """The port of a Sentinel that watches over a master and its replica."""
    servers = Servers(folder)
    try:
        master = servers.start(config="repl-diskless-sync-delay 0\n")
        servers.start(config=f"replicaof 127.0.0.1 {master}\n")
        replica = servers.clients[1]
        until(lambda: replica.info("replication")["master_link_status"] == "up", "the replica is in step")
        watched = (
            f"sentinel monitor {service} 127.0.0.1 {master} 1\nsentinel down-after-milliseconds {service} 1000\n"
        )
        port = servers.start(config=watched, sentinel=True)
        sentinel = servers.clients[2]
        until(
            lambda: any(
                "disconnected" not in each["flags"] and each["master-link-status"] == "ok"
                for each in map(pairs, sentinel.execute_command("SENTINEL", "REPLICAS", service))
            ),
            "Sentinel knows the replica",
        )
        yield port
    finally:
        servers.close()


def pairs(reply: object) -> dict[str, str]:
    """A reply of alternating names and values, which some versions of redis-py have paired already."""
    if isinstance(reply, dict):
        return reply
    assert isinstance(reply, list)
    return dict(zip(reply[::2], reply[1::2], strict=True))
