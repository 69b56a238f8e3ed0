"""Do pages hold more rows than slots where all requests are alike? OPT-30B on an emulated T4.

Claim: rows that enter one by one are half grown on average, so memory holds nearly twice as many.
The paper's T4 generates 512 tokens after prompts of 32. The planner plans for a job with as many
requests as memory has slots of that length, which enter together, as in a cache of slots, and for
one with so many that they enter one by one. Both are emulated: the first for its 512 passes, the
second for half as many, from the pass at which its first answer ends. So this is the rate that a
job has once it is under way; until its first answer ends, and after its last request entered, a job
has fewer rows, which costs it the time of an answer. `whole_job` says how many times as fast a job
of so many requests is, if both parts are counted.

Good: a `ratio` of tokens/s of 1.6 or more. It can't exceed `bound`, the longest row's pages over
the mean ones, and is below it where the host's attention takes as long as the weights' way to the
GPU. Memory of the host is what so many slots need (--slots).
docs/results/one-by-one-emulated.json: python -m benchmarks.one_by_one --slots 16 --json FILE
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Annotated

import typer

from benchmarks import gate
from benchmarks import paper_machines as t4
from benchmarks.command import run_as_command
from benchmarks.mixed_lengths import EMULATED_T4, budget_of, fixed_slots
from benchmarks.stand_in import StandIn, alike_requests, memory_folder
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.runs import beside
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.config import Budget
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.pipeline_plan import PlannedJob, StageDevice
from flexgen_ray.planner.search import Planner, find_best_plan
from flexgen_ray.reporting.terminal import say
from flexgen_ray.runtime.worker import Worker

MODEL = "opt-30b"
PROMPT, ANSWER = 32, 512
BLOCKS = 100  # of slots, that the larger job is planned for
JOBS = 10, 20, 50, BLOCKS  # blocks of slots of the jobs in `whole_job`
RATE = "tokens_per_s"


def one_by_one(
    slots: Annotated[
        int, typer.Option(metavar="N", min=1, help="Slots for which memory is enough.")
    ] = 64,
    layer_ms: Annotated[
        float,
        typer.Option(
            metavar="MS",
            help="Wall time of a layer, all batches, of a decoding pass, in milliseconds.",
        ),
    ] = 12.0,
    json_file: JsonOption = None,
) -> None:
    """Emulate equal requests that enter together, and one by one; the ratio of tokens/s.

    Example: python -m benchmarks.one_by_one --slots 16
    """
    config = shape_config(MODEL)
    budget = budget_of(fixed_slots(config, [(PROMPT, ANSWER)], slots, True), EMULATED_T4)
    runs = {}
    for name, count in (("together", slots), ("one by one", BLOCKS * slots)):
        job = PlannedJob.uniform(count, PROMPT, ANSWER)
        device = StageDevice(lambda *rows: t4.MACHINE, Budget(**budget))
        (plan,) = find_best_plan(Planner(config, (device,), job, "float16")).stages
        runs[name] = gate.attempt(partial(_run, plan, job.middle_position, layer_ms / 1e3))
        say(f"{name}: {runs[name]}")
    result = {
        "emulated": True, "model": MODEL, "prompt_len": PROMPT, "max_tokens": ANSWER,
        "slots": slots, "budget_bytes": budget, "runs": runs,
        "bound": round(runs["one by one"]["longest_pages"] / runs["one by one"]["mean_pages"], 3),
        "ratio": gate.ratio(runs["one by one"], runs["together"], RATE, 3),
        "whole_job": {str(count * slots): _whole_job(runs, count * slots) for count in JOBS},
    }  # fmt: skip
    gate.finish(result, "emulated T4 machine", json_file)


def _run(plan: StagePlan, middle: int, layer_seconds: float) -> dict:
    """Figures of passes with a block under way, and what others did meanwhile."""
    cell_seconds = layer_seconds / plan.policy.num_gpu_batches
    stand_in = StandIn([plan], [t4.MACHINE], middle, cell_seconds)
    rows, enters_together = plan.policy.block_size, plan.row_pages == plan.longest_pages
    # Rows that enter one by one do so only while more wait than would fit together.
    count = rows if enters_together else 5 * rows
    first, passes = (0, ANSWER) if enters_together else (ANSWER, ANSWER // 2)
    worker = Worker()
    with tempfile.TemporaryDirectory(prefix="flexgen-bench-", dir=memory_folder()) as folder:
        worker.load(stand_in.specs(folder)[0])
        worker.add(alike_requests(count, PROMPT, ANSWER))
        watch = OtherLoad()
        for _ in worker.run():
            if len(worker.measured().visits) > first + passes:
                break
        disturbed, measured = beside(watch), worker.measured()
        worker.close()
    visits = measured.visits[: first + passes]
    assert len(visits) == first + passes, "the run ended before its last pass"
    began = visits[first - 1].ended if first else visits[-1].ended - measured.wall
    seconds = (visits[-1].ended - began) / stand_in.time_scale
    tokens = sum(visit.new_tokens for visit in visits[first:])
    return (
        {
            RATE: round(tokens / seconds, 3),
            "rows": round(tokens / passes, 1),
            "slots": rows,
            "seconds_per_pass": round(seconds / passes, 4),
            "longest_pages": plan.longest_pages,
            "mean_pages": plan.row_pages,
            "time_scale": stand_in.time_scale,
            "policy": str(plan.policy),
        }
        | stand_in.op_times()
        | disturbed
    )


def _whole_job(runs: dict[str, dict], count: int) -> float:
    """Speed of a job of so many requests, one by one, over that if they enter together."""
    together, apart = runs["together"], runs["one by one"]
    blocks = -(-count // together["slots"])
    passes = count * ANSWER / apart["rows"] + ANSWER
    seconds = passes * apart["seconds_per_pass"]
    return round(blocks * ANSWER * together["seconds_per_pass"] / seconds, 3)


if __name__ == "__main__":
    run_as_command(one_by_one)
