"""For the subprocesses of the tests: what an interpreter is like, to be compared before and after patching."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import logging
import subprocess
import sys
import threading
import time
from types import ModuleType
from typing import Any

STDLIB = [
    "_thread",
    "_threading_local",
    "asyncio",
    "asyncio.base_events",
    "asyncio.events",
    "asyncio.selector_events",
    "asyncio.tasks",
    "asyncio.unix_events",
    "builtins",
    "concurrent.futures.thread",
    "contextvars",
    "http.client",
    "importlib._bootstrap",
    "logging",
    "logging.handlers",
    "multiprocessing",
    "multiprocessing.connection",
    "multiprocessing.synchronize",
    "os",
    "queue",
    "select",
    "selectors",
    "signal",
    "socket",
    "socketserver",
    "ssl",
    "subprocess",
    "sys",
    "threading",
    "time",
]
LIBRARIES = {
    "sockets": [],
    "asyncio": ["uvloop"],
    "asgiref": ["asgiref.local", "asgiref.sync"],
    "anyio": ["anyio", "anyio.from_thread", "anyio._backends._asyncio"],
    "psycopg2": ["psycopg2", "psycopg2.extensions", "psycopg2.pool", "psycopg2._psycopg"],
    "psycopg": ["psycopg", "psycopg.waiting", "psycopg.connection", "psycopg._acompat", "psycopg.conninfo"],
    "redis": ["redis", "redis.client", "redis.cluster", "redis.connection", "redis.sentinel"],
    "requests": ["requests", "requests.sessions", "requests.adapters", "requests.api"],
    "django": ["django.core.cache.backends.redis", "django.db.backends.postgresql.base"],
    "django_redis": ["django_redis.pool"],
    "puff_alias": [],
    "sqlalchemy": ["sqlalchemy.pool", "sqlalchemy.pool.impl", "sqlalchemy.dialects.postgresql.base"],
}
# What changes with time, or is made anew at each look.
_FLEETING = frozenset({"__dict__", "__weakref__", "_abc_impl", "__abstractmethods__", "__annotations_cache__"})
_MISSING = object()


with contextlib.suppress(ImportError):
    import exceptiongroup  # noqa: F401 - anyio's on Python 3.10; it replaces sys.excepthook


def import_all(names: list[str]) -> None:
    for name in names:
        importlib.import_module(name)


def snapshot(modules: list[str]) -> dict[Any, Any]:
    """Every attribute of these modules and their classes, of the threads and of the root logger's handlers."""
    state: dict[Any, Any] = {}
    asyncio.get_event_loop_policy()  # made at the first use
    for name in modules:
        module = importlib.import_module(name)
        for key, value in list(vars(module).items()):
            if isinstance(value, ModuleType) or key.startswith("__"):
                continue  # a submodule that was imported later is an attribute, too
            state[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                for attribute, inner in list(vars(value).items()):
                    if attribute not in _FLEETING:
                        state[name, key, attribute] = inner
    for thread in threading.enumerate():
        for key, value in vars(thread).items():
            state["thread", thread.name, key] = value
    for handler in logging.getLogger().handlers:
        state["handler", str(handler)] = handler.lock
    return state


def assert_same(before: dict[Any, Any], after: dict[Any, Any]) -> None:
    """Each name has the very same object."""
    names = [*before, *(name for name in after if name not in before)]
    differences = [
        f"{'.'.join(map(str, name))}: {before.get(name, '-')!r} -> {after.get(name, '-')!r}"
        for name in names
        if before.get(name, _MISSING) is not after.get(name, _MISSING)
    ]
    assert not differences, differences


def left_behind(modules: list[str]) -> list[str]:
    """Attributes that are still puff_patch's."""
    return [
        ".".join(map(str, name))
        for name, value in snapshot(modules).items()
        if str(getattr(value, "__module__", "")).startswith("puff_patch")
    ]


def assert_blocking() -> None:
    """The interpreter is a plain one: sleeps block, threads are real, and the rest works."""
    import gevent

    ticks: list[int] = []
    gevent.spawn(ticks.append, 1)
    started = time.monotonic()
    time.sleep(0.02)
    assert time.monotonic() - started >= 0.02
    assert not ticks, "time.sleep still lets greenlets run"

    assert threading.current_thread() is threading.main_thread()
    assert threading.main_thread().is_alive()
    assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
    native: list[int] = []

    def work() -> None:
        assert threading.current_thread().name == "worker"
        logging.getLogger("worker").info("from a thread")
        native.append(threading.get_native_id())

    thread = threading.Thread(target=work, name="worker")
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert native
    assert native[0] != threading.get_native_id(), "threads are still greenlets"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert pool.submit(threading.get_native_id).result(10) != threading.get_native_id()
    assert subprocess.run([sys.executable, "-S", "-c", "print(7)"], capture_output=True).stdout == b"7\n"
    asyncio.run(asyncio.sleep(0.001))
    logging.getLogger().warning("from the main thread")
