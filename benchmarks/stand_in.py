"""Stand-ins for models too large to run: small tensors whose ops take the large model's time.

Each stage dispatches the ops of the large model's plan and takes their modelled time, but computes
tokens with tensors of a few values. Knows plans and the emulation; no benchmark.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.emulation import emulated
from flexgen_ray.config import Budget, HardwareSpec, Placement
from flexgen_ray.cost.bound import decoding_rows, visit_seconds
from flexgen_ray.cost.steady import OpDemands
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import Rows
from flexgen_ray.request import Request, SamplingParams
from flexgen_ray.runtime.stage import StageSpec
from flexgen_ray.schedule.ops import Op
from flexgen_ray.schedule.zigzag import zigzag


@dataclass(frozen=True)
class StandIn:
    """A pipeline's plans, to be run as small tensors on emulated hardware.

    plans: of the large model, one a stage. hardware: rates of each stage's machine. middle:
    position of an average decoding row. cell_seconds: wall time that a decoding pass's cell (one
    batch in one layer) of the slowest stage is to take.
    """

    plans: list[StagePlan]
    hardware: list[HardwareSpec]
    middle: int
    cell_seconds: float
    executor: str = "async"

    @property
    def time_scale(self) -> float:
        """Wall seconds that one modelled second takes."""
        slowest = max(
            max(visit_seconds(plan, rates, decoding_rows(plan, self.middle)).values())
            / (len(plan.stage.decoders) * plan.policy.num_gpu_batches)
            for plan, rates in self._pairs()
        )
        return self.cell_seconds / slowest

    def op_times(self) -> dict:
        """Wall time of the ops of a decoding visit of all stages: mean, and share of long ops.

        Python's own time distorts short ops, so results are to be trusted if long ops dominate.
        """
        scale, seconds = self.time_scale, list[float]()
        for plan, rates in self._pairs():
            demands = OpDemands(plan, rates, _always(decoding_rows(plan, self.middle)))
            ops = zigzag(plan.stage, plan.policy.num_gpu_batches, range(1), mixtures=plan.mixtures)
            seconds += [scale * demands(op).seconds for op in ops]
        taken = [each for each in seconds if each]
        long = sum(each for each in taken if each >= 1e-3)
        return {
            "mean_op_ms": round(1e3 * sum(taken) / len(taken), 3),
            "share_of_time_in_ops_of_1_ms_or_more": round(long / sum(taken), 4),
        }

    def specs(self, folder: str) -> list[StageSpec]:
        """Specs that the stages' workers load. folder: place of the offload files."""
        return [
            StageSpec(
                model=None,
                plan=_small(plan),
                budget=Budget(*[2**34] * 3),
                device="cpu",
                offload_dir=folder,
                executor=self.executor,
                spaces=tuple(each.space for each in self.plans),
                number=number,
                **emulated(rates, self.time_scale, stands_for=plan),
            )
            for number, (plan, rates) in enumerate(self._pairs())
        ]

    def _pairs(self) -> list[tuple[StagePlan, HardwareSpec]]:
        return list(zip(self.plans, self.hardware, strict=True))


def alike_requests(count: int, prompt_len: int, max_tokens: int) -> list[Request]:
    """Equal requests, answered greedily to their last token; lengths in tokens."""
    params = SamplingParams(max_tokens, 0.0, ignore_eos=True)
    prompt = [4 + i % 90 for i in range(prompt_len)]
    return [Request(index, prompt, params) for index in range(count)]


def memory_folder() -> str | None:
    """Folder in memory, whose files take no time beyond the modelled one; None without /dev/shm."""
    folder = "/dev/shm"
    return folder if os.access(folder, os.W_OK) else None


def _always(rows: Rows) -> Callable[[Op], Rows]:
    return lambda op: rows


def _small(plan: StagePlan) -> StagePlan:
    """Plan of as many layers whose tensors are tiny, so that all weights lie on the device."""
    config = replace(
        plan.config, hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8,
        vocab_size=96, embedding_size=8,
    )  # fmt: skip
    if config.num_experts:
        config = replace(
            config, num_experts=2, experts_per_token=1, expert_size=8, expert_groups=1,
            chosen_groups=1, shared_expert_size=0, expert_format=None,
        )  # fmt: skip
    policy = replace(plan.policy, weights=Placement(1, 0, 0))
    return replace(plan, config=config, policy=policy, dtype="float32")
