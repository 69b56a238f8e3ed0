"""`flexgen-ray plan`: predicts a job on given machines, which needn't be at hand."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from flexgen_ray.cli.options import (
    FILES,
    MODEL,
    AttentionSparsityOption,
    CacheBitsOption,
    EmbeddingBitsOption,
    JsonOption,
    MaxLatencyOption,
    WeightBitsOption,
)
from flexgen_ray.config import DTYPE_BYTES
from flexgen_ray.files.json_text import to_json
from flexgen_ray.files.output_files import write_text
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.reporting.terminal import display

_MACHINES = "Machines"
_JOB = "Job"


def plan(
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=MODEL,
            help="Model folder, a name on the Hugging Face hub (only its config.json is read), or "
            "a built-in shape, such as opt-30b.",
        ),
    ],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="|".join((*DTYPE_BYTES, "auto")),
            rich_help_panel=MODEL,
            help="Number format of weights, KV cache and hidden states. auto: the checkpoint's.",
        ),
    ] = "float16",
    hardware: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HARDWARE",
            rich_help_panel=_MACHINES,
            help="Machine to plan for: a preset, such as t4, a YAML file, or auto (this machine, "
            "if calibrated); give the option again for each further machine. [default: auto]",
        ),
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_MACHINES,
            help="Number of machines like the one given, each a pipeline stage. [default: one for "
            "each --hardware]",
        ),
    ] = None,
    nodes: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            metavar="FILE",
            rich_help_panel=_MACHINES,
            help="YAML list of {hardware, count, gpus}, in place of --hardware. [default: none]",
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=_MACHINES,
            help="Memory of each GPU, such as 16GiB. [default: the hardware's own]",
        ),
    ] = None,
    cpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=_MACHINES,
            help="Host memory of each machine, such as 64GiB. [default: the hardware's own]",
        ),
    ] = None,
    disk_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=_MACHINES,
            help="Disk space of each machine, such as 1TiB. [default: the hardware's own]",
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            metavar="DOLLARS",
            rich_help_panel=_MACHINES,
            help="Price of all machines together, to show the price of the tokens. [default: not "
            "shown]",
        ),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_JOB,
            help="Number of requests. [default: the lines of --workload, else 1000]",
        ),
    ] = None,
    prompt_len: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=_JOB, help="Tokens of each prompt.")
    ] = 512,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=_JOB, help="Tokens of each answer.")
    ] = 32,
    shared_prefix: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=_JOB,
            help="Tokens at the beginning of each prompt that it shares with others, as a system "
            "prompt or examples. They are computed and kept once.",
        ),
    ] = 0,
    prefix_groups: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_JOB,
            help="Number of different beginnings, each shared by as many prompts.",
        ),
    ] = 1,
    workload: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_JOB,
            help="CSV file with a line a request, whose last two columns are its prompt's and its "
            "answer's tokens, in place of --prompt-len and --max-tokens. [default: none]",
        ),
    ] = None,
    max_latency: MaxLatencyOption = None,
    weight_bits: WeightBitsOption = None,
    cache_bits: CacheBitsOption = None,
    embedding_bits: EmbeddingBitsOption = None,
    attention_sparsity: AttentionSparsityOption = None,
    policy_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            writable=True,
            rich_help_panel=FILES,
            help="YAML file to write the planned policy to, for generate --policy. [default: not "
            "written]",
        ),
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            writable=True,
            rich_help_panel=FILES,
            help="Image to draw throughput over latency to, .png or .svg; needs matplotlib. "
            "[default: no plot]",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Predict a job: if it fits the machines, its speed, its bottleneck, and what would help.

    Use it before you rent or buy machines: nothing is downloaded but the model's config.json, and
    nothing runs. All figures are predictions.

    \b
    Example: flexgen-ray plan --model opt-30b --hardware t4 --pipeline-parallel-size 4
             --num-requests 1000000
    """
    from flexgen_ray.config import Policy
    from flexgen_ray.planner.comparison import PlannedJob, compare, devices_of, read_job, read_nodes
    from flexgen_ray.planner.grid import SearchSpace
    from flexgen_ray.planner.search import Planner
    from flexgen_ray.reporting.plan_report import PlanReport, estimate_line, headline

    _check(dtype, max_latency, price_per_hour, frontier)
    machines = (
        read_nodes(nodes) if nodes else _machines(hardware or ["auto"], pipeline_parallel_size)
    )
    if nodes and (hardware or pipeline_parallel_size):
        raise ValueError(
            "--nodes describes all machines; leave --hardware and --pipeline-parallel-size out"
        )
    machines = [it.with_memory(gpu_memory, cpu_memory, disk_memory) for it in machines]
    if workload:
        if shared_prefix:
            raise ValueError("--shared-prefix is for prompts of --prompt-len; leave --workload out")
        job = read_job(workload, num_requests)
    else:
        lengths = prompt_len, max_tokens, shared_prefix, prefix_groups
        job = PlannedJob.uniform(num_requests or 1000, *lengths)
    config = _config(model)
    dtype = config.dtype if dtype == "auto" else dtype
    if job.max_seq_len > config.max_seq_len:
        raise ValueError(
            f"the longest request has {job.max_seq_len} tokens, but the model's context is "
            f"{config.max_seq_len}; shorten --prompt-len or --max-tokens"
        )
    base = Policy().compressed(
        weight_bits=weight_bits,
        cache_bits=cache_bits,
        embedding_bits=embedding_bits,
        attention_sparsity=attention_sparsity,
    )
    search = SearchSpace(base, max_seconds=max_latency)
    names = [
        f"{each.hardware.name} x {each.gpus}" if each.gpus > 1 else each.hardware.name
        for each in machines
    ]

    def announce(plan) -> None:
        display(headline(model, names, plan))
        sys.stdout.flush()

    def estimate(tokens_per_s: float) -> None:
        display(estimate_line(tokens_per_s))
        sys.stdout.flush()

    comparison = compare(config, machines, job, dtype, search, announce, estimate)
    on_gpu = not machines[0].hardware.device.is_cpu
    report = PlanReport(model, names, comparison, price_per_hour, on_gpu)
    result = report.as_dict()
    for line in report.lines()[1:]:
        display(line)
    if frontier:
        planner = Planner(
            config, devices_of(machines, config, dtype, cache_bits), job, dtype, search
        )
        result["frontier"] = _draw(planner, f"{model} on {', '.join(names)}", frontier)
    if policy_out:
        write_text(policy_out, report.policy_yaml())
    if json_file:
        write_text(json_file, to_json(result, indent=2) + "\n")


def _machines(names: list[str], stages: int | None) -> list:
    from flexgen_ray.hardware.spec import LOCAL, Hardware
    from flexgen_ray.planner.comparison import MAX_MACHINES, HardwareNode

    machines = [HardwareNode(Hardware.load(LOCAL if name == "auto" else name)) for name in names]
    if stages is None:
        return machines
    if not 1 <= stages <= MAX_MACHINES:
        raise ValueError(f"--pipeline-parallel-size is {stages}; it must be 1 to {MAX_MACHINES}")
    if len(machines) not in (1, stages):
        raise ValueError(
            f"--pipeline-parallel-size {stages}, but {len(machines)} machines; give one, or one "
            "for each stage"
        )
    return machines * (stages if len(machines) == 1 else 1)


def _check(
    dtype: str, max_latency: float | None, price_per_hour: float | None, frontier: Path | None
) -> None:
    """Raise ValueError, naming the option, for a value that can't be used."""
    if dtype not in (*DTYPE_BYTES, "auto"):
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}, auto")
    for name, value in (("--max-latency", max_latency), ("--price-per-hour", price_per_hour)):
        if value is not None and not 0 < value < inf:
            raise ValueError(f"{name} is {value:g}; it must be above 0")
    if frontier and find_spec("matplotlib") is None:
        raise ValueError("--frontier needs matplotlib: pip install 'flexgen-ray[plot]'")


def _config(model: str) -> ModelConfig:
    from flexgen_ray.checks import unknown_name
    from flexgen_ray.models.config_files import load_config
    from flexgen_ray.models.shapes import SHAPES, shape_config
    from flexgen_ray.paths import find_config

    if model in SHAPES and not Path(model).is_dir():
        return shape_config(model)
    if "/" not in model and not Path(model).is_dir():
        unknown = unknown_name("--model", "folder or built-in shape", [model], SHAPES, {})
        raise FileNotFoundError(
            f"{unknown} (names on the Hugging Face hub have an owner, such as Qwen/Qwen3-32B)"
        )
    return load_config(find_config(model))


def _draw(planner, title: str, path: Path) -> dict:
    from dataclasses import asdict

    from flexgen_ray.planner.frontier import find_frontiers
    from flexgen_ray.reporting.plot import draw_frontier

    curves = find_frontiers(planner)
    draw_frontier(title, curves, path)
    return {name: [asdict(point) for point in points] for name, points in curves.items()}
