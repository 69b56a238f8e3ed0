"""Are predictions right on this machine? Policies run on it in real time, and are predicted.

Claim: with calibrated rates the cost model predicts a policy's throughput within 15 %. Weights are
random. A shared machine's speed drifts, so its rates are calibrated again after each run, and the
mean of the predictions before and after the run counts.

Good: `predicted_within_15%` equal to `policies`. Runs beside which other processes used the cores
are repeated, and marked if that doesn't help.
docs/results/prediction-cpu.json: python -m benchmarks.prediction --device cpu --json FILE
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks import gate
from benchmarks.command import run_as_command
from flexgen_ray.calibration.calibrate import calibrate
from flexgen_ray.calibration.rates import Scope
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.runs import beside, holds, synthetic_requests
from flexgen_ray.cli.options import DeviceOption, GpuOption, JsonOption
from flexgen_ray.config import Placement, Policy
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.llm import LLM
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.pipeline_plan import ModelRates, PlannedJob, StageDevice
from flexgen_ray.planner.search import Planner
from flexgen_ray.reporting.report import Report
from flexgen_ray.reporting.result import prediction_errors
from flexgen_ray.reporting.terminal import say
from flexgen_ray.units import parse_bytes

SHAPES = ((8, 2), (16, 2))
ATTEMPTS = 3
STEADY = 0.1  # relative difference below which two predictions are of one and the same speed
WEIGHTS = (Placement(1, 0, 0), Placement(0, 1, 0), Placement(0, 0, 1))
CACHES = (Placement(1, 0, 0), Placement(0, 1, 0))


@dataclass(frozen=True)
class Setting:
    """The model, its dtype, and where it runs: auto, cpu or cuda, with so many bytes of a GPU."""

    model: str
    dtype: str
    device: str
    gpu_memory: int | None


def prediction(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Built-in shape to run with random weights.")
    ] = "opt-1.3b",
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Number format of weights and KV cache.")
    ] = "float32",
    prompt_len: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of each prompt.")
    ] = 32,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of each answer.")
    ] = 16,
    device: DeviceOption = "auto",
    gpu_memory: GpuOption = None,
    json_file: JsonOption = None,
) -> None:
    """Run policies on this machine in real time: throughput as a multiple of the predicted one.

    Each policy first generates one token a prompt, so that all kernels are compiled and all memory
    is touched. A policy runs again, up to three times, while the predictions before and after it
    differ by a tenth or more, or other processes use the cores; of the attempts without these, if
    there are any, the one counts in which predictions differ least.

    Example: python -m benchmarks.prediction --model opt-350m
    """
    limit = None if gpu_memory is None else parse_bytes(gpu_memory)
    setting = Setting(model, dtype, device, limit)
    runs, machine, device_names = [], _measured(setting), ""
    for policy in policies():
        job = PlannedJob.uniform(policy.block_size, prompt_len, max_tokens)
        attempts: list[dict] = []
        while len(attempts) < ATTEMPTS and not any(map(_is_sound, attempts)):
            attempt, machine, device_names = _attempt(policy, job, setting, machine)
            attempts.append(attempt)
            say(str(attempts[-1]))
        runs.append(min(attempts, key=lambda it: (not holds(it), _drift(it))))
    settings = {"model": model, "dtype": dtype, "prompt_len": prompt_len, "max_tokens": max_tokens}
    result = {"settings": settings} | prediction_errors(runs) | {"runs": runs}
    gate.finish(result, device_names, json_file, rests_on=())


def _is_sound(attempt: dict) -> bool:
    return holds(attempt) and _drift(attempt) < STEADY


def _drift(attempt: dict) -> float:
    """Relative difference of the predictions before and after a run, in the worse of both phases.

    Seconds of the whole run could hide that one phase became slower and the other faster.
    """
    before, after = attempt["before"], attempt["after"]
    return max(abs(after[phase] / before[phase] - 1) for phase in ("prefill_s", "decode_s"))


def _attempt(
    policy: Policy, job: PlannedJob, setting: Setting, machine: Hardware
) -> tuple[dict, Hardware, str]:
    """Run a policy once; returns its figures, the machine calibrated again, and the device's name.

    machine: as calibrated just before the run. Both calibrations give a prediction.
    """
    elsewhere = OtherLoad()
    report = _report(policy, job, setting)
    disturbed = beside(elsewhere)
    now = _measured(setting)
    before, after = (_predicted(policy, job, setting, each) for each in (machine, now))
    predicted = fmean((before["tokens_per_s"], after["tokens_per_s"]))
    (stage,) = report.stages
    attempt = {
        "policy": asdict(policy),
        "predicted_tokens_per_s": round(predicted, 3),
        "measured_tokens_per_s": round(report.tokens_per_s, 3),
        "measured_to_predicted": round(report.tokens_per_s / predicted, 4),
        "measured_s": {
            "prefill": round(report.prefill_seconds, 3), "decode": round(report.decode_seconds, 3)
        },
        "lanes": {lane: each["fraction"] for lane, each in stage.lanes().items()},
        "before": before,
        "after": after,
    } | disturbed  # fmt: skip
    return attempt, now, report.device


def policies() -> Iterator[Policy]:
    """Policies to run: hidden states on the device; the host attends all of its cache's part."""
    for (size, number), weights, cache in product(SHAPES, WEIGHTS, CACHES):
        yield Policy(size, number, 512, weights, cache, Placement(1, 0, 0), 1.0)


def _measured(setting: Setting) -> Hardware:
    """The machine's rates, calibrated now for this model and dtype."""
    config = shape_config(setting.model)
    scope = Scope((setting.dtype,), (config.num_heads // config.num_kv_heads,))
    folder = Path(tempfile.gettempdir())
    return calibrate(setting.device, folder, setting.gpu_memory, uses_ray=False, scope=scope)


def _predicted(policy: Policy, job: PlannedJob, setting: Setting, hardware: Hardware) -> dict:
    """Simulated throughput and seconds of a policy on this hardware, and the rates it has."""
    config, dtype = shape_config(setting.model), setting.dtype
    rates = ModelRates(hardware, config, dtype)
    device = StageDevice(rates, hardware.budget, "this node", hardware.core_shares)
    # On a GPU, bytes from disk pass through host memory.
    stages_disk = not hardware.device.is_cpu
    planner = Planner(config, (device,), job, dtype, stages_disk=stages_disk)
    plan = planner.simulate(planner.evaluate((config.num_layers,), [policy]))
    (of_policy,) = planner.rates(policy)
    return {
        "tokens_per_s": round(plan.tokens_per_s, 3),
        "prefill_s": round(plan.prefill_seconds, 3),
        "decode_s": round(plan.decode_seconds, 3),
        "rates": asdict(of_policy),
        "core_shares": dict(device.core_shares),
    }


def _report(policy: Policy, job: PlannedJob, setting: Setting) -> Report:
    """Run a policy on the job; returns the report of the run that counts."""
    options: dict[str, Any] = {
        "device": setting.device,
        "dtype": setting.dtype,
        "gpu_memory": setting.gpu_memory,
        "load_format": "dummy",
        "use_ray": False,
        "enable_prefix_caching": False,
    }
    with LLM(setting.model, policy=policy, **options) as llm:
        requests = synthetic_requests(llm, [(job.prompt_len, job.max_tokens)] * job.num_requests)
        llm.prepare(requests)
        first = synthetic_requests(llm, [(job.prompt_len, 1)] * job.num_requests)
        for _ in chain(llm.stream(first), llm.stream(requests)):
            pass
        return llm.report


if __name__ == "__main__":
    run_as_command(prediction)
