"""``import puff``: programs written for Puff, unmodified."""

from __future__ import annotations

from pathlib import Path

from support.process import run_python


def test_the_names_are_this_project_s() -> None:
    run_python("""
        import puff_patch
        try:
            import puff
            raise AssertionError(puff)
        except ModuleNotFoundError:
            pass
        puff_patch.patch_all()
        assert not {name for name in sys.modules if name.split(".")[0] == "puff"}
        assert "puff_patch.redis" not in sys.modules
        import puff
        assert "gevent.greenlet" in sys.modules and "redis" not in sys.modules and "httpx" not in sys.modules
        for name in puff_patch.__all__:
            assert getattr(puff, name) is getattr(puff_patch, name), name
        assert {"blocking", "spawn_blocking", "read_file_bytes", "is_greenlet"} <= set(dir(puff))
        from puff import *
        assert spawn is puff_patch.spawn
        import puff.json, puff.redis as puff_redis
        from puff import postgres
        from puff.http import global_http_client, named_client
        import puff_patch.http, puff_patch.postgres, puff_patch.redis
        assert puff.json is puff_patch.json and puff_redis is puff_patch.redis and postgres is puff_patch.postgres
        assert global_http_client is puff_patch.http.global_http_client
        assert puff_patch.json.__spec__.name == "puff_patch.json" == puff.json.__name__
        import importlib
        assert importlib.import_module("puff.json") is puff.json

        # what is still to come, and what there never was
        for name, feature in (("graphql", "GraphQL"), ("pubsub", "pubsub"), ("task_queue", "task queue")):
            try:
                importlib.import_module(f"puff.{name}")
            except NotImplementedError as error:
                assert f"puff.{name}: " in str(error) and feature in str(error)
            else:
                assert importlib.util.find_spec(f"puff_patch.{'tasks' if name == 'task_queue' else name}")
        for name in ("puff.nothing", "puff.json.nothing", "puff.contrib.nothing", "puff.contrib.django.nothing"):
            try:
                importlib.import_module(name)
                raise AssertionError(name)
            except ModuleNotFoundError as error:
                assert name in str(error)
        try:
            from puff import nothing
        except ImportError:
            pass

        puff_patch.unpatch_all()
        assert not {name for name in sys.modules if name.split(".")[0] == "puff"}
        try:
            import puff.json
            raise AssertionError
        except ModuleNotFoundError:
            pass
        puff_patch.patch_all()
        import puff.json
        assert puff.json is puff_patch.json
    """)


def test_an_installed_puff_is_the_one(tmp_path: Path) -> None:
    installed = tmp_path / "site" / "puff"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("real = True\n")
    (installed / "json.py").write_text("real = True\n")
    run_python(
        """
        import puff_patch
        puff_patch.patch_all()
        import puff, puff.json
        assert puff.real and puff.json.real
        try:
            import puff.redis
            raise AssertionError
        except ModuleNotFoundError:
            pass
        puff_patch.unpatch_all()
        assert sys.modules["puff"] is puff and sys.modules["puff.json"] is puff.json
        """,
        env={"PYTHONPATH": str(tmp_path / "site")},
    )
    # A folder that happens to have the name is none.
    (tmp_path / "folder" / "puff" / "json").mkdir(parents=True)
    run_python(
        """
        import puff_patch
        puff_patch.patch_all()
        import puff.json
        assert puff.json is puff_patch.json
        """,
        env={"PYTHONPATH": str(tmp_path / "folder")},
    )


def test_the_seed_s_programs(tmp_path: Path, services) -> None:
    """Their code as it stands there: the command of a program, and the endpoint with a native extension."""
    (tmp_path / "my_file.zip").write_bytes(b"zip" * 1000)
    (tmp_path / "my_puff_proj_py.py").write_text("""\
import puff

# Standard python functions run on Puff greenlets. You can only use special Puff async functions without pausing other greenlets.
def hello_world():
    fn = "my_file.zip"
    result_bytes = puff.read_file_bytes(fn) # Puff async function that runs in Tokio.
    result_py_bytes = do_some_blocking_work(fn) # Python blocking that spawns a thread to prevent pausing the greenlet thread.
    print(f"Hello from python!! Zip is {len(result_bytes)} bytes long from rust and {len(result_py_bytes)} bytes from Python.")


# 100% of python packages are compatible by wrapping them in blocking decorator.
@puff.blocking    
def do_some_blocking_work(fn):
    with open(fn, "rb") as f:
        return f.read()
""")  # noqa: E501, W291
    (tmp_path / "fast_api_example.py").write_text("""\
from fastapi import FastAPI
from puff import global_state, wrap_async


state = global_state

app = FastAPI()


@app.get("/fast-api")
async def read_root():
    result = await wrap_async(lambda r: state.hello_from_rust_async(r, "hello from asyncio"))
    return {"Hello": "World", "from": "Fast API", "rust_value": result}
""")
    run_python(
        """
        import puff_patch
        puff_patch.patch_all()
        import contextlib, io, types
        from gevent.monkey import get_original
        from my_puff_proj_py import hello_world
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            hello_world()
        assert "Zip is 3000 bytes long from rust and 3000 bytes from Python." in printed.getvalue()

        # Enough of FastAPI for the endpoint, which is what this is about.
        class FastAPI:
            def get(self, path):
                return lambda function: function
        sys.modules["fastapi"] = types.SimpleNamespace(FastAPI=FastAPI)
        class Extension:
            def hello_from_rust_async(self, ret, text):
                get_original("_thread", "start_new_thread")(ret, (text.upper(), None))
        from fast_api_example import read_root
        puff_patch.set_global_state(Extension())
        from puff_patch.runtime.aio import run_coroutine
        assert run_coroutine(read_root())["rust_value"] == "HELLO FROM ASYNCIO"
        """,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )


def test_django_settings_written_for_puff(tmp_path: Path, services) -> None:
    (tmp_path / "puff_settings.py").write_text("""\
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth"]
SECRET_KEY = "x"
USE_TZ = True
DATABASES = {
    'default': {
        'ENGINE': 'puff.contrib.django.postgres',
        'NAME': 'global',
    },
    'other': {
        'ENGINE': 'puff.contrib.django.postgres',
        'NAME': 'readonly',
    },
    'named': {
        'ENGINE': 'puff.contrib.django.postgres',
        'NAME': 'nowhere',
        'HOST': 'localhost',
        'PORT': '1',
    },
}
CACHES = {
    'default': {
        'BACKEND': 'puff.contrib.django.redis.PuffRedisCache',
        'LOCATION': 'redis://global',
    },
    'other': {
        'BACKEND': 'puff.contrib.django.redis.PuffRedisCache',
        'LOCATION': 'redis://readonly',
    },
}
""")
    run_python(
        """
        import puff_patch
        puff_patch.patch_all()
        import django
        django.setup()
        from django.contrib.auth.models import User
        from django.core.cache import caches
        from django.db import connections
        from puff.contrib.django import query_and_params
        from puff.contrib.django.static import serve
        import puff.contrib.django.postgres.base, django_backend.puff.postgres.base
        assert puff.contrib.django.postgres.base is django_backend.puff.postgres.base
        def application(alias):
            with connections[alias].cursor() as cursor:
                cursor.execute("SHOW application_name")
                return cursor.fetchone()[0]
        assert application("other") == "readonly" != application("default")
        settings = connections["named"].settings_dict
        assert (settings["NAME"], settings["HOST"]) == ("nowhere", "localhost")
        caches["default"].set("alias", 1)
        assert caches["default"].get("alias") == 1 and caches["other"].get("alias") is None
        assert caches["other"]._service == "readonly"
        caches["default"].delete("alias")

        sql, params = query_and_params(User.objects.filter(id__in=[3, 4], username__contains="a%b").only("id"))
        assert "%s" not in sql and "IN ($1, $2)" in sql and "$3" in sql, sql
        assert params == [3, 4, "%a\\\\%b%"], params
        from puff.postgres import global_postgres
        puff_patch.close_pools()
        """,
        cwd=tmp_path,
        env={
            **services.env(),
            "PYTHONPATH": str(tmp_path),
            "DJANGO_SETTINGS_MODULE": "puff_settings",
            "PUFF_READONLY_POSTGRES_URL": f"{services.postgres}{'&' if '?' in services.postgres else '?'}"
            "application_name=readonly",
            "PUFF_READONLY_REDIS_URL": services.redis.split("?")[0]
            + ("?db=7" if services.redis.startswith("unix") else "/7"),
        },
    )
