"""Are predictions right on this machine as it is? Policies run for real, against the cost model.

The rates are calibrated anew between runs, and the mean of the predictions before and after each
counts, for a shared machine's speed drifts; the model's weights are made up. Measures; decides
nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.command import run_as_command
from flexgen_ray.calibration.calibrate import calibrate
from flexgen_ray.calibration.rates import Scope
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.runs import synthetic_requests
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.config import Placement, Policy
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.llm import LLM
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.pipeline_plan import ModelRates, PlannedJob, StageDevice
from flexgen_ray.planner.search import Planner
from flexgen_ray.reporting.report import Report
from flexgen_ray.reporting.result import finish, prediction_errors
from flexgen_ray.reporting.terminal import say

SHAPES = ((8, 2), (16, 2))
ATTEMPTS = 3
STEADY = 0.1  # how far two predictions of a steady machine are apart
WEIGHTS = (Placement(1, 0, 0), Placement(0, 1, 0), Placement(0, 0, 1))
CACHES = (Placement(1, 0, 0), Placement(0, 1, 0))


def prediction(
    model: Annotated[str, typer.Option(help="A built-in shape.")] = "opt-1.3b",
    dtype: Annotated[str, typer.Option(help="Of weights and cache.")] = "float32",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of every prompt.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 16,
    json_file: JsonOption = None,
) -> None:
    """Policies run on the CPU, in real time, as multiples of what was predicted.

    Each once before it is measured, for one token, so that nothing is compiled or touched first;
    and again, up to three times, where the predictions before and after it differ by a tenth or
    more: the attempt counts in which they differ least.
    Example: python -m benchmarks.prediction --model opt-350m
    """
    runs, machine = [], _measured(model, dtype)
    for policy in policies():
        job = PlannedJob.uniform(policy.block_size, prompt_len, max_tokens)
        attempts: list[dict] = []
        while len(attempts) < ATTEMPTS and not any(_drift(it) < STEADY for it in attempts):
            attempt, machine = _attempt(policy, job, model, dtype, machine)
            attempts.append(attempt)
            say(str(attempts[-1]))
        runs.append(min(attempts, key=_drift))
    settings = {"model": model, "dtype": dtype, "prompt_len": prompt_len, "max_tokens": max_tokens}
    finish({"settings": settings} | prediction_errors(runs) | {"runs": runs}, "CPU", json_file)


def _drift(attempt: dict) -> float:
    """How far the two predictions of a run are apart, that before it and that after it: in the
    phase in which they differ more, lest one that became slower hides one that became faster."""
    before, after = attempt["before"], attempt["after"]
    return max(abs(after[phase] / before[phase] - 1) for phase in ("prefill_s", "decode_s"))


def _attempt(
    policy: Policy, job: PlannedJob, model: str, dtype: str, machine: Hardware
) -> tuple[dict, Hardware]:
    """Predicted for the machine as it was just now, run, and predicted anew for what it is then."""
    elsewhere = OtherLoad()
    report = _report(policy, job, model, dtype)
    now = _measured(model, dtype)
    before, after = (_predicted(policy, job, model, dtype, it) for it in (machine, now))
    foretold = fmean((before["tokens_per_s"], after["tokens_per_s"]))
    (stage,) = report.stages
    attempt = {
        "policy": asdict(policy),
        "predicted_tokens_per_s": round(foretold, 3),
        "measured_tokens_per_s": round(report.tokens_per_s, 3),
        "measured_to_predicted": round(report.tokens_per_s / foretold, 4),
        "measured_s": {
            "prefill": round(report.prefill_seconds, 3), "decode": round(report.decode_seconds, 3)
        },
        "lanes": {lane: it["fraction"] for lane, it in stage.lanes().items()},
        "cores_elsewhere": round(elsewhere.cores, 3),
        "before": before,
        "after": after,
    }  # fmt: skip
    return attempt, now


def policies() -> Iterator[Policy]:
    """Hidden states on the device; what the host has of the cache it attends."""
    for (size, number), weights, cache in product(SHAPES, WEIGHTS, CACHES):
        yield Policy(size, number, 512, weights, cache, Placement(1, 0, 0), 1.0)


def _measured(model: str, dtype: str) -> Hardware:
    """The machine as it is now."""
    config = shape_config(model)
    scope = Scope((dtype,), (config.num_heads // config.num_kv_heads,))
    return calibrate("cpu", Path(tempfile.gettempdir()), uses_ray=False, scope=scope)


def _predicted(policy: Policy, job: PlannedJob, model: str, dtype: str, hardware: Hardware) -> dict:
    config = shape_config(model)
    rates = ModelRates.of(hardware, config, dtype)
    device = StageDevice(rates, hardware.budget, "this node", hardware.core_shares)
    planner = Planner(config, (device,), job, dtype, stages_disk=False)
    plan = planner.simulate(planner.evaluate((config.num_layers,), [policy]))
    (of_policy,) = planner.rates(policy)
    return {
        "tokens_per_s": round(plan.tokens_per_s, 3),
        "prefill_s": round(plan.prefill_seconds, 3),
        "decode_s": round(plan.decode_seconds, 3),
        "rates": asdict(of_policy),
        "core_shares": dict(device.core_shares),
    }


def _report(policy: Policy, job: PlannedJob, model: str, dtype: str) -> Report:
    """Of the run."""
    options: dict[str, Any] = {
        "device": "cpu",
        "dtype": dtype,
        "load_format": "dummy",
        "use_ray": False,
    }
    with LLM(model, policy=policy, **options) as llm:
        requests = synthetic_requests(llm, [(job.prompt_len, job.max_tokens)] * job.num_requests)
        llm.prepare(requests)
        first = synthetic_requests(llm, [(job.prompt_len, 1)] * job.num_requests)
        for _ in chain(llm.stream(first), llm.stream(requests)):
            pass
        return llm.report


if __name__ == "__main__":
    run_as_command(prediction)
