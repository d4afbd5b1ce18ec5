"""The FastAPI application that ``asgi.py`` loads: plain for uvicorn, patched if it is run as a program.

Usage: python asgi_app.py PORT    serves it with puff_patch
"""

import sys

if __name__ == "__main__":
    import puff_patch

    puff_patch.patch_all()

import asyncio
import time

from asgiref.sync import async_to_sync, sync_to_async
from fastapi import FastAPI

app = FastAPI()


@app.get("/async")
async def on_loop():
    """As little as an endpoint can do."""
    return {"hello": "world"}


@app.get("/def")
def in_thread():
    """A sync endpoint that waits, as for a database."""
    time.sleep(0.01)
    return {"hello": "world"}


async def innermost():
    """What the chain ends in."""
    await asyncio.to_thread(time.sleep, 0.01)
    return {"hello": "world"}


@app.get("/chain")
async def chain():
    """Sync below async below sync: what a library of one kind does to a program of the other."""
    return await sync_to_async(async_to_sync(innermost))()


if __name__ == "__main__":
    from puff_patch.server import Applications, ServerOptions, serve

    sys.exit(serve(Applications(asgi=app), ServerOptions(port=int(sys.argv[1]))))
