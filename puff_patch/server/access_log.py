"""The access log: one line a request on the logger ``puff_patch.access``, as text or as JSON."""

from __future__ import annotations

import json
import logging
import time
from time import perf_counter
from typing import Any

logger = logging.getLogger("puff_patch.access")

_FORMAT = '%s "%s %s HTTP/%s" %d %d %.1fms'
_FORMAT_WITH_ID = _FORMAT + " %s"
_encode = json.JSONEncoder(separators=(",", ":")).encode


def enable(form: str = "text") -> None:
    """Have the lines written: to stderr if the program configured no handler for them.

    Args:
        form: ``"text"`` puts the time before each line; ``"json"`` does not, since it has it.
    """
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s" if form == "text" else "%(message)s"))
        logger.addHandler(handler)


def log_request(scope: dict[str, Any], status: int, size: int, began: float) -> None:
    """Log one request as text.

    Args:
        scope: the ASGI connection scope.
        status: the status code sent, 0 if the client left before there was one.
        size: bytes of the response body.
        began: ``time.perf_counter()`` when the request began.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    args = (
        scope["client"][0] or "unix",
        scope["method"],
        _target(scope),
        scope["http_version"],
        status,
        size,
        (perf_counter() - began) * 1000,
    )
    request_id = scope.get("puff.request_id")
    if request_id is None:
        _handle(_FORMAT, args)
    else:
        _handle(_FORMAT_WITH_ID, (*args, request_id))


def log_request_as_json(scope: dict[str, Any], status: int, size: int, began: float) -> None:
    """Log one request as an object of JSON; see `log_request`."""
    if not logger.isEnabledFor(logging.INFO):
        return
    line: dict[str, Any] = {
        "time": _now(),
        "client": scope["client"][0] or "unix",
        "method": scope["method"],
        "target": _target(scope),
        "http": scope["http_version"],
        "scheme": scope["scheme"],
        "status": status,
        "size": size,
        "ms": round((perf_counter() - began) * 1000, 1),
    }
    request_id = scope.get("puff.request_id")
    if request_id is not None:
        line["request_id"] = request_id
    for name, value in scope["headers"]:
        key = _LOGGED_HEADERS.get(name)
        if key is not None:
            line[key] = value.decode("ascii", "backslashreplace")
    _handle("%s", (_encode(line),))


_LOGGED_HEADERS = {b"host": "host", b"user-agent": "user_agent", b"referer": "referer"}


def _target(scope: dict[str, Any]) -> str:
    query = scope["query_string"]
    # Both are as the client sent them: percent-encoded, and whatever is not ASCII shown escaped.
    target: bytes = scope["raw_path"] + b"?" + query if query else scope["raw_path"]
    return target.decode("ascii", "backslashreplace")


def _now() -> str:
    now = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"


def _handle(message: str, args: tuple[Any, ...]) -> None:
    # Not logger.info(), which would look for our caller's file and line each time: a third of the cost.
    logger.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, message, args, None))
