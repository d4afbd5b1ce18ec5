"""The sample project as it would be without puff_patch: Django's own backends, one connection a request."""

from mysite.settings import *  # noqa: F403
from mysite.settings import INSTALLED_APPS
from psycopg2.extensions import parse_dsn

from puff_patch.config import current

_SERVER = parse_dsn(current().postgres_url())

INSTALLED_APPS = [app for app in INSTALLED_APPS if app != "django_backend"]

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _SERVER["dbname"],
        "USER": _SERVER.get("user", ""),
        "PASSWORD": _SERVER.get("password", ""),
        "HOST": _SERVER.get("host", ""),
        "PORT": _SERVER.get("port", ""),
    }
}

CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": current().redis_url(),
    }
}
