"""What cost models say of the paper's machine, against what was measured there.

The original's own model and constants, and ours under the same constants, for the policies that the
paper and its scripts give; and what is lost by leaving each of FlexGen's ideas out. Nothing runs:
all but the published figures is predicted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import inf

from benchmarks import paper_machines as t4
from benchmarks.command import run_as_command
from benchmarks.original import Original
from flexgen_ray.cli.options import JsonOption, PlotOption
from flexgen_ray.config import Budget, Placement, Policy
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.corners import ON_DEVICE, SHARES, Share
from flexgen_ray.planner.grid import SearchSpace
from flexgen_ray.planner.pipeline_plan import PlannedJob, StageDevice
from flexgen_ray.planner.search import (
    Planner,
    Point,
    find_best_plan,
    find_frontiers,
    throughput_within,
)
from flexgen_ray.reporting.plot import draw_frontier
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say

_HOST, _DISK = Placement(0, 1, 0), Placement(0, 0, 1)
MAX_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """A policy of the original's, and the tokens/s that were published for it on one T4."""

    model: str
    prompt_len: int
    policy: Policy
    generation: float
    decode: float | None = None


# Paper, tables 2 and 4; policies from its appendix and the released scripts.
CASES = [
    Case("opt-30b", 512, t4.ORIGINAL_POLICY, 7.32, 11.52),
    Case("opt-30b", 1024, Policy(20, 4, 2048, Placement(0.04, 0.96, 0), _HOST, _HOST), 3.50),
    Case("opt-175b", 512, Policy(32, 8, 2048, Placement(0, 0.5, 0.5), _DISK, _HOST), 0.69, 0.83),
]
# OPT-30B, paper, table 5: the original's throughput without one of its parts.
ABLATION = {
    "all on": 7.32,
    "no policy search": 7.26,
    "no overlap": 5.86,
    "no host attention": 4.03,
    "no disk": 7.32,
    "DeepSpeed's policy": 1.57,
}


# OPT-175B against row-by-row schedules (section 6.1): within a block latency, and each at its best;
# with compression, which isn't modelled here, 100.
CLAIMS = {"within 5000 s": 40.0, "each at its best": 69.0}
CLAIMED_LATENCY = 5000.0


def paper(
    plot: PlotOption = None,
    json_file: JsonOption = None,
) -> None:
    """Predicted against published: FlexGen's figures on one T4.

    Example: python -m benchmarks.paper --json docs/results/paper-predicted.json
    """
    cases = [_case(case) for case in CASES]
    for case in cases:
        say(f"{case}")
    ablation = _ablation()
    for name, found in ablation.items():
        say(f"{name:>20}: {found:.2f}, published {ABLATION[name]}")
    curves = {model: find_frontiers(_planner(model, 512)) for model in ("opt-30b", "opt-175b")}
    claims = _claims(curves["opt-175b"])
    say(f"OPT-175B against row by row: {claims}")
    if plot is not None:
        draw_frontier("opt-175b on the paper's T4", curves["opt-175b"], plot)
    result = {
        "predicted": True,
        "max_tokens": MAX_TOKENS,
        "cases": cases,
        "ablation_opt_30b": {
            name: {"ours_tokens_per_s": round(found, 3), "published_tokens_per_s": ABLATION[name]}
            for name, found in ablation.items()
        },
        "opt_175b_against_row_by_row": claims,
        "frontiers": {
            model: {name: [asdict(point) for point in points] for name, points in both.items()}
            for model, both in curves.items()
        },
    }
    finish(result, "none: the original's T4, as its authors' constants", json_file)


def _case(case: Case) -> dict:
    config = shape_config(case.model)
    theirs = Original(config, case.policy, case.prompt_len, MAX_TOKENS)
    ours = _planner(case.model, case.prompt_len).evaluate((config.num_layers,), [case.policy])
    found = {
        "model": case.model,
        "prompt_len": case.prompt_len,
        "sequences": case.policy.block_size,
        "published_tokens_per_s": case.generation,
        "original_model_tokens_per_s": round(theirs.tokens_per_s, 3),
        "original_model_of_published": round(theirs.tokens_per_s / case.generation, 3),
        "our_model_tokens_per_s": round(ours.tokens_per_s, 3),
    }
    if case.decode:
        found |= {
            "published_decode_tokens_per_s": case.decode,
            "original_model_decode_tokens_per_s": round(theirs.decode_tokens_per_s, 3),
            "original_model_decode_of_published": round(
                theirs.decode_tokens_per_s / case.decode, 3
            ),
            "our_model_decode_tokens_per_s": round(ours.decode_tokens_per_s, 3),
        }
    return found


def _claims(found: dict[str, list[Point]]) -> dict:
    """How many times the row-by-row schedule's throughput; None where that one fits nothing."""
    ours, theirs = (
        {
            "within 5000 s": throughput_within(it, CLAIMED_LATENCY),
            "each at its best": throughput_within(it, inf),
        }
        for it in (found["zig-zag"], found["row by row"])
    )
    return {
        name: {
            "ours": round(ours[name] / theirs[name], 1) if theirs[name] else None,
            "published": published,
        }
        for name, published in CLAIMS.items()
    }


def _ablation() -> dict[str, float]:
    """OPT-30B, prompt 512, our model under the original's constants."""
    model, layers = "opt-30b", (shape_config("opt-30b").num_layers,)
    planner = _planner(model, 512)
    without_host = tuple(it for it in SHARES if it != Share("cache", "attended"))
    without_disk = replace(t4.BUDGET, disk=0)
    # All weights stream for every batch, whose cache stays on the GPU.
    deepspeed = SearchSpace(batches=(1,), shares=(Share("weights", "cpu"), *ON_DEVICE[1:]))
    return {
        "all on": find_best_plan(planner).tokens_per_s,
        "no policy search": planner.evaluate(layers, [t4.ORIGINAL_POLICY]).tokens_per_s,
        "no overlap": find_best_plan(
            _planner(model, 512, SearchSpace(overlaps=False))
        ).tokens_per_s,
        "no host attention": find_best_plan(
            _planner(model, 512, SearchSpace(shares=without_host))
        ).tokens_per_s,
        "no disk": find_best_plan(_planner(model, 512, budget=without_disk)).tokens_per_s,
        "DeepSpeed's policy": find_best_plan(_planner(model, 512, deepspeed)).tokens_per_s,
    }


def _planner(
    model: str, prompt_len: int, search: SearchSpace | None = None, budget: Budget = t4.BUDGET
) -> Planner:
    device = StageDevice(lambda *rows: t4.ORIGINAL, budget)
    job = PlannedJob.uniform(1024, prompt_len, MAX_TOKENS)
    return Planner(shape_config(model), (device,), job, "float16", search or SearchSpace())


if __name__ == "__main__":
    run_as_command(paper)
