"""The smallest Django project: one view, no middleware.  What is left of a request is the server and Django.

gunicorn --worker-class gevent bare:application      or      python benchmarks/bare.py PORT [WORKERS]
"""

import puff_patch

puff_patch.patch_all()

import sys  # noqa: E402

from django.conf import settings  # noqa: E402
from django.core.wsgi import get_wsgi_application  # noqa: E402
from django.http import HttpResponse  # noqa: E402
from django.urls import path  # noqa: E402

settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["127.0.0.1"],
    SECRET_KEY="only-for-this-benchmark",
    MIDDLEWARE=[],
)


def hello(request):
    """A constant."""
    return HttpResponse(b"Hello, world!\n", content_type="text/plain")


urlpatterns = [path("bare/hello/", hello)]

application = get_wsgi_application()

if __name__ == "__main__":
    from puff_patch.server import ServerOptions, serve

    if len(sys.argv) > 2:
        from puff_patch.server.supervisor import run

        sys.exit(run(lambda: application, ServerOptions(port=int(sys.argv[1]), workers=int(sys.argv[2]))))
    sys.exit(serve(application, ServerOptions(port=int(sys.argv[1]))))
