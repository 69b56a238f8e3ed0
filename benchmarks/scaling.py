"""Does decoding scale super-linearly over machines? Emulated T4s, real actors and real tokens.

Each stage is a Ray actor whose lanes are paced by the modelled bytes and flops of an OPT model's
stage on a machine of its own (t4.py); small tensors of as many layers stand in for the model's.
What is measured is the schedule, the executor, the ring and the driver, not a device.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, replace
from typing import Annotated

import typer

from benchmarks import paper_machines as t4
from benchmarks.command import run_as_command
from benchmarks.stand_in import StandIn, alike_requests, memory_folder
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
from flexgen_ray.runtime.meter import StageMeasurements, VisitTiming

# More batches would be shorter ops than can be emulated.
GRID = SearchSpace(batches=tuple(number for number in BATCHES if number <= 8))
MIDDLE = t4.PROMPT_LEN + t4.MAX_TOKENS // 2
CELL_SECONDS = 8e-3  # wall time of a cell that the time scale aims at
# Four T4 machines: FlexGen's decode and generation throughput (table 4), for 1 and 4 GPUs.
PAPER = {
    "opt-6.7b": {"decode": (38.28, 764.65), "generation": (25.26, 201.12)},
    "opt-30b": {"decode": (11.52, 48.94), "generation": (7.32, 23.61)},
    "opt-175b": {"decode": (0.83, 3.86), "generation": (0.69, 2.33)},
}


def scaling(
    models: Annotated[str, typer.Option(help="OPT shapes.")] = "opt-6.7b,opt-30b,opt-175b",
    stages: Annotated[str, typer.Option(help="Numbers of stages, each on its machine.")] = "1,2,4",
    extra_blocks: Annotated[
        str, typer.Option(help="Blocks in flight beyond the most stages; the best counts.")
    ] = "0,1",
    sequences: Annotated[int, typer.Option(min=1, help="In flight at most.")] = 1024,
    plot: PlotOption = None,
    json_file: JsonOption = None,
) -> None:
    """Emulated T4 machines: decode throughput of pipelines against as many copies of one.

    Example: python -m benchmarks.scaling --models opt-30b --stages 1,4
    """
    result: dict = {"emulated": True, "believable": _as_the_original(), "models": {}}
    counts = [int(count) for count in stages.split(",")]
    for model in models.split(","):
        config = shape_config(model)
        runs = {}
        for count in counts:
            extra = extra_blocks.split(",") if count == max(counts) > 1 else ["0"]
            blocks = [count + int(more) for more in extra]
            tried = [_best_run(config, count, it, sequences) for it in blocks]
            best = max(tried, key=lambda run: run["decode_tokens_per_s"])
            runs[str(count)] = best | {
                "blocks_tried": {
                    str(it): run["decode_tokens_per_s"]
                    for it, run in zip(blocks, tried, strict=True)
                }
            }
            _say(f"{model} x {count}: {best}")
        result["models"][model] = {"stages": runs, "paper": PAPER.get(model)} | _ratios(runs)
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


def run(stand_in: StandIn) -> dict:
    """One emulated run, from the prompts of all blocks to their last tokens."""
    from flexgen_ray.distributed.driver import Driver

    plans, scale = stand_in.plans, stand_in.time_scale
    policy = plans[0].policy
    count = policy.block_size * plans[0].num_blocks
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
    shares = [_steady_share(it, plans[0].num_blocks, scale) for it in measured]
    slowest = max(range(len(shares)), key=lambda it: shares[it][1])
    last = _steady(measured[-1], plans[0].num_blocks)
    decode = sum(it.new_tokens for it in last[1:]) / (last[-1].ended - last[0].ended)
    return {
        "decode_tokens_per_s": round(decode * scale, 3),
        "generation_tokens_per_s": round(count * t4.MAX_TOKENS / wall * scale, 3),
        "sequences": count,
        "blocks_in_flight": plans[0].num_blocks,
        "busy_share_of_stages": [round(share, 4) for _, share in shares],
        "slowest_stage": slowest,
        "slowest_stage_is_bound_by": shares[slowest][0],
        "driver_cores": round(cpu / wall, 4),
        "wall_s": round(wall, 2),
        "time_scale": round(scale, 5),
        "policies": [asdict(plan.policy) for plan in plans],
    }


def _steady(measured: StageMeasurements, num_blocks: int) -> list[VisitTiming]:
    """A stage's visits while every block decodes, the first and the last of each left out."""
    decoding = [it for it in measured.visits if it.new_tokens and not it.prefill_tokens]
    return decoding[num_blocks - 1 : len(decoding) - num_blocks]


def _steady_share(
    measured: StageMeasurements, num_blocks: int, time_scale: float
) -> tuple[str, float]:
    """The busiest lane or resource of a stage while every block decodes, and its share of then."""
    visits = _steady(measured, num_blocks)
    seconds = (visits[-1].ended - visits[0].ended) / time_scale
    busy = {
        name: sum(it.modelled.get(name, 0.0) for it in visits[1:])
        for name in {name for it in visits for name in it.modelled}
    }
    busiest = max(busy, key=lambda name: busy[name])
    return busiest, busy[busiest] / seconds


def _best_run(config: ModelConfig, num_stages: int, num_blocks: int, most: int) -> dict:
    """The planner's choice for so many blocks, run."""
    job = PlannedJob.uniform(most, t4.PROMPT_LEN, t4.MAX_TOKENS)
    search = replace(GRID, extra_blocks=(num_blocks - num_stages,))
    best = find_best_plan(Planner(config, t4.machines(num_stages), job, "float16", search))
    stand_in = StandIn(best.stages, [t4.MACHINE] * num_stages, MIDDLE, CELL_SECONDS)
    predicted = {
        "predicted_decode_tokens_per_s": round(best.decode_tokens_per_s, 3),
        "predicted_generation_tokens_per_s": round(best.tokens_per_s, 3),
    }
    return run(stand_in) | predicted | stand_in.op_times()


def _as_the_original() -> dict:
    """One stage with the original's policy and constants, one op after the other."""
    plans = [t4.original_plan(shape_config("opt-30b"))]
    found = run(StandIn(plans, [t4.ORIGINAL], MIDDLE, CELL_SECONDS, "serial"))
    measured, published = found["decode_tokens_per_s"], PAPER["opt-30b"]["decode"][0]
    _say(f"the original's policy, constants and serial sums: {measured} against {published}")
    return found | {"published": published, "ratio": round(measured / published, 4)}


def _ratios(runs: dict[str, dict]) -> dict:
    """Each number of stages against one stage, and against as many copies of it."""
    if "1" not in runs:
        return {}
    alone = runs["1"]["decode_tokens_per_s"]
    return {
        "decode_of_one": {it: round(r["decode_tokens_per_s"] / alone, 3) for it, r in runs.items()},
        "decode_of_copies": {
            it: round(r["decode_tokens_per_s"] / alone / int(it), 3) for it, r in runs.items()
        },
    }


def _say(text: str) -> None:
    say(text)


if __name__ == "__main__":
    run_as_command(scaling)
