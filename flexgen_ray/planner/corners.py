"""A stage's seconds and bytes as linear functions of where it keeps things.

Costs and sizes add up over layers, and over the shares of weights, cache and hidden states on each
tier. So what they are when all of a thing lies in one place, a *corner*, for one layer and for two,
tells what they are for any number of layers and any division, up to the rounding to whole tensors
and rows. Corners are asked of the same functions that cost real ops and size real buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from flexgen_ray.config import TIERS, HardwareSpec, Placement, Policy
from flexgen_ray.cost.bound import Quantity, seconds_of_visit
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import stage_bytes, staged_bytes, totals
from flexgen_ray.schedule.zigzag import StageLayers

_ON = {tier: Placement(*(float(it == tier) for it in TIERS)) for tier in TIERS}


@dataclass(frozen=True, order=True)
class Share:
    """Some of the weights, the cache or the hidden states, and where it lies.

    The cache in host memory is two shares: attended there, and streamed to the device.
    """

    what: str
    where: str


# The first of each group is what the others are compared with.
GROUPS = {
    "weights": TIERS,
    "cache": ("gpu", "attended", "streamed", "disk"),
    "activations": TIERS,
}
SHARES = tuple(Share(what, where) for what, places in GROUPS.items() for where in places)
ON_DEVICE = tuple(Share(what, places[0]) for what, places in GROUPS.items())
_AT = {share: number for number, share in enumerate(SHARES, start=2)}  # in a row of `linear`


@dataclass(frozen=True)
class Corners:
    """Of a stage that is, or is not, the model's first and its last.

    plan: gives the model, the shape of a block and the longest sequences; its own layers and
    placement don't count. position: of the tokens that an average decoding pass brings.
    """

    plan: StagePlan
    hardware: HardwareSpec
    position: int

    def value(
        self, quantity: Quantity, layers: float, shares: Mapping[Share, float], near: float
    ) -> float:
        """The quantity for so many layers, `shares` of them lying where (in layers, each group
        summing to `layers`). near: about how many layers, for what a share takes once."""
        row = self.linear(near).get(quantity)
        if row is None:
            return 0.0
        parts = (row[_AT[share]] * amount for share, amount in shares.items())
        return float(row[0] + row[1] * layers + sum(parts))

    def linear(self, near: float) -> dict[Quantity, np.ndarray]:
        """{quantity: its constant, and its coefficients for layers and for each of SHARES}, of all
        that are ever above zero."""
        once, each = self._values[..., 0], self._values[..., 1]
        slopes = each - each[:, :1] + (once - once[:, :1]) / near
        rows = np.concatenate((once[:, :1], each[:, :1], slopes), axis=1)
        return dict(zip(self._known, rows, strict=True))

    @property
    def quantities(self) -> list[Quantity]:
        """All that are ever above zero."""
        return self._known

    @cached_property
    def _known(self) -> list[Quantity]:
        return sorted({it for at in self._corners for it, amount in at.items() if any(amount)})

    @cached_property
    def _values(self) -> np.ndarray:
        """A stage's amounts at each corner, once and for each layer: [quantities, shares, 2]."""
        nothing = (0.0, 0.0)
        return np.array([[at.get(it, nothing) for at in self._corners] for it in self._known])

    @cached_property
    def _corners(self) -> list[dict[Quantity, tuple[float, float]]]:
        """The same, at each of SHARES."""
        base = self._at(SHARES[0])
        return [base if _is_base(share) else self._at(share) for share in SHARES]

    def _at(self, share: Share) -> dict[Quantity, tuple[float, float]]:
        policy = corner_policy(self.plan.policy, share)
        needs = [_bytes(_small(self.plan, layers, policy)) for layers in (1, 2)]
        found: dict[Quantity, tuple[float, float]] = {}
        for tier in TIERS:
            one, two = (need[tier] for need in needs)
            found["bytes", tier] = 2 * one - two, two - one
        # What batches bring doesn't depend on how many there are, nor on the blocks.
        alike = replace(policy, num_gpu_batches=2, blocks_in_flight=None)
        small = replace(_small(self.plan, 1, alike), num_blocks=1)
        more = self.plan.policy.num_gpu_batches - 1
        for key, taken in seconds_of_visit(small, self.hardware, self.position).items():
            found[key] = taken.once + more * taken.once_more, taken.each + more * taken.each_more
        return found


def _bytes(plan: StagePlan) -> dict[str, int]:
    """{tier: bytes} of a small plan: each further batch takes as many, but for weights on their way
    from disk, whose parts get smaller."""
    batches = plan.policy.num_gpu_batches
    two, three = (_unstaged_bytes(_with_batches(plan, number)) for number in (2, 3))
    found = {tier: two[tier] + (batches - 2) * (three[tier] - two[tier]) for tier in TIERS}
    return found | {"cpu": found["cpu"] + staged_bytes(plan)}


@lru_cache(maxsize=8192)
def _unstaged_bytes(plan: StagePlan) -> dict[str, int]:
    need = totals(stage_bytes(plan))
    found = {tier: getattr(need, tier) for tier in TIERS}
    return found | {"cpu": found["cpu"] - staged_bytes(plan)}


def _with_batches(plan: StagePlan, batches: int) -> StagePlan:
    return replace(plan, policy=replace(plan.policy, num_gpu_batches=batches))


def corner_policy(policy: Policy, share: Share) -> Policy:
    """All of the share's group where it says, the other groups on the device."""
    place = {"attended": "cpu", "streamed": "cpu"}.get(share.where, share.where)
    weights, cache, activations = (_ON[place if it == share.what else "gpu"] for it in GROUPS)
    return replace(
        policy,
        weights=weights,
        cache=cache,
        activations=activations,
        cpu_attention=float(share.where != "streamed"),
    )


def policy_of(shape: Policy, layers: float, shares: Mapping[Share, float]) -> Policy:
    """The shape with these shares, in layers, as fractions."""

    def part(what: str, *places: str) -> float:
        parts = [shares.get(Share(what, it), 0.0) for it in places]
        return min(max(round(sum(parts) / layers, 4), 0.0), 1.0)

    def placement(what: str) -> Placement:
        disk = part(what, "disk")
        cpu = min(part(what, "cpu", "attended", "streamed"), 1 - disk)
        return Placement(round(1 - cpu - disk, 4), cpu, disk)

    host = part("cache", "attended", "streamed")
    return replace(
        shape,
        weights=placement("weights"),
        cache=placement("cache"),
        activations=placement("activations"),
        cpu_attention=min(round(part("cache", "attended") / host, 4), 1.0) if host else 1.0,
    )


def shares_of(policy: Policy, layers: float) -> dict[Share, float]:
    """The inverse of `policy_of`."""
    attended = policy.cpu_attention
    fractions = {
        Share(what, tier): getattr(getattr(policy, what), tier) for what in GROUPS for tier in TIERS
    }
    host = fractions.pop(Share("cache", "cpu"))
    fractions[Share("cache", "attended")] = host * attended
    fractions[Share("cache", "streamed")] = host * (1 - attended)
    return {share: layers * fraction for share, fraction in fractions.items()}


def _is_base(share: Share) -> bool:
    return share.where == GROUPS[share.what][0]


def _small(plan: StagePlan, layers: int, policy: Policy) -> StagePlan:
    """A stage with so few layers, with the model's ends if the plan's has them.

    Where only some layers attend within a window, none does here: no layer takes more.
    """
    before, after = not plan.stage.is_first, not plan.stage.is_last
    count = layers + before + after
    first = 2 if before else 0
    last = before + layers + (not after)
    mixed = bool(plan.config.full_attention_layers)
    window = None if mixed else plan.config.sliding_window
    config = replace(plan.config, num_layers=count, sliding_window=window)
    stage, workload = StageLayers(first, last, count), replace(plan.workload, num_requests=1)
    return replace(plan, config=config, stage=stage, policy=policy, workload=workload)
