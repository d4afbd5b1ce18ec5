"""Who holds the connections of a pool, for how long, and what they are doing now.

A stack taken at each checkout would tell where a lease began, and cost more than the checkout.  A lease keeps a
weak reference to its greenlet instead, and the stack is looked at when somebody asks: it tells what the holder is
doing *now*, which is what keeps the others waiting.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent

from puff_patch.runtime.stacks import describe, greenlet_stack

if TYPE_CHECKING:
    from puff_patch.pools.base import Slot


def describe_holders(leased: Iterable[Slot[Any]], now: float, *, most: int = 3) -> str:
    """A line for each of the longest leases, the longest first; empty if there is none.

    Args:
        leased: the slots in use; a set that other threads change is fine.
        now: on the clock of `time.monotonic`.
        most: how many lines.
    """
    # sorted() copies the set first, and no other thread comes between.
    longest = sorted(leased, key=lambda slot: slot.leased_at)[:most]
    return "".join(f"\n  held for {now - slot.leased_at:.1f} s by {_holder(slot)}" for slot in longest)


def _holder(slot: Slot[Any]) -> str:
    holder = slot.holder() if slot.holder is not None else None
    if holder is None or holder.dead:
        return "a greenlet that has ended; something else still refers to the connection"
    if holder is getcurrent():
        return "this very greenlet, which asks for another one"
    stack = greenlet_stack(holder)
    return f"{holder!r}, now at {describe(stack)}" if stack else f"{holder!r}, running in another thread"
