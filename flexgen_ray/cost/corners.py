"""A stage's seconds and bytes as linear functions of where it keeps things.

Costs and sizes add up over layers, and over the shares of weights, cache and hidden states on each
tier. So what they are when all of a thing lies in one place, a *corner*, for one layer and for two,
tells what they are for any number of layers and any division, up to the rounding to whole tensors
and rows. Corners are asked of the same functions that cost real ops and size real buffers. The
same coefficients take numbers or the variables of a linear program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from flexgen_ray.config import TIERS, HardwareSpec, Placement, Policy
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.predict import decoding, prefilling, visit_seconds
from flexgen_ray.cost.sizes import stage_bytes, totals
from flexgen_ray.schedule.zigzag import StageLayers

PHASES = ("prefill", "decode")
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
Quantity = tuple[str, str]  # (phase, lane or resource): seconds; ("bytes", tier): bytes


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
        self, quantity: Quantity, layers: Any, shares: Mapping[Share, Any], near: float
    ) -> Any:
        """The quantity for so many layers, `shares` of them lying where (in layers, each group
        summing to `layers`). near: about how many layers, for what a share takes once."""
        once, each = self._once_and_each(SHARES[0], quantity)
        total = once + each * layers
        for share, amount in shares.items():
            its_once, its_each = self._once_and_each(share, quantity)
            slope = its_each - each + (its_once - once) / near
            if slope:
                total = total + slope * amount
        return total

    @cached_property
    def quantities(self) -> list[Quantity]:
        """All that is ever above zero."""
        corners = self._values.values()
        return sorted({it for values in corners for it, amount in values.items() if amount})

    def _once_and_each(self, share: Share, quantity: Quantity) -> tuple[float, float]:
        """What a stage takes at this corner once, and for each layer."""
        one, two = (self._values[share, count].get(quantity, 0.0) for count in (1, 2))
        return 2 * one - two, two - one

    @cached_property
    def _values(self) -> dict[tuple[Share, int], dict[Quantity, float]]:
        base = {count: self._at(SHARES[0], count) for count in (1, 2)}
        return {
            (share, count): base[count] if _is_base(share) else self._at(share, count)
            for share in SHARES
            for count in (1, 2)
        }

    def _at(self, share: Share, layers: int) -> dict[Quantity, float]:
        plan = _small(self.plan, layers, corner(self.plan.policy, share))
        need = totals(stage_bytes(plan))
        found: dict[Quantity, float] = {("bytes", tier): getattr(need, tier) for tier in TIERS}
        one, two = (self._seconds(plan, batches) for batches in (1, 2))
        more = plan.policy.num_gpu_batches - 1
        for key, seconds in one.items():
            found[key] = seconds + more * (two[key] - seconds)
        return found

    def _seconds(self, plan: StagePlan, batches: int) -> dict[Quantity, float]:
        """Of a visit of so many batches; each further one takes the same."""
        policy = replace(plan.policy, num_gpu_batches=batches, blocks_in_flight=None)
        return _seconds(replace(plan, policy=policy, num_blocks=1), self.hardware, self.position)


@lru_cache(maxsize=4096)
def _seconds(plan: StagePlan, hardware: HardwareSpec, position: int) -> dict[Quantity, float]:
    """The same for blocks of any number of batches, so it is asked for once."""
    rows = {"prefill": prefilling(plan)[0], "decode": decoding(plan, position)}
    return {
        (phase, name): seconds
        for phase in PHASES
        for name, seconds in visit_seconds(plan, hardware, rows[phase]).items()
    }


def corner(policy: Policy, share: Share) -> Policy:
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
    return replace(plan, config=config, stage=StageLayers(first, last, count), policy=policy)
