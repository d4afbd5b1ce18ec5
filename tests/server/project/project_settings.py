"""Settings of the test project: no database but SQLite, unless the environment says otherwise."""

import json
import os

SECRET_KEY = "not a secret"
DEBUG = "PROJECT_DEBUG" in os.environ
ALLOWED_HOSTS = [] if "PROJECT_NO_HOSTS" in os.environ else ["*"]
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "django_backend",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
ROOT_URLCONF = "project_urls"
WSGI_APPLICATION = os.environ.get("PROJECT_APPLICATION", "project_wsgi.application") or None
STATIC_URL = "/static/"
DATABASES = {
    "default": json.loads(
        os.environ.get("PROJECT_DATABASE", '{"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}')
    )
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
PUFF = json.loads(os.environ.get("PROJECT_PUFF", "{}"))
