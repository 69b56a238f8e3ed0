"""Limits common to the stages of a pipeline: of nodes, and of batches that pass through all.

Knows bytes and seconds of each stage; chooses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_ray.config import TIERS, Budget
from flexgen_ray.cost.lp import LANES, SHARED_SECONDS
from flexgen_ray.cost.pipeline_plan import ONE_BATCH, Device
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.sizes import stage_bytes, totals
from flexgen_ray.cost.visit import WAYS


def over_budgets(devices: Sequence[Device], stages: list[StagePlan]) -> list[dict[str, int]]:
    """{tier: bytes beyond the budget} of each stage; of the host's tiers, those of its node."""
    needs = [totals(stage_bytes(stage)) for stage in stages]
    found = []
    for number, device in enumerate(devices):
        over = {}
        for tier in TIERS:
            who = [number] if tier == "gpu" else _mates(devices, device)
            nbytes = sum(getattr(needs[it], tier) for it in who) - getattr(device.budget, tier)
            if nbytes > 0:
                over[tier] = nbytes
        found.append(over)
    return found


def less(budget: Budget, over: dict[str, int]) -> Budget:
    """By what was too much, and a little more, for a row or a tensor is a step."""
    cuts = {tier: nbytes + getattr(budget, tier) // 256 for tier, nbytes in over.items()}
    left = {tier: getattr(budget, tier) - cuts.get(tier, 0) for tier in TIERS}
    return Budget(**{tier: max(nbytes, 0) for tier, nbytes in left.items()})


def add_one_batch(seconds: list[dict[str, float]], num_blocks: int) -> None:
    """A batch's way through all stages, in one phase, by the blocks under way meanwhile."""
    ways = [sum(stage.pop(way, 0.0) for stage in seconds) for way in WAYS]
    seconds[-1][ONE_BATCH] = max(ways) / num_blocks


def add_shared(devices: Sequence[Device], seconds: list[dict[str, float]], overlaps: bool) -> None:
    """Add the seconds of what a stage's lanes, or a node's stages, share in one phase.

    overlaps: as in lp.Aim.
    """
    for device, own in zip(devices, seconds, strict=True):
        mates = _mates(devices, device)
        for name in SHARED_SECONDS if len(mates) > 1 else ():
            own[f"the node's {name}"] = sum(seconds[it].get(name, 0.0) for it in mates)
        if device.core_shares:
            own["cores"] = sum(share * own.get(lane, 0) for lane, share in device.core_shares)
        if not overlaps:
            own["all lanes"] = sum(it for lane, it in own.items() if lane in LANES)


def _mates(devices: Sequence[Device], device: Device) -> list[int]:
    """The stages on its node."""
    return [number for number, other in enumerate(devices) if other.node == device.node]
