"""Policies for machines without known rates: fill the GPU, then host memory, then the disk.

The block is as large as fits without pushing much to the disk. The module knows sizes and no
speeds; where rates are known, search.py finds better policies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import nlargest

from flexgen_ray.config import Budget, Placement
from flexgen_ray.layout.pages import pages_of
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import check_budgets, stage_bytes, tier_totals

MAX_BLOCK = 512
MAX_GPU_BATCH = 64
TILES = (2048, 512, 128)
PREFIX_TIERS = "gpu", "cpu"  # for prefixes that rows share, the first choice first
BISECTIONS = 7  # settle a fraction to within 1 %


def fill_tiers(plans: list[StagePlan], budgets: list[Budget]) -> list[StagePlan]:
    """The plans with filled tiers, all with the same block shape.

    Tries blocks from the largest to the smallest, each with tiles from the largest to the smallest,
    and takes the first that leaves little on disk (see `_merits`). If none does, the one with most
    merits is taken, so that with a short budget the model still runs.

    plans: all stages; the parts of their policies that are not chosen here stay.
    Raises ValueError, which says what the smallest block lacks, if nothing fits.
    """
    best: list[StagePlan] | None = None
    requests = -(-plans[0].workload.num_requests // plans[0].num_blocks)
    for block in _halvings(min(requests, MAX_BLOCK)):
        batches = -(-block // MAX_GPU_BATCH)
        for tile in TILES:
            shaped = [_with_shape(plan, -(-block // batches), batches, tile) for plan in plans]
            filled = _fill_stages(shaped, budgets)
            if best is None or _common_merits(filled, budgets) > _common_merits(best, budgets):
                best = filled
            if all(_common_merits(best, budgets)):
                return best
    assert best is not None
    # For a stage in which nothing fits, the error is about the smallest block.
    pairs = zip(best, filled, budgets, strict=True)
    check_budgets([a if _fits(a, budget) else b for a, b, budget in pairs], budgets)
    return best


def fill_stage(plan: StagePlan, budget: Budget) -> StagePlan:
    """The plan with as much on the faster tiers as fits: weights first, then the cache.

    Starts with all weights on disk, then moves the largest shares that fit, step by step.
    """
    plan = _slowest(plan, budget)
    plan = _move_up(plan, "weights", "disk", "gpu", budget)
    plan = _move_up(plan, "cache", "cpu", "gpu", budget)
    plan = _move_up(plan, "cache", "disk", "gpu", budget)
    plan = _move_up(plan, "weights", "disk", "cpu", budget)
    return _move_up(plan, "cache", "disk", "cpu", budget)


def place_prefixes(
    plans: list[StagePlan], budgets: list[Budget], tiers: Sequence[str] = PREFIX_TIERS
) -> list[StagePlan] | None:
    """The plans with a tier for prefixes that rows share: the first that has room for them.

    They lie in host memory only where some rows do. None if a stage has room for them on no tier.
    """
    placed = []
    for plan, budget in zip(plans, budgets, strict=True):
        choices = (replace(plan, prefix_tier=tier) for tier in tiers)
        fitting = (it for it in choices if may_hold_prefixes(it) and _fits(it, budget))
        placed.append(next(fitting, None))
    holding = [plan for plan in placed if plan is not None]
    return holding if len(holding) == len(plans) else None


def may_hold_prefixes(plan: StagePlan) -> bool:
    """True if prefixes that rows share may lie on the plan's tiers for them."""
    is_free = plan.is_sparse or plan.prefix_tier == "gpu"
    return is_free or any(split.cpu for split in plan.splits)


def with_spare_pages(
    plans: list[StagePlan], budgets: list[Budget], final_lengths: Sequence[int] | None = None
) -> list[StagePlan]:
    """The plans with more pages for rows to grow into, as far as memory goes.

    final_lengths: tokens of each sequence at its end; all together, the longest of those that can
    be under way at once need no more. None for any up to the longest that the plans allow.
    """
    low, high = plans[0].row_pages, plans[0].longest_pages
    if final_lengths is not None:
        rows = plans[0].num_batches * plans[0].policy.gpu_batch_size
        pages = sum(map(pages_of, nlargest(rows, final_lengths)))
        high = min(high, -(-pages // rows))
    while low < high:
        middle = (low + high + 1) // 2
        wider = [replace(plan, pages_per_row=middle) for plan in plans]
        low, high = (middle, high) if all(map(_fits, wider, budgets)) else (low, middle - 1)
    return [replace(plan, pages_per_row=low) for plan in plans]


def _halvings(size: int) -> Iterator[int]:
    while size >= 1:
        yield size
        size //= 2


def _with_shape(plan: StagePlan, size: int, batches: int, tile: int) -> StagePlan:
    policy = replace(
        plan.policy, gpu_batch_size=size, num_gpu_batches=batches, max_batch_tokens=tile
    )
    return replace(plan, policy=policy)


def _fill_stages(plans: list[StagePlan], budgets: list[Budget]) -> list[StagePlan]:
    """Everything on the devices if that fits; else filled, in two batches at least.

    With two batches, moving one's data overlaps computing the other.
    """
    device = Placement(1, 0, 0)
    resident = [_placed(plan, weights=device, cache=device, activations=device) for plan in plans]
    if all(map(_fits, resident, budgets)):
        return resident
    return list(map(fill_stage, map(_in_two_batches, plans), budgets))


def _common_merits(plans: list[StagePlan], budgets: list[Budget]) -> tuple[bool, ...]:
    """The merits that every stage has."""
    merits = [_merits(plan, budget) for plan, budget in zip(plans, budgets, strict=True)]
    return tuple(all(each) for each in zip(*merits, strict=True))


def _merits(plan: StagePlan, budget: Budget) -> tuple[bool, ...]:
    """Merits of a plan, the most important first; tuples of them compare like numbers.

    The plan fits; no hidden states are on disk; no cache is on disk; the cache doesn't push weights
    to disk, that is, no weights are there while the cache takes over half of the host's memory.
    """
    policy = plan.policy
    displaces = policy.weights.disk > 0 and 2 * stage_bytes(plan)["cpu"]["cache"] > budget.cpu
    return (
        _fits(plan, budget),
        policy.activations.disk == 0,
        policy.cache.disk == 0,
        not displaces,
    )


def _fits(plan: StagePlan, budget: Budget) -> bool:
    need = tier_totals(stage_bytes(plan))
    return need.gpu <= budget.gpu and need.cpu <= budget.cpu and need.disk <= budget.disk


def _in_two_batches(plan: StagePlan) -> StagePlan:
    """The plan with its only batch divided in two."""
    policy = plan.policy
    if policy.num_gpu_batches > 1 or policy.gpu_batch_size == 1:
        return plan
    halves = replace(policy, gpu_batch_size=-(-policy.gpu_batch_size // 2), num_gpu_batches=2)
    return replace(plan, policy=halves)


def _slowest(plan: StagePlan, budget: Budget) -> StagePlan:
    """Weights on disk; cache and hidden states on the fastest tiers that take all of them."""
    disk = Placement(0, 0, 1)
    caches = (Placement(0, 1, 0),) if plan.is_sparse else (Placement(0, 1, 0), disk)
    homes = (Placement(1, 0, 0), Placement(0, 1, 0), disk)
    for cache in caches:
        # Rows wait for groups of experts on the GPU alone.
        for activations in homes[:1] if plan.policy.expert_slots else homes:
            slowest = _placed(plan, weights=disk, cache=cache, activations=activations)
            need = tier_totals(stage_bytes(slowest))
            if need.gpu <= budget.gpu and need.cpu <= budget.cpu:
                return slowest
    return slowest


def _placed(plan: StagePlan, **placements: Placement) -> StagePlan:
    return replace(plan, policy=replace(plan.policy, **placements))  # type: ignore[arg-type]


def _move_up(plan: StagePlan, group: str, source: str, tier: str, budget: Budget) -> StagePlan:
    """Move the largest share of weights or cache from `source` to `tier` that its budget takes.

    Bisects the share, because bytes grow with it in steps of whole tensors and rows.
    """
    placement: Placement = getattr(plan.policy, group)
    available: float = getattr(placement, source)

    def moved(share: float) -> StagePlan:
        amount = available * share
        changes = {
            source: 0.0 if share == 1 else available - amount,
            tier: getattr(placement, tier) + amount,
        }
        return _placed(plan, **{group: replace(placement, **changes)})

    def fits(candidate: StagePlan) -> bool:
        need = tier_totals(stage_bytes(candidate))
        return getattr(need, tier) <= getattr(budget, tier)

    if not available or fits(moved(1.0)):
        return moved(1.0)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(moved(middle)) else (low, middle)
    return moved(low)
