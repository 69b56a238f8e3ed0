"""Is the planner's split of the layers over unequal GPUs the best, and what does it gain? Emulated.

Claim: on machines with unlike GPUs the planner gives each the layers that it can serve, and gains
over equal stages. For the block shape that the planner chose, every split of the layers gets its
best policies by prediction, and so does the equal split; the planner's split and the equal one are
then run on emulated machines.

Good: `chosen_to_best` near 1, and both gains above 1, the more the GPUs differ: that of the
predictions, and `emulated_gain_over_equal`. With a doubtful run (gate.py) no file is written.
docs/results/unequal-emulated.json: python -m benchmarks.unequal --json FILE
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Annotated

import typer

from benchmarks import gate
from benchmarks import paper_machines as t4
from benchmarks.command import run_as_command
from benchmarks.scaling import run_plan
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.config import Budget
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.pipeline_plan import ModelRates, PipelinePlan, PlannedJob, StageDevice
from flexgen_ray.planner.search import Planner, find_best_plan
from flexgen_ray.reporting.terminal import say

CLUSTERS = ("t4,rtx4090", "t4,t4,a100-80")
DTYPE = "float16"
PLAYED_SPLITS = 8


def unequal(
    clusters: Annotated[
        str,
        typer.Option(
            metavar="PRESET,...;...",
            help="Clusters, divided by ';': hardware presets of their machines, divided by ','.",
        ),
    ] = ";".join(CLUSTERS),
    model: Annotated[str, typer.Option(metavar="NAME", help="OPT shape to emulate.")] = "opt-30b",
    requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of requests of the job.")
    ] = 1024,
    step: Annotated[
        int, typer.Option(metavar="N", min=1, help="Layers by which enumerated splits differ.")
    ] = 1,
    json_file: JsonOption = None,
) -> None:
    """Emulate machines with unlike GPUs: the planner's split of the layers against every other.

    Example: python -m benchmarks.unequal --clusters t4,rtx4090
    """
    results = {}
    for cluster in clusters.split(";"):
        results[cluster] = _cluster(cluster.split(","), model, requests, step)
        say(f"{cluster}: {results[cluster]}")
    settings = {"model": model, "prompt_len": t4.PROMPT_LEN, "max_tokens": t4.MAX_TOKENS}
    result = {"emulated": True, "settings": settings | {"step": step}, "clusters": results}
    gate.finish(result, "emulated machines", json_file)


def _cluster(names: list[str], model: str, requests: int, step: int) -> dict:
    """Chosen, best and equal split of a model over machines; names: presets, one a machine."""
    config = shape_config(model)
    devices = []
    for number, name in enumerate(names):
        hardware = Hardware.preset(name)
        memory = hardware.memory
        budget = Budget(memory.gpu, memory.cpu, memory.disk)
        rates = ModelRates(hardware, config, DTYPE)
        devices.append(StageDevice(rates, budget, f"machine {number}"))
    job = PlannedJob.uniform(requests, t4.PROMPT_LEN, t4.MAX_TOKENS)
    planner = Planner(config, tuple(devices), job, DTYPE)
    chosen = find_best_plan(planner)
    tried = [_of_split(planner, chosen, it) for it in splits(config.num_layers, len(names), step)]
    fastest = sorted(filter(None, tried), key=lambda plan: -plan.tokens_per_s)[:PLAYED_SPLITS]
    best = max(map(planner.simulate, fastest), key=lambda plan: plan.tokens_per_s)
    whole, rest = divmod(config.num_layers, len(names))
    equal = find_best_plan(
        replace(
            planner,
            search=replace(
                planner.search, layers=tuple(whole + (i < rest) for i in range(len(names)))
            ),
        )
    )
    run, of_equal = (_describe(plan) | _run(planner, plan) for plan in (chosen, equal))
    return {
        "chosen": run,
        "best_of_enumeration": _describe(best) | {"splits": len(tried)},
        "chosen_to_best": round(chosen.tokens_per_s / best.tokens_per_s, 4),
        "equal": of_equal,
        "gain_over_equal": round(chosen.tokens_per_s / equal.tokens_per_s, 3),
        "emulated_gain_over_equal": gate.ratio(run, of_equal, "generation_tokens_per_s", 3),
    }


def splits(num_layers: int, num_stages: int, step: int) -> Iterator[tuple[int, ...]]:
    """Every way to give each stage at least `step` layers, with cuts at multiples of `step`."""
    for cuts in combinations(range(step, num_layers, step), num_stages - 1):
        ends = (0, *cuts, num_layers)
        yield tuple(after - before for before, after in zip(ends, ends[1:], strict=False))


def _of_split(
    planner: Planner, chosen: PipelinePlan, layers: tuple[int, ...]
) -> PipelinePlan | None:
    """The best plan with this split of the layers and the chosen block shape; None if none fits."""
    may_shrink = replace(planner, search=replace(planner.search, layers=layers))
    return may_shrink.plan(chosen.stages[0].policy)


def _describe(plan: PipelinePlan) -> dict:
    """Layers of each stage, block shape, and predicted throughput of a plan."""
    policy = plan.stages[0].policy
    return {
        "layers": [stage.num_decoder_layers for stage in plan.stages],
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
        "blocks_in_flight": policy.blocks_in_flight,
        "predicted_generation_tokens_per_s": round(plan.block_tokens_per_s, 3),
        "predicted_decode_tokens_per_s": round(plan.decode_tokens_per_s, 3),
    }


def _run(planner: Planner, plan: PipelinePlan) -> dict:
    return run_plan(plan, planner.rates(plan.stages[0].policy))


if __name__ == "__main__":
    run_as_command(unequal)
