"""Django's ASGI application of sync and async views; the tests give the addresses of the services."""

# ruff: noqa: E402 - everything else is imported patched
from __future__ import annotations

import puff_patch

puff_patch.patch_all()

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import django
from asgiref.sync import async_to_sync, sync_to_async
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

from puff_patch.runtime import aio
from puff_patch.server import Applications, ServerOptions, serve

TAG = sys.argv[1]
left: list[str] = []


def plain_middleware(get_response: Any) -> Any:
    """Of the kind that Django has to run in a thread."""

    def middleware(request: HttpRequest) -> HttpResponse:
        response: HttpResponse = get_response(request)
        response["X-Plain"] = "on_loop" if aio.in_thread() else "greenlet"
        return response

    return middleware


def ask(sql: str, *args: object) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql, args)
        return cursor.fetchone()[0]


def sync_view(request: HttpRequest) -> JsonResponse:
    time.sleep(0.05)
    with transaction.atomic():
        first = ask("SELECT pg_backend_pid() FROM pg_sleep(0.05)")
        return JsonResponse({"same": first == ask("SELECT pg_backend_pid()"), "on_loop": aio.in_thread()})


async def async_view(request: HttpRequest) -> JsonResponse:
    await asyncio.sleep(0.05)
    return JsonResponse(
        {"one": await sync_to_async(ask)("SELECT 1 FROM pg_sleep(0.05)"), "on_loop": aio.in_thread()}
    )


def chained(request: HttpRequest) -> JsonResponse:
    async def inner() -> Any:
        return await sync_to_async(ask)("SELECT pg_backend_pid()")

    with transaction.atomic():
        return JsonResponse({"same": async_to_sync(inner)() == ask("SELECT pg_backend_pid()")})


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[str]:
        try:
            for number in range(int(request.GET["n"])):
                yield f"{number}\n"
                await asyncio.sleep(0.005)
        finally:
            left.append("stream")

    return StreamingHttpResponse(parts(), content_type="text/plain")


async def long(request: HttpRequest) -> HttpResponse:
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        left.append("long")
        raise
    return HttpResponse()


def upload(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"size": len(request.body)})


def show(request: HttpRequest) -> JsonResponse:
    sessions = ask("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", TAG)
    return JsonResponse(
        {"sessions": sessions, "left": left, "path": request.path, "client": request.META["REMOTE_ADDR"]}
    )


urlpatterns = [
    path("sync", sync_view),
    path("async", async_view),
    path("chained", chained),
    path("stream", stream),
    path("long", long),
    path("upload", upload),
    path("show", show),
]

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    settings.configure(
        ROOT_URLCONF="__main__",
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="not one",
        DATA_UPLOAD_MAX_MEMORY_SIZE=None,
        MIDDLEWARE=["django.middleware.common.CommonMiddleware", "__main__.plain_middleware"],
        DATABASES={
            "default": {
                "ENGINE": "django_backend.postgresql",
                "OPTIONS": {"application_name": TAG, "pool": {"max_size": 5}},
            }
        },
    )
    django.setup()
    sys.exit(
        serve(Applications(asgi=get_asgi_application()), ServerOptions(port=0, on_stop=(puff_patch.close_pools,)))
    )
