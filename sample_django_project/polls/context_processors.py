"""What the last line of every page tells about the server."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.db import connection
from django.http import HttpRequest

import puff_patch


def served_by(request: HttpRequest) -> dict[str, Any]:
    """How this page was served: on what, and with how many connections."""
    pools = [
        {
            "label": "PostgreSQL" if name.startswith("postgres") else "Redis",
            "in_use": stats["pool_size"] - stats["pool_available"],
            "open": stats["pool_size"],
            "max": stats["pool_max"],
            "waiting": stats["requests_waiting"],
            "leases": stats["requests_num"],
        }
        for name, stats in puff_patch.stats().items()
    ]
    return {
        "served_by": {
            "greenlet": puff_patch.is_patched("sockets"),
            "pools": pools,
            # Django keeps count only when DEBUG is on.
            "queries": len(connection.queries_log) if settings.DEBUG else None,
        }
    }
