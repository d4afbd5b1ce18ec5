"""The core of the pool soaks: thousands of greenlets on a bounded pool, which are killed and find sessions ended.

A `Workload` says what is done to one kind of pool and what its server knows; `Soak` runs it and judges.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import psutil


class Wrong(AssertionError):
    """A promise of the pool is broken."""


class Stray(BaseException):
    """What an impatient owner throws into a greenlet: no GreenletExit, and no Exception."""


class Workload:
    """One kind of pool under load.

    Args:
        tag: what the server knows this run's sessions by.
        max_size: the pool's bound.
        sessions: how many the server may see, if that is more.
    """

    #: What a use may raise because somebody ended the session, or because it was queued for too long.
    expected: tuple[type[BaseException], ...] = ()
    #: What it may not raise, for nobody but the pool could have caused it.
    forbidden: tuple[type[BaseException], ...] = ()

    def __init__(self, tag: str, max_size: int, *, sessions: int = 0) -> None:
        self.tag = tag
        self.max_size = max_size
        self.most_sessions = sessions or max_size
        self.inside: set[Any] = set()
        self.counts: Counter[str] = Counter()
        self._owners: dict[Any, str] = {}

    def uses(self) -> list[Callable[[random.Random, str], None]]:
        """What a greenlet may do, each with a token of its own; the more often it is listed the oftener."""
        raise NotImplementedError

    def end_a_session(self, rng: random.Random) -> None:
        """Have the server end one of the pool's sessions."""
        raise NotImplementedError

    def observer(self) -> list[str]:
        """The command that counts the sessions from outside, and prints the most when its input ends."""
        raise NotImplementedError

    def at_rest(self) -> str:
        """Empty if the server shows nothing but clean, idle sessions, else what is wrong."""
        raise NotImplementedError

    def take(self) -> Any:
        """A lease."""
        raise NotImplementedError

    def give(self, lease: Any) -> None:
        """Return it."""
        raise NotImplementedError

    def stats(self) -> dict[str, int]:
        """The pool's."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the pool and whatever else is open."""
        raise NotImplementedError

    @contextmanager
    def alone(self, session: Any, token: str) -> Iterator[None]:
        """Within it nobody else may have this session, and the killer knows that there is something to disturb."""
        if session in self._owners:
            raise Wrong(f"{token} was given session {session}, which {self._owners[session]} has")
        greenlet = gevent.getcurrent()
        self._owners[session] = token
        self.inside.add(greenlet)
        try:
            yield
        finally:
            self.inside.discard(greenlet)
            del self._owners[session]


def is_same(found: Any, wanted: Any, what: str) -> None:
    """Complain of a wrong answer."""
    if found != wanted:
        raise Wrong(f"{what}: wanted {wanted!r}, got {found!r}")


def open_files() -> Counter[str]:
    """What this process has open, each kind of socket as one."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the folder itself
            found[os.readlink(f"/proc/self/fd/{name}").partition(":[")[0]] += 1
    return found


class Soak:
    """A run.

    Args:
        workload: what is done.
        greenlets: how many are alive at any time.
        seconds: how long, without the end.
        seed: of all chance.
        kills: greenlets killed a second.
        ends: sessions ended a second by the server.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        greenlets: int = 10_000,
        seconds: float = 60,
        seed: int = 0,
        kills: float = 100,
        ends: float = 20,
    ) -> None:
        self.workload = workload
        self.seconds = seconds
        self.seed = seed
        self.kills = kills
        self.ends = ends
        self.failures: list[str] = []
        self.counts = workload.counts
        self._size = greenlets
        self._born = 0
        self._stopping = False
        self._alive: dict[int, gevent.Greenlet] = {}
        self._longest_block = 0.0

    def run(self) -> int:
        """Run, judge and tell; 0 if every promise was kept."""
        workload, process = self.workload, psutil.Process()
        print(
            f"{type(workload).__name__}: seed {self.seed}, {self._size} greenlets, {self.seconds:g} s", flush=True
        )
        observer = subprocess.Popen(workload.observer(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert observer.stdout is not None
        observer.stdout.readline()  # it watches
        workload.give(workload.take())
        files = open_files()
        for place in range(self._size):
            self._spawn(place)
        rng = random.Random(self.seed)
        disturbers = [
            gevent.spawn(self._often, self.kills, self._kill_one, random.Random(rng.random())),
            gevent.spawn(self._often, self.ends, workload.end_a_session, random.Random(rng.random())),
            gevent.spawn(self._tick),
        ]
        gevent.sleep(self.seconds / 3)
        early = self._memory(process)
        gevent.sleep(self.seconds * 2 / 3)
        late = self._memory(process)
        self._stopping = True
        gevent.joinall(disturbers, timeout=10)  # not killed: they may be talking to the server
        self._check_growth(early, late)
        self._check_end()
        most = int(observer.communicate("")[0])
        if most > workload.most_sessions:
            self.failures.append(f"the server saw {most} sessions, {workload.most_sessions} are allowed")
        stats = workload.stats()
        workload.close()
        self._alive.clear()
        gevent.sleep(0.1)
        gc.collect()
        left = open_files() - files
        del left["anon_inode"]  # two for the hub of each thread that copies, of which there are few
        if sum(left.values()) > 2:
            self.failures.append(f"files are open that were not at the start: {left}")
        self._tell(early, late, most, stats)
        return 1 if self.failures else 0

    def _spawn(self, place: int) -> None:
        self._born += 1
        self._alive[place] = greenlet = gevent.Greenlet(self._life, self._born)
        greenlet.rawlink(lambda _: None if self._stopping else self._spawn(place))
        greenlet.start()

    def _life(self, number: int) -> None:
        rng = random.Random(f"{self.seed}-{number}")
        uses = self.workload.uses()
        try:
            for turn in range(rng.randrange(1, 200)):
                if self._stopping:
                    return
                self._use(rng.choice(uses), rng, f"{number}-{turn}")
                gevent.sleep(rng.random() * 0.1)
        except (gevent.GreenletExit, Stray):
            self.counts["killed"] += 1

    def _use(self, use: Callable[[random.Random, str], None], rng: random.Random, token: str) -> None:
        try:
            use(rng, token)
        except Wrong as error:
            self._fail(f"{use.__name__} {token}: {error}")
        except self.workload.forbidden as error:
            self._fail(f"{use.__name__} {token}: a lease was hit by what another one did: {error!r}")
        except self.workload.expected as error:
            self.counts[f"{use.__name__} raised {type(error).__name__}"] += 1
        except Exception:  # noqa: BLE001 - told at the end
            self._fail(f"{use.__name__} {token}: {traceback.format_exc()}")
        else:
            self.counts[use.__name__] += 1

    def _fail(self, failure: str) -> None:
        if len(self.failures) < 20:
            print(f"WRONG: {failure}", flush=True)
            self.failures.append(failure)

    def _often(self, rate: float, deed: Callable[[random.Random], None], rng: random.Random) -> None:
        while not self._stopping:
            gevent.sleep(rng.expovariate(rate))
            deed(rng)

    def _kill_one(self, rng: random.Random) -> None:
        inside = list(self.workload.inside)
        victim = rng.choice(inside) if inside and rng.random() < 0.6 else self._alive[rng.randrange(self._size)]
        victim.kill(rng.choice([gevent.GreenletExit, Stray]), block=False)

    def _tick(self) -> None:
        while not self._stopping:
            started = time.monotonic()
            gevent.sleep(0.001)
            self._longest_block = max(self._longest_block, time.monotonic() - started)

    def _memory(self, process: psutil.Process) -> tuple[float, int]:
        gc.collect()
        return process.memory_info().rss / 2**20, len(gc.get_objects())

    def _check_growth(self, early: tuple[float, int], late: tuple[float, int]) -> None:
        if self.seconds < 10:
            return  # thousands of greenlets are still at their first use, and more so on a busy machine
        if late[0] > early[0] * 1.15 + 10:
            self.failures.append(f"memory grew from {early[0]:.0f} to {late[0]:.0f} MiB")
        if late[1] > early[1] * 1.10 + 5000:
            self.failures.append(f"objects grew from {early[1]} to {late[1]}")

    def _check_end(self) -> None:
        """Whether everything comes to rest, and every place of the pool is there."""
        workload = self.workload
        # Whoever waits for a lease gets it now; a use takes a fraction of a second.
        gevent.joinall(list(self._alive.values()), timeout=60)
        stuck = [greenlet for greenlet in self._alive.values() if not greenlet.dead]
        if stuck:
            where = "".join(traceback.format_stack(stuck[0].gr_frame)) if stuck[0].gr_frame else "not started"
            self._fail(f"{len(stuck)} greenlets have not ended, one of them here:\n{where}")
            gevent.killall(stuck, timeout=10)
        gc.collect()
        limit = time.monotonic() + 10
        while wrong := self._restless():
            if time.monotonic() > limit:
                self._fail(f"no rest after 10 s: {wrong}")
                break
            gevent.sleep(0.02)
        leases: list[Any] = []
        refused: list[str] = []
        try:
            with gevent.Timeout(20):
                while len(leases) < workload.max_size:
                    try:
                        leases.append(workload.take())
                    except workload.expected as error:  # the server may have ended that very one
                        refused.append(repr(error))
        except (gevent.Timeout, Exception) as error:  # noqa: BLE001 - told at the end
            self._fail(
                f"only {len(leases)} of {workload.max_size} places came back: {error!r}, "
                f"{len(refused)} were refused: {refused[:1]} ... {refused[-1:]}"
            )
        while leases:
            workload.give(leases.pop())

    def _restless(self) -> str:
        stats = self.workload.stats()
        if stats["requests_waiting"] or stats["pool_available"] != stats["pool_size"]:
            return f"the pool has {stats}"
        if stats["pool_size"] > self.workload.max_size:
            return f"the pool has {stats['pool_size']} places"
        return self.workload.at_rest()

    def _tell(self, early: tuple[float, int], late: tuple[float, int], most: int, stats: Any) -> None:
        for name, count in sorted(self.counts.items()):
            print(f"{count:9} {name}")
        print(f"{self._born:9} greenlets in all")
        print(f"{most:9} sessions at most")
        print(f"memory {early[0]:.0f} -> {late[0]:.0f} MiB, objects {early[1]} -> {late[1]}")
        print(f"longest time the hub was not free: {self._longest_block * 1000:.0f} ms")
        print(f"the pool: {stats}")
        for failure in self.failures:
            print(f"FAILED: {failure}")
        sys.stdout.flush()
