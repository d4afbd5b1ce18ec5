"""Replication streams on a cooperative connection, which psycopg2 refuses.

None of what it refuses has to wait: starting goes the way of any query, and reading a message never blocks.  Only
``consume_stream`` waits, inside psycopg2; here the same loop waits in gevent.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent.select
import psycopg2
from psycopg2 import _psycopg, extensions, sql

from puff_patch.pools.offload import CooperativeCursor, Gate, Statement

_C: Any = _psycopg.ReplicationCursor


class StreamingCursor(CooperativeCursor, _C):  # type: ignore[misc]
    """A replication cursor that works on a cooperative connection."""

    _puff_interval: float | None = None
    _puff_consuming = False

    def start_replication_expert(self, command: Any, decode: Any = False, status_interval: float = 10) -> None:
        """As psycopg2's."""
        start = partial(_C.start_replication_expert, self)
        if (
            self.closed
            or extensions.get_wait_callback() is None
            or not isinstance(command, (str, bytes, sql.Composable))
        ):
            start(command, decode, status_interval)
        else:
            connection: Any = self.connection
            if isinstance(command, sql.Composable):
                command = command.as_string(connection)
            elif isinstance(command, bytes):
                command = command.decode(extensions.encodings[connection.encoding])
            with Gate() as gate:
                gate.pass_through(partial(start, Statement(gate, command), decode, status_interval))
        self._puff_interval = status_interval

    def read_message(self) -> Any:
        """As psycopg2's."""
        read = partial(_C.read_message, self)
        if extensions.get_wait_callback() is None:
            return read()
        with Gate() as gate:
            return gate.pass_through(read)

    def consume_stream(self, consume: Callable[[Any], Any], keepalive_interval: float | None = None) -> None:
        """As psycopg2's, while other greenlets run."""
        connection: Any = self.connection
        if self.closed or connection.async_ or extensions.get_wait_callback() is None:
            _C.consume_stream(self, consume, keepalive_interval)
            return
        if keepalive_interval is not None:
            if not isinstance(keepalive_interval, (int, float)):
                raise psycopg2.ProgrammingError("keepalive_interval must be int or float")
            if keepalive_interval < 1:
                raise psycopg2.ProgrammingError("keepalive_interval must be >= 1 (sec)")
        if self._puff_consuming:
            raise psycopg2.ProgrammingError("consume_stream cannot be used when already in the consume loop")
        if self._puff_interval is None:
            raise psycopg2.ProgrammingError("consume_stream: not replicating, call start_replication first")
        interval = datetime.timedelta(seconds=keepalive_interval or self._puff_interval)
        self._puff_consuming = True
        try:
            while True:
                message = self.read_message()
                if message is not None:
                    consume(message)
                    continue
                # Both are local times without a zone.
                left = (self.feedback_timestamp + interval - datetime.datetime.now()).total_seconds()
                if left <= 0:
                    self.send_feedback(force=True)
                else:
                    gevent.select.select([connection.fileno()], [], [], left)
        finally:
            self._puff_consuming = False
            self._puff_interval = None  # psycopg2 streams once for each start
