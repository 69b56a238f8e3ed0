"""Do mixtures of experts run as fast as predicted? Cases of mixtures_predicted.py, emulated.

Claim: the plan's schedule takes the time that the simulation says: streams of experts, parts whose
rows wait for them, and attention on the host beside that. One in four layers, with as much of the
machine's memory, so that Python issues ops in less time than they take.

Good: `simulated` within 5 % of 1: the plan's seconds over those of the run.
docs/results/mixtures-emulated.json: python -m benchmarks.mixtures_emulated --json FILE
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from functools import partial
from typing import Annotated

import torch
import typer

from benchmarks import gate
from benchmarks.command import run_as_command
from benchmarks.mixtures_predicted import CASES, Case, planner_of
from benchmarks.stand_in import StandIn, alike_requests, memory_folder
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.runs import beside
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.planner.comparison import rooflines
from flexgen_ray.planner.search import find_best_plan
from flexgen_ray.reporting.terminal import say
from flexgen_ray.runtime.worker import Worker

_SHORT = "T4, 256/50", "L4, 256/50"
_SHARE = 4


def mixtures_emulated(
    cases: Annotated[
        str,
        typer.Option(
            metavar="NAME;...",
            help=f"Cases to run, of: {'; '.join(CASES)}. [default: the short two]",
        ),
    ] = ";".join(_SHORT),
    requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of requests of each case.")
    ] = 1200,
    layer_ms: Annotated[
        float,
        typer.Option(
            metavar="MS",
            help="Wall time of a layer, all batches, of a decoding pass, in milliseconds.",
        ),
    ] = 120.0,
    json_file: JsonOption = None,
) -> None:
    """Emulate mixtures on published systems' machines; simulated seconds over the run's.

    Example: python -m benchmarks.mixtures_emulated --cases "T4, 256/50" --requests 500
    """
    runs = {}
    for name in filter(None, map(str.strip, cases.split(";"))):
        if name not in CASES:
            raise ValueError(f"--cases has {name!r}; it must be of {'; '.join(CASES)}")
        runs[name] = gate.attempt(partial(_run, CASES[name], requests, layer_ms / 1e3))
        say(f"{name}: {runs[name]}")
    result = {"emulated": True, "requests": requests, "runs": runs}
    gate.finish(result, "emulated machines: presets' rates", json_file)


def _run(case: Case, requests: int, layer_seconds: float) -> dict:
    """Figures of an emulated run, beside the plan's and the roofline; and what others did."""
    torch.set_num_threads(1)  # the small tensors' maths must not disturb the clock
    planner = planner_of(case, requests, _SHARE)
    plan = find_best_plan(planner)
    (stage,) = plan.stages
    rates = planner.rates(stage.policy)
    cell_seconds = layer_seconds / stage.policy.num_gpu_batches
    stand_in = StandIn([stage], rates, plan.job.middle_position, cell_seconds)
    worker = Worker()
    with tempfile.TemporaryDirectory(prefix="flexgen-bench-", dir=memory_folder()) as folder:
        worker.load(stand_in.specs(folder)[0])
        worker.add(alike_requests(requests, case.prompt_len, case.max_tokens))
        watch = OtherLoad()
        for _ in worker.run():
            pass
        disturbed, measured = beside(watch), worker.measured()
        worker.close()
    seconds = measured.wall / stand_in.time_scale
    tokens = sum(visit.new_tokens for visit in measured.visits)
    best, _ = rooflines(planner.devices, plan)
    return (
        {
            "model": case.model,
            "hardware": case.hardware,
            "seconds": round(seconds, 2),
            "simulated_seconds": round(plan.job_seconds, 2),
            "simulated": round(plan.job_seconds / seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "layers": stage.num_decoder_layers,
            "roofline_tokens_per_s": best and round(best.tokens_per_s, 1),
            "passes": len(measured.visits),
            "policy": asdict(stage.policy),
            "time_scale": stand_in.time_scale,
        }
        | stand_in.op_times()
        | disturbed
    )


if __name__ == "__main__":
    run_as_command(mixtures_emulated)
