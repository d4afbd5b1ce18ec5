"""``manage.py runpuff``: serve the project's WSGI application on puff_patch's server."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from typing import Any

import gevent
from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.management.commands.runserver import naiveip_re
from django.core.servers.basehttp import get_internal_wsgi_application
from django.db import DEFAULT_DB_ALIAS, Error, connections

import puff_patch
from puff_patch import config

_DATABASE_SECONDS = 10.0

_NOT_PATCHED = """\
puff_patch.patch_all() was not called, so one request would block all others.
Put these two lines first in manage.py (and in wsgi.py), before every other import:

    import puff_patch
    puff_patch.patch_all()"""


class Command(BaseCommand):
    """Serve the WSGI application of the project on greenlets, in one process or more, until SIGTERM or Ctrl-C."""

    help = "Serves the project's WSGI application on greenlets behind a Rust HTTP front."

    # Run in handle(), when the embedded services are up and the server has said what it does.
    requires_system_checks = []

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the options; ``manage.py runpuff --help`` shows them."""
        parser.add_argument(
            "addrport",
            nargs="?",
            default="8000",
            help="port, or address:port; port 0 takes a free one. Default: 127.0.0.1:8000.",
        )
        parser.add_argument(
            "--workers",
            type=_workers,
            default=1,
            metavar="N",
            help='number of processes that serve; "auto" is one for each usable CPU. Default: 1.',
        )
        parser.add_argument(
            "--reload",
            action="store_true",
            help="serve anew whenever a file of the program changes; for development.",
        )
        parser.add_argument(
            "--reload-dir",
            action="append",
            default=[],
            metavar="DIR",
            help="a folder to watch for --reload instead of the program's; may be given several times.",
        )
        parser.add_argument(
            "--max-requests",
            type=int,
            default=0,
            metavar="N",
            help="replace a worker after so many requests, against leaks of memory. Default: never.",
        )
        parser.add_argument(
            "--max-requests-jitter",
            type=int,
            default=0,
            metavar="N",
            help="up to how many requests more, at random, so that workers are not all replaced at one time.",
        )
        parser.add_argument(
            "--reuse-port",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="let other servers listen on the same port at the same time. Default: PUFF_REUSE_PORT, or not.",
        )
        parser.add_argument(
            "--graceful-timeout",
            type=float,
            default=30.0,
            metavar="SECONDS",
            help="how long running requests may take after SIGTERM or Ctrl-C. Default: 30.",
        )
        parser.add_argument(
            "--max-greenlets",
            type=int,
            default=1000,
            metavar="N",
            help="how many requests run at a time; further ones wait in order. Default: 1000.",
        )
        parser.add_argument(
            "--access-log",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="log one line a request. Default: if DEBUG is on.",
        )
        parser.add_argument(
            "--nostatic", action="store_true", help="do not serve the static files of installed apps."
        )
        parser.add_argument("--insecure", action="store_true", help="serve static files even if DEBUG is off.")
        parser.add_argument(
            "--embedded",
            action="store_true",
            help="start a PostgreSQL and a Redis from wheels first, with their data in PUFF_DATA_DIR.",
        )
        parser.add_argument("--skip-checks", action="store_true", help="skip the system checks.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Check the project, then serve it."""
        from django_backend.websocket import get_handlers
        from puff_patch.server import Applications, ServerError, ServerOptions, is_worker, run

        host, port = _address(options["addrport"])
        if not puff_patch.is_patched("sockets"):
            raise CommandError(_NOT_PATCHED)
        if not settings.DEBUG and not settings.ALLOWED_HOSTS:
            raise CommandError("You must set settings.ALLOWED_HOSTS if DEBUG is False.")
        access_log, reuse_port = options["access_log"], options["reuse_port"]
        try:
            server_options = ServerOptions(
                host=host,
                port=port,
                graceful_timeout=options["graceful_timeout"],
                max_greenlets=options["max_greenlets"],
                access_log=settings.DEBUG if access_log is None else access_log,
                reuse_port=config.current().reuse_port if reuse_port is None else reuse_port,
                workers=options["workers"],
                max_requests=options["max_requests"],
                max_requests_jitter=options["max_requests_jitter"],
                reload=options["reload"],
                reload_dirs=tuple(options["reload_dir"]),
                on_stop=(puff_patch.close_pools,),
            )
        except ValueError as exc:
            raise CommandError(str(exc)) from exc
        if options["embedded"]:
            self._start_embedded()
        if not is_worker():
            self._look_before(host, skip_checks=options["skip_checks"])
            if server_options.supervised:
                puff_patch.close_pools()  # this process needs them no more

        def load() -> Applications:
            application = _application(nostatic=options["nostatic"], insecure=options["insecure"])
            try:
                return Applications(wsgi=application, websockets=get_handlers())
            except ImproperlyConfigured as exc:
                raise CommandError(str(exc)) from exc

        try:
            code = run(load, server_options)
        except ServerError as exc:
            raise CommandError(str(exc)) from exc
        if code:
            sys.exit(code)

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


def _workers(text: str) -> int:
    """Take a number of workers, or "auto", which is 0 to the server."""
    if text == "auto":
        return 0
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'{text!r} is neither a number of workers from 1 on nor "auto".')
    return int(text)


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``, an address or a name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _application(*, nostatic: bool, insecure: bool) -> Any:
    """Load the application that settings name, with the static files of installed apps where they are wanted."""
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
    if apps.is_installed("django.contrib.staticfiles") and not nostatic and (settings.DEBUG or insecure):
        from django.contrib.staticfiles.handlers import StaticFilesHandler

        return StaticFilesHandler(application)
    return application
