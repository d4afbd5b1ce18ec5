"""The listening sockets of several workers.

Where the kernel can share out connections among sockets bound to one address (Linux, TCP), each worker has one of
its own.  With a single socket whoever wakes first takes all there is: with few connections, which is what a proxy
holds, one worker often got every one of them.  Elsewhere one socket serves all.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from puff_patch.server.listener import Instruction, Listener, attach, bind_tcp
from puff_patch.server.options import ServerOptions

# asm-generic/socket.h; Python has no names for them.
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68
# linux/filter.h: where a program finds a random number.
_RANDOM = 0xFFFFF000 + 56


class ListenerGroup:
    """The sockets that workers accept from, all at one address.

    Args:
        options: see `Listener`.
        count: how many workers there are to be.

    Raises:
        ServerError: see `Listener`.
    """

    def __init__(self, options: ServerOptions, count: int) -> None:
        # Where others may join, the kernel's order of the sockets is not ours to know.
        self._steers = not options.reuse_port
        self._accepting = tuple(range(count))
        if options.uds is not None or count == 1 or not sys.platform.startswith("linux"):
            self._listeners = [Listener(options)]
            return
        # The first one as the options say, so that it is noticed if the port is in use.
        sockets = [bind_tcp(options)]
        try:
            sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            port = sockets[0].getsockname()[1]
            for _ in range(count - 1):
                sockets.append(bind_tcp(replace(options, port=port, reuse_port=True)))
            for sock in sockets:
                sock.listen(options.backlog)
        except BaseException:
            for sock in sockets:
                sock.close()
            raise
        self._sockets = sockets
        self._listeners = [Listener(options, sock) for sock in sockets]

    @property
    def url(self) -> str:
        """See `Listener.url`."""
        return self._listeners[0].url

    def of(self, index: int) -> Listener:
        """The listener of the worker with a number from 0 on."""
        return self._listeners[index % len(self._listeners)]

    def accepted_by(self, indices: Iterable[int]) -> None:
        """Say which workers are there to accept, so that the kernel gives new connections to no others."""
        accepting = tuple(indices)
        if accepting == self._accepting or len(self._listeners) == 1 or not self._steers:
            return
        self._accepting = accepting
        if 0 < len(accepting) < len(self._listeners):
            attach(self._sockets[0], _SO_ATTACH_REUSEPORT_CBPF, _one_of(accepting))
        else:
            with suppress(OSError):
                self._sockets[0].setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, struct.pack("i", 0))

    def turn_away(self) -> None:
        """See `Listener.turn_away`."""
        for listener in self._listeners:
            listener.turn_away()

    def close(self) -> None:
        """Close the sockets."""
        for listener in self._listeners:
            listener.close()


def _one_of(indices: tuple[int, ...]) -> list[Instruction]:
    """A program that picks one of some sockets at random, by the order in which they began to listen."""
    program: list[Instruction] = [
        (0x20, 0, 0, _RANDOM),  # ld [random]
        (0x94, 0, 0, len(indices)),  # mod #length
    ]
    for number, index in enumerate(indices[1:], 1):
        program += [(0x15, 0, 1, number), (0x06, 0, 0, index)]  # jeq #number, next, skip one; ret #index
    return [*program, (0x06, 0, 0, indices[0])]
