"""Is what prompts share computed and read once on the paper's T4, too? OPT-30B, emulated.

Claim: requests whose prompts begin alike take the time of what is their own, where weights and
cache lie in host memory. Requests come in groups, as in prefixes.py. The planner plans for them
with what they share, and for whole prompts, in the same memory; both plans are emulated to their
last token.

Good: a `ratio` of seconds of 3 or more at 1,024 tokens of which 80 % are shared; `predicted` within
15 % of 1, which is the plan's seconds over those of the run.
docs/results/prefixes-emulated.json: python -m benchmarks.prefixes_emulated --json FILE
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated

import torch
import typer

from benchmarks import gate
from benchmarks import paper_machines as t4
from benchmarks.command import run_as_command
from benchmarks.prefixes import (
    WITH,
    WITHOUT,
    AnswerOption,
    Groups,
    GroupsOption,
    PromptOption,
    RowsOption,
    SharedOption,
    whole_pages,
)
from benchmarks.stand_in import StandIn, memory_folder
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.runs import beside
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.choose import planned_job
from flexgen_ray.planner.pipeline_plan import PipelinePlan, StageDevice
from flexgen_ray.planner.search import Planner, find_best_plan
from flexgen_ray.reporting.terminal import say
from flexgen_ray.request import Request
from flexgen_ray.runtime.prefixes import NOTHING_SHARED, find_prefixes
from flexgen_ray.runtime.worker import Worker

MODEL = "opt-30b"
VOCABULARY = 96  # of the stand-in


def prefixes_emulated(
    groups: GroupsOption = 4,
    rows: RowsOption = 50,
    prompt_len: PromptOption = 1024,
    shared: SharedOption = 0.8,
    max_tokens: AnswerOption = 32,
    layer_ms: Annotated[
        float,
        typer.Option(
            metavar="MS",
            help="Wall time of a layer, all batches, of a decoding pass, in milliseconds.",
        ),
    ] = 20.0,
    json_file: JsonOption = None,
) -> None:
    """Emulate prompts that begin alike with sharing and without; the ratio of seconds.

    Example: python -m benchmarks.prefixes_emulated --groups 2 --rows 20
    """
    work = Groups(groups, rows, prompt_len, whole_pages(shared * prompt_len), max_tokens)
    requests, runs = work.requests(VOCABULARY), {}
    for name in (WITH, WITHOUT):
        prefixes = find_prefixes(requests) if name == WITH else NOTHING_SHARED
        job = planned_job(requests, prefixes)
        device = StageDevice(lambda *of: t4.MACHINE, t4.BUDGET)
        plan = find_best_plan(Planner(shape_config(MODEL), (device,), job, "float16"))
        runs[name] = gate.attempt(partial(_run, plan, requests, layer_ms / 1e3))
        say(f"{name} sharing: {runs[name]}")
    result = {
        "emulated": True, "model": MODEL, **asdict(work),
        "ratio": gate.ratio(runs[WITHOUT], runs[WITH], "seconds"),
        "runs": runs,
    }  # fmt: skip
    gate.finish(result, "emulated T4 machine", json_file)


def _run(plan: PipelinePlan, requests: Sequence[Request], layer_seconds: float) -> dict:
    """Figures of an emulated run, and what others did meanwhile."""
    torch.set_num_threads(1)  # the small tensors' maths must not disturb the clock
    (stage,) = plan.stages
    cell_seconds = layer_seconds / stage.policy.num_gpu_batches
    stand_in = StandIn([stage], [t4.MACHINE], plan.job.middle_position, cell_seconds)
    worker = Worker()
    with tempfile.TemporaryDirectory(prefix="flexgen-bench-", dir=memory_folder()) as folder:
        worker.load(stand_in.specs(folder)[0])
        worker.add(list(requests))
        watch = OtherLoad()
        for _ in worker.run():
            pass
        disturbed, measured = beside(watch), worker.measured()
        worker.close()
    seconds = measured.wall / stand_in.time_scale
    return (
        {
            "seconds": round(seconds, 2),
            "predicted_seconds": round(plan.job_seconds, 2),
            "predicted": round(plan.job_seconds / seconds, 3),
            "passes": len(measured.visits),
            "prompt_tokens": sum(visit.prefill_tokens for visit in measured.visits),
            "tokens": sum(visit.new_tokens for visit in measured.visits),
            "prefix_tier": stage.prefix_tier if stage.prefix_pages else None,
            "policy": asdict(stage.policy),
            "time_scale": stand_in.time_scale,
        }
        | stand_in.op_times()
        | disturbed
    )


if __name__ == "__main__":
    run_as_command(prefixes_emulated)
