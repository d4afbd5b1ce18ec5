"""``puff example_config``: a puff.toml with every key, made from what checks one, so that neither knows more."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any

from puff_patch import schema
from puff_patch.config import Config
from puff_patch.project import allowed_keys
from puff_patch.schema import Key

_HEAD = """\
# puff.toml: what puff runs, and how. Every key there is, with its default; what has none is commented out.
# A variable of the environment wins over the file, and an option of the command over both.
"""
# What to write where a key has no default, or would do something if it were written.
_SAMPLES: Mapping[str, Any] = {
    "wsgi": "my_module.app",
    "asgi": "my_module.app",
    "asgi_paths": ["/api"],
    "django_settings_module": "mysite.settings",
    "bind": "127.0.0.1:7777",
    "uds": "/run/my_program.sock",
    "blocked_hub_ms": 250,
    "max_body_size": 10_485_760,
    "unpooled_postgres": ["*/reporting"],
    "metrics_token": "a-secret",
    "host": "127.0.0.1",
    "port": 7777,
    "cors.max_age_secs": 86400,
    "cors.allow_credentials": True,
    "cors.allowed_origins": ["http://localhost:7777"],
    "cors.allowed_headers": ["*"],
    "cors.allowed_methods": ["GET"],
    "commands.function": "my_module.my_function",
    "commands.command_name": "my_command",
    "websocket.path": "/chat",
    "websocket.handler": "my_module.chat",
    "static.prefix": "/static/",
    "static.folder": "static",
    "postgres.url": "postgres://postgres:password@localhost:5432/postgres",
    "redis.url": "redis://localhost:6379",
    "pubsub.url": "redis://localhost:6379",
    "task_queue.url": "redis://localhost:6379",
    "graphql.schema": "my_module.Schema",
    "graphql.url": "/graphql/",
    "graphql.subscription_url": "/subscriptions/",
    "graphql.playground_url": "/playground/",
    "http_client.user_agent": "my_program/1.0",
    "http_client.base_url": "http://localhost:7777",
}
# Lists of tables that only repeat what holds anyway; others would ask for something that may not be there.
_SAID = frozenset({"postgres", "redis", "pubsub", "task_queue", "http_client"})


def example() -> str:
    """The text of the file."""
    keys = allowed_keys()
    lines = [_HEAD]
    for key in keys.values():
        if key.kind.table is None and key.kind.tables is None:
            lines += [*_entry(key, key.name), ""]
    for key in keys.values():
        if (table := key.kind.table or key.kind.tables) is not None:
            brackets = "[{}]" if key.kind.table else "[[{}]]"
            unsaid = key.default is None or (bool(key.kind.tables) and key.name not in _SAID)
            lines += [*_comment(key.help), ("# " if unsaid else "") + brackets.format(key.name)]
            for inner in schema.keys(table).values():
                default = getattr(key.default, inner.name, None) if key.kind.table else None
                lines += _entry(inner, f"{key.name}.{inner.name}", default=default, unsaid=unsaid)
            lines.append("")
    return "\n".join(lines)


def _sample(path: str) -> Any:
    table, _, name = path.partition(".")
    if table in ("postgres", "redis") and hasattr(pool := getattr(Config, f"{table}_pool"), name):
        return getattr(pool, name)
    return 10 if name == "pool_size" else _SAMPLES.get(path, "")


def _entry(key: Key, path: str, *, default: Any = None, unsaid: bool = False) -> Iterator[str]:
    value = key.default if default is None else default
    sample = _sample(path)
    if sample != "" or value in (None, MISSING, ""):
        value, unsaid = sample if sample != "" else _anything(key), True
    yield from _comment(key.help)
    yield f"{'# ' if unsaid else ''}{key.name} = {_toml(value)}"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ")


def _anything(key: Key) -> Any:
    """A value that fits a key of which no sample is known here."""
    candidates: tuple[Any, ...] = (1, "...", True, {})
    for value in candidates:
        try:
            key.kind.check(value)
        except schema.Mismatch:
            continue
        return value
    raise AssertionError(f"no sample for {key.name}")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {_toml(each)}" for name, each in value.items()) + "}"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
