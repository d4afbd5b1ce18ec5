"""`patch_all` as a whole: what it takes, tells and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.process import run_python

HERE = str(Path(__file__).parent)


def test_importing_puff_patch_has_no_side_effects() -> None:
    before, after, heavy = run_python("""
        def look():
            return [len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), len(sys.meta_path)]
        before = look()
        import puff_patch
        heavy = {"gevent", "greenlet", "django", "psycopg2", "psycogreen", "redis", "requests", "granian"}
        report([before, look(), sorted(heavy & set(sys.modules))])
    """)
    assert before == after
    assert heavy == []


def test_patching_imports_nothing_that_the_program_does_not() -> None:
    assert (
        run_python("""
        import puff_patch
        puff_patch.patch_all()
        report(sorted({"django", "psycopg2", "redis", "requests", "granian"} & set(sys.modules)))
    """)
        == []
    )


def test_switches_and_repetition() -> None:
    run_python("""
        import puff_patch
        from puff_patch.patches import PATCHES
        for left_out in PATCHES:
            puff_patch.patch_all(**{left_out: False})
            assert [name for name in PATCHES if not puff_patch.is_patched(name)] == [left_out]
            # takes nothing back, and adds what was left out
            puff_patch.patch_all(**{name: False for name in PATCHES if name != left_out})
            assert all(map(puff_patch.is_patched, PATCHES))
            puff_patch.unpatch_all()
            assert not any(map(puff_patch.is_patched, PATCHES))
        puff_patch.patch_all(**{name: False for name in PATCHES})
        assert not any(map(puff_patch.is_patched, PATCHES))
    """)


def test_an_unknown_patch_is_named_with_those_there_are() -> None:
    import puff_patch

    with pytest.raises(
        ValueError, match=r"'psycopg3'.*sockets, asyncio, asgiref, anyio, psycopg2, psycopg, redis"
    ):
        puff_patch.is_patched("psycopg3")


def test_events_and_veto() -> None:
    run_python("""
        import puff_patch, zope.event
        seen = []
        def listen(event):
            if isinstance(event, (puff_patch.WillPatch, puff_patch.DidPatch, puff_patch.DidUnpatch)):
                seen.append((type(event).__name__, event.name, puff_patch.is_patched(event.name)))
                if isinstance(event, puff_patch.WillPatch) and event.name == "redis":
                    raise puff_patch.DoNotPatch
        zope.event.subscribers.append(listen)
        from puff_patch.patches import PATCHES
        puff_patch.patch_all(**{name: name in ("psycopg2", "redis") for name in PATCHES})
        assert seen == [
            ("WillPatch", "psycopg2", False), ("DidPatch", "psycopg2", True), ("WillPatch", "redis", False)
        ], seen
        import redis
        pool = redis.Redis().connection_pool
        assert type(pool) is redis.ConnectionPool, "the veto was not heard"
        del seen[:]
        puff_patch.unpatch_all()
        assert seen == [("DidUnpatch", "psycopg2", False)], seen
    """)


@pytest.mark.parametrize("imported", ["before", "after"])
def test_an_old_library_is_refused_with_the_way_out(imported: str) -> None:
    run_python(f"""
        import importlib.metadata
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "4.6.0" if name == "redis" else version(name)
        import puff_patch
        if {imported!r} == "before":
            import redis
        try:
            puff_patch.patch_all(sockets=False)
            import redis
        except puff_patch.UnsupportedVersion as error:
            message = str(error)
        assert "redis 5.2" in message, message
        assert "4.6.0" in message, message
        assert "patch_all(redis=False)" in message, message
        puff_patch.unpatch_all()
        puff_patch.patch_all(sockets=False, redis=False)
        import redis
        assert type(redis.Redis().connection_pool) is redis.ConnectionPool
    """)


def test_too_late_warns_once_and_names_module_and_attribute(tmp_path: Path) -> None:
    (tmp_path / "eager.py").write_text("from time import sleep as doze\nfrom psycopg2 import connect\n")
    (tmp_path / "lazy.py").write_text("import time, psycopg2, socket\nfrom psycopg2 import extensions\n")
    messages = run_python(
        """
        import warnings
        import eager, lazy
        import puff_patch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            puff_patch.patch_all()
            puff_patch.patch_all()
        assert all(item.category is puff_patch.PatchedTooLateWarning for item in caught), caught
        assert [item.filename for item in caught] == ["<string>"], "it does not point at the caller"
        report([str(item.message) for item in caught])
        """,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert len(messages) == 1
    assert "eager.doze (was time.sleep)" in messages[0] or "eager.connect (was psycopg2.connect)" in messages[0]
    assert "lazy" not in messages[0]
    assert "puff_patch.patch_all()` the first lines" in messages[0]
    assert "__init__.py of its package" in messages[0]


def test_too_late_is_also_what_was_made_of_an_original(tmp_path: Path) -> None:
    files = {
        "base": "import threading\nclass Local(threading.local): pass\n",
        "lock": "import threading\nlock = threading.Lock()\n",
        "fine": "import threading\nclass Worker(threading.Thread): pass\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    [message] = run_python(
        """
        import warnings
        import base, lock, fine
        import puff_patch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            puff_patch.patch_all()
        report([str(item.message) for item in caught])
        """,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert "base.Local (was " in message
    assert "lock.lock (was _thread." in message
    assert "fine" not in message


def test_patching_late_leaves_what_is_lazy_alone() -> None:
    run_python("""
        import warnings
        from django.conf import settings  # loads at the first question, and has nothing to load here
        import puff_patch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", puff_patch.PatchedTooLateWarning)
            puff_patch.patch_all()
        assert not settings.configured
    """)


def test_too_late_for_requests_is_one_warning_not_also_gevents() -> None:
    messages = run_python("""
        import warnings, requests, redis
        import puff_patch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            puff_patch.patch_all()
        report([str(item.message) for item in caught])
    """)
    assert len(messages) == 1
    assert "ssl.SSLContext" in messages[0]
    # redis-py's own pool class is not a blocking original: whoever makes one, wants one.
    assert "ConnectionPool" not in messages[0]


def test_a_clean_program_is_not_warned() -> None:
    run_python("""
        import argparse, asyncio, concurrent.futures, logging, os, subprocess, threading, urllib.request
        import puff_patch
        puff_patch.patch_all()
        import requests, redis, psycopg2, psycopg2.extras, psycopg2.pool, urllib3, django
        from django.conf import settings
        settings.configure()
        django.setup()
        import django.core.cache.backends.redis, django.db.backends.postgresql.base, django.test
        puff_patch.patch_all()
        puff_patch.unpatch_all()
    """)


def test_a_gevent_server_keeps_its_patch() -> None:
    """As under gunicorn -k gevent."""
    run_python(
        """
        import gevent.monkey
        gevent.monkey.patch_all()
        import interpreter_state as state
        before = state.snapshot(state.STDLIB)
        import puff_patch
        for _ in range(2):
            puff_patch.patch_all()
            puff_patch.unpatch_all()
            state.assert_same(before, state.snapshot(state.STDLIB))
        assert gevent.monkey.is_module_patched("socket")
        assert gevent.monkey.get_original("time", "sleep") is not time.sleep
        ticks = []
        gevent.spawn(ticks.append, 1)
        import time
        time.sleep(0.01)
        assert ticks
        """,
        env={"PYTHONPATH": HERE},
    )


def test_a_server_that_patched_a_part_keeps_that_part() -> None:
    run_python(
        """
        import gevent.monkey
        gevent.monkey.patch_time()
        import interpreter_state as state
        state.import_all(state.STDLIB)
        before = state.snapshot(state.STDLIB)
        import puff_patch
        puff_patch.patch_all()
        assert gevent.monkey.is_module_patched("socket")
        puff_patch.unpatch_all()
        state.assert_same(before, state.snapshot(state.STDLIB))
        assert gevent.monkey.is_module_patched("time")
        assert not gevent.monkey.is_module_patched("socket")
        """,
        env={"PYTHONPATH": HERE},
    )


def test_a_thread_that_runs_throughout_is_joined_for_real() -> None:
    run_python("""
        import threading
        go = threading.Event()
        thread = threading.Thread(target=go.wait)
        thread.start()
        import puff_patch
        puff_patch.patch_all()
        puff_patch.unpatch_all()
        assert "join" not in vars(thread)
        assert set(threading.enumerate()) == {threading.main_thread(), thread}, threading.enumerate()
        go.set()
        thread.join(10)
        assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
    """)


def test_an_exit_while_patched_is_clean() -> None:
    run_python("""
        import puff_patch
        puff_patch.patch_all()
        import threading, atexit, logging
        done = []
        def work():
            time.sleep(0.02)
            done.append(1)
        import time
        threading.Thread(target=work).start()
        atexit.register(lambda: report(done))
    """)
