"""Requests that make every slot longer than others need, and how much smaller the block gets.

Knows requests and how tiers are filled; runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil

from flexgen_ray.auto_policy import Run
from flexgen_ray.config import Budget
from flexgen_ray.request import Request

USUAL_SHARE = 0.9  # of the requests, by whose length the others count as long

Name = Callable[[int], str]


def numbered(index: int) -> str:
    """A request by its place, where it has no name of its own."""
    return f"request {index}"


def cost_of_longest(
    run: Run, budgets: list[Budget], requests: Sequence[Request], name: Name
) -> str | None:
    """A line for people if the longest requests make the block smaller; None if they don't.

    Compares the blocks that fill the tiers with and without them, which takes no planner.
    """
    lengths = sorted(request.max_seq_len for request in requests)
    usual = lengths[ceil(USUAL_SHARE * len(lengths)) - 1]
    if lengths[-1] == usual:
        return None
    others = [request for request in requests if request.max_seq_len <= usual]
    prompt_len = max(len(request.prompt_token_ids) for request in others)
    workload = replace(run.workload, max_prompt_len=prompt_len, max_seq_len=usual)
    fit, fit_without = _fit(run, budgets), _fit(replace(run, workload=workload), budgets)
    if fit_without <= fit:
        return None
    longest = max(requests, key=lambda request: request.max_seq_len)
    asks = f"{len(longest.prompt_token_ids)} prompt tokens, max_tokens {longest.max_tokens}"
    few = len(requests) - len(others)
    return (
        f"{name(longest.index)} ({asks}) makes every slot {lengths[-1]} tokens long: memory then "
        f"takes {fit} sequences at a time, and {fit_without}, in slots of {usual} tokens, without "
        + (f"these {few} longest requests" if few > 1 else "it")
    )


def _fit(run: Run, budgets: list[Budget]) -> int:
    """Sequences of all blocks in flight."""
    try:
        plan = run.filled(budgets)[0]
    except ValueError:  # not even one
        return 0
    return plan.num_blocks * plan.policy.num_gpu_batches * plan.policy.gpu_batch_size
