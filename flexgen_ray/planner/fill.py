"""The policies where none is given: fill the GPU, then host memory, then disk, in as large a block
as fits. A stand-in until a planner weighs the choices; it knows sizes and no speeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flexgen_ray.config import Budget, Placement, Policy
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import check_budgets, stage_bytes, totals

MAX_BLOCK = 512
MAX_GPU_BATCH = 64
TILES = (2048, 512, 128)
BISECTIONS = 7  # a fraction is settled to within 1 %


def fill_tiers(plans: list[StagePlan], budgets: list[Budget]) -> list[Policy]:
    """Of a pipeline's stages: the largest block that leaves little on disk, the same for all; of
    the others the one that leaves least.

    plans: all of the stages; of their policies, what isn't chosen here is kept.
    Raises ValueError with what the smallest block lacks if nothing fits.
    """
    best: list[StagePlan] | None = None
    requests = -(-plans[0].workload.num_requests // plans[0].num_blocks)
    for block in _halves(min(requests, MAX_BLOCK)):
        batches = -(-block // MAX_GPU_BATCH)
        for tile in TILES:
            sized = [_sized(plan, -(-block // batches), batches, tile) for plan in plans]
            filled = _fill(sized, budgets)
            if best is None or _worst_merits(filled, budgets) > _worst_merits(best, budgets):
                best = filled
            if all(_worst_merits(best, budgets)):
                return [plan.policy for plan in best]
    assert best is not None
    pairs = zip(best, filled, budgets, strict=True)
    check_budgets([a if _fits(a, budget) else b for a, b, budget in pairs], budgets)
    return [plan.policy for plan in best]


def _sized(plan: StagePlan, size: int, batches: int, tile: int) -> StagePlan:
    policy = replace(
        plan.policy, gpu_batch_size=size, num_gpu_batches=batches, max_batch_tokens=tile
    )
    return replace(plan, policy=policy)


def _halves(size: int) -> Iterator[int]:
    while size >= 1:
        yield size
        size //= 2


def _worst_merits(plans: list[StagePlan], budgets: list[Budget]) -> tuple[bool, ...]:
    """Those that every stage has."""
    merits = [_merits(plan, budget) for plan, budget in zip(plans, budgets, strict=True)]
    return tuple(all(each) for each in zip(*merits, strict=True))


def _merits(plan: StagePlan, budget: Budget) -> tuple[bool, ...]:
    """Fits; no hidden states on disk; no cache there; no weights there that more than half of the
    host's memory, taken by the cache, would have kept off it."""
    policy = plan.policy
    displaces = policy.weights.disk > 0 and 2 * stage_bytes(plan)["cpu"]["cache"] > budget.cpu
    return (
        _fits(plan, budget),
        policy.activations.disk == 0,
        policy.cache.disk == 0,
        not displaces,
    )


def _fits(plan: StagePlan, budget: Budget) -> bool:
    need = totals(stage_bytes(plan))
    return need.gpu <= budget.gpu and need.cpu <= budget.cpu and need.disk <= budget.disk


def _fill(plans: list[StagePlan], budgets: list[Budget]) -> list[StagePlan]:
    """All on the devices if it fits; else as much as fits, in two batches that overlap at least."""
    device = Placement(1, 0, 0)
    whole = [_with(plan, weights=device, cache=device, activations=device) for plan in plans]
    if all(map(_fits, whole, budgets)):
        return whole
    return list(map(fill_stage, map(_in_two_batches, plans), budgets))


def fill_stage(plan: StagePlan, budget: Budget) -> StagePlan:
    """As much on the faster tiers as fits: weights first, then the cache."""
    plan = _barest(plan, budget)
    plan = _lift(plan, "weights", "disk", "gpu", budget)
    plan = _lift(plan, "cache", "cpu", "gpu", budget)
    plan = _lift(plan, "cache", "disk", "gpu", budget)
    plan = _lift(plan, "weights", "disk", "cpu", budget)
    return _lift(plan, "cache", "disk", "cpu", budget)


def _barest(plan: StagePlan, budget: Budget) -> StagePlan:
    """Weights on disk; cache and hidden states on the fastest tiers that take all of them."""
    disk = Placement(0, 0, 1)
    for cache in (Placement(0, 1, 0), disk):
        for activations in (Placement(1, 0, 0), Placement(0, 1, 0), disk):
            bare = _with(plan, weights=disk, cache=cache, activations=activations)
            need = totals(stage_bytes(bare))
            if need.gpu <= budget.gpu and need.cpu <= budget.cpu:
                return bare
    return bare


def _in_two_batches(plan: StagePlan) -> StagePlan:
    """One batch has nothing to overlap with."""
    policy = plan.policy
    if policy.num_gpu_batches > 1 or policy.gpu_batch_size == 1:
        return plan
    halves = replace(policy, gpu_batch_size=-(-policy.gpu_batch_size // 2), num_gpu_batches=2)
    return replace(plan, policy=halves)


def _with(plan: StagePlan, **changes: Placement) -> StagePlan:
    return replace(plan, policy=replace(plan.policy, **changes))  # type: ignore[arg-type]


def _lift(plan: StagePlan, what: str, source: str, tier: str, budget: Budget) -> StagePlan:
    """Moves the largest share of weights or cache from `source` to `tier` that its budget takes."""
    placement: Placement = getattr(plan.policy, what)
    available: float = getattr(placement, source)

    def lifted(share: float) -> StagePlan:
        moved = available * share
        changes = {
            source: 0.0 if share == 1 else available - moved,
            tier: getattr(placement, tier) + moved,
        }
        return _with(plan, **{what: replace(placement, **changes)})

    def fits(candidate: StagePlan) -> bool:
        need = totals(stage_bytes(candidate))
        return getattr(need, tier) <= getattr(budget, tier)

    if not available or fits(lifted(1.0)):
        return lifted(1.0)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(lifted(middle)) else (low, middle)
    return lifted(low)
