"""Amount of what the prompts of a job share, and what is said about it before the job runs.

A job's prompts share if memory has room for the prefixes. Where they could share and don't, a note
names the amount and the remedy. Knows requests, plans and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import is_

from flexgen_ray.config import PAGE_TOKENS, Sharing
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import prefix_bytes
from flexgen_ray.request import Request
from flexgen_ray.runtime.prefixes import (
    NOTHING_SHARED,
    SharedPrompts,
    find_prefixes,
    measure_sharing,
)
from flexgen_ray.units import format_bytes

_TIERS = {"gpu": "GPU memory", "cpu": "host memory"}
SMALL_SHARE = 0.5  # of the memory that prefixes want, below which a note says so


@dataclass(frozen=True)
class JobSharing:
    """Sharing among the prompts of some requests.

    answers: the requests, each as often as it has answers. shared: prefixes of their prompts.
    amount: what takes part in plans; None for nothing.
    """

    answers: Sequence[Request]
    shared: SharedPrompts = NOTHING_SHARED
    amount: Sharing | None = None

    @classmethod
    def of(cls, requests: Sequence[Request], is_wanted: bool = True) -> JobSharing:
        """Find what these requests share; nothing if it isn't wanted."""
        answers = [request for request in requests for _ in range(request.params.n)]
        if not is_wanted:
            return cls(answers)
        shared = find_prefixes(answers)
        return cls(answers, shared, measure_sharing(answers, shared))

    def is_of(self, requests: Sequence[Request]) -> bool:
        """True if it was found for these very requests."""
        answers = [request for request in requests for _ in range(request.params.n)]
        return len(answers) == len(self.answers) and all(map(is_, answers, self.answers))

    def whole(self) -> JobSharing:
        """Sharing of these requests if every prompt is computed whole: none."""
        return JobSharing(self.answers)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, of each as often as it has answers."""
        return sum(len(answer.prompt_token_ids) for answer in self.answers)

    def saved_tokens(self, stages: Sequence[StagePlan]) -> int:
        """Prompt tokens that are expected not to be computed by these plans."""
        may_share = self.amount is not None and all(plan.prefix_pages for plan in stages)
        return self.amount.saved_tokens if self.amount and may_share else 0

    def line(self, stages: Sequence[StagePlan]) -> str | None:
        """One line for people on what prompts share by these plans, and where it lies."""
        saved, total = self.saved_tokens(stages), self.prompt_tokens
        if self.amount is None or not saved:
            return None
        room = min(plan.prefix_pages for plan in stages) * PAGE_TOKENS
        return (
            f"prompts share: {saved:,} of their {total:,} tokens need no computing "
            f"({saved / total:.0%}); prefixes of {room:,} tokens at a time take {_memory(stages)}"
        )

    def note_no_room(self, stages: Sequence[StagePlan]) -> str:
        """Note on prompts whose prefixes don't fit beside what these plans hold."""
        needed = _memory([_with_sharing(plan, self.amount) for plan in stages])
        return (
            f"{self._could} there is no room for prefixes, which take {needed}, so each prompt is "
            "computed whole; raise --gpu-memory or --cpu-memory, or give a policy of smaller blocks"
        )

    def note_lack(self, stages: Sequence[StagePlan]) -> str | None:
        """Note if stages that are loaded have much less room for prefixes than is wanted."""
        if self.amount is None:
            return None
        have = min(plan.prefix_pages for plan in stages) * PAGE_TOKENS
        want = min(_with_sharing(plan, self.amount).prefix_pages for plan in stages) * PAGE_TOKENS
        if have >= SMALL_SHARE * want:
            return None
        return (
            f"{self._could} memory was planned for prompts whose prefixes have {have:,} tokens at "
            f"a time, and these have {want:,}, so more is computed; make another LLM for them"
        )

    @property
    def _could(self) -> str:
        saved = self.amount.saved_tokens if self.amount else 0
        return f"prompts share {saved:,} of their {self.prompt_tokens:,} tokens, but"


def _with_sharing(plan: StagePlan, amount: Sharing | None) -> StagePlan:
    return replace(plan, workload=replace(plan.workload, sharing=amount))


def _memory(stages: Sequence[StagePlan]) -> str:
    """Bytes of the prefixes on each tier, in all stages together."""
    taken = dict.fromkeys(_TIERS, 0)
    for plan in stages:
        for tier in plan.prefix_tiers:
            taken[tier] += prefix_bytes(plan)
    return " and ".join(
        f"{format_bytes(size)} of {_TIERS[tier]}" for tier, size in taken.items() if size
    )
