"""What a program runs in the background beside its requests, and alone after ``puff wait_forever``."""

from __future__ import annotations

import sys

from puff_patch.project import Project


class Background:
    """The background of one process; ``puff serve``, ``manage.py runpuff`` and ``puff wait_forever`` all have one.

    The one place where the workers of task queues are to be started and stopped.

    Args:
        project: says what there is to run.
    """

    def __init__(self, project: Project) -> None:
        self._project = project

    def start(self) -> None:
        """Start it, on greenlets of the calling thread's hub, in the process that serves."""
        for index, queue in enumerate(self._project.program.task_queue):
            if queue.enable:
                print(
                    f"puff: {self._project.where('task_queue', index)}: tasks are run by a later version; "
                    f"the queue {queue.name!r} has no worker here",
                    file=sys.stderr,
                )

    def stop(self) -> None:
        """End what was started, and wait until it has ended; does nothing if nothing was."""
