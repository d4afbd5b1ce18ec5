"""What `record.py` writes down: each test once as it ended, and nothing of tests inside tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECORD = Path(__file__).resolve().parent / "record.py"
UNITTESTS = """
import unittest

class Outer(unittest.TestCase):
    def test_passes(self):
        class Inner(unittest.TestCase):
            def runTest(self):
                self.fail()

        result = unittest.TestResult()
        Inner().run(result)
        result.addSuccess(None)
        self.assertEqual(len(result.failures), 1)

    def test_fails_in_a_part(self):
        with self.subTest(part=1):
            self.fail()

    def test_is_skipped(self):
        self.skipTest("")

    @unittest.expectedFailure
    def test_fails_as_expected(self):
        self.fail()

class Unusable(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise OSError

    def test_never(self):
        pass
"""
PYTESTS = """
import pytest
import socket

def test_is_patched():
    assert socket.socket.__module__.startswith("gevent")

def test_is_skipped():
    pytest.skip()

@pytest.fixture
def broken():
    raise OSError

def test_cannot_start(broken):
    pass
"""


@pytest.fixture
def outcomes(tmp_path: Path):
    def run(mode: str, program: str, text: str) -> dict[str, str]:
        (tmp_path / "test_samples.py").write_text(text)
        written = tmp_path / f"{mode}.jsonl"
        command = [sys.executable, str(RECORD), mode, str(written), "-m", program, "test_samples.py"]
        subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False)
        return dict(json.loads(line) for line in written.read_text().splitlines())

    return run


def test_unittest(outcomes):
    assert outcomes("plain", "unittest", UNITTESTS) == {
        "test_samples.Outer.test_fails_as_expected": "passed",
        "test_samples.Outer.test_fails_in_a_part": "failed",
        "test_samples.Outer.test_is_skipped": "skipped",
        "test_samples.Outer.test_passes": "passed",
        "setUpClass (test_samples.Unusable)": "failed",
    }


@pytest.mark.parametrize(("mode", "first"), [("plain", "failed"), ("patched", "passed")])
def test_pytest_and_mode(outcomes, mode, first):
    assert outcomes(mode, "pytest", PYTESTS) == {
        "test_samples.py::test_is_patched": first,
        "test_samples.py::test_is_skipped": "skipped",
        "test_samples.py::test_cannot_start": "failed",
    }
