"""`flexgen-ray bench scaling`: decode throughput of pipelines over their number of stages.

N stages are compared with N copies of one stage, each with a share of the prompts. A pipeline may
beat them (super-linear scaling, FlexGen's table 4): its GPUs hold more of the model together, so
less is offloaded. Each number of stages gets as many prompts per stage, in one round of full
blocks. benchmarks/scaling.py measures emulated machines by the functions here. Knows pipelines and
their reports; not how a stage works.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.cli.bench.runs import WORKLOAD, ModelOrShapeOption, synthetic_requests
from flexgen_ray.cli.options import (
    AddressOption,
    CpuOption,
    DeviceOption,
    DiskOption,
    Dtype,
    DtypeOption,
    GpuOption,
    JsonOption,
    OffloadOption,
    PlotOption,
    PolicyOption,
    ThreadsOption,
    Transport,
    TransportOption,
    WaitOption,
)
from flexgen_ray.llm import LLM
from flexgen_ray.reporting.report import Report
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say
from flexgen_ray.runtime.meter import VisitTiming

LEAST_TOKENS = 4  # of an answer, so that some passes decode every block


def scaling(
    model: ModelOrShapeOption,
    stages: Annotated[
        str,
        typer.Option(
            "--pipeline-parallel-sizes",
            rich_help_panel=WORKLOAD,
            metavar="N,N,...",
            help="Numbers of pipeline stages to compare; 1 is the reference.",
        ),
    ] = "1,2",
    prompt_len: Annotated[
        int,
        typer.Option(rich_help_panel=WORKLOAD, metavar="N", min=1, help="Tokens of each prompt."),
    ] = 512,
    max_tokens: Annotated[
        int,
        typer.Option(
            rich_help_panel=WORKLOAD, metavar="N", min=LEAST_TOKENS, help="Tokens of each answer."
        ),
    ] = 32,
    num_prompts: Annotated[
        int,
        typer.Option(
            rich_help_panel=WORKLOAD,
            metavar="N",
            min=1,
            help="Prompts for each stage: 4 stages get 4 times as many.",
        ),
    ] = 32,
    policy: PolicyOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    gpu_memory: GpuOption = None,
    cpu_memory: CpuOption = None,
    disk_memory: DiskOption = None,
    offload_dir: OffloadOption = None,
    threads: ThreadsOption = None,
    address: AddressOption = None,
    transport: TransportOption = Transport.auto,
    wait: WaitOption = None,
    plot: PlotOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure decode and total tokens/s over the number of pipeline stages, on this machine's GPUs
    or a Ray cluster, and compare with as many copies of one stage.

    Stages on one machine without GPUs share its cores, so there they show no gain.

    Example: flexgen-ray bench scaling --model opt-30b --pipeline-parallel-sizes 1,2,4
             --address auto
    """
    counts = parse_counts(stages)
    options: dict[str, Any] = {
        "policy": policy, "dtype": dtype.value, "device": device, "gpu_memory": gpu_memory,
        "cpu_memory": cpu_memory, "disk_memory": disk_memory, "offload_dir": offload_dir,
        "threads": threads, "address": address, "transport": transport.value, "wait": wait,
        "load_format": "auto" if Path(model).is_dir() else "dummy",
    }  # fmt: skip
    runs, device_names = {}, ""
    for count in counts:
        with LLM(model, pipeline_parallel_size=count, **options) as llm:
            report = _run_full_blocks(llm, num_prompts * count, (prompt_len, max_tokens))
        runs[str(count)] = _figures(report)
        device_names = report.device
        say(f"{count} stages: {runs[str(count)]}")
    settings = {
        "prompt_len": prompt_len,
        "max_tokens": max_tokens,
        "prompts_per_stage": num_prompts,
    }
    result = {"settings": settings, "models": {model: {"stages": runs} | compare_with_copies(runs)}}
    for line in table(runs):
        say(line)
    if plot is not None and all(run["decode_tokens_per_s"] for run in runs.values()):
        from flexgen_ray.reporting.plot import draw_scaling

        draw_scaling(result, plot)
    finish(result, device_names, json_file)


def parse_counts(text: str) -> list[int]:
    """Numbers of stages from `1,2,4`; BadParameter for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of numbers from 1 up, such as 1,2")
    return [int(part) for part in parts]


def _run_full_blocks(llm: LLM, num_requests: int, lengths: tuple[int, int]) -> Report:
    """The report of one round of full blocks of a plan for so many requests."""
    requests = synthetic_requests(llm, [lengths] * num_requests)
    llm.prepare(requests)
    plan = llm.plans[0]
    for _ in llm.stream(requests[: plan.policy.block_size * plan.num_blocks]):
        pass
    return llm.report


def _figures(report: Report) -> dict:
    """Throughput of one run and how busy its stages were."""
    plan = report.stages[0].plan
    decode = decode_rate(report.stages[-1].measured.visits, plan.num_blocks)
    busiest = []
    for stage in report.stages:
        lane, wall = stage.measured.binding_lane, stage.measured.wall
        busiest.append((lane, stage.measured.busy.get(lane, 0.0) / wall if wall else 0.0))
    figures: dict = {
        "decode_tokens_per_s": None if decode is None else round(decode, 3),
        "generation_tokens_per_s": round(report.tokens_per_s, 3),
        "sequences": report.num_requests,
        "blocks_in_flight": plan.num_blocks,
        "hosts": len({stage.machine.host for stage in report.stages}),
        "seconds": round(report.seconds, 3),
        "policies": [stage.as_dict()["policy"] for stage in report.stages],
    }
    if report.planned is not None:
        figures["predicted_decode_tokens_per_s"] = round(report.planned.decode_tokens_per_s, 3)
        figures["predicted_generation_tokens_per_s"] = round(report.planned.tokens_per_s, 3)
    return figures | name_slowest(busiest)


def steady_visits(visits: Sequence[VisitTiming], num_blocks: int) -> list[VisitTiming]:
    """A stage's visits while every block decodes: all but the first and the last of each block."""
    decoding = [each for each in visits if each.new_tokens and not each.prefill_tokens]
    return decoding[num_blocks - 1 : len(decoding) - num_blocks]


def decode_rate(
    visits: Sequence[VisitTiming], num_blocks: int, time_scale: float = 1.0
) -> float | None:
    """Tokens/s while every block decodes; None if fewer than two visits do so.

    visits: those of the last stage. time_scale: wall seconds that one second takes, if emulated.
    """
    steady = steady_visits(visits, num_blocks)
    if len(steady) < 2:
        return None
    seconds = steady[-1].ended - steady[0].ended
    return sum(each.new_tokens for each in steady[1:]) / seconds * time_scale


def name_slowest(busiest: Sequence[tuple[str, float]]) -> dict:
    """The slowest stage and its bottleneck; busiest: each stage's busiest lane and busy share."""
    slowest = max(range(len(busiest)), key=lambda stage: busiest[stage][1])
    return {
        "busy_share_of_stages": [round(share, 4) for _, share in busiest],
        "slowest_stage": slowest,
        "slowest_stage_is_bound_by": busiest[slowest][0],
    }


def compare_with_copies(runs: dict[str, dict]) -> dict:
    """Each number of stages against one stage, and against as many copies of it.

    runs: {number of stages: figures}. Empty without a run of one stage; ratios of decode are left
    out where no pass decoded every block.
    """
    ratios: dict[str, dict[str, float]] = {}
    for phase in ("decode", "generation"):
        rates = {count: run[f"{phase}_tokens_per_s"] for count, run in runs.items()}
        if not rates.get("1"):
            continue
        of_one = {count: rate / rates["1"] for count, rate in rates.items() if rate is not None}
        ratios[f"{phase}_of_one"] = {count: round(ratio, 3) for count, ratio in of_one.items()}
        ratios[f"{phase}_of_copies"] = {
            count: round(ratio / int(count), 3) for count, ratio in of_one.items()
        }
    return ratios


def table(runs: dict[str, dict]) -> list[str]:
    """Lines for people: a row for each number of stages; 1.00 of copies is linear scaling."""
    columns = ("stages", "hosts", "decode tok/s", "total tok/s", "x one stage", "x copies")
    lines = ["".join(f"{column:>14}" for column in columns)]
    ratios = compare_with_copies(runs)
    for count, run in runs.items():
        decode = run["decode_tokens_per_s"]
        cells = [count, str(run["hosts"]), "-" if decode is None else f"{decode:.2f}"]
        cells.append(f"{run['generation_tokens_per_s']:.2f}")
        for name in ("of_one", "of_copies"):
            each = ratios.get(f"decode_{name}", ratios.get(f"generation_{name}", {}))
            cells.append(f"{each[count]:.2f}" if count in each else "-")
        lines.append("".join(f"{cell:>14}" for cell in cells))
    return lines
