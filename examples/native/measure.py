"""What a native function gains that is called through `puff_patch.blocking`: prints one JSON object.

pip install ./examples/native
python examples/native/measure.py
"""

import puff_patch

puff_patch.patch_all()

import json  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import gevent  # noqa: E402
import similarity  # noqa: E402

# It runs in a native thread while the calling greenlet, or coroutine, waits.
distance = puff_patch.blocking(similarity.distance)


@puff_patch.blocking
def timed(a: str, b: str) -> tuple[float, float]:
    """When it began in its thread, and when it ended."""
    started = time.perf_counter()
    similarity.distance(a, b)
    return started, time.perf_counter()


def distance_in_python(a: str, b: str) -> int:
    """The same as similarity.distance."""
    costs = list(range(len(b) + 1))
    for i, one in enumerate(a):
        diagonal, costs[0] = costs[0], i + 1
        for j, other in enumerate(b):
            cost = min(diagonal + (one != other), costs[j + 1] + 1, costs[j] + 1)
            diagonal, costs[j + 1] = costs[j + 1], cost
    return costs[-1]


class Ticker:
    """Ticks every millisecond in a greenlet, and remembers the longest pause, in seconds."""

    def __enter__(self) -> "Ticker":
        self.ticks, self.longest, self._last = 0, 0.0, time.perf_counter()
        self._greenlet = gevent.spawn(self._run)
        gevent.sleep(0.01)
        self.ticks, self.longest = 0, 0.0
        return self

    def _run(self) -> None:
        while True:
            gevent.sleep(0.001)
            now = time.perf_counter()
            self.longest, self._last = max(self.longest, now - self._last), now
            self.ticks += 1

    def __exit__(self, *_: object) -> None:
        gevent.sleep(0.005)  # after a pause it must be seen how long it was
        self._greenlet.kill()


def seconds(function: Callable[[], object]) -> float:
    """How long it takes, the best of three."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
        gevent.sleep(0.002)
    return min(times)


async def both_awaited(a: str, b: str) -> list[int]:
    """From a coroutine: the call is awaitable."""
    import asyncio

    return list(await asyncio.gather(distance(a, b), distance(b, a)))


def main(size: int) -> None:
    """Measure."""
    from puff_patch.runtime.aio import run_coroutine

    letters = random.Random(4)
    a, b = ("".join(letters.choices("abcdefgh", k=size)) for _ in range(2))
    short = a[:400], b[:400]
    assert similarity.distance(*short) == distance_in_python(*short) == distance(*short)
    with Ticker() as beside_direct:
        direct = seconds(lambda: similarity.distance(a, b))
    with Ticker() as beside_blocking:
        alone = seconds(lambda: distance(a, b))

    def two() -> None:
        calls = [gevent.spawn(distance, a, b), gevent.spawn(distance, b, a)]
        gevent.joinall(calls, raise_error=True)

    calls = [gevent.spawn(timed, a, b), gevent.spawn(timed, b, a)]
    began, ended = zip(*(call.get() for call in calls), strict=True)
    one_after_the_other = seconds(lambda: (distance(a, b), distance(b, a)))
    at_once = seconds(two)
    assert run_coroutine(both_awaited(a, b)) == [similarity.distance(a, b)] * 2
    print(
        json.dumps(
            {
                "call_ms": alone * 1000,
                "longest_pause_direct_ms": beside_direct.longest * 1000,
                "longest_pause_blocking_ms": beside_blocking.longest * 1000,
                "ticks_direct": beside_direct.ticks,
                "ticks_blocking": beside_blocking.ticks,
                "overlap": (min(ended) - max(began)) / (max(ended) - min(began)),
                "two_at_once_x": one_after_the_other / at_once,
                "through_blocking_x": direct / alone,
                "python_x": seconds(lambda: distance_in_python(*short))
                / seconds(lambda: similarity.distance(*short)),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 12_000)
