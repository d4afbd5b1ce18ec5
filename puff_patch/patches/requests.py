"""requests: all sessions share connections, so that ``requests.get()`` need not connect each time.

Replaces ``requests.Session.__init__``, which mounts the adapters a session starts with.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch


class RequestsPatch(Patch):
    """Shared connections for requests."""

    name = "requests"
    modules = ("requests",)
    requires = ("requests", (2, 32, 2))

    def apply(self, module: ModuleType) -> None:
        """Let new sessions start with adapters over shared connections; a caller's own adapters are left alone."""
        session_class = module.Session
        original = session_class.__init__

        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            from puff_patch.pools.http import SessionAdapter

            original(self, *args, **kwargs)
            for prefix, mounted in list(self.adapters.items()):
                # Only requests' own default: a subclass may have mounted something else in its __init__.
                if type(mounted) is module.adapters.HTTPAdapter and prefix in ("http://", "https://"):
                    self.adapters[prefix] = SessionAdapter()

        self.ledger.replace(session_class, "__init__", __init__)
        self.ledger.on_restore(_close_connections)


def _close_connections() -> None:
    http = sys.modules.get("puff_patch.pools.http")
    if http is not None:
        http.close_connections()


PATCH = RequestsPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
