"""How many CPUs this process may use."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """How many CPUs this process may use: those of its affinity mask, within the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(count, _quota())))


def _quota() -> float:
    """CPUs' worth of time that control groups leave to this process; infinite without a limit."""
    found = [float("inf")]
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                found.append(_least(_CGROUPS, path))
            elif "cpu" in controllers.split(","):
                found.append(_least(_CGROUPS / controllers, path))
    return min(found)


def _least(root: Path, path: str) -> float:
    """The smallest quota of a group and those above it."""
    # In a container the path may be the host's: what is there then is at the root.
    groups = [root]
    for part in path.strip("/").split("/"):
        groups.append(groups[-1] / part)
    return min(_quota_of(group) for group in groups)


def _quota_of(group: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()  # version 2
        return float("inf") if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "cpu.cfs_quota_us").read_text())  # version 1
        return limit / int((group / "cpu.cfs_period_us").read_text()) if limit > 0 else float("inf")
    return float("inf")
