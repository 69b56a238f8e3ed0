"""What a run took and what lay where, for people at its end. Adds up; measures nothing itself."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from flexgen_ray.config import TIERS, Budget
from flexgen_ray.cost.sizes import StagePlan, weight_bytes
from flexgen_ray.request import Progress
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.units import format_bytes


@dataclass
class Report:
    """Tokens, seconds, bytes. A pass that brings prompt tokens counts as prefill."""

    num_requests: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    used: dict[str, dict[str, int]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    budget: Budget | None = None
    plan: StagePlan | None = None
    device: str = ""

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

    def finish(
        self, plan: StagePlan, budget: Budget, machine: Machine, used: dict[str, dict[str, int]]
    ) -> None:
        """What lay where at the end."""
        self.plan, self.budget, self.used = plan, budget, used
        self.weights = weight_bytes(plan)
        self.device = f"{machine.device_name} ({plan.dtype}, {machine.num_threads} threads)"

    def lines(self) -> list[str]:
        """A few lines of plain text."""
        lines = [
            f"{self.num_requests} requests: {self.prompt_tokens} prompt tokens, "
            f"{self.new_tokens} generated on {self.device or 'no device'}",
            f"load {self.load_seconds:.1f} s, prefill {self.prefill_seconds:.1f} s, "
            f"decode {self.decode_seconds:.1f} s: {self.tokens_per_s:.1f} generated tokens/s",
        ]
        if self.plan is not None and self.budget is not None:
            policy = self.plan.policy
            lines.append(
                f"block of {policy.num_gpu_batches} x {policy.gpu_batch_size} sequences, "
                f"up to {self.plan.max_seq_len} tokens each"
            )
            lines += [self._tier(tier) for tier in TIERS]
        return lines

    def as_dict(self) -> dict:
        """The same for programs, with the hardware, versions, command and date that made it."""
        return environment(self.device) | {
            "requests": self.num_requests,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.new_tokens,
            "load_s": round(self.load_seconds, 3),
            "prefill_s": round(self.prefill_seconds, 3),
            "decode_s": round(self.decode_seconds, 3),
            "generated_tokens_per_s": round(self.tokens_per_s, 3),
            "policy": asdict(self.plan.policy) if self.plan else None,
            "budget_bytes": asdict(self.budget) if self.budget else None,
            "used_bytes": self.used,
            "weight_bytes": self.weights,
        }

    def _tier(self, tier: str) -> str:
        used = self.used[tier]
        cache = used.get("cache", 0)
        hidden = used.get("hidden states", 0)
        rest = sum(used.values()) - self.weights[tier] - cache - hidden
        parts = {"weights": self.weights[tier], "cache": cache, "hidden": hidden, "work": rest}
        detail = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        total, budget = format_bytes(sum(used.values())), format_bytes(getattr(self.budget, tier))
        return f"{tier:>4}: {total} of {budget}" + (f" ({detail})" if detail else "")


def environment(device: str) -> dict:
    """What made a figure: date, command, hardware, versions. device: as text, for the hardware."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": {"device": device, "cpu": _cpu_name(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("flexgen-ray", "torch", "ray", "transformers")},
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
