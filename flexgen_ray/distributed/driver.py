"""Driver of a pipeline of stages on a Ray cluster: starts, loads, feeds, mends and stops them.

A run, step by step:

1. `Driver(...)` connects to a cluster or starts one, reserves a bundle of cores and GPUs for each
   stage, and starts an actor in each bundle (stage_actors.py).
2. `load` gives every actor its StageSpec; all load their weights at the same time.
3. `add` records requests as unfinished. `run` begins an attempt (attempt.py) under a new *epoch*:
   all actors join a ring through a store in this process, and the first one gets the requests.
   Stages of different epochs can't meet, so nothing of an earlier attempt gets into this one.
4. Every 0.05 s the first stage reports new tokens and finished requests. The driver isn't on a
   token's path: it keeps each unfinished request's tokens, and passes the reports on.

If a stage dies, raises an error or stands still, the attempt raises StageLost with the stages at
fault, and `run` goes on:

5. The lost stages' processes are ended. The others leave their ring and keep their weights.
6. New actors start in the bundles of the lost ones; if a node has gone, Ray moves its bundles to
   another node, once it has noticed. They load their weights.
7. Step 3 again. Unfinished requests go on from the tokens that the driver has kept, which are
   prefilled as if they belonged to the prompt.

A run ends with an error after `max_restarts` recoveries, or if stages don't start in time.
Knows Ray and faults; not what a stage computes.
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
    """Backend whose stages are actors, on a cluster that runs already or on one of its own."""

    def __init__(self, deployment: Deployment, on_progress: OnProgress = ignore_progress) -> None:
        self._transport = deployment.transport
        self._faults = deployment.faults
        self._on_progress = on_progress
        self._specs: list[StageSpec] = []
        self._loaded: set[int] = set()  # stages that have their weights
        self._epoch = 0
        self._store: RendezvousStore | None = None
        self._unfinished: dict[int, Request] = {}
        self.recoveries: list[Recovery] = []
        was_connected = ray.is_initialized()
        own_cluster = connect(deployment.address)
        self._started_ray = own_cluster is not None and not was_connected
        self._stage_actors = StageActors(own_cluster, on_progress)
        # An LLM that is dropped without `close` gives its resources back as well.
        self._release = weakref.finalize(self, self._stage_actors.close)
        try:
            num_stages = None if deployment.num_stages == "auto" else int(deployment.num_stages)
            threads = deployment.threads or threads_set_by_user(os.environ)
            on_progress(Progress(phase="waiting for room on the Ray cluster"))
            self._stage_actors.reserve(
                deployment.device, num_stages, threads, deployment.wait_seconds
            )
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
        """True if a run goes on after a stage is lost."""
        return self._faults.max_restarts > 0

    @property
    def uses_nccl(self) -> bool:
        """True if hidden states go from GPU to GPU, for which every stage needs a GPU.

        Raises ValueError if NCCL was asked for and a stage has no GPU.
        """
        has_gpus = all(bundle.num_gpus for bundle in self._bundles)
        if self._transport == "nccl" and not has_gpus:
            raise ValueError("--transport nccl, but not every stage has a GPU; use auto or gloo")
        return self.num_stages > 1 and has_gpus and self._transport != "gloo"

    @property
    def reserved_cpu_bytes(self) -> int:
        """Host memory that the object store may take, if this driver started Ray; else 0."""
        return OBJECT_STORE_BYTES if self._started_ray else 0

    def probe(self, device: str, offload_dir: str) -> list[Machine]:
        """Describe each stage's machine; of its GPUs, a stage sees only the one it was given."""
        return self._call_each("probe", device.partition(":")[0], offload_dir)

    def pids(self) -> list[int]:
        """Number of each stage's process on its node."""
        return self._call_each("pid")

    def rates(self, spec: StageSpec) -> HardwareSpec:
        """Measure the first stage's machine."""
        self._stage_actors.start()
        return get_results([self.actors[0].rates.remote(spec)], self.nodes)[0]

    def load(self, specs: list[StageSpec], on_progress: OnProgress = ignore_progress) -> None:
        """Load every stage's weights, at the same time."""
        self._stage_actors.start()
        self._specs = specs
        try:
            load_stages(self.actors, specs, self.nodes, on_progress)
        except RuntimeError:
            # A process may have died; the next load begins with new ones.
            self.abort()
            raise
        self._loaded = set(range(self.num_stages))

    def add(self, requests: list[Request]) -> None:
        """Queue requests for the next run."""
        for request in requests:
            tokens, scores = [*request.generated], [*request.scores]
            self._unfinished[request.index] = replace(request, generated=tokens, scores=scores)

    def run(self) -> Generator[Finished | Progress]:
        """Answer the queued requests; yields the first stage's events, over all attempts.

        Raises the error that a stage raised, or RuntimeError, if lost stages can't be replaced.
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
                for event in self._begin_attempt():
                    self._record(event)
                    yield event
            except StageLost as error:
                lost = StageLost(error.reasons, self.nodes)

    def used(self) -> list[dict[str, dict[str, int]]]:
        """Bytes that each stage uses: {tier: {purpose: bytes}}."""
        return self._call_each("used")

    def measured(self) -> list[StageMeasurements]:
        """Busy time of each stage's lanes in the last run."""
        return self._call_each("measured")

    def spans(self, stage: int, first: int, count: int) -> list[Span]:
        """Timed ops of a stage's last run, at most `count` of them from number `first` on."""
        return get_results([self.actors[stage].spans.remote(first, count)], self.nodes, stage)[0]

    def abort(self) -> None:
        """End a run by ending the actors' processes; the next call starts new ones."""
        self._unfinished.clear()
        self._stop(range(len(self.actors)))
        self._stage_actors.actors = []

    def close(self) -> None:
        """Stop the actors, give back their bundles, and stop Ray if it runs for this LLM alone."""
        self._unfinished.clear()
        self._loaded.clear()
        self._release()

    def _begin_attempt(self) -> Attempt:
        """Start a run of what is unfinished, in a new ring if there are several stages."""
        if self.num_stages > 1:
            self._join_ring()
        requests = list(self._unfinished.values())
        for first in range(0, len(requests), REQUESTS_PER_CALL):
            piece = requests[first : first + REQUESTS_PER_CALL]
            await_stages([self.actors[0].add.remote(piece)], [0], ANSWER_SECONDS)
        return Attempt(self.actors, self._faults.stall_seconds)

    def _join_ring(self) -> None:
        """Let all actors join a ring of the next epoch; StageLost for those that don't."""
        stages = range(self.num_stages)
        self._epoch += 1
        store = self._store = self._store or RendezvousStore(node_address())
        ring = self.num_stages, self.uses_nccl, store.secret
        rendezvous = Rendezvous(store.host, store.port, self._epoch, *ring)
        # Find dead actors first: at the rendezvous their neighbours would wait for them.
        await_stages([actor.pid.remote() for actor in self.actors], stages, ANSWER_SECONDS)
        joining = [actor.join.remote(rendezvous, rank) for rank, actor in enumerate(self.actors)]
        await_stages(joining, stages, ANSWER_SECONDS)

    def _record(self, event: Finished | Progress) -> None:
        """Keep each unfinished request's tokens and scores, to resume from them."""
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
        """Replace the lost stages and load their weights; the others keep theirs."""
        if len(self.recoveries) >= self._faults.max_restarts:
            raise self._final_error(lost, f"{self._faults.max_restarts} restarts were not enough")
        recovery = Recovery(str(lost), sorted(lost.reasons))
        self.recoveries.append(recovery)
        self._stop(lost.reasons)
        left = [stage for stage, actor in enumerate(self.actors) if actor is not None]
        await_stages([self.actors[stage].leave.remote() for stage in left], left, LEAVE_SECONDS)
        self._restart(lost)
        recovery.note_restart()
        # After a recovery that was itself cut short, more stages than the lost ones lack weights.
        missing = [stage for stage in range(self.num_stages) if stage not in self._loaded]
        loading = [self.actors[stage].load.remote(self._specs[stage]) for stage in missing]
        await_stages(loading, missing)
        self._loaded.update(missing)
        recovery.note_weights()
        count_restarts(missing)

    def _restart(self, lost: StageLost) -> None:
        """Start the lost stages, again and again within the time for restarts.

        Until Ray has noticed that a node has gone, it starts actors there, and these are lost too.
        """
        seconds = self._stage_actors.restart_seconds(self._faults.restart_seconds)
        waiting = ResourceWait(seconds, self._on_progress)
        while True:
            try:
                return self._stage_actors.start(waiting)
            except NotStarted as error:
                why = f"{error}; --restart-timeout gives it longer"
                raise self._final_error(lost, why) from error
            except StageLost as error:
                if not waiting.left:
                    raise
                self._stop(error.reasons)
                time.sleep(RETRY_SECONDS)

    def _stop(self, stages: Iterable[int]) -> None:
        self._stage_actors.stop(stages)
        self._loaded.difference_update(stages)

    def _final_error(self, lost: StageLost, why: str) -> Exception:
        """Error that ends the run: the first that a stage raised, else one that describes all."""
        for stage, error in lost.reasons.items():
            if isinstance(error, RayTaskError) and error.cause is not None:
                return original_error(error, stage, self.nodes.get(stage, ""))
        return RuntimeError(
            f"{lost}; {why}. What was answered is kept; if a node ran out of memory, lower "
            "--cpu-memory, and run the rest again"
        )

    def _call_each(self, method: str, *arguments: Any) -> list:
        """Call a method of every stage's actor; returns the answers in the order of the stages."""
        self._stage_actors.start()
        answers = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        return get_results(answers, self.nodes)


def node_address() -> str:
    """IP address of the network interface that Ray uses on this node."""
    return ray.util.get_node_ip_address()
