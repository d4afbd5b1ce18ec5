"""Waiting for what will happen, with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gevent


def eventually(condition: Callable[[], Any], seconds: float = 5.0, what: str = "") -> Any:
    """Let other greenlets run until ``condition()`` is true and return its value; fail after ``seconds``."""
    limit = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < limit, f"did not happen within {seconds:g} s: {what or condition}"
        gevent.sleep(0.002)
