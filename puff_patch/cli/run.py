"""The commands that run something other than the server: Django's, pytest, the program's own functions."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from puff_patch.background import Background
from puff_patch.cli.common import prepare, service_parser
from puff_patch.config import ConfigError
from puff_patch.project import BUILT_IN, Project


def django(project: Project, arguments: list[str]) -> int:
    """Run a management command, as ``manage.py`` does.

    Raises:
        ConfigError: Django or its settings are not there.
    """
    parser = service_parser("django", project, BUILT_IN["django"], add_help=False)
    given, rest = parser.parse_known_args(arguments)
    prepare(project, given)
    if not any(argument.startswith("--settings") for argument in rest):
        find_settings()
    return run_django(rest, name="puff django")


def run_django(arguments: list[str], *, name: str) -> int:
    """Run ``python -m django`` in this process.

    Args:
        arguments: the management command and its own.
        name: what it calls itself.
    """
    if importlib.util.find_spec("django") is None:
        raise ConfigError("Django is not installed: pip install 'puff-patch[django]'")
    sys.argv = [name, *arguments]
    try:
        runpy.run_module("django", run_name="__main__")
    except SystemExit as stop:
        return _exit_code(stop)
    return 0


def find_settings() -> None:
    """Set DJANGO_SETTINGS_MODULE, if it is not, to what ``manage.py`` in the working directory names.

    Raises:
        ConfigError: nothing names the settings.
    """
    if os.environ.get("DJANGO_SETTINGS_MODULE"):
        return
    manage = Path("manage.py")
    text = manage.read_text(encoding="utf-8") if manage.is_file() else ""
    match = re.search(r"""DJANGO_SETTINGS_MODULE["']\s*[,\]][\s=]*["']([\w.]+)["']""", text)
    if match is None:
        raise ConfigError(
            "nothing names the settings of Django: add to puff.toml, for example\n"
            '    django_settings_module = "mysite.settings"\n'
            "or set DJANGO_SETTINGS_MODULE"
        )
    os.environ["DJANGO_SETTINGS_MODULE"] = match[1]


def pytest(project: Project, arguments: list[str]) -> int:
    """Run the program's tests, patched, with puff_patch's plugin.

    Raises:
        ConfigError: pytest is not installed.
    """
    parser = service_parser("pytest", project, BUILT_IN["pytest"], add_help=False)
    given, rest = parser.parse_known_args(arguments)
    prepare(project, given)
    if importlib.util.find_spec("pytest") is None:
        raise ConfigError("pytest is not installed: pip install pytest")
    import pytest

    plugin = "puff_patch.pytest_plugin"
    if importlib.util.find_spec(plugin) is not None:
        rest = ["-p", plugin, *rest]
    if "pytest_path" in project.values:
        try:
            os.chdir(project.program.pytest_path)
        except OSError as error:
            raise ConfigError(f"{project.where('pytest_path')}: {error}") from error
        rest = [f"--rootdir={os.getcwd()}", *rest]
    return int(pytest.main(rest))


def function(project: Project, index: int, arguments: list[str]) -> int:
    """Run a function of the program's own: on a greenlet, or on the asyncio thread if it is async.

    Args:
        project: the program.
        index: of its commands.
        arguments: what the function finds in ``sys.argv``.

    Raises:
        ConfigError: the function is not there.
        Exception: what the function raises.
    """
    from puff_patch.references import load

    command = project.program.commands[index]
    parser = service_parser(command.command_name, project, f"run {command.function}", add_help=False)
    given, rest = parser.parse_known_args(arguments)
    prepare(project, given)
    sys.argv = [f"puff {command.command_name}", *rest]
    called = load(command.function, what="function", where=project.where("commands", index, "function"))
    import puff_patch

    try:
        if inspect.iscoroutinefunction(called):
            from puff_patch.runtime.aio import run_coroutine

            run_coroutine(called())
        else:
            _on_greenlet(called)
    except SystemExit as stop:
        return _exit_code(stop)
    finally:
        puff_patch.close_pools()
    return 0


def wait_forever(project: Project, arguments: list[str]) -> int:
    """Run what runs in the background until SIGTERM or Ctrl-C."""
    given = service_parser("wait_forever", project, BUILT_IN["wait_forever"]).parse_args(arguments)
    prepare(project, given)
    import gevent
    from gevent.event import Event

    import puff_patch

    background = Background(project)
    background.start()
    ended = Event()
    # The loop's own watchers: an idle hub runs no Python code, and so no handler of signal.signal().
    watchers = [gevent.get_hub().loop.signal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for watcher in watchers:
        watcher.start(ended.set)
    print("puff_patch is waiting; SIGTERM or Ctrl-C ends it", flush=True)
    ended.wait()
    for watcher in watchers:
        watcher.close()
    background.stop()
    puff_patch.close_pools()
    return 0


def _on_greenlet(called: Callable[[], Any]) -> None:
    import gevent

    raised: list[BaseException] = []

    def run() -> None:
        try:
            called()
        except BaseException as error:  # noqa: BLE001 - raised again below, once and not by the hub as well
            raised.append(error)

    greenlet = gevent.spawn(run)
    try:
        greenlet.join()
    except KeyboardInterrupt as interrupt:
        greenlet.kill(type(interrupt))
        raise
    if raised:
        raise raised[0]


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1
