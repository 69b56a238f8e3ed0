"""Stand-ins for models too large to run: small tensors, paced by what the large ones would take.

Each stage is as the plan of the large model says, in modelled bytes and flops, but computes tokens
with tensors of almost nothing. Knows plans and the emulation; no benchmark.
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
    """What runs, what it stands for, and at what pace.

    hardware: of each stage; middle: position of an average decoding row; cell_seconds: wall time of
    a decoding pass's cell that the time scale aims at.
    """

    plans: list[StagePlan]
    hardware: list[HardwareSpec]
    middle: int
    cell_seconds: float
    executor: str = "async"

    @property
    def time_scale(self) -> float:
        """Wall seconds a modelled second."""
        slowest = max(
            max(visit_seconds(plan, its, decoding_rows(plan, self.middle)).values())
            / (len(plan.stage.decoders) * plan.policy.num_gpu_batches)
            for plan, its in self._pairs()
        )
        return self.cell_seconds / slowest

    def op_times(self) -> dict:
        """How long the ops of a decoding visit are in wall time, those of all stages."""
        scale, seconds = self.time_scale, list[float]()
        for plan, its in self._pairs():
            demands = OpDemands(plan, its, _always(decoding_rows(plan, self.middle)))
            ops = zigzag(plan.stage, plan.policy.num_gpu_batches, range(1))
            seconds += [scale * demands(op).seconds for op in ops]
        taken = [it for it in seconds if it]
        long = sum(it for it in taken if it >= 1e-3)
        return {
            "mean_op_ms": round(1e3 * sum(taken) / len(taken), 3),
            "share_of_time_in_ops_of_1_ms_or_more": round(long / sum(taken), 4),
        }

    def specs(self, folder: str) -> list[StageSpec]:
        return [
            StageSpec(
                model=None,
                plan=_small(plan),
                budget=Budget(*[2**34] * 3),
                device="cpu",
                offload_dir=folder,
                executor=self.executor,
                **emulated(its, self.time_scale, stands_for=plan),
            )
            for plan, its in self._pairs()
        ]

    def _pairs(self) -> list[tuple[StagePlan, HardwareSpec]]:
        return list(zip(self.plans, self.hardware, strict=True))


def alike_requests(count: int, prompt_len: int, max_tokens: int) -> list[Request]:
    """So many, all alike."""
    params = SamplingParams(max_tokens, 0.0, ignore_eos=True)
    prompt = [4 + i % 90 for i in range(prompt_len)]
    return [Request(index, prompt, params) for index in range(count)]


def memory_folder() -> str | None:
    """One whose files take no time beyond what the model says, if there is one."""
    folder = "/dev/shm"
    return folder if os.access(folder, os.W_OK) else None


def _always(rows: Rows) -> Callable[[Op], Rows]:
    return lambda op: rows


def _small(plan: StagePlan) -> StagePlan:
    """As many layers, of almost nothing, so that their weights need no place but the device."""
    config = replace(
        plan.config, hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8,
        vocab_size=96, embedding_size=8,
    )  # fmt: skip
    policy = replace(plan.policy, weights=Placement(1, 0, 0))
    return replace(plan, config=config, policy=policy, dtype="float32")
