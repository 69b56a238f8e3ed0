"""Are predictions right on this machine as it is? Policies run for real, against the cost model.

The rates are those that `flexgen-ray calibrate` measured; the model's weights are made up.
Measures; decides nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain, product
from typing import Annotated, Any

import typer

from flexgen_ray.auto_policy import core_shares
from flexgen_ray.bench.result import finish, off_by
from flexgen_ray.bench.throughput import random_requests
from flexgen_ray.config import Budget, Placement, Policy
from flexgen_ray.cost.pipeline_plan import Device, Job, ModelRates, Plan
from flexgen_ray.cost.planner import Planner
from flexgen_ray.llm import LLM
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.options import JsonOption
from flexgen_ray.runtime.worker import Worker

SHAPES = ((8, 2), (16, 2))
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

    Each once before it is measured, for one token, so that nothing is compiled or touched first.
    Needs `flexgen-ray calibrate` first. Example: flexgen-ray bench prediction --model opt-350m
    """
    runs = []
    for policy in policies():
        job = Job.uniform(policy.block_size, prompt_len, max_tokens)
        runs.append(_compared(_predicted(model, dtype, job, policy), model, dtype))
    settings = {"model": model, "dtype": dtype, "prompt_len": prompt_len, "max_tokens": max_tokens}
    finish({"settings": settings} | off_by(runs) | {"runs": runs}, "CPU", json_file)


def policies() -> Iterator[Policy]:
    """Hidden states on the device; what the host has of the cache it attends."""
    for (size, number), weights, cache in product(SHAPES, WEIGHTS, CACHES):
        yield Policy(size, number, 512, weights, cache, Placement(1, 0, 0), 1.0)


def _predicted(model: str, dtype: str, job: Job, policy: Policy) -> Plan:
    """ValueError if this machine wasn't calibrated for the dtype."""
    machine = Worker().probe("cpu", tempfile.gettempdir())
    if machine.hardware is None or not machine.hardware.knows(dtype):
        raise ValueError(f"this machine's rates for {dtype} are unknown; run flexgen-ray calibrate")
    config = shape_config(model)
    rates = ModelRates.of(machine.hardware, config, dtype)
    budget = Budget(machine.gpu_bytes, machine.cpu_bytes, machine.disk_bytes)
    device = Device(rates, budget, "this node", core_shares(machine))
    planner = Planner(config, (device,), job, dtype, stages_disk=False)
    return planner.played(planner.evaluate((config.num_layers,), [policy]))


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
    found = {
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
    typer.echo(str(found), err=True)
    return found
