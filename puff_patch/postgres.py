"""PostgreSQL for plain programs: ``connect()``, ``global_postgres`` and ``named_client(name)``, by psycopg2.

After `puff_patch.patch_all` a connection is a lease from the pool of its server.  It is leased with the first
statement and given back by ``close()``.  What waits for the server waits in a greenlet, and returns an awaitable
where an event loop is running.  The module has the names of DB-API 2.0 (``Error``, ``paramstyle``, ...), which are
psycopg2's.
"""

from __future__ import annotations

import contextvars
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from puff_patch.config import current
from puff_patch.runtime.calls import at_once, either_way, is_asyncio

Parameters = Sequence[Any] | Mapping[str, Any] | None

ISOLATION_LEVEL_AUTOCOMMIT = 0
ISOLATION_LEVEL_READ_COMMITTED = 1
ISOLATION_LEVEL_REPEATABLE_READ = 2
ISOLATION_LEVEL_SERIALIZABLE = 3
ISOLATION_LEVEL_READ_UNCOMMITTED = 4
ISOLATION_LEVEL_DEFAULT = None

_DBAPI = frozenset(
    {
        *("apilevel", "paramstyle", "threadsafety", "BINARY", "DATETIME", "NUMBER", "ROWID", "STRING", "Binary"),
        *("Date", "DateFromTicks", "Time", "TimeFromTicks", "Timestamp", "TimestampFromTicks"),
        *("Warning", "Error", "InterfaceError", "DatabaseError", "DataError", "OperationalError"),
        *("IntegrityError", "InternalError", "ProgrammingError", "NotSupportedError"),
    }
)
_ERRORS = frozenset(name for name in _DBAPI if name.endswith("Error") or name == "Warning")


def __getattr__(name: str) -> Any:
    if name in _DBAPI:
        import psycopg2

        return getattr(psycopg2, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class PostgresCursor:
    """A cursor of psycopg2, whose attributes it has, too."""

    def __init__(self, connection: PostgresConnection, arguments: Mapping[str, Any]) -> None:
        self.connection = connection
        self.arraysize = 1
        self._arguments = arguments
        self._made: Any = None
        self._closed = False

    def _cursor(self) -> Any:
        """psycopg2's; made with the first statement, for that may wait for a connection."""
        if self._closed:
            raise __getattr__("InterfaceError")("cursor already closed")
        connection = self.connection._lease()
        if self._made is None:
            self._made = connection.cursor(**self._arguments)
            self._made.arraysize = self.arraysize
        return self._made

    @either_way
    def execute(self, query: Any, params: Parameters = None) -> Any:
        """Run a statement.

        Args:
            query: its text, with ``%s`` or ``%(name)s`` for parameters, or numbered ones (``$1``).
            params: their values.

        Returns:
            The number of rows it found or changed; -1 if it has none.
        """
        cursor = self._cursor()
        cursor.execute(*_numbered(query, params))
        return cursor.rowcount

    @either_way
    def executemany(self, query: Any, seq_of_params: Iterable[Parameters] = ()) -> Any:
        """Run a statement with each of several sets of parameters; the number of rows of all together."""
        cursor = self._cursor()
        runs = [_numbered(query, params) for params in seq_of_params]
        # Translated or not, it is the same text each time.
        cursor.executemany(runs[0][0] if runs else query, [params for _, params in runs])
        return cursor.rowcount

    @either_way
    def callproc(self, procname: str, parameters: Any = None) -> Any:
        """Call a function of the database; its rows are there to be fetched."""
        return self._cursor().callproc(procname, parameters)

    def _fetch(self, method: str, *args: Any) -> Any:
        cursor = self._cursor()
        fetch = getattr(cursor, method)
        # Only a named cursor's rows are not here yet.
        return (either_way if cursor.name is not None else at_once)(fetch)(*args)

    def fetchone(self) -> Any:
        """The next row, or None."""
        return self._fetch("fetchone")

    def fetchmany(self, size: int | None = None) -> Any:
        """The next ``size`` rows, by default ``arraysize``."""
        return self._fetch("fetchmany", self.arraysize if size is None else size)

    def fetchall(self) -> Any:
        """The rows that are left."""
        return self._fetch("fetchall")

    @property
    def rowcount(self) -> int:
        """How many rows the last statement found or changed; -1 if none was run."""
        return -1 if self._made is None else int(self._made.rowcount)

    @property
    def description(self) -> Any:
        """The columns of the rows of the last statement, or None."""
        return None if self._made is None else self._made.description

    @property
    def query(self) -> bytes | None:
        """The last statement as it was sent."""
        return None if self._made is None else self._made.query

    def setinputsizes(self, *args: Any) -> None:
        """Nothing, as DB-API allows."""

    def setoutputsize(self, *args: Any) -> None:
        """Nothing, as DB-API allows."""

    def close(self) -> Any:
        """End it."""
        if self._closed or self._made is None:
            self._closed = True
            return at_once(lambda: None)()
        self._closed = True
        return (either_way if self._made.name is not None else at_once)(self._made.close)()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        row = self._cursor().fetchone()
        if row is None:
            raise StopIteration
        return row

    def __aiter__(self) -> PostgresCursor:
        return self

    async def __anext__(self) -> Any:
        row = await self.fetchone()
        if row is None:
            raise StopAsyncIteration
        return row

    def __enter__(self) -> PostgresCursor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> PostgresCursor:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._cursor(), name)


class PostgresConnection:
    """A connection of psycopg2, whose attributes it has, too; use it in one greenlet or task at a time.

    As a context manager it ends the transaction, with COMMIT or after an exception with ROLLBACK, and closes.

    Args:
        dsn: the server, as libpq knows it; None if ``connection`` is given.
        autocommit: whether each statement is a transaction of its own.
        connection: one of psycopg2's, which is somebody else's to close.
    """

    def __init__(self, dsn: str | None, *, autocommit: bool = False, connection: Any = None) -> None:
        self._dsn = dsn
        self._autocommit = autocommit
        self._connection = connection
        self._borrowed = connection is not None
        self._closed = False

    def _check_open(self) -> None:
        if self._closed:
            raise __getattr__("InterfaceError")("connection already closed")

    def _lease(self) -> Any:
        self._check_open()
        if self._connection is None:
            import psycopg2

            connection = psycopg2.connect(self._dsn)
            if self._autocommit:
                connection.autocommit = True
            self._connection = connection
        return self._connection

    @property
    def closed(self) -> bool:
        return self._closed or (self._connection is not None and bool(self._connection.closed))

    @property
    def autocommit(self) -> bool:
        """Whether each statement is a transaction of its own; not to be set within one."""
        return self._autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        if self._connection is not None:
            self._connection.autocommit = value
        self._autocommit = value

    def set_autocommit(self, autocommit: bool) -> None:
        """Set `autocommit`."""
        self.autocommit = autocommit

    def cursor(self, name: str | None = None, **kwargs: Any) -> PostgresCursor:
        """A cursor; does not wait.

        Args:
            name: for one whose rows stay in the server until they are fetched.
            kwargs: further ones of psycopg2's ``cursor``.
        """
        return PostgresCursor(self, {**kwargs, **({} if name is None else {"name": name})})

    @either_way
    def commit(self) -> None:
        """End the transaction, if there is one."""
        self._check_open()
        if self._connection is not None:
            self._connection.commit()

    @either_way
    def rollback(self) -> None:
        """Undo the transaction, if there is one."""
        self._check_open()
        if self._connection is not None:
            self._connection.rollback()

    @either_way  # the pool has a greenlet clean it up
    def close(self) -> None:
        """Give the connection back; what was not committed is undone."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None and not self._borrowed:
            connection.close()

    def _end(self, failed: bool) -> None:
        try:
            if self._connection is not None and not self._connection.closed and not self._borrowed:
                self._connection.rollback() if failed else self._connection.commit()
        finally:
            self._closed = True
            connection, self._connection = self._connection, None
            if connection is not None and not self._borrowed:
                connection.close()

    def __enter__(self) -> PostgresConnection:
        if is_asyncio():
            raise TypeError(
                "an event loop is running here, and the end of the transaction waits: use `async with`"
            )
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._end(kind is not None)

    async def __aenter__(self) -> PostgresConnection:
        return self

    async def __aexit__(self, kind: Any, *_: object) -> None:
        await either_way(self._end)(kind is not None)

    def __getattr__(self, name: str) -> Any:
        if name in _ERRORS:
            return __getattr__(name)
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._lease(), name)


class PostgresClient:
    """One configured PostgreSQL.

    Args:
        name: the service: ``PUFF_<NAME>_POSTGRES_URL``.
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name

    def connect(self, *, autocommit: bool = False) -> PostgresConnection:
        """A connection to it; see `connect`."""
        return connect(dbname=self.name, autocommit=autocommit)

    @either_way
    def query(self, query: Any, params: Parameters = None) -> Any:
        """Run one statement in a transaction of its own; the list of its rows, or None if it has none."""
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(query, params)
            return None if cursor.description is None else cursor.fetchall()

    @either_way
    def execute(self, query: Any, params: Parameters = None) -> Any:
        """Run one statement in a transaction of its own; the number of rows it changed."""
        with self.connect() as connection, connection.cursor() as cursor:
            return cursor.execute(query, params)

    def __repr__(self) -> str:
        return f"<PostgresClient {self.name}>"


#: What `connect` gives in this context in place of a lease: one of psycopg2's connections.
connection_override: contextvars.ContextVar[Any] = contextvars.ContextVar("connection_override", default=None)


def set_connection_override(connection: Any) -> None:
    """Have `connect` lend a connection of psycopg2 in this context; None for leases again."""
    connection_override.set(connection)


def connect(dsn: str | None = None, *, dbname: str | None = None, autocommit: bool = False) -> PostgresConnection:
    """A connection to a configured PostgreSQL; nothing is connected before its first statement.

    Args:
        dsn: another server than a configured one, as libpq knows it (``postgres://...``).
        dbname: the service: ``PUFF_<NAME>_POSTGRES_URL``; ``default`` by default.
        autocommit: whether each statement is a transaction of its own.
    """
    override = connection_override.get()
    if override is not None and dsn is None and dbname is None:
        return PostgresConnection(None, autocommit=override.autocommit, connection=override)
    return PostgresConnection(dsn or current().postgres_url(dbname or "default"), autocommit=autocommit)


#: The client of the service ``default``.
global_postgres = PostgresClient()


def named_client(name: str = "default") -> PostgresClient:
    """The client of a service.

    Args:
        name: the service: ``PUFF_<NAME>_POSTGRES_URL``.
    """
    return PostgresClient(name)


# What is no parameter: strings, names, comments; then the parameters, and what psycopg2 would take for one.
_PARTS = re.compile(
    r"""(?P<text>[eE]'(?:[^'\\]|''|\\.)*' | '(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]* | /\*.*?\*/
        | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$)
      | (?<![\w$])\$(?P<number>[1-9]\d*) | (?P<percent>%)""",
    re.VERBOSE | re.DOTALL,
)


def _numbered(query: Any, params: Parameters) -> tuple[Any, Parameters]:
    """The same statement with psycopg2's parameters in place of numbered ones."""
    if (
        not isinstance(query, str)
        or not params
        or isinstance(params, Mapping)
        or "$" not in query
        or "%s" in query
    ):
        return query, params
    text = _translated(query)
    if text is None:
        return query, params
    return text, {f"p{number}": value for number, value in enumerate(params, 1)}


@functools.lru_cache(1024)
def _translated(query: str) -> str | None:
    numbered = False

    def translate(match: re.Match[str]) -> str:
        nonlocal numbered
        if match["number"]:
            numbered = True
            return f"%(p{match['number']})s"
        return match[0].replace("%", "%%")

    text = _PARTS.sub(translate, query)
    return text if numbered else None
