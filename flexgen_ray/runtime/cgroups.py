"""This process's control groups, version 1 and 2, and the limits on memory and cores in them.

A container, a pod or a batch job has its limits there. Page cache is free memory, for the kernel
gives it back when memory is asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def free_memory(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int:
    """Bytes that this process may still take: what the machine has, or the nearest limit leaves.

    root, membership: where cgroups are mounted, and the file that names this process's own.
    """
    limits = (_free_in(folder) for folder in _cgroups("memory", root, membership))
    return min([psutil.virtual_memory().available, *(free for free in limits if free is not None)])


def usable_cores(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int:
    """Cores that this process may use: those it is bound to, or fewer by a quota of CPU time.

    More threads than the quota has cores would be stopped for a part of each period.
    """
    quotas = (_quota(folder) for folder in _cgroups("cpu", root, membership))
    cores = min([math.inf, *(quota for quota in quotas if quota is not None)])
    return max(1, min(len(os.sched_getaffinity(0)), math.ceil(min(cores, 2**20))))


def _cgroups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Folders of this process's cgroups with a controller, and of all that enclose them."""
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 mounts each controller; version 2 is the root, or beside version 1.
        mounts = (
            (root / controllers, root / controller) if controllers else (root, root / "unified")
        )
        for mount in mounts:
            # In a container the path may be the host's, of which only the last part is mounted.
            folder = mount / path.lstrip("/")
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mount))


def _quota(folder: Path) -> float | None:
    """Cores' worth of CPU time that a cgroup may use; None if it has no limit."""
    both, quota = folder / "cpu.max", folder / "cpu.cfs_quota_us"
    if both.is_file():
        most, period = both.read_text().split()
    elif quota.is_file():
        most, period = quota.read_text(), (folder / "cpu.cfs_period_us").read_text()
    else:
        return None
    return None if most == "max" or int(most) <= 0 else int(most) / int(period)


def _free_in(folder: Path) -> int | None:
    """Bytes left in a cgroup; None if it has no limit."""
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, usage = folder / limit_name, folder / usage_name
        if limit.is_file() and usage.is_file():
            most = limit.read_text().strip()
            if most == "max":
                return None
            return max(0, int(most) - int(usage.read_text()) + _page_cache(folder))
    return None


def _page_cache(folder: Path) -> int:
    """Bytes of files that a cgroup caches, its children's included."""
    path = folder / "memory.stat"
    lines = path.read_text().splitlines() if path.is_file() else []
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    names = ("inactive_file", "active_file")
    # Version 1 names the sums over children apart.
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in names)
