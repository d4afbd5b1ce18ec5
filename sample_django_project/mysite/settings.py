"""Settings of the sample project.

What a deployment changes comes from the environment:

=============================  ===============================================================
``DJANGO_DEBUG``               1 (default) or 0
``DJANGO_SECRET_KEY``          required when DEBUG is off
``DJANGO_ALLOWED_HOSTS``       comma-separated; needed when DEBUG is off
``DJANGO_HTTPS``               1 behind a proxy that terminates TLS: secure cookies, HSTS
``SAMPLE_BENCH``               1 or 0: the URLs below /bench/ and /hello/; default as DEBUG
=============================  ===============================================================

PostgreSQL and Redis are found by puff_patch: ``PUFF_DEFAULT_POSTGRES_URL`` and ``PUFF_DEFAULT_REDIS_URL``, or
``PUFF_EMBEDDED=1`` for servers of its own.
"""

import os
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent.parent


def env_flag(name: str, default: bool) -> bool:
    """The environment variable ``name`` as a boolean."""
    value = os.environ.get(name, "").strip().lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"0", "false", "no", "off"}:
        return False
    if value:
        raise ImproperlyConfigured(f"{name} takes 1 or 0, got {value!r}")
    return default


def env_list(name: str) -> list[str]:
    """The environment variable ``name``, split at commas."""
    return [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()]


DEBUG = env_flag("DJANGO_DEBUG", True)

_DEVELOPMENT_KEY = "django-insecure-for-development-only-nothing-secret-is-kept-with-this-key"
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or _DEVELOPMENT_KEY
if SECRET_KEY == _DEVELOPMENT_KEY and not DEBUG:
    raise ImproperlyConfigured("Set DJANGO_SECRET_KEY: the development key is not used when DEBUG is off.")

ALLOWED_HOSTS = env_list("DJANGO_ALLOWED_HOSTS")

# The URLs of bench/urls.py, which let anybody make the server work.
SAMPLE_BENCH = env_flag("SAMPLE_BENCH", DEBUG)


INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "django_backend",
    "polls",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.http.ConditionalGetMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "mysite.urls"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "polls.context_processors.served_by",
            ],
        },
    },
]

WSGI_APPLICATION = "mysite.wsgi.application"


DATABASES = {"default": {"ENGINE": "django_backend.postgresql"}}

CACHES = {"default": {"BACKEND": "django_backend.cache.RedisCache"}}

DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

SESSION_ENGINE = "django.contrib.sessions.backends.cached_db"


AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
    {"NAME": "django.contrib.auth.password_validation.NumericPasswordValidator"},
]

if env_flag("DJANGO_HTTPS", False):
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_SSL_REDIRECT = True
    SECURE_HSTS_SECONDS = 3600
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True
    # Whether all subdomains, and the lists in browsers, promise HTTPS is for the owner of the domain to say.
    SILENCED_SYSTEM_CHECKS = ["security.W005", "security.W021"]


# As Django's own, but errors are written to the console also when DEBUG is off, instead of nowhere.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {"django": {"handlers": ["console"], "level": "INFO" if DEBUG else "ERROR", "propagate": False}},
}


LANGUAGE_CODE = "en-gb"
TIME_ZONE = "UTC"
USE_I18N = True
USE_TZ = True

STATIC_URL = "static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
STATICFILES_DIRS = [BASE_DIR / "static"]
