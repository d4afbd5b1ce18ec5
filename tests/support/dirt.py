"""What a program can leave behind in a session of PostgreSQL, with whichever driver."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

Deed = Callable[[Any], None]


def execute(*statements: str) -> Deed:
    def make_dirty(connection: Any) -> None:
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)

    return make_dirty


def committed(*statements: str) -> Deed:
    def make_dirty(connection: Any) -> None:
        execute(*statements)(connection)
        connection.commit()

    return make_dirty


def assign(**attributes: Any) -> Deed:
    def make_dirty(connection: Any) -> None:
        for name, value in attributes.items():
            setattr(connection, name, value)

    return make_dirty


def in_autocommit(deed: Deed) -> Deed:
    def make_dirty(connection: Any) -> None:
        connection.autocommit = True
        deed(connection)

    return make_dirty


def abort(connection: Any) -> None:
    with contextlib.suppress(connection.DataError):
        execute("SELECT 1/0")(connection)


SQL_DIRT: dict[str, Deed] = {
    "SET": committed("SET statement_timeout = 12345", "SET work_mem = '1MB'"),
    "SET LOCAL": execute("SET LOCAL work_mem = '1MB'"),
    "search_path": committed("SET search_path = pg_catalog"),
    "role": committed("SET ROLE pg_read_all_data"),
    "session authorization": committed("SET SESSION AUTHORIZATION pg_read_all_data"),
    "time zone": committed("SET TIME ZONE 'Asia/Tokyo'"),
    "DateStyle": committed("SET DateStyle = 'German'"),
    "interval style": committed("SET intervalstyle = 'sql_standard'"),
    "string literals": committed("SET standard_conforming_strings = off"),
    "transactions read only": committed("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"),
    "client encoding by SQL": committed("SET client_encoding = 'LATIN1'"),
    "temporary table": committed("CREATE TEMP TABLE mine (x int)"),
    "LISTEN": committed("LISTEN gossip"),
    "notifies": in_autocommit(execute("LISTEN gossip", "NOTIFY gossip, 'x'")),
    "notices": execute("DO $$ BEGIN RAISE NOTICE 'psst'; END $$"),
    "advisory lock": committed("SELECT pg_advisory_lock(4711)"),
    "prepared statement": committed("PREPARE mine AS SELECT 1"),
    "open transaction": execute("SELECT 1"),
    "aborted transaction": abort,
    "transaction begun by hand": in_autocommit(execute("BEGIN", "SELECT 1")),
    "transaction ended by hand": execute("SELECT 1", "COMMIT"),
    "autocommit": assign(autocommit=True),
    "attributes of one's own": assign(mine=1, request=object()),
    "cursor with hold": committed("DECLARE mine CURSOR WITH HOLD FOR SELECT 1"),
    "sequence": committed("CREATE TEMP SEQUENCE mine", "SELECT nextval('mine')"),
}


def server_state(cursor: Any) -> dict[str, Any]:
    """Everything that a program could change about the session of this cursor, which gives tuples."""

    def rows(sql: str) -> list[Any]:
        cursor.execute(sql)
        return [tuple(row) for row in cursor.fetchall()]

    return {
        "settings": dict(rows("SELECT name, setting FROM pg_settings WHERE name NOT LIKE '%.%'")),
        "who": rows("SELECT current_user, session_user, current_schema()"),
        "temporary": rows("SELECT relname FROM pg_class WHERE pg_my_temp_schema() = relnamespace"),
        "channels": rows("SELECT * FROM pg_listening_channels()"),
        "locks": rows("SELECT * FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"),
        "prepared": rows("SELECT name FROM pg_prepared_statements"),
        "cursors": rows("SELECT name FROM pg_cursors"),
    }
