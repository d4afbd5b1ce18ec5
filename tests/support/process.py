"""Run code in a fresh interpreter: the only place where the tests patch anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

_PRELUDE = """\
import faulthandler, json as _json, os, sys, time
faulthandler.dump_traceback_later({timeout}, exit=True)  # a hang shows where it hangs
def report(value):
    sys.stdout.write("\\n@@" + _json.dumps(value) + "\\n")
    sys.stdout.flush()
"""

#: Code for `run_python`, to show that others get their turn within a block.
TICKER = """\
class Ticker:
    '''Counts how often another greenlet gets its turn within the block.'''
    def __enter__(self):
        self.count = 0
        self._greenlet = gevent.spawn(self._run)
        return self
    def _run(self):
        while True:
            gevent.sleep(0.001)
            self.count += 1
    def __exit__(self, *_):
        self._greenlet.kill()
"""

# What a call raises, which must be of that kind.
RAISES = """\
def raises(kind, function, *args, **kwargs):
    try:
        value = function(*args, **kwargs)
    except kind as error:
        return error
    raise AssertionError(f"no {kind}, but {value!r}")
"""


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str | None] | None = None,
    timeout: float = 60,
    cwd: Any = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -W error ARGV``, without the PUFF_* and PG* variables of this process but for ``env``.

    Slow checkouts are no warning there unless ``env`` says so: how slow a busy machine is proves nothing.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PUFF_", "PG"))}
    environment["PUFF_SLOW_CHECKOUT_MS"] = "0"
    environment.update({name: value for name, value in (env or {}).items() if value is not None})
    return subprocess.run(
        [sys.executable, "-W", "error", *argv],
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_python(
    code: str,
    *,
    env: Mapping[str, str | None] | None = None,
    timeout: float = 60,
    exit_code: int = 0,
    quiet: bool = True,
    cwd: Any = None,
) -> Any:
    """Run code with warnings as errors; return what it passed to ``report()``.

    Args:
        code: may be indented; ``report(value)``, ``os``, ``sys`` and ``time`` are there.
        env: see `run`.
        timeout: seconds after which the interpreter dumps its stacks and exits.
        exit_code: what the process must exit with.
        quiet: whether anything on stderr is a failure ("Exception ignored in ...", a stray traceback).
        cwd: the working directory.
    """
    script = _PRELUDE.format(timeout=timeout) + textwrap.dedent(code)
    done = run(["-c", script], env=env, timeout=timeout + 10, cwd=cwd)
    told = f"exit code {done.returncode}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
    assert done.returncode == exit_code, told
    if quiet:
        assert not done.stderr, told
    reports = [line[2:] for line in done.stdout.splitlines() if line.startswith("@@")]
    assert len(reports) <= 1, told
    return json.loads(reports[0]) if reports else None
