"""The actors of all stages, in bundles that are reserved for them: started, stopped, given back.

Knows Ray's actors; not what they compute.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

import ray

from flexgen_ray.distributed.actor import StageActor
from flexgen_ray.distributed.attempt import StageLost, Stalled, await_stages
from flexgen_ray.distributed.capacity import (
    OWN_SHARE,
    BundlePlacement,
    FreeResources,
    place_stages,
)
from flexgen_ray.distributed.cluster import actor_options, is_placed
from flexgen_ray.distributed.own_cluster import OwnCluster
from flexgen_ray.distributed.reservation import (
    NOTE_SECONDS,
    ResourceWait,
    free_resources,
    has_autoscaler,
    reserve,
)
from flexgen_ray.runtime.events import OnProgress

START_SECONDS = 120.0
RESTART_SECONDS = 120.0  # for lost stages to start elsewhere, on a cluster of fixed size
SCALING_RESTART_SECONDS = 600.0  # where an autoscaler may have to start a node


class NotStarted(RuntimeError):
    """Ray has no room for a stage, or could not start it in time."""


class StageActors:
    """One actor a stage, in a placement group, until `close`.

    actors: handles in the order of the stages; None for a stage that has been stopped.
    """

    def __init__(self, own_cluster: OwnCluster | None, on_progress: OnProgress) -> None:
        self._own_cluster = own_cluster
        self._on_progress = on_progress
        self._group: Any = None
        self.placed = BundlePlacement([])
        self.actors: list[Any] = []
        self._hosts: dict[int, str] = {}

    @property
    def nodes(self) -> dict[int, str]:
        """{stage: the name of its last node}; empty if there is one stage, on this machine."""
        is_here = [*self._hosts.values()] == [socket.gethostname()]
        return {} if is_here else self._hosts

    def reserve(
        self, device: str, num_stages: int | None, threads: int | None, seconds: float | None
    ) -> None:
        """Reserve a bundle for each stage; see capacity.place_stages and reservation.reserve."""

        def place(cluster: FreeResources, may_shrink: bool) -> BundlePlacement:
            if self._own_cluster is None:
                return place_stages(cluster, device, num_stages, threads, may_shrink)
            # On a cluster of this process's own there are only its LLMs, which share the cores.
            cluster = cluster.with_idle_cores()
            placed = place_stages(cluster, device, num_stages, threads, may_shrink)
            return placed.with_cores(OWN_SHARE)

        self.placed, self._group = reserve(place, seconds, self._on_progress)

    def start(self, waiting: ResourceWait | None = None) -> None:
        """Start the actors that are missing, and wait until they answer.

        Raises NotStarted if they don't start in time, StageLost if they end while they start.
        """
        if not ray.is_initialized() or self._group is None:
            raise RuntimeError("this LLM is closed; make another one")
        bundles = self.placed.bundles
        if not self.actors:
            self.actors = [None] * len(bundles)
        actor_class: Any = StageActor
        new = [stage for stage, actor in enumerate(self.actors) if actor is None]
        for stage in new:
            options = actor_options(bundles[stage], stage, self._group)
            self.actors[stage] = actor_class.options(**options).remote(bundles[stage].threads)
        if not new:
            return
        self._wait_for(new, waiting or ResourceWait(START_SECONDS, self._on_progress))
        if self._own_cluster is not None:
            self._own_cluster.check_sockets()

    def restart_seconds(self, wanted: float | None) -> float:
        """Seconds for lost stages to start again: as wanted, else by the kind of cluster."""
        return wanted or (SCALING_RESTART_SECONDS if has_autoscaler() else RESTART_SECONDS)

    def stop(self, stages: Iterable[int]) -> None:
        """End these actors' processes."""
        for stage in stages:
            if self.actors[stage] is not None and ray.is_initialized():
                ray.kill(self.actors[stage])
            self.actors[stage] = None

    def close(self) -> None:
        """Stop all actors and give back their bundles, and Ray if this process uses it no more."""
        self.stop(range(len(self.actors)))
        self.actors = []
        if self._group is not None and ray.is_initialized():
            ray.util.remove_placement_group(self._group)
        self._group = None
        own_cluster, self._own_cluster = self._own_cluster, None
        if own_cluster is not None:
            own_cluster.close()

    def _wait_for(self, new: list[int], waiting: ResourceWait) -> None:
        """Wait until these stages answer; once a minute, a note says what is missing."""
        starting = [self.actors[stage].host.remote() for stage in new]
        while True:
            seconds = min(max(waiting.left, 1), NOTE_SECONDS)
            late = ray.wait(starting, num_returns=len(starting), timeout=seconds)[1]
            if not late or not waiting.left:
                break
            waiting.note(self._describe_missing([new[starting.index(it)] for it in late]))
        try:
            self._hosts |= dict(zip(new, await_stages(starting, new, 0), strict=True))
        except StageLost as error:
            stalled = [stage for stage, why in error.reasons.items() if isinstance(why, Stalled)]
            if not stalled:
                raise
            what = self._describe_missing(stalled)
            raise NotStarted(f"{what} after {waiting.waited:.0f} s") from error

    def _describe_missing(self, stages: list[int]) -> str:
        """Clause for a note or an error: why these stages haven't started."""
        which = f"stage {', '.join(map(str, stages))}"
        if is_placed(self._group):
            return f"{which} did not start"
        needed = self.placed.bundles[stages[0]].resources
        return f"no node has room for {which}, which needs {needed}: {free_resources().describe()}"
