"""Reserves and awaits resources for stages on a Ray cluster; an error names who holds them.

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

WAIT_SECONDS = 10.0  # for resources on a cluster of fixed size
SCALING_SECONDS = 900.0  # for resources on a cluster that may start nodes
SETTLE_SECONDS = 2.0  # Ray notices within this time that resources were given back
NOTE_SECONDS = 60.0
POLL_SECONDS = 0.5
_PREFIX = "flexgen-ray "  # of the names of our placement groups
_numbers = itertools.count()


class ResourceWait:
    """Limited time of waiting for resources, with a note once a minute."""

    def __init__(self, seconds: float, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._began = time.monotonic()
        self._seconds = seconds
        self._noted = self._began

    @property
    def waited(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds until the wait is given up; 0 from then on."""
        return max(self._seconds - self.waited, 0.0)

    def note(self, what: str) -> None:
        """Report what is waited for, if the last note is a minute old."""
        if time.monotonic() - self._noted >= NOTE_SECONDS:
            self._noted = time.monotonic()
            report_note(
                self._on_progress,
                f"waiting since {self.waited:.0f} s, for {self.left:.0f} s more: {what}",
            )


def report_note(on_progress: OnProgress, text: str) -> None:
    """Show a line to the user: with the progress, or as a warning if no progress is shown."""
    if on_progress is ignore_progress:
        warnings.warn(text, stacklevel=2)
    else:
        on_progress(Progress(note=text))


def has_autoscaler() -> bool:
    """True if the cluster has an autoscaler that may start nodes."""
    return bool(_node_types())


def free_resources() -> FreeResources:
    """Snapshot of the cluster; what Ray knows may be a second old."""
    free = state.available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            total, left = node["Resources"], free.get(node["NodeID"], {})
            sizes = [total.get(name, 0.0) for name in ("CPU", "GPU")]
            nodes.append(ClusterNode(*sizes, *(left.get(name, 0.0) for name in ("CPU", "GPU"))))
    return FreeResources(tuple(nodes), _node_types(), tuple(_resource_holders()))


def reserve(
    place: Callable[[FreeResources, bool], BundlePlacement],
    seconds: float | None,
    on_progress: OnProgress,
) -> tuple[BundlePlacement, PlacementGroup]:
    """Reserve a bundle for each stage; returns them with their placement group.

    Bundles are spread over the nodes, so that the stages have the memory and links of many hosts.
    place: returns the stages' bundles, from the free resources and whether fewer cores than the
    whole share will do (capacity.place_stages).
    seconds: limit of the wait; None means SCALING_SECONDS where there is an autoscaler, else
    WAIT_SECONDS.
    Raises RuntimeError, naming who holds the resources, if they aren't free in time.
    """
    cluster = free_resources()
    if seconds is None:
        seconds = SCALING_SECONDS if cluster.node_types else WAIT_SECONDS
    waiting = ResourceWait(seconds, on_progress)
    placed = _wait_for_placement(place, cluster, waiting, min(SETTLE_SECONDS, seconds))
    if placed.note:
        report_note(on_progress, placed.note)
    bundles = placed.bundles
    name = f"{_PREFIX}{socket.gethostname()} {os.getpid()} {next(_numbers)} {time.time():.0f}"
    group = placement_group([it.resources for it in bundles], strategy="SPREAD", name=name)
    try:
        while not group.wait(min(max(waiting.left, 1), NOTE_SECONDS)):
            size = f"{len(bundles)} bundles of {bundles[0].resources}"
            what = f"{size}: {free_resources().describe()}"
            if not waiting.left:
                raise RuntimeError(_no_resources(what, waiting))
            waiting.note(what)
    except BaseException:
        ray.util.remove_placement_group(group)
        raise
    return placed, group


def _wait_for_placement(
    place: Callable[[FreeResources, bool], BundlePlacement],
    cluster: FreeResources,
    waiting: ResourceWait,
    settle_seconds: float,
) -> BundlePlacement:
    """Bundles as `place` returns them, once there are resources for them.

    settle_seconds: from then on, less than the whole share of cores is accepted. Resources of a
    program that has just ended come free before, so that a run gets its whole share.
    """
    while True:
        try:
            return place(cluster, waiting.waited >= settle_seconds)
        except InsufficientResources as why:
            if not waiting.left and waiting.waited >= SETTLE_SECONDS:
                raise RuntimeError(_no_resources(str(why), waiting)) from None
            waiting.note(str(why))
        time.sleep(POLL_SECONDS)
        cluster = free_resources()


def _no_resources(what: str, waiting: ResourceWait) -> str:
    return (
        f"no room on the Ray cluster after {waiting.waited:.0f} s: {what}; close what holds it, "
        "lower --pipeline-parallel-size or --threads, or wait longer with --wait SECONDS"
    )


def _node_types() -> tuple[NodeType, ...]:
    """Kinds of nodes that the cluster's autoscaler may start; empty without an autoscaler."""
    config = state.state.get_cluster_config()
    node_types = []
    for group in config.node_group_configs if config is not None else ():
        count = float("inf") if group.max_count < 0 else group.max_count
        cpus, gpus = (float(group.resources.get(name, 0)) for name in ("CPU", "GPU"))
        if count and (cpus or gpus):
            node_types.append(NodeType(cpus, gpus, count))
    return tuple(node_types)


def _resource_holders() -> list[str]:
    """Owners of reserved cores and GPUs as far as Ray knows: LLMs, other groups, and this task."""
    holders = []
    for group in placement_group_table().values():
        if group["state"] in ("CREATED", "RESCHEDULING"):
            amounts = _describe_amounts(group["bundles"].values())
            holders.append(f"{_describe_owner(group['name'])} ({amounts})")
    context = ray.get_runtime_context()
    own = context.get_assigned_resources() if context.worker.mode == ray.WORKER_MODE else {}
    if own.get("CPU") or own.get("GPU"):
        holders.append(f"the task or actor that makes this LLM ({_describe_amounts([own])})")
    return holders


def _describe_owner(name: str) -> str:
    """Owner of the placement group of this name, with the way to free its resources if known."""
    if not name.startswith(_PREFIX):
        return f"placement group {name or 'without a name'}"
    host, pid, *_ = name.removeprefix(_PREFIX).split(" ")
    if (host, pid) == (socket.gethostname(), str(os.getpid())):
        return "another LLM of this process, which `close()` or `del` gives back"
    return f"an LLM of process {pid} on {host}"


def _describe_amounts(bundles: Any) -> str:
    """Sum of some bundles of Ray, such as "4 cores, 1 GPUs"."""
    parts = [*bundles]
    sums = {
        name: sum(bundle.get(key, 0) for bundle in parts)
        for key, name in (("CPU", "cores"), ("GPU", "GPUs"))
    }
    return ", ".join(f"{count:g} {name}" for name, count in sums.items() if count) or "nothing"
