"""Does decoding scale super-linearly over machines? Emulated T4s, real actors, real tokens.

Claim (FlexGen, table 4): a pipeline of N machines decodes more than N times what one does, since
its GPUs hold more of the model together. Generation, prefill included, is compared as well. Each
stage is a Ray actor whose ops take the modelled time of an OPT model's stage on a T4 machine of its
own (paper_machines.py); small tensors of as many layers stand in for the model's. So the schedule,
the executor, the ring between stages and the driver are measured; the device is not.
`flexgen-ray bench scaling` measures real machines.

Good: `decode_of_copies` above 1, `busy_share_of_stages` near 1, and tokens/s near the predictions;
`generation_of_copies` says what prefill leaves of it. A doubtful run (gate.py) has no ratio, and no
file is written. One run has the original's policy, constants and serial order, and should come near
its published 11.52 tokens/s for OPT-30B ("believable").
docs/results/scaling-emulated.json: python -m benchmarks.scaling --plot
docs/results/scaling-emulated.png --json docs/results/scaling-emulated.json
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated

import typer

from benchmarks import gate
from benchmarks import paper_machines as t4
from benchmarks.command import run_as_command
from benchmarks.stand_in import StandIn, alike_requests, memory_folder
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.runs import beside, holds
from flexgen_ray.cli.bench.scaling import (
    RATES,
    compare_with_copies,
    decode_rate,
    name_slowest,
    parse_counts,
    steady_visits,
    table,
)
from flexgen_ray.cli.options import JsonOption, PlotOption
from flexgen_ray.config import Deployment, Faults, HardwareSpec
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.grid import SearchSpace
from flexgen_ray.planner.pipeline_plan import ONE_BATCH, SCHEDULE, PipelinePlan, PlannedJob
from flexgen_ray.planner.search import Planner, find_best_plan
from flexgen_ray.reporting.plot import draw_scaling
from flexgen_ray.reporting.terminal import say
from flexgen_ray.runtime.meter import VisitTiming

GRID = SearchSpace()
# Wall time of a decoding pass's cell. The time scale follows it, so that more batches a block mean
# longer runs, but no shorter ops.
CELL_SECONDS = 8e-3
# FlexGen's throughput on 1 and 4 machines with a T4 each (its table 4), in tokens/s.
PAPER = {
    "opt-6.7b": {"decode": (38.28, 764.65), "generation": (25.26, 201.12)},
    "opt-30b": {"decode": (11.52, 48.94), "generation": (7.32, 23.61)},
    "opt-175b": {"decode": (0.83, 3.86), "generation": (0.69, 2.33)},
}


def scaling(
    models: Annotated[
        str, typer.Option(metavar="NAME,...", help="OPT shapes to emulate.")
    ] = "opt-6.7b,opt-30b,opt-175b",
    stages: Annotated[
        str, typer.Option(metavar="N,...", help="Numbers of pipeline stages, a machine each.")
    ] = "1,2,4",
    extra_blocks: Annotated[
        str,
        typer.Option(
            metavar="N,...",
            help="Numbers of blocks in flight, beyond one a stage, to try with the most stages; "
            "the fastest run counts.",
        ),
    ] = "0,1",
    sequences: Annotated[
        int, typer.Option(metavar="N", min=1, help="Limit on the sequences in flight.")
    ] = 1024,
    plot: PlotOption = None,
    json_file: JsonOption = None,
) -> None:
    """Emulate T4 machines: throughput of pipelines against one stage, and as many copies of it.

    Example: python -m benchmarks.scaling --models opt-30b --stages 1,4
    """
    result: dict = {"emulated": True, "believable": _run_as_original(), "models": {}}
    counts = parse_counts(stages)
    for model in models.split(","):
        config = shape_config(model)
        runs = {}
        for count in counts:
            extra = extra_blocks.split(",") if count == max(counts) > 1 else ["0"]
            blocks = [count + int(more) for more in extra]
            runs[str(count)] = _fastest_run(config, count, blocks, sequences)
            say(f"{model} x {count}: {runs[str(count)]}")
        for line in table(runs):
            say(line)
        ratios = compare_with_copies(runs)
        result["models"][model] = {"stages": runs, "paper": PAPER.get(model)} | ratios
    result["machine"] = {"rates": asdict(t4.MACHINE), "budget": asdict(t4.BUDGET)}
    result["grid"] = {
        "gpu_batch_size": GRID.batch_sizes,
        "num_gpu_batches": GRID.batches,
        "max_batch_tokens": GRID.tiles,
        "placement": "by linear programming",
    }
    gate.finish(result, "emulated T4 machines", json_file)
    if plot is not None:
        draw_scaling(result, plot)


def _fastest_run(config: ModelConfig, num_stages: int, blocks: list[int], most: int) -> dict:
    """The run that decodes most, of one for each number of blocks in flight.

    A doubtful run comes last, and what makes it doubtful stands in place of its rate.
    """
    tried = {str(each): _planned_run(config, num_stages, each, most) for each in blocks}
    rates = {each: run["decode_tokens_per_s"] or 0.0 for each, run in tried.items()}
    fastest = max(rates, key=lambda each: (holds(tried[each]), rates[each]))
    shown = {each: run.get("doubtful", rates[each]) for each, run in tried.items()}
    return tried[fastest] | {"blocks_tried": shown}


def _planned_run(config: ModelConfig, num_stages: int, num_blocks: int, most: int) -> dict:
    """Run the planner's choice for this many blocks and at most this many sequences in flight."""
    job = PlannedJob.uniform(most, t4.PROMPT_LEN, t4.MAX_TOKENS)
    search = replace(GRID, extra_blocks=(num_blocks - num_stages,))
    best = find_best_plan(Planner(config, t4.machines(num_stages), job, "float16", search))
    return run_plan(best, [t4.MACHINE] * num_stages)


def run_plan(plan: PipelinePlan, hardware: list[HardwareSpec]) -> dict:
    """Run a plan beside its predictions, and again if the run is doubtful (see `run`)."""
    stand_in = StandIn(plan.stages, hardware, plan.job.middle_position, CELL_SECONDS)
    predicted = {
        "predicted_decode_tokens_per_s": round(plan.decode_tokens_per_s, 3),
        "predicted_generation_tokens_per_s": round(plan.block_tokens_per_s, 3),
        "predicted_busy_share": round(predicted_busy_share(plan), 4),
    }
    return gate.attempt(lambda: run(stand_in) | predicted, judge) | stand_in.op_times()


def judge(figures: dict) -> list[str]:
    """Reasons to doubt a run's figures, which have their predictions among them."""
    doubts = gate.off_pace(max(figures["busy_share_of_stages"]), figures["predicted_busy_share"])
    for phase in RATES:
        name = f"{phase}_tokens_per_s"
        if f"predicted_{name}" in figures:
            doubts += gate.missed(f"{phase} tokens/s", figures[name], figures[f"predicted_{name}"])
    return doubts


def predicted_busy_share(plan: PipelinePlan) -> float:
    """Share of a decoding visit for which a plan's busiest lane or resource is to be busy."""
    seconds = [
        each
        for stage in plan.seconds
        for name, each in stage["decode"].items()
        if name not in (SCHEDULE, ONE_BATCH)
    ]
    return max(seconds) / plan.visit_seconds("decode")


def _run_as_original() -> dict:
    """Run one stage with the original's policy and constants, one op after the other."""
    plans = [t4.original_plan(shape_config("opt-30b"))]
    middle = t4.PROMPT_LEN + t4.MAX_TOKENS // 2
    stand_in = StandIn(plans, [t4.ORIGINAL], middle, CELL_SECONDS, "serial")
    figures = gate.attempt(lambda: run(stand_in))
    measured, published = figures["decode_tokens_per_s"], PAPER["opt-30b"]["decode"][0]
    say(f"the original's policy, constants and serial order: {measured} tokens/s of {published}")
    return figures | {"published": published, "ratio": round(measured / published, 4)}


def run(stand_in: StandIn) -> dict:
    """One emulated run in Ray actors, from the prompts of all blocks to their last tokens.

    Returns throughput in modelled time, and each stage's busy share while all rows decode; if they
    never do, in all visits, and no throughput of decoding.
    """
    from flexgen_ray.distributed.driver import Driver

    plans, scale = stand_in.plans, stand_in.time_scale
    num_blocks = plans[0].num_blocks
    count = plans[0].policy.block_size * num_blocks
    driver = Driver(Deployment(num_stages=len(plans), device="cpu", faults=Faults(max_restarts=0)))
    try:
        with tempfile.TemporaryDirectory(prefix="flexgen-bench-", dir=memory_folder()) as folder:
            driver.load(stand_in.specs(folder))
            driver.add(alike_requests(count, t4.PROMPT_LEN, t4.MAX_TOKENS))
            watch = OtherLoad()
            started, cpu = time.perf_counter(), time.process_time()
            for _ in driver.run():
                pass
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
            disturbed = beside(watch)  # before the stages' processes end
            measured = driver.measured()
    finally:
        driver.close()
    decode = decode_rate(measured[-1].visits, num_blocks, scale)
    figures = {
        "decode_tokens_per_s": None if decode is None else round(decode, 3),
        "generation_tokens_per_s": round(count * t4.MAX_TOKENS / wall * scale, 3),
        "sequences": count,
        "blocks_in_flight": num_blocks,
        "driver_cores": round(cpu / wall, 4),
        "wall_s": round(wall, 2),
        "time_scale": round(scale, 5),
        "policies": [asdict(plan.policy) for plan in plans],
    } | disturbed
    steady = [steady_visits(each.visits, num_blocks) for each in measured]
    visits = steady if decode is not None else [each.visits for each in measured]
    return figures | name_slowest([_busiest(each, scale) for each in visits])


def _busiest(visits: Sequence[VisitTiming], time_scale: float) -> tuple[str, float]:
    """A stage's busiest lane or resource in these visits, and its share of their time."""
    seconds = (visits[-1].ended - visits[0].ended) / time_scale
    busy = {
        name: sum(each.modelled.get(name, 0.0) for each in visits[1:])
        for name in {name for each in visits for name in each.modelled}
    }
    busiest = max(busy, key=lambda name: busy[name])
    return busiest, busy[busiest] / seconds


if __name__ == "__main__":
    run_as_command(scaling)
