"""A job, the devices it may run on, and a pipeline's plan with the cost model's seconds.

The module knows seconds and bytes as others compute them; it chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from flexgen_ray.config import PAGE_TOKENS, Budget, HardwareSpec, Sharing
from flexgen_ray.cost.experts import rows_of_expert
from flexgen_ray.cost.resources import Resource
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.layout.admission import mean_cached
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.visits import spread

# Two entries among a plan's seconds that are neither a lane nor a resource: the simulated schedule,
# and the latency of one batch through all stages, on which its ops wait for each other.
SCHEDULE = "the schedule"
ONE_BATCH = "one batch"
ISSUING = Resource.ISSUE.name.lower()  # seconds of the thread that issues a GPU's ops
NEARLY = 0.85
MOST_LENGTHS = 4096
# Rates of a device, from the rows of its matrix products in decode and in prefill, and the tokens
# whose rows a mixture's experts take at once in each.
Rates = Callable[..., HardwareSpec]


@dataclass(frozen=True)
class PlannedJob:
    """The job to plan for; lengths are in tokens.

    prompt_len, max_tokens: the longest prompt, and the tokens of the longest request after it.
    mean_prompt_len, mean_tokens: averages. drawn: as in Workload. together_len, apart_len: mean
    tokens of a row's cache while the job runs, if rows enter as soon as they can, and if equal
    ones enter one by one. middle_position: of the token that an average decoding row processes.
    lengths: (prompt, answer) of at most MOST_LENGTHS requests, the longest first, which stand for
    all. sharing: prefixes that their prompts share, beside which all lengths but prompt_len count;
    None for nothing.
    """

    num_requests: int
    prompt_len: int
    max_tokens: int
    mean_prompt_len: float
    mean_tokens: float
    drawn: float
    together_len: float
    apart_len: float
    middle_position: int
    lengths: tuple[tuple[int, int], ...]
    sharing: Sharing | None = None

    @staticmethod
    def uniform(
        num_requests: int, prompt_len: int, max_tokens: int, shared: int = 0, groups: int = 1
    ) -> PlannedJob:
        """A job whose requests are all alike.

        shared: tokens with which the prompts of each of `groups` equal groups begin, of which whole
        pages count. Raises ValueError if there is no such page or no such group.
        """
        if not shared:
            return PlannedJob.of([(prompt_len, max_tokens)], num_requests)
        # At least one token of each prompt is its own.
        prefix = min(shared, prompt_len - 1) // PAGE_TOKENS * PAGE_TOKENS
        if shared >= prompt_len or not prefix:
            raise ValueError(
                f"{shared} tokens of a prompt of {prompt_len} can't be shared; at least "
                f"{PAGE_TOKENS} must be, and at least one token must be its own"
            )
        if not 1 <= groups <= num_requests / 2:
            raise ValueError(
                f"{num_requests} requests don't share prefixes in {groups} groups; each needs two"
            )
        sharing = Sharing(num_requests, groups * prefix, prefix, prefix, levels=1.0)
        job = PlannedJob.of([(prompt_len - prefix, max_tokens)], num_requests, sharing=sharing)
        return replace(job, prompt_len=prompt_len)

    @staticmethod
    def of(
        lengths: Sequence[tuple[int, int]],
        num_requests: int | None = None,
        drawn: float = 0.0,
        sharing: Sharing | None = None,
    ) -> PlannedJob:
        """The job of requests with these lengths, (prompt, answer), beside what they share.

        num_requests: None for as many as there are lengths.
        """
        prompts, answers = zip(*lengths, strict=True)
        longest = max(prompt + answer for prompt, answer in lengths)
        # A row with a long answer decodes for longer.
        passes = sum(answer * (prompt + answer / 2) for prompt, answer in lengths)
        return PlannedJob(
            num_requests or len(lengths),
            max(prompts),
            max(longest - max(prompts), 1),
            fmean(prompts),
            fmean(answers),
            drawn,
            mean_cached(lengths),
            mean_cached(lengths, are_apart=True),
            int(passes / sum(answers) if any(answers) else fmean(prompts)),
            _longest_first(lengths),
            sharing,
        )

    @property
    def max_seq_len(self) -> int:
        return self.prompt_len + self.max_tokens

    @property
    def without_sharing(self) -> PlannedJob:
        """The job if every prompt is computed whole, each with prefixes of mean length."""
        if self.sharing is None:
            return self
        before = round(self.sharing.mean_tokens)
        lengths = [(before + prompt, answer) for prompt, answer in self.lengths]
        job = PlannedJob.of(lengths, self.num_requests, self.drawn)
        return replace(job, prompt_len=self.prompt_len, max_tokens=self.max_tokens)

    def part(self, parts: int) -> PlannedJob:
        """The job of one of so many parts of the requests, in which groups stay together."""
        count, sharing = -(-self.num_requests // parts), self.sharing
        if sharing is not None:
            tokens = max(sharing.tokens // parts, sharing.most_tokens)
            sharing = replace(sharing, num_requests=count, tokens=tokens)
        return replace(self, num_requests=count, sharing=sharing)

    def mean_seq_len(self, rows: int) -> float:
        """Mean tokens of a row's cache if so many are under way.

        Rows enter one by one (layout/admission.py) if, for want of pages, it would take them more
        than one answer longer to have entered together, block after block.
        """
        saved = self.num_requests * (self.together_len / self.apart_len - 1)
        return self.apart_len if saved > rows else self.together_len


def _longest_first(lengths: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Lengths that stand for all; an answer of no tokens takes a visit, too."""
    ordered = sorted(lengths, key=lambda it: (-sum(it), -it[0]))
    some = spread(ordered, min(len(ordered), MOST_LENGTHS))
    return tuple((prompt, max(answer, 1)) for prompt, answer in some)


@dataclass(frozen=True)
class StageDevice:
    """The device of one stage.

    rates: rates for the rows of its matrix products. budget: `gpu` is the stage's, `cpu` and `disk`
    are those of all stages on the node. core_shares: pairs of a lane or resource and the fraction
    of the cores that it occupies, where the device is the host's cores.
    """

    rates: Rates
    budget: Budget
    node: str = ""
    core_shares: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ModelRates:
    """A machine's rates for one model, from the rows of its products in decode and in prefill."""

    hardware: Hardware
    config: ModelConfig
    dtype: str
    cache_bits: int | None = None

    def __call__(self, decode_rows: int, prefill_rows: int, *expert_tokens: int) -> HardwareSpec:
        config, hardware = self.config, self.hardware
        shape = self.dtype, config.num_heads // config.num_kv_heads
        rates = hardware.rates(*shape, decode_rows, prefill_rows, self.cache_bits)
        if not config.num_experts:
            return rates
        decode, prefill = (
            rows_of_expert(config, tokens, on_gpu=not hardware.device.is_cpu)
            for tokens in expert_tokens or (decode_rows, prefill_rows)
        )
        return replace(
            rates,
            device_expert_flops_per_s=hardware.gemm_flops_per_s(self.dtype, prefill),
            device_decode_expert_flops_per_s=hardware.gemm_flops_per_s(self.dtype, decode),
        )


@dataclass(frozen=True)
class PipelinePlan:
    """A plan for each stage of a pipeline, and how long its visits take.

    seconds: {phase or kind of visits: {lane or resource: seconds of a visit}} of each stage.
    prefill_visits: visits of a block in which prompts are processed.
    kinds: {kind: visits of the job}, for each block in flight; empty if it is one block, whose
    requests begin and end together.
    """

    job: PlannedJob
    stages: list[StagePlan]
    seconds: list[dict[str, dict[str, float]]]
    prefill_visits: float
    kinds: dict[str, float] = field(default_factory=dict)

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
        """Lower bound of a visit: seconds of the slowest stage's busiest lane or resource."""
        stages = (stage[phase].items() for stage in self.seconds)
        return max(it for seconds in stages for name, it in seconds if name != SCHEDULE)

    def visit_seconds(self, phase: str) -> float:
        """Seconds of a visit: the bound, or the simulated schedule's where that is slower."""
        return max(max(stage[phase].values()) for stage in self.seconds)

    @property
    def bottleneck(self) -> tuple[int, str]:
        """The bottleneck over the whole job: a stage, and its busiest lane or resource.

        Ops of few rows keep their lane for as long as they take to issue, so the issuing thread is
        named if it is nearly as busy.
        """
        names = (
            (i, name)
            for i, stage in enumerate(self.seconds)
            for name in stage["decode"]
            if name not in (SCHEDULE, ONE_BATCH)
        )
        busiest = max(names, key=lambda it: self._busy_seconds(*it))
        issuing = busiest[0], ISSUING
        is_issuing = self._busy_seconds(*issuing) >= NEARLY * self._busy_seconds(*busiest)
        return issuing if is_issuing else busiest

    @property
    def prefill_seconds(self) -> float:
        """Seconds that all blocks in flight take for their prompts."""
        return self._phase_seconds("prefill")

    @property
    def decode_seconds(self) -> float:
        """Seconds that all blocks in flight take for their new tokens, after the first."""
        return self._phase_seconds("decode")

    @property
    def block_seconds(self) -> float:
        """Latency of a request, from the start of its block to its last token."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_s(self) -> float:
        """Throughput in generated tokens per second of prefill and decode.

        The whole job counts, its end too, when blocks are no longer full.
        """
        return self.job.num_requests * self.job.mean_tokens / self.job_seconds

    @property
    def block_tokens_per_s(self) -> float:
        """The throughput of blocks whose requests begin and end together, as FlexGen counts."""
        sequences = min(self.num_blocks * self.block_size, self.job.num_requests)
        return sequences * self.job.mean_tokens / self.block_seconds

    @property
    def job_seconds(self) -> float:
        """Seconds that the whole job takes."""
        if not self.kinds:
            return self.block_seconds
        filling = (len(self.stages) - 1) * self.visit_seconds("decode")
        visits = sum(count * self.visit_seconds(kind) for kind, count in self.kinds.items())
        return self.num_blocks * visits + filling

    @property
    def decode_tokens_per_s(self) -> float:
        return self.block_size / self.visit_seconds("decode")

    def _phase_seconds(self, phase: str) -> float:
        """Seconds until the last block has had its visits; the pipeline has to fill first."""
        visits = self.num_blocks * self.visits[phase] + len(self.stages) - 1
        return visits * self.visit_seconds(phase)

    def _busy_seconds(self, stage: int, name: str) -> float:
        """Seconds of one lane or resource of a stage over all visits of a block, or of the job."""
        seconds, visits = self.seconds[stage], self.kinds or self.visits
        return sum(count * seconds[each].get(name, 0.0) for each, count in visits.items())
