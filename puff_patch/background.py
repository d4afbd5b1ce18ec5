"""What a program runs in the background beside its requests, and alone after ``puff wait_forever``."""

from __future__ import annotations

import sys
from collections.abc import Callable

from puff_patch.project import Project


def start(project: Project) -> Callable[[], None]:
    """Start it, on greenlets of the calling thread's hub.

    The one place where the workers of task queues are to be started; ``puff serve``, ``manage.py runpuff`` and
    ``puff wait_forever`` all come by here.

    Args:
        project: says what there is.

    Returns:
        What ends it again, and waits until it has ended.
    """
    for index, queue in enumerate(project.program.task_queue):
        if queue.enable:
            print(
                f"puff: {project.where('task_queue', index)}: tasks are run by a later version; "
                f"the queue {queue.name!r} has no worker here",
                file=sys.stderr,
            )
    return lambda: None
