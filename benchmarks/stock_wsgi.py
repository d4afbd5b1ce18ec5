"""The sample project's WSGI application for `gunicorn -k gevent` with psycogreen and nothing of puff_patch."""

import os

from psycogreen.gevent import patch_psycopg

patch_psycopg()

from django.core.wsgi import get_wsgi_application  # noqa: E402

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "stock_settings")

application = get_wsgi_application()
