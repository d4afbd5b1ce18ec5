"""The access log: one line a request on the logger ``puff_patch.access``."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any

logger = logging.getLogger("puff_patch.access")

_FORMAT = '%s "%s %s HTTP/%s" %d %d %.1fms'


def enable() -> None:
    """Have the lines written: to stderr if the program configured no handler for them."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)


def log_request(scope: dict[str, Any], status: int, size: int, began: float) -> None:
    """Log one request.

    Args:
        scope: the ASGI connection scope.
        status: the status code sent, 0 if the client left before there was one.
        size: bytes of the response body.
        began: ``time.perf_counter()`` when the request began.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    query = scope["query_string"]
    # Both are as the client sent them: percent-encoded, and whatever is not ASCII shown escaped.
    target = (scope["raw_path"] + b"?" + query if query else scope["raw_path"]).decode("ascii", "backslashreplace")
    # Not logger.info(), which would look for our caller's file and line each time: a third of the cost.
    args = (
        scope["client"][0] or "unix",
        scope["method"],
        target,
        scope["http_version"],
        status,
        size,
        (perf_counter() - began) * 1000,
    )
    logger.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, _FORMAT, args, None))
