"""`flexgen-ray bench scaling`: throughput of pipelines over their number of stages.

N stages are compared with one, and with N copies of one stage, each with a share of the prompts: in
tokens/s of decoding alone, and of generation, prefill included. A pipeline may beat the copies in
decoding (super-linear scaling, FlexGen's table 4): its GPUs hold more of the model together, so
less is offloaded; prefill gains less. Each number of stages gets as many prompts per stage, in one
round of full blocks. benchmarks/scaling.py measures emulated machines by the functions here. Knows
pipelines and their reports; not how a stage works.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.cli.bench.runs import (
    WORKLOAD,
    ModelOrShapeOption,
    holds,
    run_watched,
    synthetic_requests,
)
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
RATES = ("decode", "generation")  # tokens/s of decoding alone, and of prefill and decoding


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
    """Measure tokens/s of decoding and of generation over the number of pipeline stages, on this
    machine's GPUs or a Ray cluster, and compare with one stage and with as many copies of it.

    A run beside which other programs used this machine's cores is marked, and compared with
    nothing. Stages on one machine without GPUs share its cores, so there they show no gain. Each
    prompt is computed whole, even if they share tokens.

    Example: flexgen-ray bench scaling --model opt-30b --pipeline-parallel-sizes 1,2,4
             --address auto
    """
    counts = parse_counts(stages)
    options: dict[str, Any] = {
        "policy": policy, "dtype": dtype.value, "device": device, "gpu_memory": gpu_memory,
        "cpu_memory": cpu_memory, "disk_memory": disk_memory, "offload_dir": offload_dir,
        "threads": threads, "address": address, "transport": transport.value, "wait": wait,
        "load_format": "auto" if Path(model).is_dir() else "dummy",
        "enable_prefix_caching": False,
    }  # fmt: skip
    runs, device_names = {}, ""
    for count in counts:
        with LLM(model, pipeline_parallel_size=count, **options) as llm:
            disturbed = _run_full_blocks(llm, num_prompts * count, (prompt_len, max_tokens))
            runs[str(count)] = _figures(llm.report) | disturbed
            device_names = llm.report.device
        say(f"{count} stages: {runs[str(count)]}")
    settings = {
        "prompt_len": prompt_len,
        "max_tokens": max_tokens,
        "prompts_per_stage": num_prompts,
    }
    result = {"settings": settings, "models": {model: {"stages": runs} | compare_with_copies(runs)}}
    for line in table(runs):
        say(line)
    if plot is not None:
        from flexgen_ray.reporting.plot import draw_scaling

        draw_scaling(result, plot)
    finish(result, device_names, json_file)


def parse_counts(text: str) -> list[int]:
    """Numbers of stages from `1,2,4`; BadParameter for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of numbers from 1 up, such as 1,2")
    return [int(part) for part in parts]


def _run_full_blocks(llm: LLM, num_requests: int, lengths: tuple[int, int]) -> dict:
    """Run one round of full blocks of a plan for so many requests; returns as run_watched does."""
    requests = synthetic_requests(llm, [lengths] * num_requests)
    llm.prepare(requests)
    plan = llm.plans[0]
    return run_watched(llm, requests[: plan.policy.block_size * plan.num_blocks])


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
    if report.forecast is not None:
        figures["predicted_decode_tokens_per_s"] = round(report.forecast.decode_tokens_per_s, 3)
        figures["predicted_generation_tokens_per_s"] = round(report.forecast.tokens_per_s, 3)
    return figures | name_slowest(busiest)


def steady_visits(visits: Sequence[VisitTiming], num_blocks: int) -> list[VisitTiming]:
    """A stage's visits while all rows of every block decode, and no more than that.

    Prompts of a block begin and end some passes apart, so the longest stretch of passes with all
    rows counts, without the visits at both ends beside which other blocks may do something else.
    """
    most = max((each.new_tokens for each in visits), default=0)
    stretches = groupby(visits, lambda it: it.new_tokens == most and not it.prefill_tokens)
    longest = max((list(each) for is_full, each in stretches if is_full), key=len, default=[])
    return longest[num_blocks - 1 : len(longest) - num_blocks]


def decode_rate(
    visits: Sequence[VisitTiming], num_blocks: int, time_scale: float = 1.0
) -> float | None:
    """Tokens/s while all rows of every block decode; None if fewer than two visits do so.

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

    runs: {number of stages: figures}. A marked run has no ratios, and if that of one stage is
    marked or missing, nor has any other; nor has one of decoding where no pass decoded all rows.
    """
    ratios: dict[str, dict[str, float]] = {}
    sound = {count: run for count, run in runs.items() if holds(run)}
    for phase in RATES:
        rates = {count: run[f"{phase}_tokens_per_s"] for count, run in sound.items()}
        if not rates.get("1"):
            continue
        of_one = {count: rate / rates["1"] for count, rate in rates.items() if rate is not None}
        ratios[f"{phase}_of_one"] = {count: round(ratio, 3) for count, ratio in of_one.items()}
        ratios[f"{phase}_of_copies"] = {
            count: round(ratio / int(count), 3) for count, ratio in of_one.items()
        }
    return ratios


def table(runs: dict[str, dict]) -> list[str]:
    """Lines for people: a row for each number of stages; 1.00 of copies is linear scaling.

    Rates of marked runs have a question mark, and the reasons follow the rows.
    """
    columns = ["stages", "hosts"]
    for phase in RATES:
        columns += [f"{phase} tok/s", "x one", "x copies"]
    rows, ratios = [columns], compare_with_copies(runs)
    for count, run in runs.items():
        rows.append([count, str(run.get("hosts", count))])
        for phase in RATES:
            rate = run[f"{phase}_tokens_per_s"]
            doubt = "" if holds(run) else "?"
            rows[-1].append("-" if rate is None else f"{rate:.2f}{doubt}")
            for other in ("one", "copies"):
                ratio = ratios.get(f"{phase}_of_{other}", {}).get(count)
                rows[-1].append("-" if ratio is None else f"{ratio:.2f}")
    widths = [2 + max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["".join(map(str.rjust, row, widths)) for row in rows]
    marked = {count: run["doubtful"] for count, run in runs.items() if not holds(run)}
    return lines + [f"stages {count}, doubtful: {'; '.join(it)}" for count, it in marked.items()]
