"""Lines for people before a run: how long it will take, by which rates, and what would be faster.

The module knows predictions and requests; it plans nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_ray.hardware.known import ASSUMED, CALIBRATED
from flexgen_ray.planner.pipeline_plan import PipelinePlan
from flexgen_ray.request import Request
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.units import format_seconds

_FILLED = "memory is filled in order of speed (GPU, host, disk)"
NOTHING_FITS = (
    f"no plan fits by the assumed rates, so {_FILLED}; "
    "`flexgen-ray calibrate` measures the real rates"
)
MIN_SPEEDUP = 1.5  # Suggest a lossy way only if it is faster by this factor.


@dataclass(frozen=True)
class Forecast:
    """The predicted times of a job if every answer gets as long as it may, or is expected to be.

    new_tokens: of all answers. shortest_answer: in tokens. is_bound: False if an answer without
    max_tokens is among them.
    """

    plan: PipelinePlan
    num_answers: int
    new_tokens: int
    shortest_answer: int
    is_bound: bool = True

    @staticmethod
    def of(plan: PipelinePlan, answers: Sequence[Request]) -> Forecast:
        """The forecast for these requests, one for each answer."""
        lengths = [request.expected_tokens for request in answers]
        is_bound = not any(request.is_open for request in answers)
        return Forecast(plan, len(answers), sum(lengths), min(lengths), is_bound)

    @property
    def seconds(self) -> float:
        """Seconds that the whole job takes."""
        return self.plan.job_seconds

    @property
    def first_answer_seconds(self) -> float:
        """Seconds until the shortest answer of the first block is finished."""
        share = min(self.shortest_answer / self.plan.job.mean_tokens, 1)
        return self.plan.prefill_seconds + share * self.plan.decode_seconds

    def line(self, machine: Machine) -> str:
        """The forecast in one line for people; machine: the one whose rates it rests on."""
        answers = "1 answer" if self.num_answers == 1 else f"{self.num_answers:,} answers"
        most = "at most" if self.is_bound else "some"
        return (
            f"predicted: {answers} with {most} {self.new_tokens:,} new tokens take about "
            f"{format_seconds(self.seconds)} ({self.new_tokens / self.seconds:.3g} new tokens/s), "
            f"the first arrive after {format_seconds(self.first_answer_seconds)}; "
            f"{_describe_rates(machine)}"
        )


def explain_no_forecast(machine: Machine, dtype: str, is_filled: bool) -> str:
    """A line for people about a machine without rates; is_filled: no policy was given."""
    has = (
        f"{machine.host} has rates, but none for {dtype}"
        if machine.hardware
        else f"{machine.host} isn't calibrated"
    )
    filled = f", so {_FILLED}" if is_filled else ""
    remedy = "`flexgen-ray calibrate` (a few minutes) allows predictions and faster policies"
    return f"no prediction: {has}{filled}; {remedy}"


def suggest_compression(lossless: Forecast, packed: Forecast) -> str | None:
    """A line for people about 4-bit weights and cache, if they are much faster."""
    ratio = lossless.seconds / packed.seconds
    if ratio < MIN_SPEEDUP:
        return None
    return (
        f"suggestion: --weight-bits 4 --cache-bits 4 (lossy) would take about "
        f"{format_seconds(packed.seconds)}, {ratio:.1f} times as fast"
    )


def _describe_rates(machine: Machine) -> str:
    name = machine.hardware.name if machine.hardware else "unknown"
    if machine.rates_source == CALIBRATED:
        return "by the rates that `flexgen-ray calibrate` measured"
    if machine.rates_source == ASSUMED:
        return (
            f"rates assumed, those of preset {name} for {machine.device_name}; "
            "`flexgen-ray calibrate` measures this machine's own"
        )
    return f"by the rates of {name}"
