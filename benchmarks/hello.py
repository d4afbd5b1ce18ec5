"""The smallest WSGI application: what is left of a request is the server.

gunicorn --worker-class gevent hello:application      or      python benchmarks/hello.py SERVER PORT
"""

from __future__ import annotations

import sys


def application(environ, start_response):
    """A constant."""
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "14")])
    return [b"Hello, world!\n"]


if __name__ == "__main__":
    server, port = sys.argv[1], int(sys.argv[2])
    if server == "pywsgi":
        from gevent import monkey

        monkey.patch_all()

        from gevent.pywsgi import WSGIServer

        WSGIServer(("127.0.0.1", port), application, log=None).serve_forever()
    else:
        import puff_patch

        puff_patch.patch_all()

        from puff_patch.server import ServerOptions, serve

        sys.exit(serve(application, ServerOptions(port=port)))
