"""WebSockets of a Django project: handlers named in settings, and the session and user behind a WebSocket.

``settings.PUFF = {"websockets": {"/chat/{room}": "chat.sockets.chat"}}`` has `runpuff` serve them; see
``docs/websockets.md``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.contrib import auth
from django.core.exceptions import DisallowedHost, ImproperlyConfigured
from django.db import close_old_connections, reset_queries
from django.http import HttpRequest
from django.utils.module_loading import import_string

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser
    from django.contrib.auth.models import AnonymousUser
    from django.contrib.sessions.backends.base import SessionBase

    from puff_patch.server import WebSocket
    from puff_patch.server.apps import WebSocketHandler


def get_handlers() -> dict[str, WebSocketHandler]:
    """Return the handlers that ``settings.PUFF["websockets"]`` names by path, as `adapt` makes them.

    Raises:
        ImproperlyConfigured: one of them is not there; the message says which.
    """
    named = getattr(settings, "PUFF", {}).get("websockets", {})
    if not isinstance(named, Mapping):
        raise ImproperlyConfigured(
            'settings.PUFF["websockets"] must name a handler for each path, as a dict does.'
        )
    handlers = {}
    for path, name in named.items():
        if not isinstance(path, str) or not path.startswith("/"):
            raise ImproperlyConfigured(f"settings.PUFF[\"websockets\"]: a path begins with '/', unlike {path!r}.")
        handler = name
        if isinstance(name, str):
            try:
                handler = import_string(name.replace(":", "."))
            except ImportError as exc:
                raise ImproperlyConfigured(
                    f'settings.PUFF["websockets"][{path!r}] is {name!r}, which cannot be loaded: {exc}'
                ) from exc
        if not callable(handler):
            raise ImproperlyConfigured(
                f'settings.PUFF["websockets"][{path!r}] is {name!r}, which is not callable.'
            )
        handlers[path] = adapt(handler)
    return handlers


def adapt(handler: WebSocketHandler) -> WebSocketHandler:
    """Return a handler that is to a WebSocket what Django is to a request.

    Before it, the Host header is checked against ``ALLOWED_HOSTS``.  Whenever it waits for a message outside a
    transaction, and after it, database connections go back as they do after a request: a WebSocket that is idle
    keeps none.
    """

    @functools.wraps(handler)
    def run(websocket: WebSocket) -> object:
        try:
            make_request(websocket).get_host()
        except DisallowedHost as exc:
            # Where Django logs it for a request.
            logging.getLogger("django.security.DisallowedHost").error(str(exc))
            websocket.refuse(400)
            return None
        websocket.on_wait(_let_go)
        try:
            return handler(websocket)
        finally:
            _let_go()

    return run


def make_request(websocket: WebSocket) -> HttpRequest:
    """Return the handshake of a WebSocket as a request of Django's, for what takes one; without middleware."""
    scope = websocket.scope
    request = HttpRequest()
    request.method = "GET"
    request.path = request.path_info = websocket.path
    request.COOKIES = websocket.cookies
    host, port = scope["server"]
    request.META = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": websocket.path,
        "QUERY_STRING": websocket.query_string,
        "REMOTE_ADDR": websocket.client[0],
        "SERVER_NAME": host,
        "SERVER_PORT": port,
        "wsgi.url_scheme": "https" if scope["scheme"] == "wss" else "http",
        **{
            "HTTP_" + name.upper().replace("-", "_"): value
            for name, value in websocket.headers.items()
            if "_" not in name  # would be the same key as the name with "-"
        },
    }
    return request


def get_session(websocket: WebSocket) -> SessionBase:
    """Return the session of the cookie that came with the handshake; an empty one without it.

    What is changed in it must be saved with its ``save()``; a cookie cannot be set.
    """
    engine: Any = import_module(settings.SESSION_ENGINE)
    session: SessionBase = engine.SessionStore(websocket.cookies.get(settings.SESSION_COOKIE_NAME))
    return session


def get_user(websocket: WebSocket) -> AbstractBaseUser | AnonymousUser:
    """Return who is logged in with the session of a WebSocket; an ``AnonymousUser`` if nobody is."""
    request = make_request(websocket)
    request.session = session = get_session(websocket)
    # After a change of SECRET_KEY Django would move the session to a new key, which only a cookie could tell.
    session.cycle_key = lambda: None  # type: ignore[method-assign]
    return auth.get_user(request)


def _let_go() -> None:
    reset_queries()
    close_old_connections()
