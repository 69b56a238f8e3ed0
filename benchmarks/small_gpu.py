"""Does an H100 of which 16 GiB may be used reach our goals for OPT? Predicted; nothing runs.

Claim: with the link and the issuing of ops as a GPU has them, the planner finds policies that reach
the goals. The machine is the H100 preset with 16 GiB of GPU memory and 110 GiB of host memory, of
which plans use 90 %, and no disk. Prompts have 512 tokens and answers 32.

Good: `predicted_to_goal` of 1 or more.
docs/results/h100-16gib-predicted.json: python -m benchmarks.small_gpu --json FILE
"""

from __future__ import annotations

from dataclasses import asdict, replace

from benchmarks.command import run_as_command
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.config import Policy
from flexgen_ray.hardware.rates import MemorySizes
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.comparison import HardwareNode, devices_of
from flexgen_ray.planner.grid import BATCHES, SearchSpace
from flexgen_ray.planner.pipeline_plan import PipelinePlan, PlannedJob
from flexgen_ray.planner.search import Planner, find_best_plan
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say

REQUESTS, PROMPT_LEN, MAX_TOKENS = 1024, 512, 32
MEMORY = MemorySizes(16 * 2**30, 110 * 2**30, 2**20)
IN_FOUR_BITS = Policy(weight_bits=4, cache_bits=4)
# {case: (shape, base policy, numbers of batches to try, goal in generated tokens/s)}
CASES = {
    "opt-6.7b, one batch": ("opt-6.7b", Policy(), (1,), 650),
    "opt-6.7b": ("opt-6.7b", Policy(), BATCHES, None),
    "opt-6.7b in 4 bits": ("opt-6.7b", IN_FOUR_BITS, BATCHES, 1300),
    "opt-30b": ("opt-30b", Policy(), BATCHES, 50),
    "opt-30b in 4 bits": ("opt-30b", IN_FOUR_BITS, BATCHES, 200),
    "opt-175b in 4 bits": ("opt-175b", IN_FOUR_BITS, BATCHES, 10),
}


def small_gpu(json_file: JsonOption = None) -> None:
    """Predict OPT on an H100 with 16 GiB, and compare with goals.

    Example: python -m benchmarks.small_gpu
    """
    machine = replace(Hardware.preset("h100"), memory=MEMORY)
    job = PlannedJob.uniform(REQUESTS, PROMPT_LEN, MAX_TOKENS)
    results = {}
    for name, (shape, base, batches, goal) in CASES.items():
        config = shape_config(shape)
        devices = devices_of([HardwareNode(machine)], config, "float16", base.cache_bits)
        search = SearchSpace(base, batches=batches)
        plan = find_best_plan(Planner(config, devices, job, "float16", search))
        results[name] = _figures(plan, goal)
        say(f"{name:>20}: {results[name]}")
    job_sizes = {"requests": REQUESTS, "prompt_len": PROMPT_LEN, "max_tokens": MAX_TOKENS}
    result = {"predicted": True, "job": job_sizes, "machine": asdict(machine), "cases": results}
    finish(result, "none: predicted for the H100 preset", json_file)


def _figures(plan: PipelinePlan, goal: float | None) -> dict:
    """Predicted throughput, beside the goal if there is one, the bottleneck and the policy."""
    return {
        "tokens_per_s": round(plan.tokens_per_s, 2),
        "goal_tokens_per_s": goal,
        "predicted_to_goal": goal and round(plan.tokens_per_s / goal, 3),
        "decode_tokens_per_s": round(plan.decode_tokens_per_s, 2),
        "prefill_s": round(plan.prefill_seconds, 3),
        "decode_s": round(plan.decode_seconds, 3),
        "bottleneck": plan.bottleneck[1],
        "decode_visit_ms": {
            name: round(1e3 * seconds, 3)
            for name, seconds in plan.seconds[0]["decode"].items()
            if seconds
        },
        "policy": asdict(plan.stages[0].policy),
    }


if __name__ == "__main__":
    run_as_command(small_gpu)
