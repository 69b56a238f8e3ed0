"""What a run took and what lay where, for people at its end. Adds up; measures nothing itself."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from flexgen_ray.config import TIERS, Budget
from flexgen_ray.hardware.known import CALIBRATED
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import weight_bytes
from flexgen_ray.planner.pipeline_plan import PipelinePlan
from flexgen_ray.request import DEFAULT_MAX_TOKENS, MAX_TOKENS_UNSET
from flexgen_ray.runtime.events import Progress, Recovery
from flexgen_ray.runtime.meter import StageMeasurements
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.units import format_bytes

TELLING_SHARE = 0.2  # of a run, from which a lane's rate is judged
RIGHT_WITHIN = 1.15
# Kinds of limits at which an answer ends, and their names for people.
_LIMITS = {
    "max_tokens": "max_tokens",
    "line": "their line's max_tokens",
    "job": "the job's max_tokens (--max-tokens or the model's generation_config.json)",
    "default": f"the default length ({DEFAULT_MAX_TOKENS} tokens, or {MAX_TOKENS_UNSET} for chats)",
    "context": "the end of the context",
}


@dataclass(frozen=True)
class StageReport:
    """What one stage held at the end, and how busy each of its lanes was."""

    plan: StagePlan
    budget: Budget
    machine: Machine
    used: dict[str, dict[str, int]]
    measured: StageMeasurements

    @property
    def weights(self) -> dict[str, int]:
        """Bytes on each tier."""
        return weight_bytes(self.plan)

    @property
    def device(self) -> str:
        machine = self.machine
        return f"{machine.device_name} ({self.plan.dtype}, {machine.num_threads} threads)"

    def lines(self) -> list[str]:
        """A few lines of plain text."""
        return [*(self._tier(tier) for tier in TIERS), *self._lanes()]

    def as_dict(self) -> dict:
        """The same for programs."""
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
        """Most bytes of each tier: as booked, and on a GPU as torch took them, if that is more."""
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
        """Of lanes that were busy for long, those whose seconds were foretold badly."""
        lanes, foretold = self.lanes(), self.measured.modelled_lanes
        rates = self.machine.rates_source
        again = " again" if rates == CALIBRATED else ""
        return [
            f"{lane} took {it['busy_s']:.1f} s, by the {rates} rates {foretold[lane]:.1f} s: run "
            f"`flexgen-ray calibrate`{again}, with nothing else running"
            for lane, it in lanes.items()
            if it["fraction"] > TELLING_SHARE
            and foretold.get(lane)
            and not 1 / RIGHT_WITHIN < it["busy_s"] / foretold[lane] < RIGHT_WITHIN
        ]

    def _lanes(self) -> list[str]:
        lanes = self.lanes()
        if not lanes:
            return []
        parts = ", ".join(
            f"{lane} {it['busy_s']:.1f} s ({it['fraction']:.0%})"
            for lane, it in lanes.items()
            if it["fraction"] >= 0.005
        )
        ratio = 1 / lanes[self.measured.binding_lane]["fraction"]
        emulated = "emulated time; " if self.measured.is_emulated else ""
        lines = [
            f"{emulated}lanes busy: {parts}",
            f"{self.measured.binding_lane} binds: the run took {ratio:.2f} x its busy time; "
            f"the device idled {self.bubbles:.0%}",
        ]
        sampling, device = self.measured.sampling, self.measured.busy.get("device", 0.0)
        if device and sampling > TELLING_SHARE * device:
            share = f"{sampling:.1f} s of the device's {device:.1f} s"
            lines.append(f"choosing tokens took {share}; with top_k it takes less, greedy least")
        return lines

    def _tier(self, tier: str) -> str:
        used = self.used[tier]
        cache = used.get("cache", 0)
        hidden = used.get("hidden states", 0)
        rest = sum(used.values()) - self.weights[tier] - cache - hidden
        parts = {"weights": self.weights[tier], "cache": cache, "hidden": hidden, "work": rest}
        detail = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        total, budget = format_bytes(sum(used.values())), format_bytes(getattr(self.budget, tier))
        return f"{tier:>4}: {total} of {budget}" + (f" ({detail})" if detail else "")


@dataclass
class Report:
    """Tokens, seconds, bytes. A pass that brings prompt tokens counts as prefill. planned: what was
    predicted, if the policy was planned. cut: answers that ended at a limit, by its kind."""

    load_seconds: float = 0.0
    planned: PipelinePlan | None = None
    num_requests: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    stages: list[StageReport] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    cut: Counter[str] = field(default_factory=Counter)

    @property
    def device(self) -> str:
        """Of every stage, each kind once."""
        return ", ".join(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def seconds(self) -> float:
        """Prefill and decode, without loading (FlexGen's throughput)."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def add(self, progress: Progress) -> None:
        """Counts one pass."""
        self.prompt_tokens += progress.prefill_tokens
        self.new_tokens += progress.new_tokens
        if progress.is_prefill:
            self.prefill_seconds += progress.seconds
        else:
            self.decode_seconds += progress.seconds
            self.decode_tokens += progress.new_tokens

    def lines(self) -> list[str]:
        """A few lines of plain text."""
        lines = [
            f"{self.num_requests} requests: {self.prompt_tokens} prompt tokens, "
            f"{self.new_tokens} generated on {self.device or 'no device'}",
            f"load {self.load_seconds:.1f} s, prefill {self.prefill_seconds:.1f} s, "
            f"decode {self.decode_seconds:.1f} s: {self.tokens_per_s:.1f} generated tokens/s",
        ]
        if self.cut:
            each = ", ".join(
                f"{self.cut[it]} at {name}" for it, name in _LIMITS.items() if self.cut[it]
            )
            lines.append(f"answers cut: {each}")
        if self.stages:
            lines.append(block_line(self.stages[0].plan))
        for number, stage in enumerate(self.stages):
            if len(self.stages) > 1:
                first, last = stage.plan.stage.first, stage.plan.stage.last
                lines.append(f"stage {number}: layers {first} to {last} on {stage.machine.host}")
            lines += stage.lines()
        return lines + self._foretold() + [recovery.line() for recovery in self.recoveries]

    def _foretold(self) -> list[str]:
        """How right the plan was, and which of the machine's rates was most wrong."""
        if self.planned is None or not self.tokens_per_s:
            return []
        foretold = self.planned.tokens_per_s
        ratio = self.tokens_per_s / foretold
        lines = [f"predicted {foretold:.4g} generated tokens/s; measured is {ratio:.2f} x that"]
        if 1 / RIGHT_WITHIN < ratio < RIGHT_WITHIN:
            return lines
        return lines + [line for stage in self.stages for line in stage.wrong_rates()]

    def as_dict(self) -> dict:
        """The same for programs, with the hardware, versions, command and date that made it."""
        result = environment(self.device) | {
            "requests": self.num_requests,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.new_tokens,
            "load_s": round(self.load_seconds, 3),
            "prefill_s": round(self.prefill_seconds, 3),
            "decode_s": round(self.decode_seconds, 3),
            "generated_tokens_per_s": round(self.tokens_per_s, 3),
        }
        if self.cut:
            result["answers_cut"] = dict(self.cut)
        if self.planned is not None:
            result["predicted_tokens_per_s"] = round(self.planned.tokens_per_s, 3)
        if self.recoveries:
            result["recoveries"] = [asdict(recovery) for recovery in self.recoveries]
        if len(self.stages) == 1:
            return result | self.stages[0].as_dict()
        return result | {"stages": [stage.as_dict() for stage in self.stages]}


def block_line(plan: StagePlan) -> str:
    """The shape of a run's blocks."""
    policy = plan.policy
    blocks = f"{plan.num_blocks} blocks" if plan.num_blocks > 1 else "block"
    return (
        f"{blocks} of {policy.num_gpu_batches} x {policy.gpu_batch_size} sequences, "
        f"up to {plan.max_seq_len} tokens each"
    )


def environment(device: str) -> dict:
    """Hardware, versions, command and date: what a result is worth nothing without."""
    packages = ("flexgen-ray", "torch", "ray", "transformers")
    program = Path(sys.argv[0]).name.replace("__main__.py", "flexgen-ray")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([program, *sys.argv[1:]]),
        "hardware": {"device": device, "cpu": _cpu_name(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
