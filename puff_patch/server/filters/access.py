"""The access log as a filter: one line a request, see `puff_patch.server.access_log`."""

from __future__ import annotations

from time import perf_counter

from puff_patch.server import access_log
from puff_patch.server.filters.base import Filter, Responder, Scope


class AccessLog(Filter):
    """Logs each request at its end; those that a filter before this one has answered are left out.

    Args:
        form: ``"text"`` or ``"json"``.
    """

    def __init__(self, form: str = "text") -> None:
        self._log = access_log.log_request if form == "text" else access_log.log_request_as_json

    def begin(self, scope: Scope) -> Responder | None:
        scope["puff.began"] = perf_counter()
        return None

    def end(self, scope: Scope, status: int, size: int) -> None:
        began = scope.get("puff.began")
        if began is not None:
            self._log(scope, status, size, began)
