"""The paper's workload: a block of equal prompts and equal outputs, prefill and decode apart.

The bound is the cost of the run's own ops at rates measured just before: the busiest lane,
resource, or, where the device is the CPU, the cores that all lanes share.
"""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.cli.options import (
    CpuOption,
    DeviceOption,
    DiskOption,
    Dtype,
    DtypeOption,
    GpuOption,
    JsonOption,
    OffloadOption,
    PolicyOption,
    TraceOption,
)
from flexgen_ray.llm import LLM
from flexgen_ray.reporting.report import Report
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say
from flexgen_ray.request import Request, SamplingParams


def throughput(
    model: Annotated[
        str,
        typer.Option(help="Model folder, or a built-in shape such as opt-30b (made-up weights)."),
    ],
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of every prompt.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 32,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="One block of the policy, or 32, if not given.")
    ] = None,
    policy: PolicyOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    gpu_memory: GpuOption = None,
    cpu_memory: CpuOption = None,
    disk_memory: DiskOption = None,
    offload_dir: OffloadOption = None,
    executor: Annotated[str, typer.Option(help="async, or serial: its oracle.")] = "async",
    trace: TraceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Generated tokens/s of the paper's workload, and what fraction of the bound that is.

    Example: flexgen-ray bench throughput --model opt-30b --gpu-memory 16GiB --policy 30b.yaml
    """
    options: dict[str, Any] = {
        "policy": policy, "dtype": dtype.value, "device": device, "gpu_memory": gpu_memory,
        "cpu_memory": cpu_memory, "disk_memory": disk_memory, "offload_dir": offload_dir,
        "executor": executor, "hardware": "measured", "trace": trace is not None, "use_ray": False,
        "load_format": "auto" if Path(model).is_dir() else "dummy",
    }  # fmt: skip
    with LLM(model, **options) as llm:
        count = num_prompts or (llm.policies.policies[0].block_size if llm.policies else 32)
        requests = random_requests(llm, count, prompt_len, max_tokens)
        llm.prepare(requests)
        for _ in llm.stream(requests):
            pass
        if trace is not None:
            llm.write_trace(trace)
        for line in llm.report.lines():
            say(line)
        settings = {"model": model, "prompt_len": prompt_len, "max_tokens": max_tokens}
        result = settings | {"num_prompts": count} | _result(llm.report)
    finish(result, llm.report.device, json_file)


def random_requests(llm: LLM, count: int, prompt_len: int, max_tokens: int) -> list[Request]:
    """As many, of as many random tokens each, that are answered greedily to the last token."""
    rng, vocabulary = random.Random(0), llm.config.vocab_size
    prompts = [[rng.randrange(vocabulary) for _ in range(prompt_len)] for _ in range(count)]
    params = SamplingParams(max_tokens, 0.0, ignore_eos=True)
    return [llm.request(index, prompt, params) for index, prompt in enumerate(prompts)]


def _result(report: Report) -> dict:
    (stage,) = report.stages
    measured, bound = stage.measured, stage.measured.bound
    ideal = max(bound.values())
    decode = report.decode_tokens / report.decode_seconds if report.decode_seconds else 0.0
    assert measured.hardware is not None
    return {
        "prefill_s": round(report.prefill_seconds, 4),
        "decode_s": round(report.decode_seconds, 4),
        "total_s": round(report.seconds, 4),
        "generated_tokens_per_s": round(report.tokens_per_s, 3),
        "decode_tokens_per_s": round(decode, 3),
        "bound_tokens_per_s": round(report.new_tokens / ideal, 3),
        "fraction_of_bound": round(ideal / report.seconds, 4),
        "binding_lane": max(bound, key=lambda lane: bound[lane]),
        "bound_s": {lane: round(seconds, 4) for lane, seconds in bound.items()},
        "busiest_lane": measured.binding_lane,
        "lanes": {lane: it["fraction"] for lane, it in stage.lanes().items()},
        "peak_bytes": stage.peak_bytes(),
        "rates": asdict(measured.hardware),
        "policy": asdict(stage.plan.policy),
    }
