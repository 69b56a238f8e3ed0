"""Backends that run an LLM's stages: in this process, or each stage in a Ray actor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from flexgen_ray.config import Deployment, HardwareSpec
from flexgen_ray.request import Finished, Request
from flexgen_ray.runtime.events import OnProgress, Progress, Recovery
from flexgen_ray.runtime.meter import StageMeasurements
from flexgen_ray.runtime.modelled import RunWrapper
from flexgen_ray.runtime.pipeline import LocalPipeline
from flexgen_ray.runtime.stage import StageSpec
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.schedule.ops import Span

SPANS_PER_CALL = 50_000


class Backend(Protocol):
    """Stages that run requests: a LocalPipeline in this process, or a Driver of Ray actors.

    Calls come in this order: probe, load, then add and run, again and again. Lists have an item a
    stage. probe: describes the machines. rates: measures the first stage's machine. load: loads
    weights. add: queues requests. run: answers them; yields events. used: bytes in use, by tier and
    purpose. measured: busy seconds of the last run. spans: a stage's timed ops, if they were kept.
    abort: ends a run, and drops the weights. recoveries: stages that the last run replaced.
    """

    @property
    def num_stages(self) -> int: ...
    @property
    def resumes(self) -> bool: ...
    @property
    def uses_nccl(self) -> bool: ...

    recoveries: list[Recovery]

    def probe(self, device: str, offload_dir: str) -> list[Machine]: ...
    def rates(self, spec: StageSpec) -> HardwareSpec: ...
    def load(self, specs: list[StageSpec], on_progress: OnProgress) -> None: ...
    def add(self, requests: list[Request]) -> None: ...
    def run(self) -> Iterator[Finished | Progress]: ...
    def used(self) -> list[dict[str, dict[str, int]]]: ...
    def measured(self) -> list[StageMeasurements]: ...
    def spans(self, stage: int, first: int, count: int) -> list[Span]: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


def start_backend(deployment: Deployment, on_progress: OnProgress) -> tuple[Backend, int]:
    """Start the backend that a deployment asks for.

    Returns it with the bytes of host memory that Ray itself may take on this machine.
    """
    if not deployment.use_ray:
        count = 1 if deployment.num_stages == "auto" else int(deployment.num_stages)
        return LocalPipeline(count, deployment.threads), 0
    on_progress(Progress(phase="starting Ray"))
    from flexgen_ray.distributed.driver import Driver
    from flexgen_ray.distributed.own_cluster import only_gpu

    with only_gpu(deployment.device, deployment.address) as kind:
        driver = Driver(replace(deployment, device=kind), on_progress)
    return driver, driver.reserved_cpu_bytes


def spans(backend: Backend, stage: int) -> Iterator[Span]:
    """Timed ops of a stage's last run, if they were kept.

    They are fetched in pieces, each small enough for Ray's object store.
    """
    first = 0
    while piece := backend.spans(stage, first, SPANS_PER_CALL):
        yield from piece
        first += len(piece)


def execution(
    executor: str,
    hardware: HardwareSpec | str | None,
    run_wrapper: RunWrapper | None,
    trace: bool,
) -> dict[str, Any]:
    """Fields of StageSpec that don't depend on a plan.

    executor: "async" or "serial". hardware: rates of which ops' times are modelled; "measured" is
    filled in later. run_wrapper: function, by import path, through which ops run. trace: keep each
    op's times.
    """
    return {
        "executor": executor,
        "hardware": None if isinstance(hardware, str) else hardware,
        "run_wrapper": run_wrapper,
        "keeps_spans": trace,
    }
