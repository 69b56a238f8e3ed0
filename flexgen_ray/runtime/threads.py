"""How many host threads a process that does a stage's work uses.

Knows environment variables and the cores that there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from flexgen_ray.runtime.cgroups import usable_cores

_OPENMP = "OMP_NUM_THREADS"
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # in the driver of a submitted job


def users_threads(environment: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS where a user set it, None where it isn't set or where Ray set it.

    Ray sets it to 1 for `ray job submit`, RayJob, `ray submit` and `ray exec`, and to the cores of
    a task or an actor, whatever a run in it needs. A job's own runtime_env counts as the user's.
    """
    if _is_in_ray(environment):
        config = json.loads(environment.get(_JOB_CONFIG) or "{}")
        variables = (config.get("runtime_env") or {}).get("env_vars") or {}
        return _first_number(variables.get(_OPENMP))
    return _first_number(environment.get(_OPENMP))


def own_threads(environment: Mapping[str, str]) -> int:
    """Threads for work in this process: the user's number, a Ray task's cores, or all usable."""
    threads = users_threads(environment)
    if threads is None and _is_in_ray(environment) and _JOB_CONFIG not in environment:
        # A task's or an actor's: others may have the rest of the node.
        threads = _first_number(environment.get(_OPENMP)) if "RAY_JOB_ID" in environment else None
    return threads or usable_cores()


def _is_in_ray(environment: Mapping[str, str]) -> bool:
    """True in a job, a task or an actor, and in a command of `ray submit` or `ray exec`."""
    # The last two name themselves by nothing else than what they export.
    by_ray_exec = (environment.get(_OPENMP), environment.get("PYTHONWARNINGS")) == ("1", "ignore")
    return by_ray_exec or _JOB_CONFIG in environment or "RAY_JOB_ID" in environment


def _first_number(value: str | None) -> int | None:
    """OpenMP takes a list, a number for each level of nesting; the first is the outermost."""
    first = (value or "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None
