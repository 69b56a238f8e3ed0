"""Is the planner's choice as good as the best policy, and are its predictions right? Emulated.

Claim: the planner finds a policy at least as fast as any of a grid, and predicts its throughput.
Every policy of the grid that fits the machine's memory is run, and so is the planner's choice, from
a block's prompts to its last tokens. The machine is emulated, with a different rate for each lane,
since placements cost the same in plain RAM.

Good: `chosen_to_best_of_grid` of 1 or more where `best_to_worst_of_grid` is large, and a
`largest_error` of at most 0.15. A run that misses its prediction, or is doubtful for another reason
(gate.py), is repeated, and marked if that doesn't help. No file is written if other processes used
the cores, or if the planner's choice or the best of the grid is doubtful.
docs/results/choice-emulated.json: python -m benchmarks.choice --json FILE
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Annotated

import torch
import typer

from benchmarks import gate
from benchmarks.command import run_as_command
from benchmarks.stand_in import StandIn, alike_requests, memory_folder
from flexgen_ray.calibration.steady import OtherLoad, name_disturbance
from flexgen_ray.cli.bench.runs import beside, holds
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.config import Budget, HardwareSpec, Placement, Policy
from flexgen_ray.layout.sizes import stage_bytes, tier_totals
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.pipeline_plan import PipelinePlan, PlannedJob, StageDevice
from flexgen_ray.planner.search import Planner, find_best_plan
from flexgen_ray.reporting.result import prediction_errors
from flexgen_ray.reporting.terminal import say
from flexgen_ray.runtime.worker import Worker

SHAPE, LAYERS, REQUESTS = "opt-1.3b", 8, 1024
RATES = HardwareSpec(
    h2d_bytes_per_s=4e9,
    d2h_bytes_per_s=3e9,
    disk_read_bytes_per_s=1e9,
    disk_write_bytes_per_s=0.6e9,
    host_bytes_per_s=24e9,
    host_attention_bytes_per_s=8e9,
    device_flops_per_s=6e12,
    device_bytes_per_s=100e9,
    device_decode_flops_per_s=3e12,
    has_copy_engines=True,
)
BUDGET = Budget(gpu=768 << 20, cpu=4 << 30, disk=32 << 30)
WORKLOADS = {"paper": (512, 32), "long prompts": (1024, 16), "long outputs": (128, 64)}
SHAPES = ((8, 2), (12, 3), (16, 4), (32, 2))
WEIGHTS = (Placement(0.2, 0.8, 0.0), Placement(0.0, 1.0, 0.0), Placement(0.0, 0.5, 0.5))
CACHES = (  # placement of the KV cache, and share of the host's part that is attended there
    (Placement(0.0, 1.0, 0.0), 1.0),
    (Placement(0.0, 1.0, 0.0), 0.85),
    (Placement(0.0, 1.0, 0.0), 0.0),
    (Placement(0.0, 0.25, 0.75), 1.0),
)


def choice(
    workloads: Annotated[
        str, typer.Option(metavar="NAME,...", help="Workloads to run.")
    ] = ",".join(WORKLOADS),
    cell_ms: Annotated[
        float,
        typer.Option(
            metavar="MS",
            help="Wall time of a decoding pass's cell (one batch in one layer), in milliseconds.",
        ),
    ] = 5.0,
    json_file: JsonOption = None,
) -> None:
    """Emulate the policies of a grid, and compare the planner's choice with the best of them.

    Example: python -m benchmarks.choice --workloads paper
    """
    torch.set_num_threads(1)  # the small tensors' maths must not disturb the clock
    results, decisive = {}, []
    for name in workloads.split(","):
        prompt_len, max_tokens = WORKLOADS[name]
        planner = planner_of(prompt_len, max_tokens)
        runs = [_compared(planner, plan, cell_ms / 1e3) for plan in _fitting(planner)]
        chosen = _compared(planner, find_best_plan(planner), cell_ms / 1e3)
        results[name] = _summary(runs, chosen) | {"chosen": chosen, "grid": runs}
        decisive += [chosen, _best(runs), *filter(_was_disturbed, runs)]
    machine = {"rates": asdict(RATES), "budget": asdict(BUDGET)}
    settings = {"shape": SHAPE, "layers": LAYERS, "cell_ms": cell_ms, "machine": machine}
    result = {"emulated": True, "settings": settings, "workloads": results}
    gate.finish(result, "emulated", json_file, decisive)


def planner_of(prompt_len: int, max_tokens: int) -> Planner:
    """Planner for the emulated machine and a job of equal requests; lengths in tokens."""
    config = replace(shape_config(SHAPE), num_layers=LAYERS)
    device = StageDevice(lambda *rows: RATES, BUDGET)
    return Planner(
        config, (device,), PlannedJob.uniform(REQUESTS, prompt_len, max_tokens), "float16"
    )


def grid() -> Iterator[Policy]:
    """Policies of every combination of block shape, weights' placement and cache's placement."""
    for (size, number), weights, (cache, attention) in product(SHAPES, WEIGHTS, CACHES):
        yield Policy(size, number, 512, weights, cache, Placement(1, 0, 0), attention)


def _fitting(planner: Planner) -> Iterator[PipelinePlan]:
    """Simulated plans of the grid's policies that the machine's memory can hold."""
    for policy in grid():
        plan = planner.evaluate((LAYERS,), [policy])
        need = tier_totals(stage_bytes(plan.stages[0]))
        if all(getattr(need, tier) <= nbytes for tier, nbytes in asdict(BUDGET).items()):
            yield planner.simulate(plan)


def _compared(planner: Planner, plan: PipelinePlan, cell_seconds: float) -> dict:
    """Tokens/s of a policy, predicted and from an emulated run, which is repeated if doubtful."""
    predicted = plan.block_tokens_per_s

    def run() -> dict:
        measured, disturbed = _run(plan, cell_seconds)
        return {
            "policy": asdict(plan.stages[0].policy),
            "predicted_tokens_per_s": round(predicted, 3),
            "measured_tokens_per_s": round(measured, 3),
            "measured_to_predicted": round(measured / predicted, 4),
        } | disturbed

    figures = gate.attempt(
        run, lambda it: gate.missed("tokens/s", it["measured_tokens_per_s"], predicted)
    )
    say(f"{planner.job.prompt_len} + {planner.job.max_tokens}: {figures}")
    return figures


def _run(plan: PipelinePlan, cell_seconds: float) -> tuple[float, dict]:
    """Run one block; returns tokens per modelled second, and what others did (`beside`)."""
    job = plan.job
    stand_in = StandIn(plan.stages, [RATES], job.middle_position, cell_seconds)
    worker = Worker()
    with tempfile.TemporaryDirectory(prefix="flexgen-bench-", dir=memory_folder()) as folder:
        worker.load(stand_in.specs(folder)[0])
        worker.add(alike_requests(plan.block_size, job.prompt_len, job.max_tokens))
        watch = OtherLoad()
        for _ in worker.run():
            pass
        disturbed = beside(watch)
        wall = worker.measured().wall
        worker.close()
    return plan.block_size * job.max_tokens / wall * stand_in.time_scale, disturbed


def _best(runs: list[dict]) -> dict:
    """The run that was fastest, or would have been, as predicted, if it weren't doubtful."""

    def rate(run: dict) -> float:
        measured, predicted = run["measured_tokens_per_s"], run["predicted_tokens_per_s"]
        return measured if holds(run) else max(measured, predicted)

    return max(runs, key=rate)


def _was_disturbed(run: dict) -> bool:
    return bool(name_disturbance(run["cores_elsewhere"]))


def _summary(runs: list[dict], chosen: dict) -> dict:
    """Ratios and errors of the runs; None for a ratio with a doubtful run."""
    rate, best = "measured_tokens_per_s", _best(runs)
    slowest = min(runs, key=lambda it: it[rate])
    return {
        "chosen_to_best_of_grid": gate.ratio(chosen, best, rate),
        "best_to_worst_of_grid": gate.ratio(best, slowest, rate, 3),
    } | prediction_errors([*runs, chosen])


if __name__ == "__main__":
    run_as_command(choice)
