"""The actors of the stages, with the room that is reserved for them: started, stopped, given back.

Knows Ray's actors; not what is asked of them.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

import ray

from flexgen_ray.distributed.actor import StageActor
from flexgen_ray.distributed.attempt import StageLost, Stalled, await_stages
from flexgen_ray.distributed.capacity import OWN_SHARE, BundlePlacement, FreeResources, place_stages
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
SCALING_RESTART_SECONDS = 600.0  # where a machine may have to be started for them


class NotStarted(RuntimeError):
    """Ray has nowhere to put a stage, or could not start it in time."""


class StageActors:
    """An actor for each stage, in a placement group, until `close`.

    actors: None where one has been stopped. nodes: where each was last.
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
        """{stage: the name of its node}; empty if there is one stage, on this machine."""
        is_here = [*self._hosts.values()] == [socket.gethostname()]
        return {} if is_here else self._hosts

    def reserve(
        self, device: str, num_stages: int | None, threads: int | None, seconds: float | None
    ) -> None:
        """Find room for the stages; see room.place and reservation.reserve."""

        def find(room: FreeResources, may_shrink: bool) -> BundlePlacement:
            if self._own_cluster is None:
                return place_stages(room, device, num_stages, threads, may_shrink)
            # Only LLMs of this process are there, and share its cores, as threads do.
            placed = place_stages(room.with_idle_cores(), device, num_stages, threads, may_shrink)
            return placed.with_cores(OWN_SHARE)

        self.placed, self._group = reserve(find, seconds, self._on_progress)

    def start(self, waiting: ResourceWait | None = None) -> None:
        """Start the actors that aren't there; NotStarted or StageLost if they don't come."""
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
        """How long lost stages may take to start elsewhere, where no number is wanted."""
        return wanted or (SCALING_RESTART_SECONDS if has_autoscaler() else RESTART_SECONDS)

    def stop(self, stages: Iterable[int]) -> None:
        """End these actors' processes."""
        for stage in stages:
            if self.actors[stage] is not None and ray.is_initialized():
                ray.kill(self.actors[stage])
            self.actors[stage] = None

    def close(self) -> None:
        """Give all back: actors, their room, and Ray if nothing else in this process uses it."""
        self.stop(range(len(self.actors)))
        self.actors = []
        if self._group is not None and ray.is_initialized():
            ray.util.remove_placement_group(self._group)
        self._group = None
        own_cluster, self._own_cluster = self._own_cluster, None
        if own_cluster is not None:
            own_cluster.close()

    def _wait_for(self, new: list[int], waiting: ResourceWait) -> None:
        """Until these stages answer, with a line a minute on what they wait for."""
        starting = [self.actors[it].host.remote() for it in new]
        while True:
            step = min(max(waiting.left, 1), NOTE_SECONDS)
            late = ray.wait(starting, num_returns=len(starting), timeout=step)[1]
            if not late or not waiting.left:
                break
            waiting.note(self._what_lacks([new[starting.index(it)] for it in late]))
        try:
            self._hosts |= dict(zip(new, await_stages(starting, new, 0), strict=True))
        except StageLost as error:
            stalled = [it for it, why in error.reasons.items() if isinstance(why, Stalled)]
            if not stalled:
                raise
            what = self._what_lacks(stalled)
            raise NotStarted(f"{what} after {waiting.waited:.0f} s") from error

    def _what_lacks(self, stages: list[int]) -> str:
        which = f"stage {', '.join(map(str, stages))}"
        if is_placed(self._group):
            return f"{which} did not start"
        needed = self.placed.bundles[stages[0]].resources
        return f"no node has room for {which}, which needs {needed}: {free_resources().describe()}"
