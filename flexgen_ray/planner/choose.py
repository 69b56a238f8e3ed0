"""The front of the planner: `choose_policy` settles every stage's policy for a run.

A policy has one of three origins. It is *given* by the user. Or it is *planned*, by linear
programming and simulation (search.py), where the rates of every machine are known: measured by
`flexgen-ray calibrate`, or assumed from a preset for the GPU. Or the tiers are *filled*, fastest
first (fill.py), which needs no rates.

The module knows machines as they were probed, and the lengths of a job's requests; it runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from math import ceil
from statistics import fmean

from flexgen_ray.config import Budget, HardwareSpec, Policy, Workload
from flexgen_ray.cost.ops import sampling_share
from flexgen_ray.hardware.known import ASSUMED
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import check_budgets
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.expert_slots import with_expert_slots
from flexgen_ray.planner.fill import (
    PREFIX_TIERS,
    fill_tiers,
    may_hold_prefixes,
    place_prefixes,
    with_spare_pages,
)
from flexgen_ray.planner.forecast import (
    NOTHING_FITS,
    Forecast,
    explain_no_forecast,
    suggest_compression,
)
from flexgen_ray.planner.grid import SearchSpace
from flexgen_ray.planner.pipeline_plan import ModelRates, PipelinePlan, PlannedJob, StageDevice
from flexgen_ray.planner.search import Infeasible, Planner, find_best_plan
from flexgen_ray.planner.stage_policies import StagePolicies, split_layers_evenly
from flexgen_ray.request import EXPECTED_TOKENS, Request
from flexgen_ray.runtime.prefixes import NOTHING_SHARED, SharedPrompts, measure_sharing
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.schedule.zigzag import StageLayers
from flexgen_ray.units import format_seconds

USUAL_SHARE = 0.9  # A request is long if it is longer than this share of all requests.
OPEN_GROWTH = 4  # spare memory is for answers without max_tokens of up to so many times the guess
LONG_SECONDS = 600  # Suggest lossy options only for runs that take longer.

RequestName = Callable[[int], str]


def numbered_request(index: int) -> str:
    """Name of a request for people, where it has none of its own."""
    return f"request {index}"


class Origin(Enum):
    """The way in which a policy came about."""

    GIVEN = "given"
    PLANNED = "planned"
    FILLED = "filled"


@dataclass(frozen=True)
class PolicyChoice:
    """The chosen policies.

    stages: a plan for each stage, which has its policy.
    forecast: the predicted times of the whole pipeline, None if rates are unknown.
    rates: rates of each stage's device if the policy was planned, else empty.
    notes: lines for people.
    """

    origin: Origin
    stages: list[StagePlan]
    forecast: PipelinePlan | None = None
    rates: list[HardwareSpec] = field(default_factory=list)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanningProblem:
    """Everything that the choice of a policy depends on.

    workload, stages_disk, hops_on_device: as in StagePlan.
    machines, budgets: one for each stage; a machine's budget is the stage's share of its memory.
    requests: the job's requests. request_name: gives a request's name for people, from its index;
    if not None, the choice says how much memory the longest requests cost.
    base: the parts of a policy that are never chosen, its lossy options.
    max_seconds: limit on a block's latency. shared: prefixes of the requests' prompts, which are
    computed once.
    """

    config: ModelConfig
    dtype: str
    workload: Workload
    machines: Sequence[Machine]
    budgets: list[Budget]
    requests: Sequence[Request]
    base: Policy = Policy()
    max_seconds: float | None = None
    stages_disk: bool = False
    hops_on_device: bool = False
    request_name: RequestName | None = None
    shared: SharedPrompts = NOTHING_SHARED

    @property
    def has_rates(self) -> bool:
        """True if the rates of every machine are known for the dtype."""
        known = (machine.hardware for machine in self.machines)
        return all(hardware and hardware.has_rates_for(self.dtype) for hardware in known)

    @property
    def answers(self) -> list[Request]:
        """The requests, each as often as it has answers."""
        return [request for request in self.requests for _ in range(request.params.n)]

    @property
    def final_lengths(self) -> list[int]:
        """Tokens that each answer's sequence may end with, as far as memory is worth its while.

        One without max_tokens counts with OPEN_GROWTH times its expected length.
        """
        return [
            min(answer.max_seq_len, prompt_len + OPEN_GROWTH * expected)
            for answer in self.answers
            for prompt_len, expected in [answer.expected_lengths]
        ]

    def without_sharing(self) -> PlanningProblem:
        """The problem in which each row has the whole prompt to itself."""
        mean = planned_job(self.answers).together_len
        workload = replace(self.workload, sharing=None, mean_seq_len=mean)
        return replace(self, workload=workload, shared=NOTHING_SHARED)

    def stage_plans(self, policies: StagePolicies) -> list[StagePlan]:
        """A plan for each stage by these policies; budgets are not checked.

        Raises ValueError if the policies are for another number of stages or of layers.
        """
        count = len(self.budgets)
        layers = policies.layers or split_layers_evenly(self.config, count)
        stages = StageLayers.split(self.config.num_layers, layers)
        if len(stages) != count:
            raise ValueError(
                f"the policy's layers are for {len(stages)} stages, but there are {count}"
            )
        return [
            StagePlan(
                self.config,
                stage,
                policy,
                self.workload,
                self.dtype,
                self.stages_disk,
                policy.blocks_in_flight or 1,
                self.hops_on_device,
            )
            for stage, policy in zip(stages, policies.for_stages(count), strict=True)
        ]

    def planner(self, base: Policy) -> Planner:
        """A planner for policies with these lossy options. The machines' rates must be known."""
        # Plan for average lengths, but with room for the longest that the workload allows.
        longest, prompt_len = self.workload.max_seq_len, self.workload.max_prompt_len
        job = replace(
            planned_job(self.answers, self.shared),
            prompt_len=prompt_len,
            max_tokens=max(longest - prompt_len, 1),
        )
        devices = []
        for number, (machine, budget) in enumerate(zip(self.machines, self.budgets, strict=True)):
            hardware = machine.hardware
            assert hardware is not None
            rates = ModelRates(hardware, self.config, self.dtype, base.cache_bits)
            # Each stage is a node of its own: its budget is its share of the host's already.
            devices.append(StageDevice(rates, budget, f"stage {number}", hardware.core_shares))
        return Planner(
            self.config,
            tuple(devices),
            job,
            self.dtype,
            SearchSpace(base=base, max_seconds=self.max_seconds),
            stages_disk=self.stages_disk,
            hops_on_device=self.hops_on_device,
            resumes=self.workload.resumes,
        )


def choose_policy(problem: PlanningProblem, policies: StagePolicies | None = None) -> PolicyChoice:
    """The given policies; without any, planned ones if rates are known, else filled ones.

    Raises ValueError, which says what is missing, if nothing fits.
    """
    try:
        choice = _choose(problem, policies)
    except ValueError as error:
        why = None
        if problem.request_name is not None:
            why = _describe_open(problem, policies, problem.request_name)
            if why is None and policies is None:
                why = _describe_longest(problem, problem.request_name)
        if why is None:
            raise
        raise ValueError(f"{error}; {why}") from error
    # With max_model_len, later calls may have other lengths.
    final = None if problem.request_name is None else problem.final_lengths
    return replace(choice, stages=with_spare_pages(choice.stages, problem.budgets, final))


def _choose(problem: PlanningProblem, policies: StagePolicies | None) -> PolicyChoice:
    if not problem.has_rates:
        return _choose_without_rates(problem, policies)
    planner = problem.planner(problem.base)
    if policies is not None:
        return _predict(problem, policies, planner)
    try:
        plan = find_best_plan(planner)
    except Infeasible:
        if problem.workload.sharing:
            return _choose(problem.without_sharing(), policies)
        # Assumed rates come with assumed limits; without a latency bound a run can still try.
        if problem.max_seconds is not None or problem.machines[0].rates_source != ASSUMED:
            raise
        return PolicyChoice(Origin.FILLED, _filled_stages(problem), notes=(NOTHING_FITS,))
    planned = StagePolicies(
        tuple(stage.policy for stage in plan.stages),
        tuple(stage.num_decoder_layers for stage in plan.stages),
    )
    forecast = Forecast.of(plan, problem.answers)
    suggestion = _suggest_compression(problem, forecast)
    notes = (forecast.line(problem.machines[0]), *([suggestion] if suggestion else []))
    rates = planner.rates(plan.stages[0].policy)
    stages = _given_stages(problem, planned, plan.stages[0].prefix_tier)
    return PolicyChoice(Origin.PLANNED, stages, plan, rates, notes)


def _choose_without_rates(problem: PlanningProblem, policies: StagePolicies | None) -> PolicyChoice:
    """Given or filled policies, with a note that says why there is no prediction."""
    machine = problem.machines[0]
    if problem.max_seconds is not None:
        raise ValueError(
            f"--max-latency needs a plan, but no rates of {machine.host} in {problem.dtype} are "
            "known; run `flexgen-ray calibrate` first, or give --hardware"
        )
    note = explain_no_forecast(machine, problem.dtype, is_filled=policies is None)
    if policies is None:
        return PolicyChoice(Origin.FILLED, _filled_stages(problem), notes=(note,))
    return PolicyChoice(Origin.GIVEN, _given_stages(problem, policies), notes=(note,))


def _predict(problem: PlanningProblem, policies: StagePolicies, planner: Planner) -> PolicyChoice:
    """Given policies, with their simulated times."""
    stages = _given_stages(problem, policies)
    if problem.workload.sharing and not stages[0].workload.sharing:
        planner = problem.without_sharing().planner(problem.base)
    planner = replace(planner, prefix_tier=stages[0].prefix_tier)
    layers = tuple(stage.num_decoder_layers for stage in stages)
    plan = planner.simulate(planner.evaluate(layers, [stage.policy for stage in stages]))
    if problem.max_seconds is not None and plan.block_seconds > problem.max_seconds:
        raise ValueError(
            f"the policy's blocks take about {format_seconds(plan.block_seconds)}, more than "
            f"--max-latency {problem.max_seconds:g}; leave --policy out, or raise the bound"
        )
    note = Forecast.of(plan, problem.answers).line(problem.machines[0])
    return PolicyChoice(Origin.GIVEN, stages, plan, notes=(note,))


def _given_stages(
    problem: PlanningProblem, policies: StagePolicies, prefix_tier: str = "gpu"
) -> list[StagePlan]:
    """Plans by these policies, for rows as they enter blocks of this size.

    prefix_tier: the tier where prefixes lie if they fit there.
    """
    stages = problem.stage_plans(policies)
    if problem.workload.mean_seq_len is not None:
        rows = stages[0].num_blocks * stages[0].policy.block_size
        mean = planned_job(problem.answers, problem.shared).mean_seq_len(rows)
        workload = replace(problem.workload, mean_seq_len=mean)
        stages = [replace(stage, workload=workload) for stage in stages]
    if problem.workload.sharing:
        tiers = prefix_tier, *(tier for tier in PREFIX_TIERS if tier != prefix_tier)
        placed = place_prefixes(stages, problem.budgets, tiers)
        return placed or _given_stages(problem.without_sharing(), policies)
    check_budgets(stages, problem.budgets)
    return stages


def _filled_stages(problem: PlanningProblem) -> list[StagePlan]:
    """Filled tiers, with what prompts share on the GPU or else in host memory, if that fits."""
    nbytes = min(budget.gpu for budget in problem.budgets)
    base = with_expert_slots(problem.base, problem.config, problem.dtype, nbytes)
    plans = problem.stage_plans(StagePolicies((base,)))
    for tier in PREFIX_TIERS if problem.workload.sharing else ():
        with suppress(ValueError):
            placed = [replace(plan, prefix_tier=tier) for plan in plans]
            stages = fill_tiers(placed, problem.budgets)
            if all(map(may_hold_prefixes, stages)):
                return stages
    if problem.workload.sharing:
        return _filled_stages(problem.without_sharing())
    return fill_tiers(plans, problem.budgets)


def _suggest_compression(problem: PlanningProblem, forecast: Forecast) -> str | None:
    """A line for people if 4-bit weights and cache would make a long run much faster."""
    policies = [stage.policy for stage in forecast.plan.stages]
    is_resident = all(policy.weights.gpu == policy.cache.gpu == 1 for policy in policies)
    is_quantized = problem.base != Policy() or problem.config.expert_format
    if is_quantized or is_resident or forecast.seconds < LONG_SECONDS:
        return None
    planner = problem.planner(Policy().compressed(weight_bits=4, cache_bits=4))
    # Try blocks of the same shape: larger ones may be faster still, but take longer to plan.
    plan = planner.plan(policies[0].compressed(weight_bits=4, cache_bits=4))
    if plan is None:
        return None
    return suggest_compression(forecast, Forecast.of(planner.simulate(plan), problem.answers))


def _describe_open(
    problem: PlanningProblem, policies: StagePolicies | None, request_name: RequestName
) -> str | None:
    """A line for people if all fits but an answer without max_tokens at its longest; else None."""
    without = [request for request in problem.requests if request.is_open]
    longest = max(sum(request.expected_lengths) for request in problem.requests)
    workload = replace(problem.workload, max_seq_len=longest)
    if not without or not _fits(replace(problem, workload=workload), policies):
        return None
    have = f" and {len(without) - 1:,} more have" if len(without) > 1 else " has"
    return (
        f"{request_name(without[0].index)}{have} no max_tokens, so memory must suffice for an "
        f"answer that fills the context of {without[0].max_seq_len:,} tokens; set max_tokens (with "
        f"{EXPECTED_TOKENS} they would fit) or max_model_len"
    )


def _fits(problem: PlanningProblem, policies: StagePolicies | None) -> bool:
    """True if the given policies fit; without any, if filled tiers do."""
    try:
        _filled_stages(problem) if policies is None else _given_stages(problem, policies)
    except ValueError:
        return False
    return True


def _describe_longest(problem: PlanningProblem, request_name: RequestName) -> str | None:
    """A line for people if something fits without the longest requests; else None."""
    requests = problem.requests
    lengths = sorted(request.max_seq_len for request in requests)
    usual = lengths[ceil(USUAL_SHARE * len(lengths)) - 1]
    others = [request for request in requests if request.max_seq_len <= usual]
    if len(others) == len(requests):
        return None
    prompt_len = max(len(request.prompt_token_ids) for request in others)
    workload = replace(
        problem.workload,
        max_prompt_len=prompt_len,
        max_seq_len=usual,
        mean_seq_len=planned_job(others, problem.shared).together_len,
    )
    num_without = _num_fitting(replace(problem, workload=workload))
    if not num_without:
        return None
    longest = max(requests, key=lambda request: request.max_seq_len)
    size = f"{len(longest.prompt_token_ids)} prompt tokens, max_tokens {longest.max_tokens}"
    num_long = len(requests) - len(others)
    return (
        f"{request_name(longest.index)} ({size}) is the longest request, and takes memory for "
        f"{lengths[-1]} tokens; without "
        + (f"these {num_long} longest requests" if num_long > 1 else "it")
        + f" {usual} tokens would do, and {num_without} sequences would fit"
    )


def _num_fitting(problem: PlanningProblem) -> int:
    """Number of sequences of all blocks in flight if the tiers are filled; 0 if nothing fits."""
    try:
        plan = _filled_stages(problem)[0]
    except ValueError:
        return 0
    return plan.num_blocks * plan.policy.num_gpu_batches * plan.policy.gpu_batch_size


def planned_job(requests: Sequence[Request], shared: SharedPrompts = NOTHING_SHARED) -> PlannedJob:
    """The job of these requests: their number, and their longest and expected lengths.

    shared: prefixes of their prompts, whose tokens don't count.
    """
    drawn = fmean(sampling_share(it.params.temperature, it.params.top_k) for it in requests)
    lengths = shared.own_lengths(requests)
    job = PlannedJob.of(lengths, drawn=drawn, sharing=measure_sharing(requests, shared))
    longest = max(request.max_seq_len for request in requests)
    return replace(job, max_tokens=max(longest - job.prompt_len, 1))
