"""Two databases, the second reached through a router; every request is a transaction."""

import os

from django_process import REDIS_URL, database

ENGINE, TAG = os.environ["ENGINE"], os.environ["TAG"]
os.environ["PUFF_ARCHIVE_POSTGRES_URL"] = os.environ["PUFF_DEFAULT_POSTGRES_URL"]
SECRET_KEY = "only for this test"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["shop"]
ROOT_URLCONF = "shop.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
# The live server of tests wants them.
STATIC_URL, MEDIA_URL = "/static/", "/media/"
DATABASES = {
    "default": database(ENGINE, ATOMIC_REQUESTS=True, CONN_MAX_AGE=60, TEST={"NAME": TAG}),
    "archive": database(ENGINE, CONN_MAX_AGE=None, TEST={"NAME": f"{TAG}_archive"}),
}
DATABASE_ROUTERS = ["shop.routers.Router"]
CACHES = {
    "default": {
        "BACKEND": "django_backend.cache.RedisCache",
        "LOCATION": REDIS_URL,
        "KEY_PREFIX": TAG,
        "TIMEOUT": 60,
    }
}
