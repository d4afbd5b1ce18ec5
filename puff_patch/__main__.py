"""``python -m puff_patch [--embedded] SCRIPT [ARGS]``: run an unmodified script patched.

Like ``python -m gevent.monkey``.  ``-m MODULE`` runs a module as ``python -m`` does.  With ``--embedded``
PostgreSQL and Redis from wheels are started first, and their URLs are in the environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m puff_patch",
        description="Run a Python program with its sockets, database drivers and HTTP clients made cooperative.",
    )
    parser.add_argument(
        "--embedded",
        action="store_true",
        help="start PostgreSQL and Redis from wheels first and put their URLs into the environment",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("-m", dest="module", metavar="MODULE", help="run a module, as python -m does")
    target.add_argument("script", nargs="?", metavar="SCRIPT", help="the script to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    return parser


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Ours up to and including the script or module, and the rest, which is not ours to understand."""
    index = 0
    while index < len(argv):
        if argv[index] == "-m":
            return argv[: index + 2], argv[index + 2 :]
        if argv[index].startswith("-m") or not argv[index].startswith("-"):
            return argv[: index + 1], argv[index + 1 :]
        index += 1
    return argv, []


def main(argv: list[str]) -> None:
    """Patch, then run the script or module as ``__main__``; its exit code is ours."""
    import puff_patch

    ours, theirs = _split(argv)
    parser = _parser()
    options = parser.parse_args(ours)
    if not (options.module or options.script):
        parser.error("name a script to run, or a module after -m")
    puff_patch.patch_all()
    if options.embedded:
        from puff_patch import embedded

        os.environ["PUFF_EMBEDDED"] = "1"
        embedded.ensure(export=True)
    if options.module:
        sys.argv = [options.module, *theirs]
        sys.path[0] = os.getcwd()
        if importlib.util.find_spec(options.module) is None:
            sys.exit(f"python -m puff_patch: No module named {options.module!r}")
        runpy.run_module(options.module, run_name="__main__", alter_sys=True)
    else:
        if not os.path.exists(options.script):
            sys.exit(f"python -m puff_patch: there is no file {options.script!r}")
        sys.argv = [options.script, *theirs]
        # As the interpreter does for a script: its own folder, not ours, comes first.
        sys.path[0] = os.path.dirname(os.path.abspath(options.script))
        runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
