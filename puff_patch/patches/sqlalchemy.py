"""SQLAlchemy: its own connection pool is the pool, over cooperative connections that ours does not pool again.

SQLAlchemy keeps the connections it has checked in: leases, if they came from our pool, that nobody else could get.
Two engines for one database would starve a third.  Replaces ``connect`` of the PostgreSQL dialects, and
``NullPool._do_get``, whose connections are the ones that SQLAlchemy does not pool, and so are leased.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from puff_patch.patches.base import Patch, pooled_elsewhere

_POOL = "sqlalchemy.pool"
_DIALECT = "sqlalchemy.dialects.postgresql.base"

# Whether SQLAlchemy connects for a NullPool now.
_leasing: ContextVar[bool] = ContextVar("puff_patch.sqlalchemy.leasing", default=False)


class SQLAlchemyPatch(Patch):
    """One pool for SQLAlchemy's engines, not two."""

    name = "sqlalchemy"
    modules = (_POOL, _DIALECT)
    requires = ("sqlalchemy", (2, 0))

    def apply(self, module: ModuleType) -> None:
        """Replace how the freshly imported module gets its connections."""
        if module.__name__ == _POOL:
            self._apply_null_pool(module.NullPool)
        else:
            self._apply_dialect(module.PGDialect)

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

    def _apply_dialect(self, dialect_class: Any) -> None:
        original = dialect_class.connect

        @functools.wraps(original)
        def connect(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.is_async:
                return original(self, *args, **kwargs)
            token = pooled_elsewhere.set(not _leasing.get())
            try:
                return original(self, *args, **kwargs)
            finally:
                pooled_elsewhere.reset(token)

        self.ledger.replace(dialect_class, "connect", connect)


PATCH = SQLAlchemyPatch()
patch, unpatch, is_patched = PATCH.patch, PATCH.unpatch, PATCH.is_patched
