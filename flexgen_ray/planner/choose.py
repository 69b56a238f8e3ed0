"""The policy of a run where nobody gives one: planned, if the machines' rates are known.

`flexgen-ray calibrate` makes them known, node by node; a GPU with a preset has assumed ones. Knows
machines as they were probed and what a job's requests need; no Ray.

Requests that make every slot longer than others need, and how much smaller the block gets.

Knows requests and how tiers are filled; runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from statistics import fmean

from flexgen_ray.config import Budget, HardwareSpec, Policy, Workload
from flexgen_ray.cost.ops import drawn_share
from flexgen_ray.hardware.known import ASSUMED
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.forecast import (
    NOTHING_FITS,
    Forecast,
    explain_no_forecast,
    suggest_compression,
)
from flexgen_ray.planner.grid import SearchSpace
from flexgen_ray.planner.pipeline_plan import ModelRates, PipelinePlan, PlannedJob, StageDevice
from flexgen_ray.planner.search import Infeasible, Planner, find_best_plan
from flexgen_ray.planner.stage_policies import StagePolicies, plan_stages
from flexgen_ray.request import Request
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.units import format_seconds

USUAL_SHARE = 0.9  # of the requests, by whose length the others count as long

Name = Callable[[int], str]


def numbered_request(index: int) -> str:
    """A request by its place, where it has no name of its own."""
    return f"request {index}"


def describe_longest(
    run: PlanningProblem, budgets: list[Budget], requests: Sequence[Request], name: Name
) -> str | None:
    """A line for people if the longest requests make the block smaller; None if they don't.

    Compares the blocks that fill the tiers with and without them, which takes no planner.
    """
    lengths = sorted(request.max_seq_len for request in requests)
    usual = lengths[ceil(USUAL_SHARE * len(lengths)) - 1]
    if lengths[-1] == usual:
        return None
    others = [request for request in requests if request.max_seq_len <= usual]
    prompt_len = max(len(request.prompt_token_ids) for request in others)
    workload = replace(run.workload, max_prompt_len=prompt_len, max_seq_len=usual)
    fit, fit_without = _fit(run, budgets), _fit(replace(run, workload=workload), budgets)
    if fit_without <= fit:
        return None
    longest = max(requests, key=lambda request: request.max_seq_len)
    asks = f"{len(longest.prompt_token_ids)} prompt tokens, max_tokens {longest.max_tokens}"
    few = len(requests) - len(others)
    return (
        f"{name(longest.index)} ({asks}) makes every slot {lengths[-1]} tokens long: memory then "
        f"takes {fit} sequences at a time, and {fit_without}, in slots of {usual} tokens, without "
        + (f"these {few} longest requests" if few > 1 else "it")
    )


def _fit(run: PlanningProblem, budgets: list[Budget]) -> int:
    """Sequences of all blocks in flight."""
    try:
        plan = run.filled(budgets)[0]
    except ValueError:  # not even one
        return 0
    return plan.num_blocks * plan.policy.num_gpu_batches * plan.policy.gpu_batch_size


LONG_SECONDS = 600  # from which a job is worth a suggestion


@dataclass(frozen=True)
class PolicyChoice:
    """Each stage's plan; if it was chosen by a prediction, that and the rates that it rests on.

    notes: lines for people. forecast: the prediction of a policy that was chosen or given."""

    stages: list[StagePlan]
    predicted: PipelinePlan | None = None
    rates: list[HardwareSpec] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    forecast: PipelinePlan | None = None


@dataclass(frozen=True)
class PlanningProblem:
    """What of a run its plan depends on, beside machines and requests; as in StagePlan. base: has
    what of a policy is never chosen: its lossy options. max_seconds: that a block may take."""

    config: ModelConfig
    dtype: str
    stages_disk: bool
    hops_on_device: bool
    workload: Workload
    base: Policy = Policy()
    max_seconds: float | None = None

    def plan(
        self,
        policies: StagePolicies | None,
        machines: Sequence[Machine],
        budgets: list[Budget],
        requests: Sequence[Request],
    ) -> PolicyChoice:
        """By the given policies; without any, planned where every machine's rates are known for
        this dtype, and elsewhere the tiers are filled, fastest first.

        Raises ValueError, with what lacks, if nothing fits.
        """
        if not all(it.hardware and it.hardware.has_rates_for(self.dtype) for it in machines):
            if self.max_seconds is not None:
                raise ValueError(
                    f"--max-latency needs a plan, but no rates of {machines[0].host} in "
                    f"{self.dtype} are known; run `flexgen-ray calibrate` first, or give --hardware"
                )
            note = explain_no_forecast(machines[0], self.dtype, policies is None)
            return PolicyChoice(self._stages(policies, budgets), notes=(note,))
        planner = self._planner(machines, budgets, requests, self.base)
        if policies is not None:
            return self._foretold(self._stages(policies, budgets), planner, machines, requests)
        try:
            plan = find_best_plan(planner)
        except Infeasible:
            if self.max_seconds is not None or machines[0].rates_source != ASSUMED:
                raise
            return PolicyChoice(self._stages(None, budgets), notes=(NOTHING_FITS,))
        chosen = StagePolicies(
            tuple(stage.policy for stage in plan.stages),
            tuple(stage.num_decoder_layers for stage in plan.stages),
        )
        forecast = Forecast.of(plan, requests)
        suggested = self._suggestions(forecast, machines, budgets, requests)
        notes = (forecast.line(machines[0]), *suggested)
        rates = planner.rates(plan.stages[0].policy)
        return PolicyChoice(self._stages(chosen, budgets), plan, rates, notes, plan)

    def _planner(
        self,
        machines: Sequence[Machine],
        budgets: list[Budget],
        requests: Sequence[Request],
        base: Policy,
    ) -> Planner:
        bits = base.cache_bits
        return Planner(
            self.config,
            tuple(
                self._device(number, machine, budget, bits)
                for number, (machine, budget) in enumerate(zip(machines, budgets, strict=True))
            ),
            self._job(requests),
            self.dtype,
            SearchSpace(base=base, max_seconds=self.max_seconds),
            stages_disk=self.stages_disk,
            hops_on_device=self.hops_on_device,
            resumes=self.workload.resumes,
        )

    def _foretold(
        self,
        stages: list[StagePlan],
        planner: Planner,
        machines: Sequence[Machine],
        requests: Sequence[Request],
    ) -> PolicyChoice:
        """A given policy, and how long it will take."""
        layers = tuple(stage.num_decoder_layers for stage in stages)
        plan = planner.simulate(planner.evaluate(layers, [stage.policy for stage in stages]))
        if self.max_seconds is not None and plan.block_seconds > self.max_seconds:
            raise ValueError(
                f"the policy's blocks take about {format_seconds(plan.block_seconds)}, more than "
                f"--max-latency {self.max_seconds:g}; leave --policy out, or raise the bound"
            )
        note = Forecast.of(plan, requests).line(machines[0])
        return PolicyChoice(stages, notes=(note,), forecast=plan)

    def _suggestions(
        self,
        forecast: Forecast,
        machines: Sequence[Machine],
        budgets: list[Budget],
        requests: Sequence[Request],
    ) -> list[str]:
        """A line if 4-bit weights and cache would be much faster."""
        stages = [stage.policy for stage in forecast.plan.stages]
        is_resident = all(it.weights.gpu == it.cache.gpu == 1 for it in stages)
        if self.base != Policy() or is_resident or forecast.seconds < LONG_SECONDS:
            return []
        shape = stages[0].compressed(weight_bits=4, cache_bits=4)
        base = Policy().compressed(weight_bits=4, cache_bits=4)
        packed = self._planner(machines, budgets, requests, base)
        # Blocks of the same shape: larger ones may be faster still, but take longer to plan.
        plan = packed.plan(shape)
        if plan is None:
            return []
        found = suggest_compression(forecast, Forecast.of(packed.simulate(plan), requests))
        return [found] if found else []

    def filled(self, budgets: list[Budget]) -> list[StagePlan]:
        """Each stage's plan if the tiers are filled; ValueError, with what lacks, if none fits."""
        return self._stages(None, budgets)

    def _job(self, requests: Sequence[Request]) -> PlannedJob:
        """The job to plan for: average needs, and at most what the workload has room for."""
        longest, prompt_len = self.workload.max_seq_len, self.workload.max_prompt_len
        max_tokens = max(longest - prompt_len, 1)
        return replace(planned_job(requests), prompt_len=prompt_len, max_tokens=max_tokens)

    def _stages(self, policies: StagePolicies | None, budgets: list[Budget]) -> list[StagePlan]:
        return plan_stages(
            self.config, policies, self.workload, self.dtype, budgets, self.stages_disk,
            self.hops_on_device, self.base,
        )  # fmt: skip

    def _device(
        self, number: int, machine: Machine, budget: Budget, cache_bits: int | None
    ) -> StageDevice:
        """Its budget is its share of its host's memory already."""
        hardware = machine.hardware
        assert hardware is not None
        rates = ModelRates.of(hardware, self.config, self.dtype, cache_bits)
        return StageDevice(rates, budget, f"stage {number}", hardware.core_shares)


def planned_job(requests: Sequence[Request]) -> PlannedJob:
    """What they need at most, and on average."""
    prompts = [len(request.prompt_token_ids) for request in requests]
    longest = max(request.max_seq_len for request in requests)
    return PlannedJob(
        len(requests),
        max(prompts),
        max(longest - max(prompts), 1),
        fmean(prompts),
        fmean(request.max_tokens for request in requests),
        fmean(drawn_share(it.params.temperature, it.params.top_k) for it in requests),
    )
