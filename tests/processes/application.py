"""A WSGI application and a Celery application that tell which process served, and with which sessions."""

# ruff: noqa: E402 - everything else is imported patched
from __future__ import annotations

import puff_patch

puff_patch.patch_all()

import json
import os
from typing import Any

from worker import REDIS_URL, use

# With preload this is done in the master.
BEFORE = use()


def application(environ: Any, start_response: Any) -> list[bytes]:
    body = json.dumps([BEFORE, use()]).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


if os.environ.get("TEST_CELERY"):
    from celery import Celery

    broker = REDIS_URL.replace("unix://", "redis+socket://").replace("?db=0", "?virtual_host=0")
    celery = Celery("application", broker=broker, backend=broker)
    celery.conf.task_default_queue = os.environ["TEST_CELERY"]
    celery.conf.broker_connection_retry_on_startup = True

    @celery.task(name="use")
    def use_task() -> Any:
        return use()
