"""What runs an LLM's requests: stages in this process, or each in a Ray actor."""

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
    """What a pipeline in this process and a Driver of Ray actors have in common."""

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


def start_backend(wanted: Deployment, on_progress: OnProgress) -> tuple[Backend, int]:
    """The stages, and the host memory that Ray takes beside them on its head's node."""
    if not wanted.use_ray:
        count = 1 if wanted.num_stages == "auto" else int(wanted.num_stages)
        return LocalPipeline(count, wanted.threads), 0
    on_progress(Progress(phase="starting Ray"))
    from flexgen_ray.distributed.driver import Driver
    from flexgen_ray.distributed.own_cluster import only_gpu

    with only_gpu(wanted.device, wanted.address) as kind:
        driver = Driver(replace(wanted, device=kind), on_progress)
    return driver, driver.reserved_cpu_bytes


def spans(backend: Backend, stage: int) -> Iterator[Span]:
    """The last run's ops, if they were kept, in pieces that a small object store can hold."""
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
    """Fields of a StageSpec that say how to run."""
    return {
        "executor": executor,
        "hardware": None if isinstance(hardware, str) else hardware,
        "run_wrapper": run_wrapper,
        "keeps_spans": trace,
    }
