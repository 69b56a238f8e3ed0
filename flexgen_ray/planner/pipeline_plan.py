"""A job, the devices it may run on, and a pipeline's plan with what the cost model says of it.

Knows seconds and bytes as others give them; chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from flexgen_ray.config import Budget, HardwareSpec
from flexgen_ray.cost.bound import PHASES
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.config import ModelConfig

# Among the seconds, where no lane and no resource is: what playing the ops gave, and a batch's way
# through all stages, on which its ops wait for each other.
SCHEDULE = "the schedule"
ONE_BATCH = "one batch"
Rates = Callable[[int, int], HardwareSpec]


@dataclass(frozen=True)
class PlannedJob:
    """What is to be answered; lengths in tokens, the longest and on average; drawn: as in
    Workload."""

    num_requests: int
    prompt_len: int
    max_tokens: int
    mean_prompt_len: float
    mean_tokens: float
    drawn: float = 0.0

    @staticmethod
    def uniform(num_requests: int, prompt_len: int, max_tokens: int) -> PlannedJob:
        return PlannedJob(num_requests, prompt_len, max_tokens, prompt_len, max_tokens)

    @property
    def max_seq_len(self) -> int:
        return self.prompt_len + self.max_tokens

    @property
    def middle_position(self) -> int:
        """Of the token that an average decoding row brings."""
        return int(self.mean_prompt_len + self.mean_tokens / 2)


@dataclass(frozen=True)
class StageDevice:
    """What one stage runs on.

    rates: for matrix products of so many rows in decode and in prefill. budget: gpu is the stage's,
    cpu and disk are those of all stages on the node. core_shares: (lane or resource, cores that it
    takes, of all there are), where the device is the host's cores.
    """

    rates: Rates
    budget: Budget
    node: str = ""
    core_shares: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ModelRates:
    """A machine's rates for one model, by the rows of its products in decode and in prefill."""

    hardware: Hardware
    dtype: str
    queries_per_kv_head: int
    cache_bits: int | None = None

    @staticmethod
    def of(
        hardware: Hardware, config: ModelConfig, dtype: str, cache_bits: int | None = None
    ) -> ModelRates:
        return ModelRates(hardware, dtype, config.num_heads // config.num_kv_heads, cache_bits)

    def __call__(self, decode_rows: int, prefill_rows: int) -> HardwareSpec:
        shape = self.dtype, self.queries_per_kv_head
        return self.hardware.rates(*shape, decode_rows, prefill_rows, self.cache_bits)


@dataclass(frozen=True)
class PipelinePlan:
    """A pipeline, and how long its visits take.

    seconds: {phase: {lane or resource: of a visit}} by stage; prefill_visits: of a block.
    """

    job: PlannedJob
    stages: list[StagePlan]
    seconds: list[dict[str, dict[str, float]]]
    prefill_visits: float

    @property
    def block_size(self) -> int:
        return self.stages[0].policy.block_size

    @property
    def num_blocks(self) -> int:
        return self.stages[0].num_blocks

    @property
    def visits(self) -> dict[str, float]:
        """{phase: visits of a block}."""
        return {"prefill": self.prefill_visits, "decode": max(self.job.mean_tokens - 1, 0)}

    def bound_seconds(self, phase: str) -> float:
        """Seconds that a visit takes on the slowest stage's busiest lane."""
        stages = (stage[phase].items() for stage in self.seconds)
        return max(it for seconds in stages for name, it in seconds if name != SCHEDULE)

    def visit_seconds(self, phase: str) -> float:
        """Of the slowest stage's busiest lane, or as the schedule was played."""
        return max(max(stage[phase].values()) for stage in self.seconds)

    @property
    def binding(self) -> tuple[int, str]:
        """The stage that binds, and its busiest lane or resource, over a whole block."""
        names = (
            (i, name)
            for i, stage in enumerate(self.seconds)
            for name in stage["decode"]
            if name not in (SCHEDULE, ONE_BATCH)
        )
        return max(names, key=lambda it: self._block_seconds(*it))

    @property
    def prefill_seconds(self) -> float:
        """Of all blocks in flight."""
        return self._phase_seconds("prefill")

    @property
    def decode_seconds(self) -> float:
        return self._phase_seconds("decode")

    @property
    def block_seconds(self) -> float:
        """What a request waits for its last token, once its block has begun."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens, prefill and decode counted (FlexGen's throughput); of no more sequences
        than the job has."""
        sequences = min(self.num_blocks * self.block_size, self.job.num_requests)
        return sequences * self.job.mean_tokens / self.block_seconds

    @property
    def job_seconds(self) -> float:
        """Seconds that the whole job takes, in whole rounds of blocks."""
        return self.num_rounds * self.block_seconds

    @property
    def num_rounds(self) -> int:
        """How often all blocks in flight are filled."""
        return ceil(self.job.num_requests / (self.num_blocks * self.block_size))

    @property
    def decode_tokens_per_s(self) -> float:
        return self.block_size / self.visit_seconds("decode")

    def _phase_seconds(self, phase: str) -> float:
        """Until the last block has had its visits; the pipeline has to fill."""
        visits = self.num_blocks * self.visits[phase] + len(self.stages) - 1
        return visits * self.visit_seconds(phase)

    def _block_seconds(self, stage: int, name: str) -> float:
        seconds = self.seconds[stage]
        return sum(self.visits[it] * seconds[it].get(name, 0.0) for it in PHASES)
