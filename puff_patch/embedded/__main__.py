"""The command line.

::

    python -m puff_patch.embedded start [DIR]     start, and keep running until told to stop; prints the URLs
    python -m puff_patch.embedded status [DIR]    exit code 0 when ready, 3 when not
    python -m puff_patch.embedded stop [DIR]      stop now, whoever uses them
    python -m puff_patch.embedded keep DIR        be the keeper, in the foreground (`ensure` does this for you)
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from puff_patch.embedded import EmbeddedError, ensure, status, stop
from puff_patch.embedded.files import Files
from puff_patch.embedded.keeper import keep


def main(arguments: Sequence[str] | None = None) -> int:
    """The commands in this module's description; returns an exit code.

    Args:
        arguments: command-line arguments without the program's name; by default the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="python -m puff_patch.embedded",
        description="A real PostgreSQL and a real Redis from wheels, for development, demonstrations and tests.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("start", "start both servers and keep them running until 'stop'; prints their URLs"),
        ("stop", "stop both servers now, whoever uses them"),
        ("status", "tell whether they run (exit code 0) or not (3), and as what"),
        ("keep", "be the keeper, in the foreground, until nobody uses the servers"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "dir",
            type=Path,
            nargs=None if name == "keep" else "?",
            help="the data directory; by default PUFF_DATA_DIR, else .puff",
        )
        if name == "keep":
            command.add_argument("--detach", action="store_true", help=argparse.SUPPRESS)
            command.add_argument("--report", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.command == "keep":
            return keep(Files.of(options.dir), detach=options.detach, report_fd=options.report)
        if options.command == "start":
            services = ensure(options.dir)
            files = Files(services.data_dir)
            with files.errors():
                files.touch(files.pin)
            services.stop()
            print(f"export PUFF_DEFAULT_POSTGRES_URL={shlex.quote(services.postgres_url)}")
            print(f"export PUFF_DEFAULT_REDIS_URL={shlex.quote(services.redis_url)}")
            return 0
        if options.command == "stop":
            print("stopped" if stop(options.dir) else "nothing was running")
            return 0
        found = status(options.dir)
        print(json.dumps(asdict(found), indent=2))
        return 0 if found.state == "ready" else 3
    except EmbeddedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
