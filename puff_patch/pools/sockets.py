"""To which thread and process a socket belongs.

A gevent socket belongs to the hub, and so to the thread, that made it: another one can neither wait for it nor
close it. After a fork the copies of all greenlets run on in the child; a connection that one of them holds would
be read and written by two processes, so the child cuts it off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from gevent._hub_local import get_hub_if_exists
from gevent.hub import Hub
from gevent.monkey import get_original

from puff_patch.runtime.mailbox import Mailbox

_socketpair: Callable[[], Any] = get_original("socket", "socketpair")


def settle() -> None:
    """In a thread that opens a connection: let other threads close it."""
    Mailbox.current()


def is_mine(sock: Any) -> bool:
    """Whether this thread can use the socket; anything but a gevent socket can be used anywhere."""
    hub = getattr(sock, "hub", None)
    return not isinstance(hub, Hub) or hub is get_hub_if_exists()


def close_at_home(sock: Any, close: Callable[[], object]) -> None:
    """Call ``close`` in the thread of the socket; if that has ended, leave it to the garbage collector."""
    if is_mine(sock):
        close()
        return
    mailbox = Mailbox.of(sock.hub)
    if mailbox is not None:
        mailbox.post(close)


def cut_off(descriptor: int) -> None:
    """In a forked child: let the descriptor lead to a closed connection; the parent's is not touched."""
    here, there = _socketpair()
    there.close()
    os.dup2(here.fileno(), descriptor, inheritable=False)
    here.close()
