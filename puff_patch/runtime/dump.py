"""The stacks of everything in this process at once, for when it hangs: greenlets, threads and asyncio's tasks."""

from __future__ import annotations

import asyncio
import gc
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from gevent import get_hub
from gevent.monkey import get_original
from greenlet import getcurrent, greenlet

from puff_patch.runtime.greenlets import warm_pools
from puff_patch.runtime.stacks import greenlet_stack, thread_stack

_get_ident: Any = get_original("_thread", "get_ident")

_OWN = (__file__, thread_stack.__code__.co_filename)


def living_greenlets() -> list[greenlet]:
    """The greenlets of this process that have begun and not ended, but those of a warm pool that have no job.

    It looks at every object there is, which takes some tens of milliseconds in a large program.
    """
    idle = {id(each) for pool in warm_pools() for each in pool.idle()}
    # type() and not isinstance(), which would load what is lazy.
    return [
        each for each in gc.get_objects() if issubclass(type(each), greenlet) and each and id(each) not in idle
    ]


def dump_stacks(labels: dict[int, str] | None = None) -> str:
    """What everybody is doing, with the innermost call last, as in a traceback.

    Call it in the hub's thread; a signal handler may.

    Args:
        labels: what to call some of the greenlets, by `id`.
    """
    return "\n".join(f"{title}:\n{lines}" for title, lines in _sections(labels or {}))


def _sections(labels: dict[int, str]) -> Iterator[tuple[str, str]]:
    current, hub, ident = getcurrent(), get_hub(), _get_ident()
    for each in living_greenlets():
        if each is not current and each is not hub and (stack := greenlet_stack(each)):
            yield labels.get(id(each), repr(each)), _formatted(stack)
    if current is not hub:
        stack = thread_stack(ident)
        mine = [frame for frame in stack if frame.f_code.co_filename not in _OWN]
        yield f"{labels.get(id(current), repr(current))}, which is running", _formatted(mine)
    for thread in sys._current_frames().keys() - {ident}:
        if stack := thread_stack(thread):
            yield f"native thread {thread}", _formatted(stack)
    # asyncio.all_tasks() would tell those of one loop only.
    for task in gc.get_objects():
        if (
            issubclass(type(task), asyncio.Task)
            and not task.done()
            and (stack := _coroutine_stack(task.get_coro()))
        ):
            yield f"asyncio's task {task.get_name()!r}", _formatted(stack)


def _coroutine_stack(coroutine: Any) -> list[FrameType]:
    """The frames of a coroutine and of what it awaits, the innermost first."""
    stack: list[FrameType] = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is None:
            break
        stack.insert(0, frame)
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    return stack


def _formatted(stack: Sequence[FrameType]) -> str:
    lines = traceback.StackSummary.extract([(frame, frame.f_lineno) for frame in reversed(stack)])
    return "".join(lines.format())
