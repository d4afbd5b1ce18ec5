"""Run one test program, plain or patched, and write down how each of its tests ended.

::

    python record.py plain|patched OUTCOMES [-m MODULE | SCRIPT] [ARGS]

Patching comes before anything else is imported, as in a program that was adopted; then the program runs as
``__main__``.  Each outcome is a line of JSON ``[test id, "passed" | "failed" | "skipped"]``; of several for one
test the worst counts.
"""

from __future__ import annotations

import sys

if sys.argv[1] == "patched":
    import puff_patch

    puff_patch.patch_all()

import json
import os
import runpy
import unittest
from collections.abc import Callable
from typing import Any

_out: int


def note(name: str, outcome: str) -> None:
    """Write down an outcome; one write a line, so that forked workers may share the file."""
    os.write(_out, json.dumps([name, outcome]).encode() + b"\n")


def record_unittest() -> None:
    """Note what any `unittest.TestResult` is told, but not of tests that a test runs (Django's do)."""
    running: list[unittest.TestCase] = []
    run = unittest.TestCase.run

    def run_noted(self: unittest.TestCase, *args: Any, **kwargs: Any) -> Any:
        running.append(self)
        try:
            return run(self, *args, **kwargs)
        finally:
            running.pop()

    unittest.TestCase.run = run_noted  # type: ignore[method-assign]

    def note_outermost(test: Any, outcome: str) -> None:
        if not running or running[0] is test:
            note(test.id(), outcome)

    def wrap(method: str, outcome: str) -> None:
        original: Callable[..., None] = getattr(unittest.TestResult, method)

        def add(self: Any, test: Any, *args: Any) -> None:
            note_outermost(test, outcome)
            original(self, test, *args)

        setattr(unittest.TestResult, method, add)

    for method, outcome in (
        ("addSuccess", "passed"),
        ("addExpectedFailure", "passed"),
        ("addSkip", "skipped"),
        ("addFailure", "failed"),
        ("addError", "failed"),
        ("addUnexpectedSuccess", "failed"),
    ):
        wrap(method, outcome)
    add_sub_test = unittest.TestResult.addSubTest

    def add(self: Any, test: Any, subtest: Any, error: Any) -> None:
        if error is not None:
            note_outermost(test, "failed")
        add_sub_test(self, test, subtest, error)

    unittest.TestResult.addSubTest = add  # type: ignore[method-assign]


def pytest_runtest_logreport(report: Any) -> None:
    """As a plugin of pytest (``-p record``): note each phase that says something."""
    if report.when == "call" or report.outcome != "passed":
        note(report.nodeid, report.outcome)


def main() -> None:
    """Do what the module says."""
    global _out
    _, _, outcomes, *program = sys.argv
    _out = os.open(outcomes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    record_unittest()
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path[0] = os.getcwd()
        if program[1] == "pytest":
            import pytest

            # Not runpy: this module stays ``__main__``, and is the plugin.
            sys.modules["record"] = sys.modules["__main__"]
            sys.exit(pytest.main(["-p", "record", *program[2:]]))
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path[0] = os.path.dirname(os.path.abspath(program[0]))
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
