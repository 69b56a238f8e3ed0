"""Every stage loads its weights at the same time, and their progress is shown as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from flexgen_ray.distributed.attempt import get
from flexgen_ray.events import OnProgress, Progress
from flexgen_ray.runtime.stage import LOADING, StageSpec

LOOK_SECONDS = 2  # between two looks at the stages


def load(
    actors: Sequence[Any],
    specs: Sequence[StageSpec],
    nodes: Mapping[int, str],
    on_progress: OnProgress,
) -> None:
    """Raises the error that a stage raised, or RuntimeError if its process died.

    nodes: see attempt.get.
    """
    on_progress(Progress(phase=LOADING))
    loading = [actor.load.remote(spec) for actor, spec in zip(actors, specs, strict=True)]
    while ray.wait(loading, num_returns=len(loading), timeout=LOOK_SECONDS)[1]:
        on_progress(_together([actor.loading.remote() for actor in actors]))
    get(loading, nodes)


def _together(looks: list) -> Progress:
    """The sum of the stages that answer in time."""
    ready = ray.wait(looks, num_returns=len(looks), timeout=LOOK_SECONDS)[0]
    try:
        shares: list[Progress] = ray.get(ready)
    except RayError:  # the load itself raises its cause
        shares = []
    phase = shares[0].phase if shares else LOADING
    done, total = sum(it.done for it in shares), sum(it.total for it in shares)
    return Progress(phase=phase, done=done, total=total, unit="bytes")
