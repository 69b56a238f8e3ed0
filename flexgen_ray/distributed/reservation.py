"""Finds room for stages on a Ray cluster and reserves it; without room says who holds what.

Knows Ray's nodes, placement groups and autoscaler; not what a stage does.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
import warnings
from collections.abc import Callable
from typing import Any

import ray
from ray._private import state
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from flexgen_ray.distributed.capacity import (
    BundlePlacement,
    ClusterNode,
    FreeResources,
    InsufficientResources,
    NodeType,
)
from flexgen_ray.runtime.events import OnProgress, Progress, ignore_progress

WAIT_SECONDS = 10.0  # for room on a cluster of fixed size
SCALING_SECONDS = 900.0  # on one that may start machines
SETTLE_SECONDS = 2.0  # Ray knows so much later that something was given back
NOTE_SECONDS = 60.0
LOOK_SECONDS = 0.5
_PREFIX = "flexgen-ray "
_numbers = itertools.count()


class ResourceWait:
    """So many seconds in which something is waited for, with a line a minute on what that is."""

    def __init__(self, seconds: float, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._began = time.monotonic()
        self._seconds = seconds
        self._noted = self._began

    @property
    def waited(self) -> float:
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds until it is given up."""
        return max(self._seconds - self.waited, 0.0)

    def note(self, what: str) -> None:
        """Say what is waited for, if a minute has gone since the last line."""
        if time.monotonic() - self._noted >= NOTE_SECONDS:
            self._noted = time.monotonic()
            report_note(
                self._on_progress,
                f"waiting since {self.waited:.0f} s, for {self.left:.0f} s more: {what}",
            )


def report_note(on_progress: OnProgress, text: str) -> None:
    """A line for people: among the progress that is shown, or as a warning where none is."""
    if on_progress is ignore_progress:
        warnings.warn(text, stacklevel=2)
    else:
        on_progress(Progress(note=text))


def has_autoscaler() -> bool:
    """True if the cluster has an autoscaler that may start machines."""
    return bool(_types())


def free_resources() -> FreeResources:
    """The cluster as Ray knows it now, which may be a second old."""
    free = state.available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            total, left = node["Resources"], free.get(node["NodeID"], {})
            sizes = [total.get(name, 0.0) for name in ("CPU", "GPU")]
            nodes.append(ClusterNode(*sizes, *(left.get(name, 0.0) for name in ("CPU", "GPU"))))
    return FreeResources(tuple(nodes), _types(), tuple(_holders()))


def reserve(
    find: Callable[[FreeResources, bool], BundlePlacement],
    seconds: float | None,
    on_progress: OnProgress,
) -> tuple[BundlePlacement, PlacementGroup]:
    """Stages as `find` fits them into the room there is, and their placement group.

    find(room, whether a smaller share will do): see room.place. Bundles are spread over the nodes,
    whose hosts' memory and links then add up. Raises RuntimeError, naming who holds what, if there
    is no room within so many seconds; None is SCALING_SECONDS where the cluster scales, else
    WAIT_SECONDS.
    """
    room = free_resources()
    seconds = (SCALING_SECONDS if room.node_types else WAIT_SECONDS) if seconds is None else seconds
    waiting = ResourceWait(seconds, on_progress)
    while True:
        try:
            placed = find(room, waiting.waited >= min(SETTLE_SECONDS, seconds))
            break
        except InsufficientResources as why:
            if not waiting.left and waiting.waited >= SETTLE_SECONDS:
                raise RuntimeError(_no_room(str(why), waiting)) from None
            waiting.note(str(why))
        time.sleep(LOOK_SECONDS)
        room = free_resources()
    if placed.note:
        report_note(on_progress, placed.note)
    bundles = placed.bundles
    name = f"{_PREFIX}{socket.gethostname()} {os.getpid()} {next(_numbers)} {time.time():.0f}"
    group = placement_group([it.resources for it in bundles], strategy="SPREAD", name=name)
    try:
        while not group.wait(min(max(waiting.left, 1), NOTE_SECONDS)):
            what = (
                f"{len(bundles)} bundles of {bundles[0].resources}: {free_resources().describe()}"
            )
            if not waiting.left:
                raise RuntimeError(_no_room(what, waiting))
            waiting.note(what)
    except BaseException:
        ray.util.remove_placement_group(group)
        raise
    return placed, group


def _no_room(what: str, waiting: ResourceWait) -> str:
    return (
        f"no room on the Ray cluster after {waiting.waited:.0f} s: {what}; close what holds it, "
        "lower --pipeline-parallel-size or --threads, or wait longer with --wait SECONDS"
    )


def _types() -> tuple[NodeType, ...]:
    """Machines that the autoscaler may start, as it told the cluster."""
    config = state.state.get_cluster_config()
    found = []
    for group in config.node_group_configs if config is not None else ():
        count = float("inf") if group.max_count < 0 else group.max_count
        cpus, gpus = (float(group.resources.get(name, 0)) for name in ("CPU", "GPU"))
        if count and (cpus or gpus):
            found.append(NodeType(cpus, gpus, count))
    return tuple(found)


def _holders() -> list[str]:
    """Who has reserved cores or GPUs, as far as Ray says: LLMs, other groups, and this task."""
    found = []
    for group in placement_group_table().values():
        if group["state"] in ("CREATED", "RESCHEDULING"):
            found.append(f"{_owner(group['name'])} ({_amounts(group['bundles'].values())})")
    context = ray.get_runtime_context()
    own = context.get_assigned_resources() if context.worker.mode == ray.WORKER_MODE else {}
    if own.get("CPU") or own.get("GPU"):
        found.append(f"the task or actor that makes this LLM ({_amounts([own])})")
    return found


def _owner(name: str) -> str:
    if not name.startswith(_PREFIX):
        return f"placement group {name or 'without a name'}"
    host, pid, *_ = name.removeprefix(_PREFIX).split(" ")
    if (host, pid) == (socket.gethostname(), str(os.getpid())):
        return "another LLM of this process, which `close()` or `del` gives back"
    return f"an LLM of process {pid} on {host}"


def _amounts(bundles: Any) -> str:
    parts = [*bundles]
    sums = {
        name: sum(it.get(key, 0) for it in parts)
        for key, name in (("CPU", "cores"), ("GPU", "GPUs"))
    }
    return ", ".join(f"{count:g} {name}" for name, count in sums.items() if count) or "nothing"
