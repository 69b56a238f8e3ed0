"""The policy of a run where nobody gives one: planned, if the machines' rates are known.

`flexgen-ray calibrate` makes them known, node by node. Knows machines as they were found and what a
job's requests need; no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from flexgen_ray.config import Budget, HardwareSpec, Policy, Workload
from flexgen_ray.cost.between import drawn_share
from flexgen_ray.cost.grid import Search
from flexgen_ray.cost.pipeline_plan import Device, Job, ModelRates, Plan
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.planner import Planner, choose
from flexgen_ray.model_config import ModelConfig
from flexgen_ray.request import Request
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.stage_policies import StagePolicies, plan_stages


@dataclass(frozen=True)
class Settled:
    """Each stage's plan; if it was predicted, the prediction and the rates that it rests on."""

    stages: list[StagePlan]
    predicted: Plan | None = None
    rates: list[HardwareSpec] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What of a run its plan depends on, beside machines and requests; as in StagePlan. base: has
    what of a policy is never chosen: its lossy options."""

    config: ModelConfig
    dtype: str
    stages_disk: bool
    hops_on_device: bool
    workload: Workload
    base: Policy = Policy()

    def plan(
        self,
        policies: StagePolicies | None,
        machines: Sequence[Machine],
        budgets: list[Budget],
        requests: Sequence[Request],
    ) -> Settled:
        """By the given policies; without any, planned where every machine's rates are known for
        this dtype, and elsewhere the tiers are filled, fastest first.

        Raises ValueError, with what lacks, if nothing fits.
        """
        are_known = all(it.hardware and it.hardware.knows(self.dtype) for it in machines)
        if policies is not None or not are_known:
            return Settled(self._stages(policies, budgets))
        devices = tuple(map(self._device, range(len(machines)), machines, budgets))
        planner = Planner(
            self.config,
            devices,
            self._job(requests),
            self.dtype,
            Search(base=self.base),
            stages_disk=self.stages_disk,
            hops_on_device=self.hops_on_device,
            resumes=self.workload.resumes,
        )
        plan = choose(planner)
        chosen = StagePolicies(
            tuple(stage.policy for stage in plan.stages),
            tuple(stage.num_decoder_layers for stage in plan.stages),
        )
        return Settled(self._stages(chosen, budgets), plan, planner.rates(plan.stages[0].policy))

    def _job(self, requests: Sequence[Request]) -> Job:
        """What the requests need on average, and at most what the workload has room for."""
        longest, prompt_len = self.workload.max_seq_len, self.workload.max_prompt_len
        max_tokens = max(longest - prompt_len, 1)
        return replace(job_of(requests), prompt_len=prompt_len, max_tokens=max_tokens)

    def _stages(self, policies: StagePolicies | None, budgets: list[Budget]) -> list[StagePlan]:
        return plan_stages(
            self.config, policies, self.workload, self.dtype, budgets, self.stages_disk,
            self.hops_on_device, self.base,
        )  # fmt: skip

    def _device(self, number: int, machine: Machine, budget: Budget) -> Device:
        """Its budget is its share of its host's memory already."""
        assert machine.hardware is not None
        hardware, bits = machine.hardware, self.base.cache_bits
        rates = ModelRates.of(hardware, self.config, self.dtype, bits)
        return Device(rates, budget, f"stage {number}", hardware.core_shares)


def job_of(requests: Sequence[Request]) -> Job:
    """What they need at most, and on average."""
    prompts = [len(request.prompt_token_ids) for request in requests]
    longest = max(request.max_seq_len for request in requests)
    return Job(
        len(requests),
        max(prompts),
        max(longest - max(prompts), 1),
        fmean(prompts),
        fmean(request.max_tokens for request in requests),
        fmean(drawn_share(it.params.temperature, it.params.top_k) for it in requests),
    )
