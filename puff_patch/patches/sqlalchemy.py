"""SQLAlchemy: its own connection pool is the pool, over cooperative connections that ours does not pool again.

SQLAlchemy keeps the connections it has checked in: leases, if they came from our pool, that nobody else could get.
Two engines for one database would starve a third.  Replaces ``connect`` of the dialects whose drivers are pooled,
and ``_do_get`` of ``NullPool``, whose connections are the ones that SQLAlchemy does not pool, and so are leased.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch

_POOL = "sqlalchemy.pool"
# The dialects' classes by module; the module has the name of the driver, which has the name of its patch.
_DIALECTS = {
    "sqlalchemy.dialects.postgresql.psycopg2": "PGDialect_psycopg2",
    "sqlalchemy.dialects.postgresql.psycopg": "PGDialect_psycopg",
}

# Whether SQLAlchemy connects for a NullPool now.
_leasing: ContextVar[bool] = ContextVar("puff_patch.sqlalchemy.leasing", default=False)


class SQLAlchemyPatch(Patch):
    """One pool for SQLAlchemy's engines, not two."""

    name = "sqlalchemy"
    modules = (_POOL, *_DIALECTS)
    requires = ("sqlalchemy", (2, 0))

    def apply(self, module: ModuleType) -> None:
        """Replace how the freshly imported module gets its connections."""
        if module.__name__ == _POOL:
            self._apply_null_pool(module.NullPool)
        else:
            driver = module.__name__.rpartition(".")[2]
            self._apply_dialect(getattr(module, _DIALECTS[module.__name__]), driver)

    def _apply_null_pool(self, pool_class: Any) -> None:
        do_get = pool_class._do_get

        @functools.wraps(do_get)
        def _do_get(self: Any) -> Any:
            token = _leasing.set(True)
            try:
                return do_get(self)
            finally:
                _leasing.reset(token)

        self.ledger.replace(pool_class, "_do_get", _do_get)

    def _apply_dialect(self, dialect_class: Any, driver: str) -> None:
        original = dialect_class.connect

        @functools.wraps(original)
        def connect(self: Any, *args: Any, **kwargs: Any) -> Any:
            from puff_patch.patches import PATCHES

            pools = driver in PATCHES and PATCHES[driver].is_patched() and not self.is_async
            if pools and not _leasing.get():
                kwargs.setdefault("pool", False)
            return original(self, *args, **kwargs)

        self.ledger.replace(dialect_class, "connect", connect)


PATCH = SQLAlchemyPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
