"""`flexgen-ray bench throughput`: equal prompts and equal answers, the FlexGen paper's workload.

Knows one run and its bound (runs.py); compares it with nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.cli.bench.runs import (
    WORKLOAD,
    ModelOrShapeOption,
    run_figures,
    run_watched,
    synthetic_requests,
)
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
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say


def throughput(
    model: ModelOrShapeOption,
    prompt_len: Annotated[
        int,
        typer.Option(rich_help_panel=WORKLOAD, metavar="N", min=1, help="Tokens of each prompt."),
    ] = 512,
    max_tokens: Annotated[
        int,
        typer.Option(rich_help_panel=WORKLOAD, metavar="N", min=1, help="Tokens of each answer."),
    ] = 32,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=WORKLOAD,
            metavar="N",
            min=1,
            help="Number of prompts. [default: one block of --policy, else 32]",
        ),
    ] = None,
    policy: PolicyOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    gpu_memory: GpuOption = None,
    cpu_memory: CpuOption = None,
    disk_memory: DiskOption = None,
    offload_dir: OffloadOption = None,
    executor: Annotated[
        str,
        typer.Option(
            rich_help_panel=WORKLOAD,
            metavar="[async|serial]",
            help="Order of ops. async: loads, stores and compute overlap. serial: one op after the "
            "other, for comparison; the tokens are the same.",
        ),
    ] = "async",
    trace: TraceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure generated tokens/s on equal prompts, and which fraction of the hardware's bound
    that is. A short warm-up before is not timed. Prompts are random, and each is computed whole,
    even if they share tokens.

    Example: flexgen-ray bench throughput --model opt-30b --gpu-memory 16GiB --policy 30b.yaml
    """
    options: dict[str, Any] = {
        "policy": policy, "dtype": dtype.value, "device": device, "gpu_memory": gpu_memory,
        "cpu_memory": cpu_memory, "disk_memory": disk_memory, "offload_dir": offload_dir,
        "executor": executor, "hardware": "measured", "trace": trace is not None, "use_ray": False,
        "load_format": "auto" if Path(model).is_dir() else "dummy",
        "enable_prefix_caching": False,
    }  # fmt: skip
    with LLM(model, **options) as llm:
        count = num_prompts or (llm.policies.policies[0].block_size if llm.policies else 32)
        requests = synthetic_requests(llm, [(prompt_len, max_tokens)] * count)
        llm.prepare(requests)
        disturbed = run_watched(llm, requests)
        if trace is not None:
            llm.write_trace(trace)
        for line in llm.report.lines():
            say(line)
        settings = {"model": model, "prompt_len": prompt_len, "max_tokens": max_tokens}
        result = settings | {"num_prompts": count} | run_figures(llm.report) | disturbed
        # Before the end of the LLM: freeing tens of GiB of pinned memory takes long.
        finish(result, llm.report.device, json_file)
