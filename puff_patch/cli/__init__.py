"""The ``puff`` command: serves and runs programs, with Django and without, as ``puff.toml`` describes them.

Each command stands in a module of its own, imported when it runs, so that ``puff --help`` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from puff_patch.config import ConfigError
from puff_patch.project import BUILT_IN, Project, find
from puff_patch.schema import nearest

_USAGE = """\
usage: puff [--config FILE] COMMAND [ARGS]

Serve and run a program on greenlets, as puff.toml describes it, or the file that --config or PUFF_CONFIG names.

commands:
"""
_END = """
options:
  --config FILE   the file to read in place of puff.toml [env: PUFF_CONFIG={}]
  --version       print the version
  -h, --help      print this

puff help COMMAND explains a command. puff new NAME makes a project to begin with.
"""
#: Where a command that needs a project runs; the others are in `main`.
_RUNNERS = {
    "serve": ("puff_patch.cli.serve", "serve"),
    "django": ("puff_patch.cli.run", "django"),
    "pytest": ("puff_patch.cli.run", "pytest"),
    "wait_forever": ("puff_patch.cli.run", "wait_forever"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; by default those of this process.

    Returns:
        The exit code: 0, or 1 if the command failed, or 2 if it was called wrongly.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(arguments)
    except ConfigError as error:
        return _complain(str(error))


def watch(argv: Sequence[str] | None = None) -> int:
    """The seed's ``puff-watch [-n NUM] COMMAND``: run a command anew whenever a file changes."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-n"], ["--num"]) and len(arguments) > 2:
        arguments = [arguments[2], "--workers", arguments[1], *arguments[3:]]
    if not arguments or arguments[0].startswith("-"):
        return _complain("puff-watch takes a command, as in puff-watch serve", 2)
    return main([arguments[0], "--reload", *arguments[1:]])


def _main(arguments: list[str]) -> int:
    while arguments and arguments[0].startswith("-"):
        option, equals, value = arguments.pop(0).partition("=")
        if option == "--config":
            if not equals and not arguments:
                return _complain("--config takes the name of a file", 2)
            os.environ["PUFF_CONFIG"] = value if equals else arguments.pop(0)
        elif option == "--version":
            from puff_patch import __version__

            print(f"puff {__version__}")
            return 0
        elif option in ("-h", "--help"):
            return _help()
        else:
            return _complain(f"there is no option {option}; puff --help names them", 2)
    if not arguments:
        _help()
        return 2
    command, *rest = arguments
    if command == "help":
        return _explain(rest[0]) if rest else _help()
    if command == "example_config":
        from puff_patch.cli.example import example

        print(example(), end="")
        return 0
    if command == "new":
        from puff_patch.cli.new import new

        return new(rest)
    if command == "doctor":
        from puff_patch.cli.doctor import doctor

        return doctor(rest)
    project = find()
    return _runner(command, project)(project, rest)


def _runner(command: str, project: Project) -> Callable[[Project, list[str]], int]:
    if command in _RUNNERS:
        module, name = _RUNNERS[command]
        runner: Callable[[Project, list[str]], int] = getattr(import_module(module), name)
        return runner
    for index, each in enumerate(project.program.commands):
        if each.command_name == command:
            from puff_patch.cli.run import function

            return lambda project, arguments: function(project, index, arguments)
    names = [*BUILT_IN, *(each.command_name for each in project.program.commands)]
    raise ConfigError(f"there is no command {command!r}{nearest(command, names)}")


def _help() -> int:
    """Name the commands, those of the project, too."""
    problem = ""
    project = Project()
    try:
        project = find()
    except ConfigError as error:
        problem = str(error)
    commands = dict(BUILT_IN)
    for each in project.program.commands:
        commands[each.command_name] = f"run {each.function}"
    width = max(map(len, commands)) + 2
    lines = "".join(f"  {name:{width}}{text}\n" for name, text in commands.items())
    print(_USAGE + lines + _END.format(os.environ.get("PUFF_CONFIG", "")), end="")
    return _complain(problem) if problem else 0


def _explain(command: str) -> int:
    if command in ("pytest", "django"):
        from puff_patch.cli.common import service_parser

        parser = service_parser(command, find(), BUILT_IN[command])
        parser.usage = f"puff {command} [OPTIONS] [ARGS OF {command.upper()}]"
        parser.epilog = f"Everything else goes to {command}: puff {command} --help prints what it takes."
        parser.print_help()
        return 0
    if command in ("help", "example_config"):
        print(f"puff {command}: {BUILT_IN[command]}")
        return 0
    for each in find().program.commands if command not in BUILT_IN else ():
        if each.command_name == command:
            print(f"puff {command}: run {each.function}; it finds its arguments in sys.argv")
            return 0
    return _main([command, "--help"])


def _complain(message: str, code: int = 1) -> int:
    print(f"puff: {message}", file=sys.stderr)
    return code
