"""A plan for people, in a few lines, and for programs. Knows a comparison; measures nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import yaml

from flexgen_ray.config import TIERS
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import stage_bytes, tier_totals, weight_bytes
from flexgen_ray.planner.comparison import RESIDENT, Alternative, Comparison
from flexgen_ray.planner.pipeline_plan import PipelinePlan
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
        stage, lane = plan.bottleneck
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
        stage, lane = plan.bottleneck
        needs = [tier_totals(stage_bytes(it)) for it in plan.stages]
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
        policy, need = stage.policy, tier_totals(stage_bytes(stage))
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
