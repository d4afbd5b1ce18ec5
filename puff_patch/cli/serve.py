"""``puff serve``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from puff_patch import serving
from puff_patch.background import Background
from puff_patch.cli.common import prepare, service_parser
from puff_patch.project import BUILT_IN, Project
from puff_patch.references import load

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from puff_patch.server import Applications


def serve(project: Project, arguments: list[str]) -> int:
    """Serve the program's applications until SIGTERM or Ctrl-C.

    Returns:
        The exit code: 0 if every accepted request was answered.

    Raises:
        ConfigError: something that was said cannot be used.
    """
    parser = service_parser("serve", project, BUILT_IN["serve"])
    if project.program.django:
        # manage.py runpuff has these, too, and takes what is said of the services from the environment.
        django = parser.add_argument_group("Django")
        for option, text in serving.DJANGO_SWITCHES.items():
            django.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=text)
    serving.add_server_options(parser, project, bind=serving.DEFAULT_BIND)
    given = parser.parse_args(arguments)
    prepare(project, given)
    if not project.program.django:
        return _serve(project, vars(given))
    from puff_patch.cli.run import find_settings, run_django

    find_settings()
    settings = importlib.import_module(os.environ["DJANGO_SETTINGS_MODULE"])
    if any(app.partition(".")[0] == "django_backend" for app in getattr(settings, "INSTALLED_APPS", ())):
        # What the services were told is in the environment by now, and the rest is runpuff's to understand.
        _, rest = service_parser("serve", project, BUILT_IN["serve"], add_help=False).parse_known_args(arguments)
        if not serving.says_where(project, vars(given)):
            rest += ["--bind", serving.DEFAULT_BIND]
        return run_django(["runpuff", *rest], name="puff serve")
    application = getattr(settings, "WSGI_APPLICATION", None)
    return _serve(
        project,
        vars(given),
        otherwise=application and (lambda: load(application, what="WSGI_APPLICATION", where=settings.__name__)),
    )


def _serve(
    project: Project, given: dict[str, Any], *, otherwise: Callable[[], WSGIApplication] | None = None
) -> int:
    import puff_patch
    from puff_patch.server import is_worker

    if not is_worker():
        for problem in serving.unavailable(project):
            print(f"puff: {problem}", file=sys.stderr)
    host, _, port = serving.DEFAULT_BIND.rpartition(":")
    background = Background(project)
    options = serving.server_options(
        project,
        given,
        otherwise={"host": host, "port": int(port)},
        on_stop=(background.stop, puff_patch.close_pools),
    )

    def load() -> Applications:
        background.start()
        return serving.applications(project, given, otherwise=otherwise)

    return serving.run(load, options)
