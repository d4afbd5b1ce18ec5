"""The test project's WebSockets."""

from django.db import transaction

from django_backend.websocket import get_session, get_user
from puff_patch.server import WebSocket


def who(ws: WebSocket) -> None:
    """Say who is logged in; then count in the session, in a transaction for each message."""
    ws.send(get_user(ws).get_username())
    for message in ws:
        with transaction.atomic():
            session = get_session(ws)
            session["count"] = session.get("count", 0) + 1
            session.save()
        ws.send(f"{message} {session['count']}")


number = 7
