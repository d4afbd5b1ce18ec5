"""Asynchronous Django on greenlets: async views, the async ORM, sync_to_async and the test client."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from support.process import run_python

PATCHED = """
import puff_patch
puff_patch.patch_all()
import asyncio, gevent, types
from django_process import *
ENGINE = "django_backend.postgresql"
urls = types.ModuleType("urls")
urls.urlpatterns = []
sys.modules["urls"] = urls
setup(
    {"default": database(ENGINE, TEST={"NAME": TAG}, OPTIONS={"application_name": TAG})},
    ROOT_URLCONF="urls",
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="not one",
    INSTALLED_APPS=["app"],
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
)
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connection, transaction
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from app.models import Item
"""

MODELS = """
from django.db import models
class Item(models.Model):
    name = models.CharField(max_length=40)
    class Meta:
        app_label = "app"
"""


def run(code: str, services: Any, tmp_path: Path, **env: str) -> Any:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").touch()
    (tmp_path / "app" / "models.py").write_text(MODELS)
    head = f"TAG = 'puff-test-{uuid.uuid4().hex[:12]}'\n"
    paths = f"{Path(__file__).parent}:{tmp_path}"
    return run_python(head + PATCHED + code, env={**services.env(), "PYTHONPATH": paths, **env})


def test_async_views_and_sync_orm_side_by_side(services, tmp_path: Path) -> None:
    run(
        """
from django.core.handlers.wsgi import WSGIHandler
from django.test import RequestFactory
from django.test.utils import setup_databases, teardown_databases

def in_transaction(name):
    with transaction.atomic():
        item = Item.objects.create(name=name)
        time.sleep(0.002)
        assert Item.objects.filter(name=name).count() == 1
        try:
            with transaction.atomic():
                Item.objects.create(name=name)
                raise LookupError
        except LookupError:
            pass
    return item.pk

async def view(request, n):
    await Item.objects.acreate(name=f"a{n}")
    await asyncio.sleep(0.002)
    pk = await sync_to_async(in_transaction)(f"b{n}")
    assert (await Item.objects.aget(pk=pk)).name == f"b{n}"
    names = [item.name async for item in Item.objects.filter(name__in=[f"a{n}", f"b{n}"]).order_by("name")]
    return JsonResponse({"names": names})

def sync_view(request, n):
    Item.objects.create(name=f"s{n}")
    return JsonResponse({"names": [item.name for item in Item.objects.filter(name=f"s{n}")]})

async def failing(request, n):
    raise LookupError("on purpose")

async def stream(request, n):
    async def parts():
        for part in (b"one", b"two"):
            await asyncio.sleep(0.001)
            yield part
    return StreamingHttpResponse(parts())

class Middleware:
    "a synchronous one, so that Django adapts on every way in"
    def __init__(self, get_response):
        self.get_response = get_response
    def __call__(self, request):
        response = self.get_response(request)
        response["X-Greenlet"] = str(gevent.getcurrent() is request.greenlet)
        return response
import types
module = types.ModuleType("mine")
module.Middleware = Middleware
sys.modules["mine"] = module
from django.conf import settings
settings.MIDDLEWARE = [*settings.MIDDLEWARE, "mine.Middleware"]
urls.urlpatterns = [
    path("async/<int:n>", view), path("sync/<int:n>", sync_view), path("fail/<int:n>", failing),
    path("stream/<int:n>", stream),
]

old = setup_databases(verbosity=0, interactive=False)
handler = WSGIHandler()
factory = RequestFactory()
server = Server(TAG)
watcher = gevent.spawn(server.watch)

def fetch(url):
    request = factory.get(url)
    request.greenlet = gevent.getcurrent()
    response = handler.get_response(request)
    assert response["X-Greenlet"] == "True"
    response.close()  # the end of the request
    return response
def expect(n):
    import json
    response = fetch(f"/async/{n}")
    assert response.status_code == 200 and json.loads(response.content) == {"names": [f"a{n}", f"b{n}"]}, response
    response = fetch(f"/sync/{n}")
    assert json.loads(response.content) == {"names": [f"s{n}"]}, response.content
import logging
logging.disable()
with gevent.Timeout(50):
    gevent.joinall([gevent.spawn(expect, n) for n in range(150)], raise_error=True)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Warning)  # Django's own: an async iterator is consumed at once
        assert b"".join(fetch("/stream/1")) == b"onetwo"
    settings.DEBUG_PROPAGATE_EXCEPTIONS = True
    try:
        fetch("/fail/1")
    except LookupError as error:
        assert str(error) == "on purpose"
    else:
        raise AssertionError
watcher.kill()
assert 1 <= server.most <= 5, server.most
assert Item.objects.count() == 450
connection.close()
teardown_databases(old, verbosity=0)
""",
        services,
        tmp_path,
        PUFF_POSTGRES_POOL_MAX_SIZE="4",
        PUFF_POSTGRES_POOL_TIMEOUT="40",
    )


def test_async_tests_and_client(services, tmp_path: Path) -> None:
    run(
        """
import unittest
from django.test import AsyncClient, Client, TestCase, TransactionTestCase
from django.test.utils import setup_databases, teardown_databases

async def view(request):
    return HttpResponse(str(await Item.objects.acount()))
def sync_view(request):
    return HttpResponse(str(Item.objects.count()))
urls.urlpatterns = [path("async", view), path("sync", sync_view)]

class Rolled(TestCase):
    @classmethod
    def setUpTestData(cls):
        Item.objects.create(name="all")
    async def test_one(self):
        await Item.objects.acreate(name="one")
        for client, url in ((self.async_client, "/async"), (self.async_client, "/sync")):
            response = await client.get(url)
            assert response.content == b"2", response.content
        assert [item.name async for item in Item.objects.order_by("pk")] == ["all", "one"]
    async def test_two(self):
        # what the other did was rolled back
        assert await Item.objects.acount() == 1
        await asyncio.gather(*[sync_to_async(Item.objects.create)(name=f"n{n}") for n in range(5)])
        assert await Item.objects.acount() == 6
    def test_sync(self):
        assert self.client.get("/async").content == b"1"
        @async_to_sync
        async def more():
            await Item.objects.acreate(name="more")
        more()
        assert self.client.get("/sync").content == b"2"

class Committed(TransactionTestCase):
    async def test_three(self):
        await Item.objects.acreate(name="three")
        assert (await self.async_client.get("/async")).content == b"1"

old = setup_databases(verbosity=0, interactive=False)
suite = unittest.TestSuite(
    unittest.defaultTestLoader.loadTestsFromTestCase(case) for case in (Rolled, Committed)
)
result = unittest.TextTestRunner(stream=open(os.devnull, "w")).run(suite)
assert result.testsRun == 4 and result.wasSuccessful(), result.errors + result.failures
connection.close()

# and what asynchronous code must not do is still refused, in the greenlet that runs the loop only
from django.core.exceptions import SynchronousOnlyOperation
async def wrong():
    Item.objects.count()
try:
    asyncio.run(wrong())
except SynchronousOnlyOperation:
    pass
else:
    raise AssertionError
sync = []
async def block():
    time.sleep(0.05)
def count():
    sync.append(Item.objects.count())
    connection.close()
other = gevent.spawn(count)
asyncio.run(block())
other.get(timeout=5)
assert sync == [0]
connection.close()
teardown_databases(old, verbosity=0)
""",
        services,
        tmp_path,
    )
