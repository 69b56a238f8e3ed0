"""Lines said before a run: how long it will take, by which rates, and what would be much faster.

Knows predictions and requests; plans nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_ray.hardware.known import ASSUMED, CALIBRATED
from flexgen_ray.planner.pipeline_plan import PipelinePlan
from flexgen_ray.request import Request
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.units import format_seconds

NOTHING_FITS = (
    "no plan fits by the assumed rates, so the tiers are filled, fastest first; "
    "`flexgen-ray calibrate` measures the real ones"
)
WORTH_SAYING = 1.5  # how much faster a lossy way has to be


@dataclass(frozen=True)
class Forecast:
    """The most that a job takes by a plan: every answer is taken to be as long as it may be."""

    plan: PipelinePlan
    num_requests: int
    new_tokens: int
    shortest: int

    @staticmethod
    def of(plan: PipelinePlan, requests: Sequence[Request]) -> Forecast:
        lengths = [request.max_tokens for request in requests]
        return Forecast(plan, len(requests), sum(lengths), min(lengths))

    @property
    def seconds(self) -> float:
        """Seconds that all blocks of the job take, each counted as whole."""
        sequences = self.plan.num_blocks * self.plan.block_size
        return math.ceil(self.num_requests / sequences) * self.plan.block_seconds

    @property
    def first_answer_seconds(self) -> float:
        """Seconds until the shortest answer of the first block is there."""
        share = min(self.shortest / self.plan.job.mean_tokens, 1)
        return self.plan.prefill_seconds + share * self.plan.decode_seconds

    def line(self, machine: Machine) -> str:
        """One line for people; machine: whose rates these are."""
        answers = "1 answer" if self.num_requests == 1 else f"{self.num_requests:,} answers"
        return (
            f"predicted: {answers} of {self.new_tokens:,} new tokens at most take about "
            f"{format_seconds(self.seconds)} ({self.new_tokens / self.seconds:.3g} new tokens/s), "
            f"the first are there after {format_seconds(self.first_answer_seconds)}; "
            f"{_source(machine)}"
        )


def explain_no_forecast(machine: Machine, dtype: str, is_planned: bool) -> str:
    """A line for a machine without rates; is_planned: no policy was given."""
    has = (
        f"{machine.host} has rates, but none for {dtype}"
        if machine.hardware
        else (f"{machine.host} isn't calibrated")
    )
    filled = ", so the tiers are filled, fastest first" if is_planned else ""
    remedy = "`flexgen-ray calibrate` (a few minutes) lets runs be predicted and planned"
    return f"no prediction: {has}{filled}; {remedy}"


def suggest_compression(lossless: Forecast, packed: Forecast) -> str | None:
    """A line about 4-bit weights and cache, if they are much faster."""
    ratio = lossless.seconds / packed.seconds
    if ratio < WORTH_SAYING:
        return None
    return (
        f"suggestion: --weight-bits 4 --cache-bits 4, which are lossy, would take about "
        f"{format_seconds(packed.seconds)}, {ratio:.1f} x as fast"
    )


def _source(machine: Machine) -> str:
    name = machine.hardware.name if machine.hardware else "unknown"
    if machine.rates_source == CALIBRATED:
        return "rates as `flexgen-ray calibrate` measured them"
    if machine.rates_source == ASSUMED:
        return (
            f"rates assumed, those of preset {name} for {machine.device_name}; "
            "`flexgen-ray calibrate` measures this machine's own"
        )
    return f"rates of {name}"
