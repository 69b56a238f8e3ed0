"""Are mixtures of experts faster than systems published for their machines? Predicted only.

Claim: where MoE-Lightning and MoE-Gen published tokens/s, our schedule makes more of the same
machine, and a good part of what no schedule exceeds there. Machines are presets with the host
memory of theirs (of MoE-Lightning's 192 GB, of MoE-Gen's 512 GB), whose rates were fixed before;
prompts are as long as they were padded to. MoE-Lightning's figures count prefill, MoE-Gen's decode
alone; so do ours beside them (of plans with and without groups of experts, those that decode
fastest), and beside the roofline, where prompts cost nothing unless `roofline_bound` is `flops`.
Nothing runs: all figures but the published ones are predicted.

Good: `predicted_to_published` of 2 or more beside MoE-Lightning, 1.5 beside MoE-Gen on
mixtral-8x7b; `share_of_roofline` of 0.85 for mixtral-8x22b in decode, and of 0.6 on the rtx4090.
docs/results/mixtures-predicted.json: python -m benchmarks.mixtures_predicted --json FILE
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from benchmarks.command import run_as_command
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.comparison import HardwareNode, devices_of, rooflines
from flexgen_ray.planner.pipeline_plan import PlannedJob
from flexgen_ray.planner.search import Planner, find_best_plan
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say

REQUESTS = 10_000
# Host memory to use: 90 % of 192 GB, and of 128 GiB.
_LIGHTNING_MEMORY, _DESKTOP_MEMORY = "172GB", "115GiB"


@dataclass(frozen=True)
class Case:
    """A model on a machine, and the tokens/s published for it by a system, None for none.

    memory: of the host, to use; None for the preset's own. decode: True if the published figure
    leaves prefill out.
    """

    model: str
    hardware: str
    memory: str | None
    dtype: str
    prompt_len: int
    max_tokens: int
    system: str | None = None
    published: float | None = None
    decode: bool = False


# Cao et al. 2025 (arXiv 2411.11217) and Xu et al. 2025 (arXiv 2503.09716).
CASES = {
    "T4, 256/50": Case(
        "mixtral-8x7b", "t4", _LIGHTNING_MEMORY, "float16", 256, 50, "MoE-Lightning", 26.3
    ),
    "T4, 418/128": Case(
        "mixtral-8x7b", "t4", _LIGHTNING_MEMORY, "float16", 418, 128, "MoE-Lightning", 30.1
    ),
    "L4, 256/50": Case(
        "mixtral-8x7b", "l4", _LIGHTNING_MEMORY, "float16", 256, 50, "MoE-Lightning", 105.3
    ),
    "A5000, 8x7b": Case(
        "mixtral-8x7b", "a5000", None, "bfloat16", 512, 256, "MoE-Gen", 469, decode=True
    ),
    "A5000, 8x22b": Case(
        "mixtral-8x22b", "a5000", None, "bfloat16", 512, 256, "MoE-Gen", 91, decode=True
    ),
    "RTX 4090, qwen3": Case("qwen3-30b-a3b", "rtx4090", _DESKTOP_MEMORY, "bfloat16", 512, 256),
    # The experts of gpt-oss stay in MXFP4.
    "RTX 4090, gpt-oss": Case("gpt-oss-120b", "rtx4090", _DESKTOP_MEMORY, "bfloat16", 512, 256),
}


def mixtures_predicted(json_file: JsonOption = None) -> None:
    """Predict mixtures on published systems' machines, beside what they published, and rooflines.

    Example: python -m benchmarks.mixtures_predicted --json docs/results/mixtures-predicted.json
    """
    cases = {}
    for name, case in CASES.items():
        cases[name] = predicted = _predicted(case)
        figures = (f"{key} {it}" for key, it in predicted.items() if isinstance(it, float))
        say(f"{name}: {', '.join(figures)}; bound by {predicted['bottleneck']}")
    result = {"predicted": True, "requests": REQUESTS, "cases": cases}
    finish(result, "none: presets' rates", json_file)


def planner_of(case: Case, requests: int) -> Planner:
    """A planner for a case with so many requests."""
    config, machine = shape_config(case.model), HardwareNode(Hardware.preset(case.hardware))
    devices = devices_of([machine.with_memory(None, case.memory, None)], config, case.dtype)
    job = PlannedJob.uniform(requests, case.prompt_len, case.max_tokens)
    return Planner(config, devices, job, case.dtype)


def _predicted(case: Case) -> dict:
    """The plan's figures for a case, beside the published one and the rooflines."""
    planner = planner_of(case, REQUESTS)
    plan = find_best_plan(planner)
    if case.decode:
        searches = (replace(planner.search, whole_layers=it) for it in (True, False))
        plans = [find_best_plan(replace(planner, search=search)) for search in searches]
        plan = max((plan, *plans), key=lambda plan: plan.decode_tokens_per_s)
    (best, flexgen), ours = rooflines(planner.devices, plan), plan.tokens_per_s
    assert best is not None and flexgen is not None, "nothing is shared, and all is attended"
    counted = plan.decode_tokens_per_s if case.decode else ours
    compared = {}
    if case.published:
        compared["predicted_to_published"] = round(counted / case.published, 2)
    return asdict(case) | {
        "tokens_per_s": round(ours, 1),
        "decode_tokens_per_s": round(plan.decode_tokens_per_s, 1),
        **compared,
        "roofline_tokens_per_s": round(best.tokens_per_s, 1),
        "share_of_roofline": round(counted / best.tokens_per_s, 2),
        "flexgen_roofline_tokens_per_s": round(flexgen.tokens_per_s, 1),
        "roofline_bound": best.bound,
        "bottleneck": plan.bottleneck[1],
        "policy": asdict(plan.stages[0].policy),
    }


if __name__ == "__main__":
    run_as_command(mixtures_predicted)
