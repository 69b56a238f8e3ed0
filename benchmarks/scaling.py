"""Does decoding scale super-linearly over machines? Emulated T4s, real actors, real tokens.

Claim (FlexGen, table 4): a pipeline of N machines decodes more than N times what one does, since
its GPUs hold more of the model together. Each stage is a Ray actor whose ops take the modelled
time of an OPT model's stage on a T4 machine of its own (paper_machines.py); small tensors of as
many layers stand in for the model's. So the schedule, the executor, the ring between stages and
the driver are measured; the device is not. `flexgen-ray bench scaling` measures
real machines.

Good: `decode_of_copies` above 1, `busy_share_of_stages` near 1, and decode_tokens_per_s near the
prediction. One run has the original's policy, constants and serial order, and should come near its
published 11.52 tokens/s for OPT-30B ("believable").
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

from benchmarks import paper_machines as t4
from benchmarks.command import run_as_command
from benchmarks.stand_in import StandIn, alike_requests, memory_folder
from flexgen_ray.cli.bench.scaling import (
    compare_with_copies,
    decode_rate,
    name_slowest,
    parse_counts,
    steady_visits,
)
from flexgen_ray.cli.options import JsonOption, PlotOption
from flexgen_ray.config import Deployment, Faults
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.grid import BATCHES, SearchSpace
from flexgen_ray.planner.pipeline_plan import PlannedJob
from flexgen_ray.planner.search import Planner, find_best_plan
from flexgen_ray.reporting.plot import draw_scaling
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say
from flexgen_ray.runtime.meter import VisitTiming

# More batches a block would mean ops too short to emulate.
GRID = SearchSpace(batches=tuple(number for number in BATCHES if number <= 8))
MIDDLE = t4.PROMPT_LEN + t4.MAX_TOKENS // 2
CELL_SECONDS = 8e-3  # wall time of a decoding pass's cell that the time scale aims at
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
    """Emulate T4 machines: decode throughput of pipelines against as many copies of one stage.

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
        ratios = compare_with_copies(runs)
        result["models"][model] = {"stages": runs, "paper": PAPER.get(model)} | ratios
    result["machine"] = {"rates": asdict(t4.MACHINE), "budget": asdict(t4.BUDGET)}
    result["grid"] = {
        "gpu_batch_size": GRID.batch_sizes,
        "num_gpu_batches": GRID.batches,
        "max_batch_tokens": GRID.tiles,
        "placement": "by linear programming",
    }
    if plot is not None:
        draw_scaling(result, plot)
    finish(result, "emulated T4 machines", json_file)


def _fastest_run(config: ModelConfig, num_stages: int, blocks: list[int], most: int) -> dict:
    """The run that decodes most, of one for each number of blocks in flight."""
    tried = {str(each): _planned_run(config, num_stages, each, most) for each in blocks}
    rates = {each: run["decode_tokens_per_s"] for each, run in tried.items()}
    return tried[max(rates, key=lambda each: rates[each])] | {"blocks_tried": rates}


def _planned_run(config: ModelConfig, num_stages: int, num_blocks: int, most: int) -> dict:
    """Run the planner's choice for this many blocks and at most this many sequences in flight."""
    job = PlannedJob.uniform(most, t4.PROMPT_LEN, t4.MAX_TOKENS)
    search = replace(GRID, extra_blocks=(num_blocks - num_stages,))
    best = find_best_plan(Planner(config, t4.machines(num_stages), job, "float16", search))
    stand_in = StandIn(best.stages, [t4.MACHINE] * num_stages, MIDDLE, CELL_SECONDS)
    predicted = {
        "predicted_decode_tokens_per_s": round(best.decode_tokens_per_s, 3),
        "predicted_generation_tokens_per_s": round(best.tokens_per_s, 3),
    }
    return run(stand_in) | predicted | stand_in.op_times()


def _run_as_original() -> dict:
    """Run one stage with the original's policy and constants, one op after the other."""
    plans = [t4.original_plan(shape_config("opt-30b"))]
    figures = run(StandIn(plans, [t4.ORIGINAL], MIDDLE, CELL_SECONDS, "serial"))
    measured, published = figures["decode_tokens_per_s"], PAPER["opt-30b"]["decode"][0]
    say(f"the original's policy, constants and serial order: {measured} tokens/s of {published}")
    return figures | {"published": published, "ratio": round(measured / published, 4)}


def run(stand_in: StandIn) -> dict:
    """One emulated run in Ray actors, from the prompts of all blocks to their last tokens.

    Returns throughput in modelled time, and each stage's busy share while every block decodes.
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
            started, cpu = time.perf_counter(), time.process_time()
            for _ in driver.run():
                pass
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
            measured = driver.measured()
    finally:
        driver.close()
    decode = decode_rate(measured[-1].visits, num_blocks, scale)
    if decode is None:
        raise ValueError(f"{t4.MAX_TOKENS} tokens are too few: no pass decodes all blocks")
    figures = {
        "decode_tokens_per_s": round(decode, 3),
        "generation_tokens_per_s": round(count * t4.MAX_TOKENS / wall * scale, 3),
        "sequences": count,
        "blocks_in_flight": num_blocks,
        "driver_cores": round(cpu / wall, 4),
        "wall_s": round(wall, 2),
        "time_scale": round(scale, 5),
        "policies": [asdict(plan.policy) for plan in plans],
    }
    visits = [steady_visits(each.visits, num_blocks) for each in measured]
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
