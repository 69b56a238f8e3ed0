"""Machines of FlexGen's paper, as rates and budgets, and the original's policy for them.

Each machine of the testbed (section 6 and the released cost model) has one T4 of 16 GB, 208 GB of
host memory and a 1.5 TB disk. Knows plans and rates; runs nothing.
"""

from __future__ import annotations

from dataclasses import replace

from flexgen_ray.config import Budget, Placement, Policy, Workload
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.pipeline_plan import StageDevice
from flexgen_ray.schedule.zigzag import StageLayers

PROMPT_LEN, MAX_TOKENS = 512, 32
_PAPER = Hardware.preset("t4-paper")
BUDGET = Budget(_PAPER.memory.gpu, _PAPER.memory.cpu, _PAPER.memory.disk)

# Rates that the original reached on that machine: its own constants, where it has them.
ORIGINAL = _PAPER.rates("float16", 1, decode_rows=64, prefill_rows=2048)
# Rates that are assumed for the machine. Copies from registered memory reach the link's speed both
# ways; decode's matrix products and attention are limited by memory before flops; host attention
# reads at half of the memory's speed; the disk reads 2 GB/s and writes 1 GB/s (with the released
# code's constants the original's own 0.83 tokens/s on OPT-175B is out of reach). The network has
# 10 Gbit/s.
MACHINE = replace(
    ORIGINAL,
    d2h_bytes_per_s=12e9,
    disk_read_bytes_per_s=2e9,
    disk_write_bytes_per_s=1e9,
    host_attention_bytes_per_s=40e9,
    device_bytes_per_s=0.8 * 320e9,
    device_decode_flops_per_s=21.24e12,
    device_attention_bytes_per_s=0.8 * 320e9,
)
# The original's policy for OPT-30B (its table of policies), with "20 % on the GPU" taken literally.
ORIGINAL_POLICY = Policy(
    gpu_batch_size=48,
    num_gpu_batches=3,
    weights=Placement(0.2, 0.8, 0.0),
    cache=Placement(0.0, 1.0, 0.0),
    activations=Placement(0.0, 1.0, 0.0),
)


def machines(count: int) -> tuple[StageDevice, ...]:
    """Devices of this many of the machines, each with its own host memory and disk."""
    return tuple(
        StageDevice(lambda *rows: MACHINE, BUDGET, f"machine {number}") for number in range(count)
    )


def original_plan(config: ModelConfig) -> StagePlan:
    """Plan of all layers on one machine, under the original's policy."""
    policy = ORIGINAL_POLICY
    workload = Workload(policy.block_size, PROMPT_LEN, PROMPT_LEN + MAX_TOKENS)
    return StagePlan(config, StageLayers.whole(config.num_layers), policy, workload, "float16")
