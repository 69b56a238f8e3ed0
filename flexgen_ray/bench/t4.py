"""The paper's machines, as rates and budgets, and the policies that are tried on them.

FlexGen's testbed (section 6 and its released cost model): a T4 with 16 GB, 208 GB of host memory
and a 1.5 TB disk, one machine a GPU. Knows plans and rates; runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from flexgen_ray.config import Budget, ModelConfig, Placement, Policy, Workload
from flexgen_ray.cost.default_policy import fill
from flexgen_ray.cost.hardware import Hardware
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.predict import decoding, prefilling, visit_seconds
from flexgen_ray.cost.sizes import stage_bytes, totals
from flexgen_ray.schedule.zigzag import StageLayers
from flexgen_ray.stage_policies import even_layers

PROMPT_LEN, MAX_TOKENS = 512, 32
_PAPER = Hardware.preset("t4-paper")
BUDGET = Budget(_PAPER.memory.gpu, _PAPER.memory.cpu, _PAPER.memory.disk)

# What the original got out of that machine: its own constants, where it has them.
ORIGINAL = _PAPER.rates("float16", 1, decode_rows=64, prefill_rows=2048)
# What is assumed of the machine: copies from registered memory go both ways at the link's speed,
# decode's matrix products are bound by memory before they are by flops, host attention reads at
# half of the memory's speed, and the disk reads 2 GB/s and writes 1 (with the released code's
# constants the original's own 0.83 tokens/s on OPT-175B would be out of reach). The network is
# 10 Gbit/s.
MACHINE = replace(
    ORIGINAL,
    d2h_bytes_per_s=12e9,
    disk_read_bytes_per_s=2e9,
    disk_write_bytes_per_s=1e9,
    host_attention_bytes_per_s=40e9,
    device_bytes_per_s=0.8 * 320e9,
    device_decode_flops_per_s=21.24e12,
)
# Its policy for OPT-30B (its table of policies), where "20 % on the GPU" was taken at its word.
ORIGINAL_POLICY = Policy(
    gpu_batch_size=48,
    num_gpu_batches=3,
    weights=Placement(0.2, 0.8, 0.0),
    cache=Placement(0.0, 1.0, 0.0),
    activations=Placement(0.0, 1.0, 0.0),
)
GRID = {
    "gpu_batch_size": (16, 32, 48, 64),
    "num_gpu_batches": (2, 3, 4, 6, 8, 12),
    "max_batch_tokens": (2048, 512),
    "cpu_attention": (1.0, 0.85, 0.75),
}


@dataclass(frozen=True)
class Candidate:
    """A pipeline's plans, and the seconds that its slowest stage takes at least for a visit: one
    that brings prompts, of which a block needs `prefill_visits`, and one that decodes."""

    plans: list[StagePlan]
    prefill_visits: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_tokens_per_s(self) -> float:
        return self.plans[0].policy.block_size / self.decode_seconds

    @property
    def generation_tokens_per_s(self) -> float:
        """Of all blocks in flight, the time in which the pipeline fills included."""
        blocks, filling = self.plans[0].num_blocks, len(self.plans) - 1
        prefill = (blocks * self.prefill_visits + filling) * self.prefill_seconds
        decode = (blocks * (MAX_TOKENS - 1) + filling) * self.decode_seconds
        return blocks * self.plans[0].policy.block_size * MAX_TOKENS / (prefill + decode)


def candidates(
    config: ModelConfig, num_stages: int, num_blocks: int, most: int
) -> Iterator[Candidate]:
    """All of the grid that fits the machines; most: sequences in flight at a time."""
    for size, batches, tile, share in product(*GRID.values()):
        if size * batches * num_blocks > most:
            continue
        policy = Policy(
            int(size), int(batches), int(tile), cpu_attention=share, blocks_in_flight=num_blocks
        )
        plans = [fill(plan, BUDGET) for plan in plan_stages(config, num_stages, policy)]
        needs = [totals(stage_bytes(plan)) for plan in plans]
        if all(it.gpu <= BUDGET.gpu and it.cpu <= BUDGET.cpu for it in needs):
            yield _judged(plans)


def plan_stages(config: ModelConfig, num_stages: int, policy: Policy) -> list[StagePlan]:
    """An even split, the same policy for all."""
    workload = Workload(policy.block_size, PROMPT_LEN, PROMPT_LEN + MAX_TOKENS)
    blocks = policy.blocks_in_flight or num_stages
    return [
        StagePlan(config, stage, policy, workload, "float16", True, blocks)
        for stage in StageLayers.split(config.num_layers, even_layers(config, num_stages))
    ]


def _judged(plans: list[StagePlan]) -> Candidate:
    passes = prefill = decode = 0.0
    for plan in {plan.stage.kind(plan.stage.last): plan for plan in plans}.values():
        rows, passes = prefilling(plan)
        prefill = max(prefill, *visit_seconds(plan, MACHINE, rows).values())
        position = PROMPT_LEN + MAX_TOKENS // 2
        middle = visit_seconds(plan, MACHINE, decoding(plan, position))
        decode = max(decode, *middle.values())
    return Candidate(plans, passes, prefill, decode)
