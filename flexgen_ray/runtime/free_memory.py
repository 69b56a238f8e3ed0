"""Host memory that is free: on the machine, or in the container if its limit is nearer.

Page cache is free memory, for the kernel gives it back when memory is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def free_memory(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int:
    """Bytes that this process may still take.

    root, membership: where cgroups are mounted, and the file that names this process's own.
    """
    limits = (_free_in(folder) for folder in _cgroups(root, membership))
    return min([psutil.virtual_memory().available, *(free for free in limits if free is not None)])


def _cgroups(root: Path, membership: Path) -> Iterator[Path]:
    """Folders of this process's memory cgroups and of all that enclose them, version 1 and 2."""
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # In a container the path may be the host's, of which only the last part is mounted.
        for mount in (root / "memory",) if controllers else (root, root / "unified"):
            folder = mount / path.lstrip("/")
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mount))


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
