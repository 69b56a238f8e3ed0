"""Limits and settings of this process on its host: free memory, cores, allocator, OpenMP threads.

A container, a pod or a batch job has its limits of memory and cores in control groups (cgroups,
version 1 and 2). The allocator is glibc's and the OpenMP runtime GNU's, or nothing is set. The
module knows no tensors.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_OPENMP = "OMP_NUM_THREADS"
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in the driver of a submitted Ray job
_PAUSE_SOFT = 1  # omp_pause_soft: settings stay, and the next parallel region makes a new team
# Parameters of mallopt(3).
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
_MIB = 2**20


def free_memory(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int:
    """Bytes that this process may still take: free in the machine, or left by the nearest limit.

    Page cache counts as free, since the kernel gives it back when memory is needed.
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


def threads_set_by_user(environment: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS if a user set it; None if it isn't set, or Ray set it.

    Ray sets it to 1 for `ray job submit`, RayJob, `ray submit` and `ray exec`, and to the cores of
    a task or an actor, whatever a run in it needs. A job's own runtime_env counts as the user's.
    """
    if _is_in_ray(environment):
        config = json.loads(environment.get(_JOB_CONFIG) or "{}")
        variables = (config.get("runtime_env") or {}).get("env_vars") or {}
        return _first_number(variables.get(_OPENMP))
    return _first_number(environment.get(_OPENMP))


def default_threads(environment: Mapping[str, str]) -> int:
    """Threads for work in this process: the user's number, a Ray task's cores, or all usable."""
    threads = threads_set_by_user(environment)
    if threads is None and _is_in_ray(environment) and _JOB_CONFIG not in environment:
        # In a task or an actor, other processes may use the rest of the node.
        threads = _first_number(environment.get(_OPENMP)) if "RAY_JOB_ID" in environment else None
    return threads or usable_cores()


def release_openmp_team() -> None:
    """End the calling thread's team of OpenMP threads, if it has one.

    Threads of a team wait for each other by spinning. A small matrix product needs that, because
    threads that the system has to wake come too late. But GNU's runtime lets threads spin only
    while all teams of the process together have no more threads than there are cores. So a team
    that has done its work must go.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_PAUSE_SOFT)


def tune_malloc_for_loading() -> None:
    """Give large temporaries back to the system when they are freed.

    While weights load, each temporary has the size of another tensor, so keeping one is waste.
    """
    _set_malloc(_M_ARENA_MAX, 1)
    _set_malloc(_M_MMAP_THRESHOLD, 4 * _MIB)


def tune_malloc_for_ops() -> None:
    """Keep freed temporaries of up to 8 MiB for the next op, in one arena for all lanes.

    Touching pages anew costs more than a small model's matrix products. Larger ones are given back,
    since they leave holes that nothing fits: with those of up to 32 MiB, the process took 2.7 times
    the memory that was live at most, with those of up to 8 MiB 1.5 times (layout/sizes.py counts
    on that).
    """
    _set_malloc(_M_MMAP_THRESHOLD, 8 * _MIB)
    _set_malloc(_M_TRIM_THRESHOLD, 64 * _MIB)


def _set_malloc(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)


def _is_in_ray(environment: Mapping[str, str]) -> bool:
    """True in a Ray job, task or actor, and in a command of `ray submit` or `ray exec`."""
    # The last two can only be recognised by the variables that they export.
    by_ray_exec = (environment.get(_OPENMP), environment.get("PYTHONWARNINGS")) == ("1", "ignore")
    return by_ray_exec or _JOB_CONFIG in environment or "RAY_JOB_ID" in environment


def _first_number(value: str | None) -> int | None:
    """The first number of OpenMP's list, which has one for each level of nesting."""
    first = (value or "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


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
    """Bytes of files that a cgroup and its children cache."""
    path = folder / "memory.stat"
    lines = path.read_text().splitlines() if path.is_file() else []
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    names = ("inactive_file", "active_file")
    # In version 1, the sums over children have names of their own.
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in names)
