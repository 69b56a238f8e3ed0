"""The policy where none is given: fill the GPU, then host memory, then disk, in as large a block
as fits. A stand-in until a planner weighs the choices; it knows sizes and no speeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flexgen_ray.config import Budget, ModelConfig, Placement, Policy, Workload
from flexgen_ray.cost.sizes import StagePlan, check_budget, stage_bytes, totals, weight_bytes
from flexgen_ray.schedule.zigzag import StageLayers

MAX_BLOCK = 512
MAX_GPU_BATCH = 64
TILES = (2048, 512, 128)
BISECTIONS = 7  # a fraction is settled to within 1 %


def default_policy(
    config: ModelConfig, stage: StageLayers, workload: Workload, dtype: str, budget: Budget
) -> Policy:
    """Raises ValueError with what the smallest block lacks if nothing fits."""
    smallest: StagePlan | None = None
    for block in _halves(min(workload.num_requests, MAX_BLOCK)):
        batches = -(-block // MAX_GPU_BATCH)
        shape = Policy(gpu_batch_size=-(-block // batches), num_gpu_batches=batches)
        for tile in TILES:
            policy = replace(shape, max_batch_tokens=tile)
            plan = _fill(StagePlan(config, stage, policy, workload, dtype), budget)
            if _fits(plan, budget) and (block == 1 or _is_good(plan, budget)):
                return plan.policy
            if _fits(plan, budget) or smallest is None or not _fits(smallest, budget):
                smallest = plan
    assert smallest is not None
    check_budget(smallest, budget)
    return smallest.policy


def _halves(size: int) -> Iterator[int]:
    while size >= 1:
        yield size
        size //= 2


def _is_good(plan: StagePlan, budget: Budget) -> bool:
    """No cache on disk, and no weights there for the sake of more than half the host's cache."""
    if plan.policy.cache.disk > 0:
        return False
    return plan.policy.weights.disk == 0 or 2 * stage_bytes(plan)["cpu"]["cache"] <= budget.cpu


def _fits(plan: StagePlan, budget: Budget) -> bool:
    need = totals(stage_bytes(plan))
    return need.gpu <= budget.gpu and need.cpu <= budget.cpu and need.disk <= budget.disk


def _fill(plan: StagePlan, budget: Budget) -> StagePlan:
    """Starts with everything on disk and lifts what fits, the fastest tier first."""
    disk = Placement(0, 0, 1)
    for activations in (Placement(1, 0, 0), Placement(0, 1, 0), disk):
        bare = _with(plan, weights=disk, cache=disk, activations=activations)
        need = totals(stage_bytes(bare))
        if need.gpu <= budget.gpu and (activations.gpu or need.cpu <= budget.cpu):
            break
    plan = _lift(bare, "weights", "gpu", budget)
    plan = _lift(plan, "cache", "gpu", budget)
    first, second = ("weights", "cache") if _weights_fit(plan, budget) else ("cache", "weights")
    return _lift(_lift(plan, first, "cpu", budget), second, "cpu", budget)


def _weights_fit(plan: StagePlan, budget: Budget) -> bool:
    return weight_bytes(plan)["disk"] <= budget.cpu


def _with(plan: StagePlan, **changes: Placement) -> StagePlan:
    return replace(plan, policy=replace(plan.policy, **changes))  # type: ignore[arg-type]


def _lift(plan: StagePlan, what: str, tier: str, budget: Budget) -> StagePlan:
    """Moves the largest fraction of weights or cache from disk to `tier` that its budget takes."""
    placement: Placement = getattr(plan.policy, what)

    def lifted(fraction: float) -> StagePlan:
        moved = placement.disk * fraction
        rest = 0.0 if fraction == 1 else placement.disk - moved
        target = {tier: getattr(placement, tier) + moved, "disk": rest}
        return _with(plan, **{what: replace(placement, **target)})

    def fits(candidate: StagePlan) -> bool:
        need = totals(stage_bytes(candidate))
        return getattr(need, tier) <= getattr(budget, tier)

    if fits(lifted(1.0)):
        return lifted(1.0)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(lifted(middle)) else (low, middle)
    return lifted(low)
