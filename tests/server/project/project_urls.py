"""The test project's pages."""

import hashlib

from django.db import connection
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt


def hello(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"hello {request.GET.get('name', 'you')}", content_type="text/plain")


@csrf_exempt
def upload(request: HttpRequest) -> HttpResponse:
    file = request.FILES["file"]
    digest = hashlib.sha256()
    for chunk in file.chunks():
        digest.update(chunk)
    return JsonResponse({"size": file.size, "sha256": digest.hexdigest(), "field": request.POST["field"]})


def stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(f"line {number}\n" for number in range(100))


def query(request: HttpRequest) -> HttpResponse:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 41 + 1")
        return HttpResponse(str(cursor.fetchone()[0]))


urlpatterns = [path(view.__name__, view) for view in (hello, upload, stream, query)]
