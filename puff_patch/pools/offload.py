"""What psycopg2 cannot do cooperatively, done in a native thread: COPY and large objects.

With a wait callback set, psycopg2 refuses both (``EXC_IF_GREEN`` in its C source), since libpq's COPY and
``lo_*`` calls block.  Here they run in a thread of gevent's while the greenlet waits:

* The refusal comes first thing in ``copy_expert`` and ``lobject``, before the connection is touched.  So the
  callback is away just for the start, and is put back by the first code of ours that psycopg2 calls from there:
  the ``as_string`` of the statement, the factory of the large object.  From its removal up to there all is C code
  that keeps the interpreter lock, so no other greenlet's query finds the callback missing.
* A file's ``read`` and ``write`` run in the greenlet that called, not in the thread, so that a file may be what
  a greenlet can use: a gevent socket, a generator over the ORM.
* A cooperative connection is in libpq's non-blocking mode, in which a large write may be cut short; it is switched
  to blocking meanwhile, through the pointer that psycopg2 offers for such use (``connection.pgconn_ptr``).
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar

import gevent
import psycopg2
from gevent.monkey import get_original
from gevent.queue import SimpleQueue
from gevent.threadpool import ThreadPool
from psycopg2 import _psycopg, extensions, sql

from puff_patch.pools import libpq
from puff_patch.pools.farewell import PATIENCE
from puff_patch.pools.turns import in_turn, is_taken, property_in_turn, yielding
from puff_patch.runtime.mailbox import Mailbox

T = TypeVar("T")

_allocate_lock: Callable[[], Any] = get_original("_thread", "allocate_lock")
# For one hub.  Each COPY has a thread to itself; more of them at once wait for one another.
_MAX_THREADS = 32
# Programs make few factories, as a rule; one that makes one for each call must not fill the memory.
_MAX_CLASSES = 256
# Bytes, or characters, of rows gathered in the thread before the greenlet writes them.
_BATCH = 64 * 1024
# Seconds until a query that is to stop is cancelled again; doubled each time.
_STOP_AGAIN = 0.02
_PAUSE = 0.0005


def copy_expert(cursor: Any, statement: Any, file: Any, size: int = 8192) -> None:
    """``cursor.copy_expert`` for a cooperative connection; same arguments, same errors."""
    connection = cursor.connection
    if isinstance(statement, sql.Composable):
        statement = statement.as_string(connection)
    elif isinstance(statement, bytes):
        statement = statement.decode(extensions.encodings[connection.encoding])
    elif not isinstance(statement, str):
        raise TypeError(f"argument 1 must be a string or unicode object: got {type(statement).__name__} instead")

    def work(desk: _Desk) -> None:
        stand_in = _File(desk, file)
        with Gate() as gate, libpq.blocking_mode(connection):
            try:
                gate.pass_through(
                    partial(_psycopg.cursor.copy_expert, cursor, Statement(gate, statement), stand_in, size)
                )
            except BaseException:
                libpq.leave_copy(connection)
                raise
        stand_in.flush_rows()

    _in_thread(connection, work)


def copy_from(
    cursor: Any, file: Any, table: str, sep: str = "\t", null: str = "\\N", size: int = 8192, columns: Any = None
) -> None:
    """``cursor.copy_from`` for a cooperative connection; same arguments, same errors."""
    if not hasattr(file, "read"):
        raise TypeError("argument 1 must have a .read() method")
    copy_expert(cursor, _copy_statement(cursor, table, "FROM stdin", sep, null, columns), file, size)


def copy_to(cursor: Any, file: Any, table: str, sep: str = "\t", null: str = "\\N", columns: Any = None) -> None:
    """``cursor.copy_to`` for a cooperative connection; same arguments, same errors."""
    if not hasattr(file, "write"):
        raise TypeError("argument 1 must have a .write() method")
    copy_expert(cursor, _copy_statement(cursor, table, "TO stdout", sep, null, columns), file)


def _copy_statement(cursor: Any, table: str, direction: str, sep: str, null: str, columns: Any) -> str:
    """The statement that psycopg2's own copy_from and copy_to compose."""
    scope = cursor.connection
    names = "" if columns is None else f"({','.join(extensions.quote_ident(name, scope) for name in columns)})"
    options = sql.SQL("DELIMITER AS {} NULL AS {}").format(sql.Literal(sep), sql.Literal(null)).as_string(scope)
    return f"COPY {extensions.quote_ident(table, scope)}{names} {direction} WITH {options}"


def large_object(connection: Any, *args: Any, lobject_factory: Any = None, **kwargs: Any) -> Any:
    """``connection.lobject`` for a cooperative connection; same arguments, same errors."""
    if len(args) > 4:
        *positional, lobject_factory = args
        args = tuple(positional)
    factory = _large_object_class(lobject_factory or extensions.lobject)
    connection_lobject: Any = _psycopg.connection.lobject

    def work(desk: _Desk) -> Any:
        with Gate() as gate, libpq.blocking_mode(connection):

            def make(*arguments: Any) -> Any:
                gate.close()
                return factory(*arguments)

            return gate.pass_through(
                partial(connection_lobject, connection, *args, lobject_factory=make, **kwargs)
            )

    made = _in_thread(connection, work)
    if isinstance(made, _LargeObject):
        made._puff_connection = connection
        vars(connection).setdefault("_puff_large_objects", weakref.WeakSet()).add(made)
    return made


def has_large_objects(connection: Any) -> bool:
    """Whether anybody holds a large object of this connection that was not closed."""
    return any(not found.closed for found in vars(connection).get("_puff_large_objects", ()))


class _LargeObject(extensions.lobject):
    """A large object whose operations run in a native thread."""

    _puff_connection: Any = None

    def _offload(self, name: str, *args: Any) -> Any:
        connection = self._puff_connection
        call = partial(getattr(extensions.lobject, name), self, *args)
        if connection is None:
            return call()  # still being made, in the thread already
        if connection.closed:  # perhaps returned to its pool, which psycopg2 does not know of
            if name == "close":
                return None
            raise psycopg2.InterfaceError("lobject already closed")

        def work(desk: _Desk) -> Any:
            with libpq.blocking_mode(connection):
                return call()

        return _offload_in_turn(connection, work)

    @property
    def closed(self) -> Any:
        """As psycopg2's."""
        connection = self._puff_connection
        lobject: Any = extensions.lobject
        return 1 if connection is not None and connection.closed else lobject.closed.__get__(self)

    def __del__(self) -> None:
        # psycopg2 closes one that was dropped, at the connection's native lock.  If a greenlet that waits for the
        # server holds that, the thread would stop for ever, so let another greenlet wait for its turn.
        connection = self._puff_connection
        if not self.closed and connection is not None and is_taken(connection):
            gevent.spawn(self.close)

    def read(self, *args: Any) -> Any:
        return self._offload("read", *args)

    def write(self, *args: Any) -> Any:
        return self._offload("write", *args)

    def seek(self, *args: Any) -> Any:
        return self._offload("seek", *args)

    def tell(self) -> Any:
        return self._offload("tell")

    def truncate(self, *args: Any) -> Any:
        return self._offload("truncate", *args)

    def export(self, *args: Any) -> Any:
        return self._offload("export", *args)

    def unlink(self) -> Any:
        return self._offload("unlink")

    def close(self) -> Any:
        return self._offload("close")


@in_turn
def _offload_in_turn(connection: Any, work: Callable[[_Desk], Any]) -> Any:
    return _in_thread(connection, work)


def _make_large_object_class(factory: Any) -> Any:
    if factory is extensions.lobject:
        return _LargeObject
    if not (isinstance(factory, type) and issubclass(factory, extensions.lobject)):
        return factory  # psycopg2 says what is wrong with it
    return type(factory.__name__, (factory, _LargeObject), {"__module__": factory.__module__})


_large_object_class: Callable[[Any], Any] = lru_cache(_MAX_CLASSES)(_make_large_object_class)


def _cursor_in_turn(function: Callable[..., Any]) -> Any:
    return in_turn(function, operator.attrgetter("connection"))


class CooperativeCursor(extensions.cursor):
    """A cursor for greenlets that share its connection, whose COPY methods work."""

    execute = _cursor_in_turn(extensions.cursor.execute)
    executemany = _cursor_in_turn(extensions.cursor.executemany)
    callproc = _cursor_in_turn(extensions.cursor.callproc)

    @_cursor_in_turn
    def copy_expert(self, *args: Any, **kwargs: Any) -> None:
        """As psycopg2's, in a native thread while the greenlet waits."""
        if _is_refused(self):
            copy_expert(self, *args, **kwargs)
        else:
            super().copy_expert(*args, **kwargs)

    @_cursor_in_turn
    def copy_from(self, *args: Any, **kwargs: Any) -> None:
        """As psycopg2's, in a native thread while the greenlet waits."""
        if _is_refused(self):
            copy_from(self, *args, **kwargs)
        else:
            super().copy_from(*args, **kwargs)

    @_cursor_in_turn
    def copy_to(self, *args: Any, **kwargs: Any) -> None:
        """As psycopg2's, in a native thread while the greenlet waits."""
        if _is_refused(self):
            copy_to(self, *args, **kwargs)
        else:
            super().copy_to(*args, **kwargs)


class NamedCursor(CooperativeCursor):
    """A server-side cursor, of which each fetch asks the server."""

    fetchone = _cursor_in_turn(extensions.cursor.fetchone)
    fetchmany = _cursor_in_turn(extensions.cursor.fetchmany)
    fetchall = _cursor_in_turn(extensions.cursor.fetchall)
    scroll = _cursor_in_turn(extensions.cursor.scroll)
    close = _cursor_in_turn(extensions.cursor.close)
    __next__ = _cursor_in_turn(extensions.cursor.__next__)


def _is_refused(cursor: Any) -> bool:
    """Whether psycopg2 would refuse to COPY for being cooperative, and for no other reason."""
    return not cursor.closed and extensions.get_wait_callback() is not None


class CooperativeConnection(extensions.connection):
    """A connection that greenlets may share, and that can COPY and do large objects although it is cooperative."""

    #: Whose turn it is; see `puff_patch.pools.turns`.
    _puff_turn: Any = None

    def _puff_failed(self) -> None:
        """Called when something that spoke to the server has raised."""

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg2's."""
        default: Any = self.cursor_factory
        named = (args[0] if args else kwargs.get("name")) is not None
        if len(args) > 1:
            name, factory, *rest = args
            args = (name, cursor_class(factory or default or extensions.cursor, named), *rest)
        else:
            factory = kwargs.pop("cursor_factory", None)
            kwargs["cursor_factory"] = cursor_class(factory or default or extensions.cursor, named)
        return super().cursor(*args, **kwargs)

    @in_turn
    def lobject(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg2's, in a native thread while the greenlet waits."""
        if self.closed or extensions.get_wait_callback() is None:
            return super().lobject(*args, **kwargs)
        return large_object(self, *args, **kwargs)

    def cancel(self) -> None:
        """As psycopg2's, while other greenlets run."""
        ready = not self.closed and self.status in (extensions.STATUS_READY, extensions.STATUS_BEGIN)
        if ready and gevent.getcurrent() is not gevent.get_hub():
            libpq.cancel(self)
        else:
            super().cancel()  # says what is wrong

    commit = yielding(in_turn(extensions.connection.commit))
    rollback = yielding(in_turn(extensions.connection.rollback))
    close = in_turn(extensions.connection.close)
    reset = in_turn(extensions.connection.reset)
    set_session = in_turn(extensions.connection.set_session)
    set_isolation_level = in_turn(extensions.connection.set_isolation_level)
    set_client_encoding = in_turn(extensions.connection.set_client_encoding)
    tpc_begin = in_turn(extensions.connection.tpc_begin)
    tpc_prepare = in_turn(extensions.connection.tpc_prepare)
    tpc_commit = in_turn(extensions.connection.tpc_commit)
    tpc_rollback = in_turn(extensions.connection.tpc_rollback)
    tpc_recover = in_turn(extensions.connection.tpc_recover)
    autocommit = property_in_turn("autocommit")
    isolation_level = property_in_turn("isolation_level")
    readonly = property_in_turn("readonly")
    deferrable = property_in_turn("deferrable")


def _make_connection_class(factory: Any) -> Any:
    if factory in (None, extensions.connection):
        return CooperativeConnection
    return type(factory.__name__, (factory, CooperativeConnection), {"__module__": factory.__module__})


#: The class of a connection for a caller's connection_factory, where that is a class.
connection_class: Callable[[Any], Any] = lru_cache(_MAX_CLASSES)(_make_connection_class)


def _make_cursor_class(factory: Any, named: bool) -> Any:
    if not (isinstance(factory, type) and issubclass(factory, extensions.cursor)):
        return factory
    cooperative: type = NamedCursor if named else CooperativeCursor
    if issubclass(factory, _psycopg.ReplicationCursor):
        from puff_patch.pools.replication import StreamingCursor

        cooperative = StreamingCursor
    if factory is extensions.cursor:
        return cooperative
    if issubclass(factory, cooperative):
        return factory
    body = {"__module__": factory.__module__, "__doc__": factory.__doc__}
    return type(factory.__name__, (factory, cooperative), body)


#: The class of a cursor for a caller's cursor_factory, with a name or without: ours comes behind the caller's.
cursor_class: Callable[[Any, bool], Any] = lru_cache(_MAX_CLASSES)(_make_cursor_class)


class Gate:
    """Takes the wait callback away for the start of one call; see the module."""

    def __enter__(self) -> Gate:
        self._callback = extensions.get_wait_callback()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pass_through(self, call: Callable[[], Any]) -> Any:
        # Both are called from within C, one right after the other.
        *_, result = map(_call, (partial(extensions.set_wait_callback, None), call))
        return result

    def close(self) -> None:
        extensions.set_wait_callback(self._callback)


_call = operator.methodcaller("__call__")


class Statement(sql.Composable):
    """A COPY statement that closes the gate when psycopg2 asks for its text."""

    def __init__(self, gate: Gate, text: str) -> None:
        super().__init__(text)
        self._gate = gate
        self._text = text

    def as_string(self, context: Any = None) -> str:
        self._gate.close()
        return self._text


class _File:
    """A file whose reads and writes are done by the greenlet."""

    def __init__(self, desk: _Desk, file: Any) -> None:
        self._desk = desk
        self._file = file
        self._rows: list[Any] = []
        self._size = 0
        # psycopg2 looks for these two, and at the class to tell text from bytes.
        if hasattr(file, "read"):
            self.read = lambda size=-1: desk.ask(lambda: file.read(size))
        if hasattr(file, "write"):
            self.write = self._write_row

    def _write_row(self, row: Any) -> None:
        # psycopg2 writes row by row; going over to the greenlet costs more than a row.
        self._rows.append(row)
        self._size += len(row)
        if self._size >= _BATCH:
            self.flush_rows()

    def flush_rows(self) -> None:
        """Have the greenlet write what has been gathered, row by row as psycopg2 would."""
        rows, self._rows, self._size = self._rows, [], 0

        def write_all() -> None:
            for row in rows:
                self._file.write(row)

        if rows:
            self._desk.ask(write_all)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._file)


class _Desk:
    """Where the waiting greenlet does what the thread asks for."""

    def __init__(self) -> None:
        self._mailbox = Mailbox.current()
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        #: What interrupted the greenlet; from then on it does nothing more for the thread, which is to end.
        self.interruption: BaseException | None = None

    def ask(self, work: Callable[[], T]) -> T:
        """In the thread: have ``work`` done by the greenlet, wait for it, return or raise what it does."""
        done = _allocate_lock()
        done.acquire()
        outcome: list[Any] = []

        def order() -> None:
            try:
                if self.interruption is not None:
                    outcome.extend((False, self.interruption))
                else:
                    outcome.extend((True, work()))
            except BaseException as error:
                outcome.extend((False, error))
                if not isinstance(error, Exception):
                    raise  # a kill or a time-out is the greenlet's own
            finally:
                done.release()

        if not self._mailbox.post(self._orders.put, order):
            raise RuntimeError("the hub of the greenlet that waits for this thread is gone")
        done.acquire()
        succeeded, result = outcome
        if not succeeded:
            raise result
        answer: T = result
        return answer

    def close(self) -> None:
        """In the thread: nothing more will be asked."""
        self._mailbox.post(self._orders.put, None)

    def serve(self) -> None:
        """In the greenlet: do what is asked until `close`."""
        while (order := self._orders.get()) is not None:
            order()


def _in_thread(connection: Any, work: Callable[[_Desk], T]) -> T:
    """Run ``work`` in a native thread while the greenlet waits; if that is interrupted, stop the server's work."""
    desk = _Desk()
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, work(desk)))
        except BaseException as error:  # noqa: BLE001 - raised again in the greenlet
            outcome.extend((False, error))
        finally:
            desk.close()

    with Mailbox.current().hold():
        task = _threads().spawn(run)
        served = False
        while not (served and task.ready()):
            try:
                if not served:
                    desk.serve()
                    served = True
                task.wait()
            except BaseException as error:  # noqa: BLE001 - killed or timed out; raised once the thread has ended
                # The thread uses the connection and what the greenlet owns, so it must end first; make it.
                if desk.interruption is None:
                    desk.interruption = error
                    stopper = gevent.spawn(_stop, connection, task)
    succeeded, result = outcome
    if desk.interruption is not None:
        try:
            stopper.join(PATIENCE)
        finally:
            if not stopper.ready():  # a cancel that comes late must not hit what the connection does next
                libpq.follow(connection)
                extensions.connection.close(connection)
        raise desk.interruption
    if not succeeded:
        raise result
    answer: T = result
    return answer


def _stop(connection: Any, task: Any) -> None:
    """Cancel the query until the thread has ended, for a cancel that overtakes its query is ignored."""
    cancel = libpq.Cancel(connection)
    pause = _STOP_AGAIN
    while not task.ready():
        if libpq.is_busy(connection):
            cancel.send()
        task.wait(pause)
        pause *= 2
    while cancel.is_under_way:
        gevent.sleep(_PAUSE)


def _threads() -> ThreadPool:
    hub: Any = gevent.get_hub()
    pool: ThreadPool | None = getattr(hub, "_puff_offload_threads", None)
    if pool is None:
        pool = hub._puff_offload_threads = ThreadPool(_MAX_THREADS, hub=hub)
    return pool
