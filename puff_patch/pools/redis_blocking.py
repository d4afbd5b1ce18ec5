"""Which Redis commands keep a connection to themselves, and who is running one now.

Importing it imports neither redis-py nor gevent, so that the patch can know the commands before either is there.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Use(enum.Enum):
    """What a connection is taken for, other than one command that is answered at once."""

    #: It may wait for as long as the caller likes: it needs a connection, but no certain one.
    BLOCKING = "blocking"
    #: It may not be the only one: the first waits its turn, further ones must not, or two such uses might wait
    #: for each other (a pipeline of a cluster holds a connection of one node while it takes one of the next).
    SEVERAL = "several"
    #: WAIT and WAITAOF wait for what was written before *on the same connection*.
    SETTLING = "settling"


# https://redis.io/docs/latest/commands/?group=list and the other groups: those with the flag "blocking".
_USES: dict[str, Use] = {
    **dict.fromkeys(
        (
            "BLPOP",
            "BRPOP",
            "BRPOPLPUSH",
            "BLMOVE",
            "BLMPOP",
            "BZPOPMIN",
            "BZPOPMAX",
            "BZMPOP",
            "MONITOR",
            "SUBSCRIBE",
            "PSUBSCRIBE",
            "SSUBSCRIBE",
            "SYNC",
            "PSYNC",
        ),
        Use.BLOCKING,
    ),
    "WAIT": Use.SETTLING,
    "WAITAOF": Use.SETTLING,
}
# Those block only with BLOCK among their options; the number says how many arguments come before these.
_OPTIONS_AT = {"XREAD": 1, "XREADGROUP": 4}


def use_of(args: Sequence[Any]) -> Use | None:
    """What a command, as given to ``execute_command``, takes its connection for; None if it does not wait.

    Args:
        args: the command's name, str or bytes in any case, and its arguments.
    """
    name = args[0] if args else ""
    if isinstance(name, bytes):
        name = name.decode("latin-1")
    if not isinstance(name, str):
        return None
    name = name.upper()
    if " " in name:  # redis-py takes "XREAD BLOCK", too
        args = (*name.split(), *args[1:])
        if not name.strip():
            return None
        name = args[0]
    if name in _OPTIONS_AT:
        for option in args[_OPTIONS_AT[name] :]:
            word = option.decode("latin-1") if isinstance(option, bytes) else str(option)
            if word.upper() == "STREAMS":
                break
            if word.upper() == "BLOCK":
                return Use.BLOCKING
        return None
    return _USES.get(name)


@functools.cache
def _current() -> Any:
    from gevent.local import local  # only once a command is run: importing a patch imports no gevent

    class Current(local):
        use: Use | None = None

    return Current()


def current_use() -> Use | None:
    """What this greenlet takes connections for now."""
    use: Use | None = _current().use
    return use


def took_one() -> None:
    """The first of `Use.SEVERAL` was taken."""
    _current().use = Use.BLOCKING


@contextmanager
def using(use: Use) -> Iterator[None]:
    """Within, this greenlet's connections are taken for ``use``."""
    current = _current()
    before, current.use = current.use, use
    try:
        yield
    finally:
        current.use = before
