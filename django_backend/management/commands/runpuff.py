"""``manage.py runpuff``: serve the project's applications on puff_patch's server."""

from __future__ import annotations

import ipaddress
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gevent
from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.management.commands.runserver import naiveip_re
from django.core.servers.basehttp import get_internal_wsgi_application
from django.db import DEFAULT_DB_ALIAS, Error, connections

import puff_patch
from django_backend import conf
from puff_patch import serving
from puff_patch.background import Background
from puff_patch.config import ConfigError
from puff_patch.project import Project

if TYPE_CHECKING:
    from puff_patch.server import Applications

_DATABASE_SECONDS = 10.0

_NOT_PATCHED = """\
puff_patch.patch_all() was not called, so one request would block all others.
Put these two lines first in manage.py (and in wsgi.py), before every other import:

    import puff_patch
    puff_patch.patch_all()"""


class Command(BaseCommand):
    """Serve the applications of the project, in this process or more, until SIGTERM or Ctrl-C."""

    help = "Serves the project on greenlets behind a Rust HTTP front. puff.toml and settings.PUFF say the same."

    # Run in handle(), when the embedded services are up and the server has said what it does.
    requires_system_checks = []

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the options; ``manage.py runpuff --help`` shows them."""
        parser.add_argument(
            "addrport",
            nargs="?",
            help="port, or address:port; port 0 takes a free one. Default: 127.0.0.1:8000.",
        )
        try:
            project = conf.read()
        except ConfigError:
            project = Project()  # said in handle()
        serving.add_server_options(parser, project)
        for option, text in serving.DJANGO_SWITCHES.items():
            parser.add_argument(option, action="store_true", help=text)
        parser.add_argument(
            "--embedded",
            action="store_true",
            help="start a PostgreSQL and a Redis from wheels first, with their data in PUFF_DATA_DIR.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Check the project, then serve it."""
        try:
            code = self._serve(options)
        except ConfigError as exc:
            raise CommandError(str(exc)) from exc
        if code:
            sys.exit(code)

    def _serve(self, options: dict[str, Any]) -> int:
        from django_backend.websocket import adapt, get_handlers
        from puff_patch.server import is_worker

        project = conf.read()
        given = dict(options)
        if options["addrport"] is not None:
            given["host"], given["port"] = _address(options["addrport"])
        if not puff_patch.is_patched("sockets"):
            raise CommandError(_NOT_PATCHED)
        if not settings.DEBUG and not settings.ALLOWED_HOSTS:
            raise CommandError("You must set settings.ALLOWED_HOSTS if DEBUG is False.")
        background = Background(project)
        server_options = serving.server_options(
            project,
            given,
            otherwise={"access_log": settings.DEBUG},
            on_stop=(background.stop, puff_patch.close_pools),
        )
        if options["embedded"]:
            self._start_embedded()

        def load() -> Applications:
            background.start()
            found = serving.applications(project, given, otherwise=_application)
            try:
                handlers = {path: adapt(handler) for path, handler in found.websockets.items()} | get_handlers()
            except ImproperlyConfigured as exc:
                raise CommandError(str(exc)) from exc
            found = replace(found, websockets=handlers)
            return _with_static_files(found, nostatic=options["nostatic"], insecure=options["insecure"])

        if not is_worker():
            for problem in serving.unavailable(project):
                self.stderr.write(problem)
            self._look_before(server_options.host, skip_checks=options["skip_checks"])
            if server_options.supervised:
                puff_patch.close_pools()  # this process needs them no more
        return serving.run(load, server_options)

    def _look_before(self, host: str, *, skip_checks: bool) -> None:
        """Say, once and not in each worker, what is to be said before the server runs."""
        if not skip_checks:
            self.stdout.write("Performing system checks...\n")
            self.check(display_num_errors=True)
        self._notice_migrations()
        if settings.DEBUG and not _is_loopback(host):
            self.stderr.write(
                f"DEBUG is on, and {host} is not a loopback address: whoever reaches it is shown source code and "
                "settings at every error. Set DEBUG = False in settings."
            )
        self.stdout.write(
            f"Django version {self.get_version()}, using settings {settings.SETTINGS_MODULE!r}\n"
            "Quit the server with CONTROL-C."
        )

    def _start_embedded(self) -> None:
        """Start the embedded services, and this process anew if their addresses came too late for it."""
        from puff_patch import embedded

        environ = dict(os.environ)
        try:
            embedded.ensure(export=True)
        except embedded.EmbeddedError as exc:
            raise CommandError(str(exc)) from exc
        # Settings may take addresses from the environment, and the models that are loaded by now have made
        # database connections with them. A program that calls this command has to set PUFF_EMBEDDED itself.
        if dict(os.environ) != environ and getattr(self, "_called_from_command_line", False):
            sys.stdout.flush()
            sys.stderr.flush()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    def _notice_migrations(self) -> None:
        """Say which migrations are not applied, or that the database cannot be asked, in a line each."""
        from puff_patch.embedded import EmbeddedError

        limit = gevent.Timeout(_DATABASE_SECONDS)
        problem = None
        try:
            with limit:
                self.check_migrations()
        except (Error, EmbeddedError) as exc:
            problem = str(exc) or type(exc).__name__
        except gevent.Timeout as expired:
            if expired is not limit:
                raise
            problem = f"no answer within {_DATABASE_SECONDS:g} seconds"
        finally:
            connections.close_all()
        if problem is not None:
            self.stderr.write(
                f"The database {DEFAULT_DB_ALIAS!r} cannot be used now, and pages that need it will fail: "
                + " ".join(problem.split())
            )


def _address(addrport: str) -> tuple[str, int]:
    """Take runserver's ``8000``, ``0.0.0.0:8000``, ``[::1]:8000`` or ``name:8000`` apart."""
    match = naiveip_re.match(addrport)
    if match is None:
        raise CommandError(f"{addrport!r} is not a valid port number or address:port pair.")
    host, _, ipv6, _, port = match.groups()
    if int(port) > 65535:
        raise CommandError(f"{port} is not a valid port number: the highest one is 65535.")
    return (ipv6[1:-1] if ipv6 else host or "127.0.0.1"), int(port)


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``, an address or a name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _application() -> Any:
    """Load the application that settings name."""
    if not settings.WSGI_APPLICATION:
        raise CommandError(
            "settings.WSGI_APPLICATION is not set. Name your application there, for example\n"
            '    WSGI_APPLICATION = "mysite.wsgi.application"'
        )
    try:
        application = get_internal_wsgi_application()
    except ImproperlyConfigured as exc:
        reason = f" ({exc.__cause__})" if exc.__cause__ is not None else ""
        raise CommandError(
            f"settings.WSGI_APPLICATION is {settings.WSGI_APPLICATION!r}, which cannot be loaded: {exc}{reason}"
        ) from exc
    if not callable(application):
        raise CommandError(
            f"settings.WSGI_APPLICATION is {settings.WSGI_APPLICATION!r}, which is not callable but "
            f"{type(application).__name__}."
        )
    return application


def _with_static_files(found: Applications, *, nostatic: bool, insecure: bool) -> Applications:
    """Add the static files of installed apps, where they are wanted."""
    if not apps.is_installed("django.contrib.staticfiles") or nostatic or not (settings.DEBUG or insecure):
        return found
    from django.contrib.staticfiles import handlers

    # wsgi.py may have done so itself. What they wrap may be any application, whatever Django's stubs say.
    wrap: Any
    if found.wsgi is not None:
        wrap = handlers.StaticFilesHandler
        return found if isinstance(found.wsgi, wrap) else replace(found, wsgi=wrap(found.wsgi))
    if found.asgi is not None:
        wrap = handlers.ASGIStaticFilesHandler
        return found if isinstance(found.asgi, wrap) else replace(found, asgi=wrap(found.asgi))
    return found
