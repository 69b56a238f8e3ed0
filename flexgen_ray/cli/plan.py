"""`flexgen-ray plan`: what a job would take on given machines, also on those one doesn't own.

A plan for people, in a few lines, and for programs. Knows a comparison; measures nothing.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Annotated

import typer
import yaml

from flexgen_ray.cli.options import (
    CacheBitsOption,
    EmbeddingBitsOption,
    JsonOption,
    SparsityOption,
    WeightBitsOption,
)
from flexgen_ray.config import DTYPE_BYTES, TIERS
from flexgen_ray.files.json_text import to_json
from flexgen_ray.files.output import write_text
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import stage_bytes, totals, weight_bytes
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.comparison import RESIDENT, Alternative, Comparison
from flexgen_ray.planner.pipeline_plan import PipelinePlan
from flexgen_ray.reporting.terminal import display
from flexgen_ray.units import format_bytes, format_seconds

WORTH_SAYING = 1.05  # gains below are no advice


@dataclass(frozen=True)
class PlanReport:
    """hardware: names of the machines; price_per_hour: of all of them together."""

    model: str
    hardware: list[str]
    comparison: Comparison
    price_per_hour: float | None = None

    @property
    def hours(self) -> float:
        return self.comparison.plan.job_seconds / 3600

    @property
    def price_per_million_tokens(self) -> float | None:
        if self.price_per_hour is None:
            return None
        job = self.comparison.plan.job
        return self.price_per_hour * self.hours / (job.num_requests * job.mean_tokens) * 1e6

    def lines(self) -> list[str]:
        """Plain text; all of it predicted."""
        plan = self.comparison.plan
        blocks = f"{plan.num_blocks} blocks" if plan.num_blocks > 1 else "a block"
        policy = plan.stages[0].policy
        stage, lane = plan.binding
        prefill, decode = map(format_seconds, (plan.prefill_seconds, plan.decode_seconds))
        lines = [
            headline(self.model, self.hardware, plan),
            f"weights {format_bytes(self._weight_bytes)}, cache "
            f"{format_bytes(self._cache_bytes_per_token)} a token",
            f"{blocks} of {policy.num_gpu_batches} x {policy.gpu_batch_size} sequences",
            *(self._stage(number, it) for number, it in enumerate(plan.stages)),
            f"{_rate(plan.tokens_per_s)} generated tokens/s: prefill {prefill} and decode {decode} "
            f"for all in flight ({_rate(plan.decode_tokens_per_s)} tokens/s)",
            f"{plan.job.num_requests:,} requests take {plan.num_rounds:,} such rounds, "
            f"{format_seconds(plan.job_seconds)}{self._price()}",
            f"stage {stage}'s {lane} binds" if len(plan.stages) > 1 else f"{lane} binds",
        ]
        return [*lines, *self._advice(), *self._verdicts()]

    def as_dict(self) -> dict:
        plan = self.comparison.plan
        stage, lane = plan.binding
        needs = [totals(stage_bytes(it)) for it in plan.stages]
        return {
            "model": self.model,
            "hardware": self.hardware,
            "predicted": True,
            "fits": True,
            "tokens_per_s": plan.tokens_per_s,
            "decode_tokens_per_s": plan.decode_tokens_per_s,
            "prefill_s": plan.prefill_seconds,
            "decode_s": plan.decode_seconds,
            "block_s": plan.block_seconds,
            "hours": self.hours,
            "weight_bytes": self._weight_bytes,
            "cache_bytes_per_token": self._cache_bytes_per_token,
            "price_per_million_tokens": self.price_per_million_tokens,
            "binding_stage": stage,
            "binding_lane": lane,
            "bytes": {tier: sum(getattr(need, tier) for need in needs) for tier in TIERS},
            "stages": [
                {
                    "layers": it.num_decoder_layers,
                    "bytes": asdict(need),
                    "policy": asdict(it.policy),
                }
                for it, need in zip(plan.stages, needs, strict=True)
            ],
            "alternatives": [asdict(it) for it in self.comparison.alternatives],
            "upgrades": [asdict(it) for it in self.comparison.upgrades],
        }

    def policy_yaml(self) -> str:
        """For --policy."""
        stages = self.comparison.plan.stages
        shape = asdict(stages[0].policy)
        own = ("weights", "cache", "activations", "cpu_attention")
        if len(stages) == 1:
            shape.pop("blocks_in_flight")
            return yaml.safe_dump(shape, sort_keys=False)
        shared = {name: value for name, value in shape.items() if name not in own}
        each = [
            {"layers": it.num_decoder_layers} | {name: asdict(it.policy)[name] for name in own}
            for it in stages
        ]
        return yaml.safe_dump(shared | {"stages": each}, sort_keys=False)

    @property
    def _weight_bytes(self) -> int:
        return sum(sum(weight_bytes(stage).values()) for stage in self.comparison.plan.stages)

    @property
    def _cache_bytes_per_token(self) -> int:
        return sum(it.kv_bytes * it.num_decoder_layers for it in self.comparison.plan.stages)

    def _stage(self, number: int, stage: StagePlan) -> str:
        policy, need = stage.policy, totals(stage_bytes(stage))
        name = (
            f"stage {number}, {stage.num_decoder_layers} layers: "
            if not stage.stage.is_whole
            else ""
        )
        parts = [
            f"{what} {_fractions(getattr(policy, what).fractions)}"
            for what in ("weights", "cache", "activations")
        ]
        if policy.cache.cpu:
            parts.append(f"{policy.cpu_attention:.0%} of the host's cache attended there")
        sizes = (format_bytes(getattr(need, tier)) for tier in TIERS)
        return f"{name}{', '.join(parts)} (GPU, host, disk: {', '.join(sizes)})"

    def _price(self) -> str:
        price = self.price_per_million_tokens
        return "" if price is None else f", {price:,.4g} $ per million tokens"

    def _advice(self) -> list[str]:
        ours = self.comparison.plan.tokens_per_s
        gains = {
            it.name: it.tokens_per_s / ours
            for it in self.comparison.upgrades
            if it.tokens_per_s and it.tokens_per_s > WORTH_SAYING * ours
        }
        best_first = sorted(gains, key=lambda name: -gains[name])
        text = ", ".join(f"{name} {gains[name]:.2f} x" for name in best_first)
        return [f"faster with: {text}"] if text else []

    def _verdicts(self) -> list[str]:
        lines = [self._verdict(it) for it in self.comparison.alternatives]
        if any(it.name == RESIDENT and it.tokens_per_s for it in self.comparison.alternatives):
            lines.append(
                "everything fits the GPUs: a resident engine (such as vLLM) would be faster"
            )
        return lines

    def _verdict(self, other: Alternative) -> str:
        if other.tokens_per_s is None:
            return f"{other.name}: not possible, {other.why_not}"
        ratio = other.tokens_per_s / self.comparison.plan.tokens_per_s
        start = f"{other.name}: {_rate(other.tokens_per_s)} tokens/s, {ratio:.2f} x"
        return f"{start}: do that instead" if ratio >= WORTH_SAYING else f"{start} of the plan"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 1000 else f"{tokens_per_s:.3g}"


def headline(model: str, hardware: list[str], plan: PipelinePlan) -> str:
    """One line on a plan that fits: its predicted throughput, and how long the job takes."""
    return (
        f"{model} in {plan.stages[0].dtype} on {', '.join(hardware)}: fits, about "
        f"{_rate(plan.tokens_per_s)} generated tokens/s, {plan.job.num_requests:,} requests in "
        f"{format_seconds(plan.job_seconds)} (predicted)"
    )


def estimate_line(tokens_per_s: float) -> str:
    """A line to be shown while the plan is made."""
    return f"fits, about {_rate(tokens_per_s)} generated tokens/s by a first estimate; planning"


def _fractions(fractions: tuple[float, ...]) -> str:
    return "/".join(f"{fraction:.0%}".rstrip("%") for fraction in fractions) + " %"


HardwareOption = Annotated[
    list[str] | None,
    typer.Option(help="auto (this machine, calibrated), a preset or a file; again for each more."),
]


def plan(
    model: Annotated[str, typer.Option(help="Model folder, or a built-in shape such as opt-30b.")],
    hardware: HardwareOption = None,
    nodes: Annotated[
        Path | None,
        typer.Option(exists=True, help="YAML list of {hardware, count, gpus} instead."),
    ] = None,
    stages: Annotated[
        int | None, typer.Option(help="So many machines like the one given, a stage each.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory of each GPU, such as 16GiB. [default: the file's]")
    ] = None,
    cpu_memory: Annotated[
        str | None, typer.Option(help="Host memory of each machine. [default: the file's]")
    ] = None,
    disk_memory: Annotated[
        str | None, typer.Option(help="Disk space of each machine. [default: the file's]")
    ] = None,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of every prompt.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 32,
    num_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of the job. [default: 1000, or the file's]")
    ] = None,
    workload: Annotated[
        Path | None, typer.Option(help="CSV instead; its last two columns are those lengths.")
    ] = None,
    max_latency: Annotated[float | None, typer.Option(help="Seconds a block may take.")] = None,
    dtype: Annotated[
        str, typer.Option(help=f"{', '.join(DTYPE_BYTES)}, or auto: the checkpoint's.")
    ] = "float16",
    weight_bits: WeightBitsOption = None,
    cache_bits: CacheBitsOption = None,
    embedding_bits: EmbeddingBitsOption = None,
    sparsity: SparsityOption = None,
    price_per_hour: Annotated[float | None, typer.Option(help="$ for all machines.")] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(writable=True, help="Draw throughput over latency, as .png or .svg."),
    ] = None,
    policy_out: Annotated[
        Path | None, typer.Option(writable=True, help="Write the policy, as YAML.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Predict a job: does it fit, how fast, what binds, what would help.

    Example: flexgen-ray plan --model opt-30b --hardware t4 --stages 4 --num-requests 1000000
    """
    from flexgen_ray.config import Policy
    from flexgen_ray.planner.comparison import PlannedJob, compare, devices_of, read_job, read_nodes
    from flexgen_ray.planner.grid import SearchSpace
    from flexgen_ray.planner.search import Planner

    _check(dtype, max_latency, price_per_hour, frontier)
    machines = read_nodes(nodes) if nodes else _machines(hardware or ["auto"], stages)
    if nodes and (hardware or stages):
        raise ValueError("--nodes says all about the machines; leave --hardware and --stages out")
    machines = [it.with_memory(gpu_memory, cpu_memory, disk_memory) for it in machines]
    job = (
        read_job(workload, num_requests)
        if workload
        else PlannedJob.uniform(num_requests or 1000, prompt_len, max_tokens)
    )
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
        attention_sparsity=sparsity,
    )
    search = SearchSpace(base, max_seconds=max_latency)
    names = [
        f"{it.hardware.name} x {it.gpus}" if it.gpus > 1 else it.hardware.name for it in machines
    ]

    def announce(plan) -> None:
        display(headline(model, names, plan))
        sys.stdout.flush()

    def estimate(tokens_per_s: float) -> None:
        display(estimate_line(tokens_per_s))
        sys.stdout.flush()

    comparison = compare(config, machines, job, dtype, search, announce, estimate)
    report = PlanReport(model, names, comparison, price_per_hour)
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
        raise ValueError(f"--stages is {stages}; it must be 1 to {MAX_MACHINES}")
    if len(machines) not in (1, stages):
        raise ValueError(
            f"--stages {stages}, but {len(machines)} machines; give one, or as many as stages"
        )
    return machines * (stages if len(machines) == 1 else 1)


def _check(
    dtype: str, max_latency: float | None, price_per_hour: float | None, frontier: Path | None
) -> None:
    """ValueError names an option that can't be; before any work."""
    if dtype not in (*DTYPE_BYTES, "auto"):
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}, auto")
    for name, value in (("--max-latency", max_latency), ("--price-per-hour", price_per_hour)):
        if value is not None and not 0 < value < inf:
            raise ValueError(f"{name} is {value:g}; it must be above 0")
    if frontier and find_spec("matplotlib") is None:
        raise ValueError("--frontier needs matplotlib: pip install 'flexgen-ray[plot]'")


def _config(model: str) -> ModelConfig:
    from flexgen_ray.models.configs import load_config
    from flexgen_ray.models.shapes import SHAPES, shape_config
    from flexgen_ray.names import unknown_name
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

    from flexgen_ray.planner.search import frontiers
    from flexgen_ray.reporting.plot import draw_frontier

    found = frontiers(planner)
    draw_frontier(title, found, path)
    return {name: [asdict(point) for point in points] for name, points in found.items()}
