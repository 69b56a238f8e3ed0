"""The report of a plan: a few lines for people, a dict for programs, a policy file for runs.

Knows a comparison of plans; measures nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import yaml

from flexgen_ray.config import TIERS
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import stage_bytes, tier_totals, weight_bytes
from flexgen_ray.planner.comparison import RESIDENT, Alternative, Comparison
from flexgen_ray.planner.pipeline_plan import PipelinePlan
from flexgen_ray.reporting.wording import block_line, layout_line, resource_name
from flexgen_ray.units import format_bytes, format_seconds

MIN_GAIN = 1.05  # ratio of speeds from which a change is recommended


@dataclass(frozen=True)
class PlanReport:
    """A plan beside its alternatives; every figure is predicted.

    hardware: names of the machines. price_per_hour: dollars for all of them together.
    on_gpu: False if layers are computed on CPUs.
    """

    model: str
    hardware: list[str]
    comparison: Comparison
    price_per_hour: float | None = None
    on_gpu: bool = True

    @property
    def hours(self) -> float:
        return self.comparison.plan.job_seconds / 3600

    @property
    def price_per_million_tokens(self) -> float | None:
        """Dollars per million generated tokens; None without a price per hour."""
        if self.price_per_hour is None:
            return None
        job = self.comparison.plan.job
        return self.price_per_hour * self.hours / (job.num_requests * job.mean_tokens) * 1e6

    def lines(self) -> list[str]:
        """The whole report in plain text, the headline first."""
        plan = self.comparison.plan
        prefill, decode = map(format_seconds, (plan.prefill_seconds, plan.decode_seconds))
        lines = [
            headline(self.model, self.hardware, plan),
            f"sizes: weights {format_bytes(self._weight_bytes)}, KV cache "
            f"{format_bytes(self._cache_bytes_per_token)} per token",
            *self._prefixes(),
            f"batches: {block_line(plan.stages[0])}",
            *(self._stage(number, stage) for number, stage in enumerate(plan.stages)),
            f"time: {plan.num_blocks * plan.block_size:,} requests at a time take prefill "
            f"{prefill} and decode {decode} (decode alone {_rate(plan.decode_tokens_per_s)} "
            f"tokens/s); {format_seconds(plan.job_seconds)} for {plan.job.num_requests:,} requests"
            + (", which enter as others end" if plan.kinds else ""),
            *self._price(),
            f"bottleneck: {self._bottleneck()}",
            *self._roofline(),
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
            "sharing": plan.job.sharing and asdict(plan.job.sharing),
            "weight_bytes": self._weight_bytes,
            "cache_bytes_per_token": self._cache_bytes_per_token,
            "price_per_million_tokens": self.price_per_million_tokens,
            "binding_stage": stage,
            "binding_lane": lane,
            "roofline": self.comparison.best and asdict(self.comparison.best),
            "flexgen_roofline": self.comparison.flexgen and asdict(self.comparison.flexgen),
            "bytes": {tier: sum(getattr(need, tier) for need in needs) for tier in TIERS},
            "stages": [
                {
                    "layers": stage_plan.num_decoder_layers,
                    "bytes": asdict(need),
                    "policy": asdict(stage_plan.policy),
                }
                for stage_plan, need in zip(plan.stages, needs, strict=True)
            ],
            "alternatives": [asdict(it) for it in self.comparison.alternatives],
            "upgrades": [asdict(it) for it in self.comparison.upgrades],
        }

    def policy_yaml(self) -> str:
        """The planned policy as YAML, as --policy takes it."""
        stages = self.comparison.plan.stages
        shape = asdict(stages[0].policy)
        own = ("weights", "cache", "activations", "cpu_attention")
        if len(stages) == 1:
            shape.pop("blocks_in_flight")
            return yaml.safe_dump(shape, sort_keys=False)
        shared = {name: value for name, value in shape.items() if name not in own}
        each = [
            {"layers": stage.num_decoder_layers}
            | {name: asdict(stage.policy)[name] for name in own}
            for stage in stages
        ]
        return yaml.safe_dump(shared | {"stages": each}, sort_keys=False)

    @property
    def _weight_bytes(self) -> int:
        return sum(sum(weight_bytes(stage).values()) for stage in self.comparison.plan.stages)

    @property
    def _cache_bytes_per_token(self) -> int:
        return sum(it.kv_bytes * it.num_decoder_layers for it in self.comparison.plan.stages)

    def _stage(self, number: int, stage: StagePlan) -> str:
        """One line on a stage's layers, on its data by tier, and on its host attention."""
        policy, need = stage.policy, tier_totals(stage_bytes(stage))
        layers = f" ({stage.num_decoder_layers} layers)"
        name = "layout" if stage.stage.is_whole else f"stage {number}{layers}"
        sizes = " / ".join(format_bytes(getattr(need, tier)) for tier in TIERS)
        attended = (
            f"; {policy.cpu_attention:.0%} of the host's KV cache attended by the CPU"
            if policy.cache.cpu
            else ""
        )
        return f"{name} {layout_line(stage)}; {sizes} in all{attended}"

    def _bottleneck(self) -> str:
        stage, lane = self.comparison.plan.bottleneck
        name = resource_name(lane, self.on_gpu)
        return f"{name} of stage {stage}" if len(self.comparison.plan.stages) > 1 else name

    def _roofline(self) -> list[str]:
        """A line on what no schedule exceeds on these machines."""
        best, flexgen = self.comparison.best, self.comparison.flexgen
        if best is None or flexgen is None or not best.tokens_per_s:
            return []
        share = self.comparison.plan.tokens_per_s / best.tokens_per_s
        return [
            f"roofline: no schedule exceeds {_rate(best.tokens_per_s)} tokens/s "
            f"({resource_name(best.bound, self.on_gpu)}), nor FlexGen's "
            f"{_rate(flexgen.tokens_per_s)}; the plan makes {share:.0%}"
        ]

    def _prefixes(self) -> list[str]:
        """A line on what prompts are assumed to share, if they do."""
        job, stage = self.comparison.plan.job, self.comparison.plan.stages[0]
        sharing = job.sharing
        if sharing is None:
            return []
        groups = sharing.tokens // sharing.most_tokens
        who = "all requests" if groups == 1 else f"{groups:,} groups of requests"
        if not stage.prefix_pages:
            return [f"prefixes: {who} share {sharing.most_tokens:,} tokens, but are computed whole"]
        names = {"gpu": "GPU", "cpu": "host"}
        tier = " and ".join(names[tier] for tier in stage.prefix_tiers)
        return [
            f"prefixes: assumes that {who} share the first {sharing.most_tokens:,} of "
            f"{job.prompt_len:,} prompt tokens, computed once and kept in {tier} memory"
        ]

    def _price(self) -> list[str]:
        price = self.price_per_million_tokens
        return [] if price is None else [f"price: {price:,.4g} $ per million generated tokens"]

    def _advice(self) -> list[str]:
        """Upgrades that would make the job faster, the best first."""
        ours = self.comparison.plan.tokens_per_s
        gains = {
            upgrade.name: upgrade.tokens_per_s / ours
            for upgrade in self.comparison.upgrades
            if upgrade.tokens_per_s and upgrade.tokens_per_s > MIN_GAIN * ours
        }
        best_first = sorted(gains, key=lambda name: -gains[name])
        text = ", ".join(f"{name} ({gains[name]:.2f} times as fast)" for name in best_first)
        return [f"faster with: {text}"] if text else []

    def _verdicts(self) -> list[str]:
        """A line on each other way to do the job."""
        others = self.comparison.alternatives
        lines = [self._verdict(other) for other in others]
        if any(other.name == RESIDENT and other.tokens_per_s for other in others):
            lines.append(
                "everything fits the GPUs: a resident engine (such as vLLM) would be faster"
            )
        return lines

    def _verdict(self, other: Alternative) -> str:
        if other.tokens_per_s is None:
            return f"{other.name}: not possible, {other.why_not}"
        ratio = other.tokens_per_s / self.comparison.plan.tokens_per_s
        start = f"{other.name}: {_rate(other.tokens_per_s)} tokens/s, {ratio:.2f} times the plan's"
        return f"{start}: do that instead" if ratio >= MIN_GAIN else start


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 1000 else f"{tokens_per_s:.3g}"


def headline(model: str, hardware: list[str], plan: PipelinePlan) -> str:
    """One line on a plan that fits: its predicted throughput, and the duration of the job."""
    formats = plan.stages[0].weight_format.described
    return (
        f"{model} in {formats} on {', '.join(hardware)}: fits, about {_rate(plan.tokens_per_s)} "
        f"generated tokens/s, {plan.job.num_requests:,} requests in "
        f"{format_seconds(plan.job_seconds)} (predicted)"
    )


def estimate_line(tokens_per_s: float) -> str:
    """One line to show while the plan is made."""
    return f"fits, about {_rate(tokens_per_s)} generated tokens/s by a first estimate; planning"
