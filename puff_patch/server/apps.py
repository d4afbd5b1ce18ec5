"""What a server serves: applications of several interfaces side by side."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from puff_patch.server.websocket import WebSocket

ASGIApplication = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]
WebSocketHandler = Callable[["WebSocket"], object]


@dataclass(frozen=True)
class Applications:
    """The applications of one server.

    A WebSocket goes to the handler of its path in ``websockets``, else to the ASGI application.  An HTTP request
    goes to ASGI if there is no WSGI application or its path is below one of ``asgi_paths``, else to WSGI.

    Args:
        wsgi: a WSGI application; its requests run on greenlets.
        asgi: an ASGI application; it runs on the asyncio thread.
        asgi_paths: prefixes of paths, such as ``/api``, that are the ASGI application's where there are both.
        websockets: greenlet handlers of WebSockets by path, each called with a `puff_patch.server.WebSocket`;
            ``{name}`` in a path stands for any one segment of it.
    """

    wsgi: WSGIApplication | None = None
    asgi: ASGIApplication | None = None
    asgi_paths: tuple[str, ...] = ()
    websockets: Mapping[str, WebSocketHandler] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.wsgi is None and self.asgi is None and not self.websockets:
            raise ValueError("there is nothing to serve: give a WSGI or an ASGI application or WebSocket handlers")
        if self.wsgi is not None and self.asgi is not None and not self.asgi_paths:
            raise ValueError(
                "with both a WSGI and an ASGI application, asgi_paths must say which paths are ASGI's"
            )
        for path in (*self.asgi_paths, *self.websockets):
            if not path.startswith("/"):
                raise ValueError(f"a path begins with '/', unlike {path!r}")
