"""The report of a run, for people and programs: its tokens, seconds, bytes and bottleneck.

Adds up what others measured; measures nothing itself.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flexgen_ray import package_versions
from flexgen_ray.config import TIERS, Budget
from flexgen_ray.hardware.known import CALIBRATED
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import weight_bytes
from flexgen_ray.planner.pipeline_plan import PipelinePlan
from flexgen_ray.reporting.wording import block_line, resource_name
from flexgen_ray.request import DEFAULT_MAX_TOKENS
from flexgen_ray.runtime.events import Progress, Recovery
from flexgen_ray.runtime.meter import StageMeasurements
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.units import format_bytes

SIGNIFICANT_SHARE = 0.2  # of a run, from which a lane's rate is judged
TOLERANCE = 1.15  # ratio of measured to predicted seconds, or its inverse, that counts as right
_MIN_SHOWN = 0.005  # of a run; lanes that were busy for less are left out
# Kinds of limits at which an answer ends, and their names for people.
_LIMITS = {
    "max_tokens": "max_tokens",
    "line": "their line's max_tokens",
    "job": "the job's max_tokens (--max-tokens or the model's generation_config.json)",
    "default": f"the default length ({DEFAULT_MAX_TOKENS} tokens)",
    "context": "the end of the context",
}
_TIER_NAMES = {"gpu": "GPU memory", "cpu": "host memory", "disk": "disk"}


@dataclass(frozen=True)
class StageReport:
    """Memory that one stage used in a run, and the busy time of each of its lanes."""

    plan: StagePlan
    budget: Budget
    machine: Machine
    used: dict[str, dict[str, int]]
    measured: StageMeasurements

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of weights on each tier."""
        return weight_bytes(self.plan)

    @property
    def device(self) -> str:
        """Name of the device, with the dtype and the host threads."""
        machine = self.machine
        return f"{machine.device_name} ({self.plan.dtype}, {machine.num_threads} threads)"

    def lines(self) -> list[str]:
        """Memory and lanes in a few lines of plain text."""
        return [*(self._tier(tier) for tier in TIERS), *self._lanes()]

    def as_dict(self) -> dict:
        """All figures of the stage, for programs."""
        return {
            "host": self.machine.host,
            "threads": self.machine.num_threads,
            "lanes": self.lanes(),
            "binding_lane": self.measured.binding_lane,
            "bubbles": round(self.bubbles, 4),
            "emulated": self.measured.is_emulated,
            "policy": asdict(self.plan.policy),
            "budget_bytes": asdict(self.budget),
            "used_bytes": self.used,
            "weight_bytes": self.weights,
        }

    def peak_bytes(self) -> dict[str, int]:
        """Peak bytes of each tier as booked; on a GPU torch's own peak, if that is more."""
        peaks = {tier: sum(parts.values()) for tier, parts in self.used.items()}
        return peaks | {"gpu": max(peaks["gpu"], self.measured.peak_gpu_bytes)}

    @property
    def bubbles(self) -> float:
        """Share of the run in which the device's lane idled."""
        busy, wall = self.measured.busy.get("device", 0.0), self.measured.wall
        return max(1 - busy / wall, 0.0) if wall else 0.0

    def lanes(self) -> dict[str, dict[str, float]]:
        """{lane: busy seconds, and as a fraction of the run}, the busiest first."""
        busy, wall = self.measured.busy, self.measured.wall
        busiest_first = sorted(busy, key=lambda lane: -busy[lane])
        return {
            lane: {"busy_s": round(busy[lane], 3), "fraction": round(busy[lane] / wall, 4)}
            for lane in busiest_first
            if wall
        }

    def wrong_rates(self) -> list[str]:
        """A line for each lane that was busy for long and whose seconds were predicted badly."""
        predicted, rates = self.measured.modelled_lanes, self.machine.rates_source
        again = " again" if rates == CALIBRATED else ""
        return [
            f"{self._name(lane)} took {busy['busy_s']:.1f} s, but {predicted[lane]:.1f} s by the "
            f"{rates} rates: run `flexgen-ray calibrate`{again}, with nothing else running"
            for lane, busy in self.lanes().items()
            if busy["fraction"] > SIGNIFICANT_SHARE
            and predicted.get(lane)
            and not 1 / TOLERANCE < busy["busy_s"] / predicted[lane] < TOLERANCE
        ]

    def _lanes(self) -> list[str]:
        """The bottleneck, how busy each lane was, and whether sampling took long."""
        lanes = self.lanes()
        if not lanes:
            return []
        bottleneck = self.measured.binding_lane
        parts = ", ".join(
            f"{self._name(lane)} {busy['busy_s']:.1f} s ({busy['fraction']:.0%})"
            for lane, busy in lanes.items()
            if busy["fraction"] >= _MIN_SHOWN
        )
        emulated = " (emulated time)" if self.measured.is_emulated else ""
        lines = [
            f"bottleneck: {self._name(bottleneck)}, {lanes[bottleneck]['fraction']:.0%} busy; "
            f"{self._compute} idle {self.bubbles:.0%}",
            f"busy{emulated}: {parts}",
        ]
        sampling, device = self.measured.sampling, self.measured.busy.get("device", 0.0)
        if device and sampling > SIGNIFICANT_SHARE * device:
            share = f"{sampling:.1f} s of the {self._compute}'s {device:.1f} s"
            lines.append(f"sampling took {share}; top_k shortens that, and greedy decoding more")
        return lines

    def _name(self, lane: str) -> str:
        return resource_name(lane, self.machine.on_cuda)

    @property
    def _compute(self) -> str:
        return "GPU" if self.machine.on_cuda else "CPU"

    def _tier(self, tier: str) -> str:
        """One line on a tier: bytes used, the budget, and their parts."""
        used = self.used[tier]
        cache = used.get("cache", 0)
        hidden = used.get("hidden states", 0)
        rest = sum(used.values()) - self.weights[tier] - cache - hidden
        parts = {"weights": self.weights[tier], "KV cache": cache, "hidden states": hidden}
        parts["workspace"] = rest
        detail = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        total, budget = format_bytes(sum(used.values())), format_bytes(getattr(self.budget, tier))
        on_cpu = tier == "gpu" and not self.machine.on_cuda
        name = "device memory" if on_cpu else _TIER_NAMES[tier]
        return f"{name}: {total} of {budget} used" + (f" ({detail})" if detail else "")


@dataclass
class Report:
    """Tokens, seconds and bytes of one run. A pass that brings prompt tokens counts as prefill.

    forecast: the prediction, if the machines' rates are known. prompt_tokens: of all requests;
    computed_tokens: those of them that were computed, and those of prefixes; possible_tokens: those
    that needn't be, if everything that prompts share is computed once. cut: number of answers
    that ended at a limit, by the limit's kind.
    """

    load_seconds: float = 0.0
    forecast: PipelinePlan | None = None
    num_requests: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    possible_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    stages: list[StageReport] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    cut: Counter[str] = field(default_factory=Counter)

    @property
    def device(self) -> str:
        """Names of all stages' devices, each once."""
        return ", ".join(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def seconds(self) -> float:
        """Seconds of prefill and decode, without loading (as in FlexGen's throughput)."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that were computed again, because rows lacked pages of the cache."""
        return self.stages[0].measured.recomputed_tokens if self.stages else 0

    @property
    def saved_tokens(self) -> int:
        """Prompt tokens that were not computed, because prompts share them."""
        return max(self.prompt_tokens - self.computed_tokens, 0) if self.possible_tokens else 0

    def add(self, progress: Progress) -> None:
        """Count one pass."""
        self.computed_tokens += progress.prefill_tokens
        self.new_tokens += progress.new_tokens
        if progress.is_prefill:
            self.prefill_seconds += progress.seconds
        else:
            self.decode_seconds += progress.seconds
            self.decode_tokens += progress.new_tokens

    def lines(self) -> list[str]:
        """The whole report in a few lines of plain text."""
        requests = "1 request" if self.num_requests == 1 else f"{self.num_requests:,} requests"
        lines = [
            f"{requests} answered: {self.prompt_tokens:,} prompt tokens, {self.new_tokens:,} "
            f"generated tokens, on {self.device or 'no device'}",
            f"{self.tokens_per_s:.1f} generated tokens/s: prefill {self.prefill_seconds:.1f} s, "
            f"decode {self.decode_seconds:.1f} s; loading before that {self.load_seconds:.1f} s",
        ]
        if self.cut:
            parts = ", ".join(
                f"{self.cut[kind]:,} at {name}" for kind, name in _LIMITS.items() if self.cut[kind]
            )
            lines.append(f"answers cut: {parts}")
        if self.saved_tokens:
            lines.append(
                f"prompts share: {self.saved_tokens:,} of their tokens were not computed, "
                f"{self.saved_tokens / self.possible_tokens:.0%} of what sharing can save"
            )
        if self.recomputed_tokens:
            lines.append(
                f"{self.recomputed_tokens:,} tokens were computed again, because rows lacked pages "
                "of the KV cache"
            )
        if self.stages:
            lines.append(block_line(self.stages[0].plan))
        for number, stage in enumerate(self.stages):
            if len(self.stages) > 1:
                first, last = stage.plan.stage.first, stage.plan.stage.last
                lines.append(f"stage {number}: layers {first} to {last} on {stage.machine.host}")
            lines += stage.lines()
        return lines + self._prediction() + [recovery.line() for recovery in self.recoveries]

    def _prediction(self) -> list[str]:
        """The prediction beside the measurement, and the rates that were wrong, if any."""
        if self.forecast is None or not self.tokens_per_s:
            return []
        predicted = self.forecast.tokens_per_s
        ratio = self.tokens_per_s / predicted
        lines = [f"predicted {predicted:.4g} generated tokens/s; measured {ratio:.2f} times that"]
        if 1 / TOLERANCE < ratio < TOLERANCE:
            return lines
        return lines + [line for stage in self.stages for line in stage.wrong_rates()]

    def as_dict(self) -> dict:
        """All figures for programs, with the hardware, versions, command and date of the run."""
        result = environment(self.device) | {
            "requests": self.num_requests,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.new_tokens,
            "load_s": round(self.load_seconds, 3),
            "prefill_s": round(self.prefill_seconds, 3),
            "decode_s": round(self.decode_seconds, 3),
            "generated_tokens_per_s": round(self.tokens_per_s, 3),
        }
        if self.possible_tokens:
            result["saved_prompt_tokens"] = self.saved_tokens
            result["saved_of_possible"] = round(self.saved_tokens / self.possible_tokens, 4)
        if self.cut:
            result["answers_cut"] = dict(self.cut)
        if self.recomputed_tokens:
            result["recomputed_tokens"] = self.recomputed_tokens
        if self.forecast is not None:
            result["predicted_tokens_per_s"] = round(self.forecast.tokens_per_s, 3)
        if self.recoveries:
            result["recoveries"] = [asdict(recovery) for recovery in self.recoveries]
        if len(self.stages) == 1:
            return result | self.stages[0].as_dict()
        return result | {"stages": [stage.as_dict() for stage in self.stages]}


def environment(device: str) -> dict:
    """Hardware, versions, command and date, without which a result is worth nothing."""
    program = Path(sys.argv[0]).name.replace("__main__.py", "flexgen-ray")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([program, *sys.argv[1:]]),
        "hardware": {"device": device, "cpu": _cpu_name(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()}
        | package_versions("flexgen-ray", "torch", "ray", "transformers"),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
