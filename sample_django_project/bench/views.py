"""Small views that each do one thing, plain Django throughout."""

import hashlib
import time
from collections.abc import Iterator

from django.core.cache import cache
from django.core.exceptions import BadRequest
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_http_methods, require_safe

from polls.models import Question

CHUNK = 64 * 1024
CHUNKS_PER_MB = 1024 * 1024 // CHUNK
MAX_SLEEP_MS = 10_000
MAX_STREAM_MB = 2_048

GREETING_KEY = "bench:greeting"
GREETING = "Hello from the cache"


def _number(request: HttpRequest, name: str, default: int, highest: int) -> int:
    """The whole number ``name`` of the query string, from 0 to ``highest``."""
    value = request.GET.get(name, str(default))
    if not (value.isascii() and value.isdigit() and len(value) < 20 and int(value) <= highest):
        raise BadRequest(f"{name} takes a whole number from 0 to {highest}")
    return int(value)


def _question(request: HttpRequest) -> Question:
    """One question by primary key, ``?pk=``: exactly one query."""
    return get_object_or_404(Question, pk=_number(request, "pk", 1, 2**63 - 1))


def _greeting() -> str:
    """One value from the cache: exactly one read, except for the first time."""
    greeting = cache.get(GREETING_KEY)
    if greeting is None:
        greeting = GREETING
        cache.set(GREETING_KEY, greeting, timeout=3600)
    return greeting


def _plain(text: str) -> HttpResponse:
    return HttpResponse(text, content_type="text/plain; charset=utf-8")


@require_safe
def hello(request):
    """Neither database nor cache."""
    return _plain("Hello, world!\n")


@require_safe
def orm(request):
    """One row by primary key."""
    return _plain(f"{_question(request).text}\n")


@require_safe
def cached(request):
    """One read from the cache."""
    return _plain(f"{_greeting()}\n")


@require_safe
def mixed(request):
    """One row by primary key and one read from the cache: what a typical page costs."""
    question = _question(request)
    return JsonResponse({"id": question.pk, "question": question.text, "cached": _greeting()})


@require_safe
def sleep(request):
    """Wait ``?ms=`` milliseconds, as a page does that waits for somebody else's service."""
    milliseconds = _number(request, "ms", 100, MAX_SLEEP_MS)
    time.sleep(milliseconds / 1000)
    return _plain(f"Slept for {milliseconds} ms\n")


@require_safe
def stream(request):
    """``?mb=`` MiB of data, made as it is sent."""
    megabytes = _number(request, "mb", 1, MAX_STREAM_MB)

    def chunks() -> Iterator[bytes]:
        block = bytes(range(256)) * (CHUNK // 256)
        for _ in range(megabytes * CHUNKS_PER_MB):
            yield block

    return StreamingHttpResponse(
        chunks(),
        content_type="application/octet-stream",
        headers={"Content-Length": megabytes * CHUNKS_PER_MB * CHUNK},
    )


@csrf_exempt
@require_http_methods(["PUT", "POST"])
def upload(request, name=""):
    """Read the body piece by piece; answer its length and SHA-256."""
    digest = hashlib.sha256()
    length = 0
    while chunk := request.read(CHUNK):
        digest.update(chunk)
        length += len(chunk)
    return JsonResponse({"bytes": length, "sha256": digest.hexdigest()})
