"""The policy of a run where nobody gives one: planned, if the machines' rates are known.

`flexgen-ray calibrate` makes them known, node by node. Knows machines as they were found and what a
job's requests need; no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from flexgen_ray.config import Budget, HardwareSpec, ModelConfig
from flexgen_ray.cost.hardware import ModelRates
from flexgen_ray.cost.pipeline_plan import Device, Job, Plan
from flexgen_ray.cost.planner import Planner, choose
from flexgen_ray.request import Request
from flexgen_ray.runtime.crews import divide_cores
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.schedule.ops import Lane
from flexgen_ray.stage_policies import StagePolicies

_WITHOUT_CORES = (Lane.DISK_READ, Lane.DISK_WRITE, Lane.RECV, Lane.SEND, Lane.DEVICE_AHEAD)


@dataclass(frozen=True)
class Run:
    """What of a run a plan depends on, beside machines and requests; as in Planner."""

    config: ModelConfig
    dtype: str
    stages_disk: bool
    hops_on_device: bool
    resumes: bool


@dataclass(frozen=True)
class Planned:
    """A plan, and the rates of each stage's machine for its shapes."""

    plan: Plan
    rates: list[HardwareSpec]

    @property
    def policies(self) -> StagePolicies:
        stages = self.plan.stages
        layers = tuple(stage.num_decoder_layers for stage in stages)
        return StagePolicies(tuple(stage.policy for stage in stages), layers)


def plan_run(
    run: Run, machines: Sequence[Machine], budgets: Sequence[Budget], requests: Sequence[Request]
) -> Planned | None:
    """None if a machine's rates aren't known for this dtype.

    Raises Infeasible, with what lacks, if nothing fits.
    """
    if any(it.hardware is None or not it.hardware.knows(run.dtype) for it in machines):
        return None
    devices = tuple(
        _device(run, number, *pair)
        for number, pair in enumerate(zip(machines, budgets, strict=True))
    )
    planner = Planner(
        run.config,
        devices,
        job_of(requests),
        run.dtype,
        stages_disk=run.stages_disk,
        hops_on_device=run.hops_on_device,
        resumes=run.resumes,
    )
    plan = choose(planner)
    return Planned(plan, planner.rates(plan.stages[0].policy))


def _device(run: Run, number: int, machine: Machine, budget: Budget) -> Device:
    """Its budget is its share of its host's memory already."""
    assert machine.hardware is not None
    rates = ModelRates.of(machine.hardware, run.config, run.dtype)
    return Device(rates, budget, f"stage {number}", _core_shares(machine))


def job_of(requests: Sequence[Request]) -> Job:
    """What they need at most, and on average."""
    prompts = [len(request.prompt_token_ids) for request in requests]
    longest = max(request.max_seq_len for request in requests)
    return Job(
        len(requests),
        max(prompts),
        max(longest - max(prompts), 1),
        fmean(prompts),
        fmean(request.params.max_tokens for request in requests),
    )


def _core_shares(machine: Machine) -> tuple[tuple[str, float], ...]:
    """Without a GPU every lane but the disk's keeps cores busy."""
    if machine.device == "cuda":
        return ()
    cores = divide_cores(machine.num_threads, on_cuda=False, attends_on_host=True)
    kept = {Lane.DEVICE: cores.device, Lane.HOST: cores.host}
    return tuple(
        (lane.value, kept.get(lane, 1) / cores.total) for lane in Lane if lane not in _WITHOUT_CORES
    )
