"""Brings a pipeline of stages up on a Ray cluster, feeds it, mends it, and takes it down.

Never on the path of a token: it hands requests to the first stage and keeps what comes back, so
that after a fault what is unfinished goes on from the tokens that are there. Knows Ray and faults;
not what a stage computes.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Generator, Iterable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayTaskError

from flexgen_ray.config import Deployment, HardwareSpec
from flexgen_ray.distributed.attempt import (
    Attempt,
    StageLost,
    await_stages,
    get_results,
    load_stages,
    original_error,
)
from flexgen_ray.distributed.capacity import Bundle
from flexgen_ray.distributed.cluster import connect
from flexgen_ray.distributed.metrics import count_restarts
from flexgen_ray.distributed.own_cluster import OBJECT_STORE_BYTES
from flexgen_ray.distributed.reservation import ResourceWait
from flexgen_ray.distributed.stage_actors import NotStarted, StageActors
from flexgen_ray.distributed.transport import JOIN_SECONDS, Rendezvous, RendezvousStore
from flexgen_ray.hardware.host import threads_set_by_user
from flexgen_ray.request import Finished, Request
from flexgen_ray.runtime.events import OnProgress, Progress, Recovery, ignore_progress
from flexgen_ray.runtime.meter import StageMeasurements
from flexgen_ray.runtime.stage import StageSpec
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.schedule.ops import Span

REQUESTS_PER_CALL = 256
LEAVE_SECONDS = 5
RETRY_SECONDS = 0.5
ANSWER_SECONDS = 1.5 * JOIN_SECONDS


class Driver:
    """Stages on a cluster that is there already, or on one started for this run."""

    def __init__(self, wanted: Deployment, on_progress: OnProgress = ignore_progress) -> None:
        self._transport = wanted.transport
        self._faults = wanted.faults
        self._on_progress = on_progress
        self._specs: list[StageSpec] = []
        self._loaded: set[int] = set()  # stages that have their weights
        self._epoch = 0
        self._meeting_place: RendezvousStore | None = None
        self._unfinished: dict[int, Request] = {}
        self.recoveries: list[Recovery] = []
        was_there = ray.is_initialized()
        own_cluster = connect(wanted.address)
        self._brought_cluster = own_cluster is not None and not was_there
        self._stage_actors = StageActors(own_cluster, on_progress)
        # An LLM that is dropped without `close` gives back what it holds, too.
        self._give_back = weakref.finalize(self, self._stage_actors.close)
        try:
            num_stages = None if wanted.num_stages == "auto" else int(wanted.num_stages)
            threads = wanted.threads or threads_set_by_user(os.environ)
            on_progress(Progress(phase="waiting for room on the Ray cluster"))
            self._stage_actors.reserve(wanted.device, num_stages, threads, wanted.wait_seconds)
            self._stage_actors.start()
        except BaseException:
            self.close()
            raise

    @property
    def actors(self) -> list[Any]:
        """Handles of the stages' actors, in the order of the stages."""
        return self._stage_actors.actors

    @property
    def nodes(self) -> dict[int, str]:
        """{stage: the name of its node}; empty if there is one stage, on this machine."""
        return self._stage_actors.nodes

    @property
    def _bundles(self) -> list[Bundle]:
        return self._stage_actors.placed.bundles

    @property
    def num_stages(self) -> int:
        return len(self._bundles)

    @property
    def resumes(self) -> bool:
        """Whether it goes on after a stage is lost."""
        return self._faults.max_restarts > 0

    @property
    def uses_nccl(self) -> bool:
        """Whether hidden states go from GPU to GPU: where every stage has one to itself."""
        has_gpus = all(bundle.num_gpus for bundle in self._bundles)
        if self._transport == "nccl" and not has_gpus:
            raise ValueError("--transport nccl, but not every stage has a GPU; use auto or gloo")
        return self.num_stages > 1 and has_gpus and self._transport != "gloo"

    @property
    def reserved_cpu_bytes(self) -> int:
        """Host memory that Ray's object store may take, if this run brought it along."""
        return OBJECT_STORE_BYTES if self._brought_cluster else 0

    def probe(self, device: str, offload_dir: str) -> list[Machine]:
        # Of cuda:1 too, for a stage sees no other GPU than its own.
        return self._each("probe", device.partition(":")[0], offload_dir)

    def pids(self) -> list[int]:
        """Of the stages' processes, each on its node."""
        return self._each("pid")

    def rates(self, spec: StageSpec) -> HardwareSpec:
        self._stage_actors.start()
        return get_results([self.actors[0].rates.remote(spec)], self.nodes)[0]

    def load(self, specs: list[StageSpec], on_progress: OnProgress = ignore_progress) -> None:
        """Of every stage at the same time."""
        self._stage_actors.start()
        self._specs = specs
        try:
            load_stages(self.actors, specs, self.nodes, on_progress)
        except RuntimeError:
            # A process may have gone; the next load begins with fresh ones.
            self.abort()
            raise
        self._loaded = set(range(self.num_stages))

    def add(self, requests: list[Request]) -> None:
        """Queues requests for the next run."""
        for request in requests:
            tokens, scores = [*request.generated], [*request.scores]
            self._unfinished[request.index] = replace(request, generated=tokens, scores=scores)

    def run(self) -> Generator[Finished | Progress]:
        """What the first stage yields, over all attempts.

        Raises what a stage raised, or RuntimeError, if lost stages can't be replaced.
        """
        self.recoveries = []
        lost: StageLost | None = None
        while self._unfinished or lost:
            try:
                if lost is not None:
                    yield Progress(note=f"{lost}; to be replaced")
                    self._recover(lost)
                    lost = None
                    yield Progress(note=self.recoveries[-1].line())
                    continue
                for event in self._begin():
                    self._note(event)
                    yield event
            except StageLost as error:
                lost = StageLost(error.reasons, self.nodes)

    def used(self) -> list[dict[str, dict[str, int]]]:
        return self._each("used")

    def measured(self) -> list[StageMeasurements]:
        return self._each("measured")

    def spans(self, stage: int, first: int, count: int) -> list[Span]:
        return get_results([self.actors[stage].spans.remote(first, count)], self.nodes, stage)[0]

    def abort(self) -> None:
        """Ends a run by ending its processes; fresh ones take their place when they are needed."""
        self._unfinished.clear()
        self._stop(range(len(self.actors)))
        self._stage_actors.actors = []

    def close(self) -> None:
        """Stops the actors, and Ray if this process started it and uses it no more."""
        self._unfinished.clear()
        self._loaded.clear()
        self._give_back()

    def _begin(self) -> Attempt:
        """A new attempt at what is unfinished."""
        stages = range(self.num_stages)
        if self.num_stages > 1:
            self._epoch += 1
            place = self._meeting_place = self._meeting_place or RendezvousStore(node_address())
            ring = self.num_stages, self.uses_nccl, place.secret
            meeting = Rendezvous(place.host, place.port, self._epoch, *ring)
            # Whoever is gone already would be waited for by its neighbours.
            await_stages([it.pid.remote() for it in self.actors], stages, ANSWER_SECONDS)
            joining = [it.join.remote(meeting, rank) for rank, it in enumerate(self.actors)]
            await_stages(joining, stages, ANSWER_SECONDS)
        requests = list(self._unfinished.values())
        pieces = range(0, len(requests), REQUESTS_PER_CALL)
        leader = self.actors[0]
        for first in pieces:
            piece = requests[first : first + REQUESTS_PER_CALL]
            await_stages([leader.add.remote(piece)], [0], ANSWER_SECONDS)
        return Attempt(self.actors, self._faults.stall_seconds)

    def _note(self, event: Finished | Progress) -> None:
        """Keeps each unfinished request's tokens and scores."""
        if isinstance(event, Finished):
            del self._unfinished[event.index]
            return
        if self.recoveries and event.new_tokens:
            self.recoveries[-1].note_tokens()
        for index, token in event.tokens:
            if index in self._unfinished:
                self._unfinished[index].generated.append(token)
        for index, scores in event.scores:
            if index in self._unfinished:
                self._unfinished[index].scores.extend(scores)

    def _recover(self, lost: StageLost) -> None:
        """Replaces the lost stages; the others keep their weights."""
        if len(self.recoveries) >= self._faults.max_restarts:
            raise self._gave_up(lost, f"{self._faults.max_restarts} restarts were not enough")
        recovery = Recovery(str(lost), sorted(lost.reasons))
        self.recoveries.append(recovery)
        self._stop(lost.reasons)
        stages = [stage for stage, actor in enumerate(self.actors) if actor is not None]
        await_stages([self.actors[it].leave.remote() for it in stages], stages, LEAVE_SECONDS)
        self._restart(lost)
        recovery.note_restart()
        # Of an earlier recovery too, if that was cut short.
        missing = [it for it in range(self.num_stages) if it not in self._loaded]
        await_stages([self.actors[it].load.remote(self._specs[it]) for it in missing], missing)
        self._loaded.update(missing)
        recovery.note_weights()
        count_restarts(missing)

    def _restart(self, lost: StageLost) -> None:
        """As often as it takes: Ray may not know yet that a node has gone, and start them there."""
        seconds = self._stage_actors.restart_seconds(self._faults.restart_seconds)
        waiting = ResourceWait(seconds, self._on_progress)
        while True:
            try:
                return self._stage_actors.start(waiting)
            except NotStarted as error:
                raise self._gave_up(lost, f"{error}; --restart-timeout gives it longer") from error
            except StageLost as error:
                if not waiting.left:
                    raise
                self._stop(error.reasons)
                time.sleep(RETRY_SECONDS)

    def _stop(self, stages: Iterable[int]) -> None:
        self._stage_actors.stop(stages)
        self._loaded.difference_update(stages)

    def _gave_up(self, lost: StageLost, why: str) -> Exception:
        """The first error that a stage itself raised, or one that tells all."""
        for stage, error in lost.reasons.items():
            if isinstance(error, RayTaskError) and error.cause is not None:
                return original_error(error, stage, self.nodes.get(stage, ""))
        return RuntimeError(
            f"{lost}; {why}. What was answered is kept; if a node ran out of memory, lower "
            "--cpu-memory, and run the rest again"
        )

    def _each(self, method: str, *arguments: Any) -> list:
        """Every stage's answer."""
        self._stage_actors.start()
        answers = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        return get_results(answers, self.nodes)


def node_address() -> str:
    """Of the interface that Ray uses here."""
    return ray.util.get_node_ip_address()
