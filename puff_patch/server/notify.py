"""Word to systemd, for services of ``Type=notify``; see sd_notify(3)."""

from __future__ import annotations

import _socket
import contextlib
import os
import socket


def notify(state: str) -> None:
    """Tell systemd what has become of the service; does nothing where no systemd asked for it.

    Args:
        state: such as ``READY=1``.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    sock = _socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            sock.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            sock.send(state.encode())
    finally:
        sock.close()
