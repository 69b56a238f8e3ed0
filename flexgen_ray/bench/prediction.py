"""Are predictions right on this machine as it is? Policies run for real, against the cost model.

The rates are calibrated anew before each policy, for a shared machine's speed drifts; the model's
weights are made up. Measures; decides nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.bench.elsewhere import Elsewhere
from flexgen_ray.bench.result import finish, off_by
from flexgen_ray.bench.throughput import random_requests
from flexgen_ray.calibrate import calibrate
from flexgen_ray.config import Placement, Policy
from flexgen_ray.cost.pipeline_plan import Device, Job, ModelRates, Plan
from flexgen_ray.cost.planner import Planner
from flexgen_ray.llm import LLM
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.options import JsonOption
from flexgen_ray.runtime.calibration import Scope

SHAPES = ((8, 2), (16, 2))
ATTEMPTS = 3
QUIET = 0.1  # cores that others keep busy
WEIGHTS = (Placement(1, 0, 0), Placement(0, 1, 0), Placement(0, 0, 1))
CACHES = (Placement(1, 0, 0), Placement(0, 1, 0))


def prediction(
    model: Annotated[str, typer.Option(help="A built-in shape.")] = "opt-1.3b",
    dtype: Annotated[str, typer.Option(help="Of weights and cache.")] = "float32",
    prompt_len: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Tokens of every answer.")] = 16,
    json_file: JsonOption = None,
) -> None:
    """Policies run on the CPU, in real time, as multiples of what was predicted.

    Each once before it is measured, for one token, so that nothing is compiled or touched first;
    and again, up to three times, if others kept cores busy meanwhile: the quietest counts.
    Example: flexgen-ray bench prediction --model opt-350m
    """
    runs = []
    for policy in policies():
        job = Job.uniform(policy.block_size, prompt_len, max_tokens)
        attempts: list[dict] = []
        while len(attempts) < ATTEMPTS and not any(map(_is_quiet, attempts)):
            attempts.append(_attempt(policy, job, model, dtype))
            typer.echo(str(attempts[-1]), err=True)
        runs.append(min(attempts, key=lambda it: it["cores_elsewhere"]))
    settings = {"model": model, "dtype": dtype, "prompt_len": prompt_len, "max_tokens": max_tokens}
    finish({"settings": settings} | off_by(runs) | {"runs": runs}, "CPU", json_file)


def _is_quiet(attempt: dict) -> bool:
    return attempt["cores_elsewhere"] < QUIET


def _attempt(policy: Policy, job: Job, model: str, dtype: str) -> dict:
    """Calibrated, predicted and run."""
    elsewhere = Elsewhere()
    planner = _planner(model, dtype, job)
    plan = planner.played(planner.evaluate((planner.config.num_layers,), [policy]))
    (rates,), (device,) = planner.rates(policy), planner.devices
    found = _compared(plan, model, dtype)
    cores = {"cores_elsewhere": round(elsewhere.cores, 3)}
    return found | cores | {"rates": asdict(rates), "core_shares": dict(device.core_shares)}


def policies() -> Iterator[Policy]:
    """Hidden states on the device; what the host has of the cache it attends."""
    for (size, number), weights, cache in product(SHAPES, WEIGHTS, CACHES):
        yield Policy(size, number, 512, weights, cache, Placement(1, 0, 0), 1.0)


def _planner(model: str, dtype: str, job: Job) -> Planner:
    """For the machine as it is now."""
    config = shape_config(model)
    scope = Scope((dtype,), (config.num_heads // config.num_kv_heads,))
    hardware = calibrate("cpu", Path(tempfile.gettempdir()), uses_ray=False, scope=scope)
    rates = ModelRates.of(hardware, config, dtype)
    device = Device(rates, hardware.budget, "this node", hardware.core_shares)
    return Planner(config, (device,), job, dtype, stages_disk=False)


def _compared(plan: Plan, model: str, dtype: str) -> dict:
    policy, job = plan.stages[0].policy, plan.job
    options: dict[str, Any] = {
        "device": "cpu",
        "dtype": dtype,
        "load_format": "dummy",
        "use_ray": False,
    }
    with LLM(model, policy=replace(policy, blocks_in_flight=None), **options) as llm:
        requests = random_requests(llm, job.num_requests, job.prompt_len, job.max_tokens)
        llm.prepare(requests)
        first = random_requests(llm, job.num_requests, job.prompt_len, 1)
        for _ in chain(llm.stream(first), llm.stream(requests)):
            pass
        report = llm.report
    (stage,) = report.stages
    return {
        "policy": asdict(policy),
        "predicted_tokens_per_s": round(plan.tokens_per_s, 3),
        "measured_tokens_per_s": round(report.tokens_per_s, 3),
        "measured_to_predicted": round(report.tokens_per_s / plan.tokens_per_s, 4),
        "predicted_s": {
            "prefill": round(plan.prefill_seconds, 3), "decode": round(plan.decode_seconds, 3)
        },
        "measured_s": {
            "prefill": round(report.prefill_seconds, 3), "decode": round(report.decode_seconds, 3)
        },
        "lanes": {lane: it["fraction"] for lane, it in stage.lanes().items()},
    }  # fmt: skip
