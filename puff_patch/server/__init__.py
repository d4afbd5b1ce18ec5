"""The HTTP server: Granian's Rust front handing each request to a WSGI application on warm greenlets."""

from puff_patch.server.apps import Applications
from puff_patch.server.exchange import ClientDisconnected
from puff_patch.server.options import ServerError, ServerOptions
from puff_patch.server.serve import serve, serving
from puff_patch.server.supervisor import is_worker, run
from puff_patch.server.websocket import WebSocket, WebSocketClosed, WebSocketTimeout

__all__ = [
    "Applications",
    "ClientDisconnected",
    "ServerError",
    "ServerOptions",
    "WebSocket",
    "WebSocketClosed",
    "WebSocketTimeout",
    "is_worker",
    "run",
    "serve",
    "serving",
]
