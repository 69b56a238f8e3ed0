"""A stage's seconds and bytes as linear functions of where it keeps things.

Costs and sizes add up over layers, and over the shares of weights, cache and hidden states on each
tier. A *corner* keeps all of one thing in one place. The amounts at each corner, for one layer and
for two, therefore give the amounts of any number of layers and any division, up to the rounding to
whole tensors and rows. Where layers that attend all tokens alternate with layers that have windows,
one pattern and two of them stand in for one layer and two, and a layer takes the pattern's mean.
The amounts come from the functions that cost real ops and size real
buffers, so no formula is written twice.

An example with the weights alone. A stage of one layer takes 110 ms a visit with its weights on the
GPU, and 130 ms with its weights in host memory, which must cross the link. A stage of two layers
takes 210 ms and 250 ms. So each layer takes 100 ms on the GPU and 120 ms in host memory, and 10 ms
are taken once. A stage of 8 layers, 6 of them on the GPU and 2 in host memory, takes
10 + 6 * 100 + 2 * 120 = 850 ms; with x layers in host memory, it takes 10 + 100 * 8 + 20 x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from flexgen_ray.config import TIERS, HardwareSpec, Placement, Policy
from flexgen_ray.cost.bound import Quantity, visit_terms
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import (
    experts_bytes,
    prefix_bytes,
    stage_bytes,
    staged_bytes,
    tier_totals,
)
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.schedule.zigzag import StageLayers

MOST_PATTERN = 8
_ALL_ON = {tier: Placement(*(float(it == tier) for it in TIERS)) for tier in TIERS}


@dataclass(frozen=True, order=True)
class Share:
    """The part of a group (weights, cache or activations) that lies in one place.

    A place is a tier, but the cache in host memory is two: "attended" there by the host's cores,
    and "streamed" to the device.
    """

    group: str
    place: str


# The places of each group. The first is the base, whose costs the other places are compared with.
GROUPS = {
    "weights": TIERS,
    "cache": ("gpu", "attended", "streamed", "disk"),
    "activations": TIERS,
}
SHARES = tuple(Share(group, place) for group, places in GROUPS.items() for place in places)
ON_DEVICE = tuple(Share(group, places[0]) for group, places in GROUPS.items())
# Index of each share's coefficient in a row of `Corners.linear`.
_INDEX = {share: number for number, share in enumerate(SHARES, start=2)}


@dataclass(frozen=True)
class Corners:
    """The amounts of one kind of stage at each corner.

    Stages of a kind have the same block shape and hardware, and agree in whether they are the
    model's first and last.

    plan: a stage of this kind; its own number of layers and its placement don't matter.
    position: index of the token that an average decoding row processes.
    """

    plan: StagePlan
    hardware: HardwareSpec
    position: int
    _linear: dict[float, dict[Quantity, np.ndarray]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    _of_phases: dict[tuple[tuple[str, ...], float], tuple[list[str], list[np.ndarray]]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def value(
        self, quantity: Quantity, layers: float, shares: Mapping[Share, float], near: float
    ) -> float:
        """A quantity of a stage.

        layers: number of decoder layers. shares: {share: number of layers}, each group summing to
        `layers`. near: as in `linear`.
        """
        row = self.linear(near).get(quantity)
        if row is None:
            return 0.0
        parts = (row[_INDEX[share]] * amount for share, amount in shares.items())
        return float(row[0] + row[1] * layers + sum(parts))

    def linear(self, near: float) -> dict[Quantity, np.ndarray]:
        """{quantity: coefficients} of all quantities that are ever above zero.

        A row holds the constant, the coefficient of the number of layers, and for each of SHARES
        the coefficient of its layers: what a layer there takes beyond one in the group's base.
        near: about how many layers the stage has. An amount that a place takes once, however many
        layers lie there, is not linear; it is spread over so many layers.
        """
        if near not in self._linear:
            self._linear[near] = self._make_linear(near)
        return self._linear[near]

    def _make_linear(self, near: float) -> dict[Quantity, np.ndarray]:
        once, each = self._amounts[..., 0], self._amounts[..., 1]
        slopes = each - each[:, :1] + (once - once[:, :1]) / near
        rows = np.concatenate((once[:, :1], each[:, :1], slopes), axis=1)
        return dict(zip(self.quantities, rows, strict=True))

    def mixed(self, mix: Mapping[str, float], near: float) -> dict[str, np.ndarray]:
        """{name: coefficients} of a visit that is a sum of phases, as in `linear`.

        mix: {phase: share}.
        """
        phases = tuple(phase for phase in sorted(mix) if mix[phase])
        names, of_phases = self._rows_of_phases(phases, near)
        total = sum(
            (mix[phase] * rows for phase, rows in zip(phases, of_phases, strict=True)),
            np.zeros((len(names), 2 + len(SHARES))),
        )
        return dict(zip(names, total, strict=True))

    def _rows_of_phases(
        self, phases: tuple[str, ...], near: float
    ) -> tuple[list[str], list[np.ndarray]]:
        """Names that count in any of these phases, and their coefficients in each: [names, 2 +
        shares]."""
        if (phases, near) not in self._of_phases:
            linear, nothing = self.linear(near), np.zeros(2 + len(SHARES))
            names = [*dict.fromkeys(name for phase, name in linear if phase in phases)]
            rows = [
                np.array([linear.get((phase, name), nothing) for name in names]).reshape(
                    len(names), -1
                )
                for phase in phases
            ]
            self._of_phases[phases, near] = names, rows
        return self._of_phases[phases, near]

    @cached_property
    def quantities(self) -> list[Quantity]:
        """All quantities that are above zero at some corner."""
        return sorted({name for at in self._corners for name, pair in at.items() if any(pair)})

    @cached_property
    def _amounts(self) -> np.ndarray:
        """Amounts taken once and for each layer: [quantities, shares, 2]."""
        nothing = (0.0, 0.0)
        return np.array([[at.get(it, nothing) for at in self._corners] for it in self.quantities])

    @cached_property
    def _corners(self) -> list[dict[Quantity, tuple[float, float]]]:
        """{quantity: (amount once, amount of each layer)} at the corner of each of SHARES."""
        base = self._evaluate(SHARES[0])  # All groups on the device: the base corner of each group.
        # Nothing lies in a place that the policy refuses.
        unused = {Share("cache", "disk")} if self.plan.is_sparse else set()
        return [
            base if _is_base(share) or share in unused else self._evaluate(share)
            for share in SHARES
        ]

    def _evaluate(self, share: Share) -> dict[Quantity, tuple[float, float]]:
        """Amounts at the corner of a share.

        Bytes are those of one pattern and of two, so the second minus the first is a pattern's,
        and the rest is taken once. Seconds come divided in this way from the cost model.
        """
        policy, length = corner_policy(self.plan.policy, share), len(pattern_of(self.plan.config))
        one, two = (_tier_bytes(_small_stage(self.plan, it, policy)) for it in (1, 2))
        amounts: dict[Quantity, tuple[float, float]] = {
            ("bytes", tier): (2 * one[tier] - two[tier], (two[tier] - one[tier]) / length)
            for tier in TIERS
        }
        # A further batch takes the same amounts, however many batches and blocks there are; with
        # these numbers fixed, the cached costs of one shape serve others.
        part = _small_stage(self.plan, 1, policy).mixtures.batches
        alike = replace(policy, num_gpu_batches=2, blocks_in_flight=None, expert_batches=None)
        stage = replace(_small_stage(self.plan, 1, alike), num_blocks=1)
        more = self.plan.policy.num_gpu_batches - 1
        for key, taken in visit_terms(stage, self.hardware, self.position, part).items():
            amounts[key] = (
                taken.fixed + more * taken.per_batch,
                (taken.per_layer + more * taken.per_layer_batch) / length,
            )
        return amounts


def corner_policy(policy: Policy, share: Share) -> Policy:
    """The policy with all of the share's group in its place, and the other groups on the device."""
    tier = {"attended": "cpu", "streamed": "cpu"}.get(share.place, share.place)
    weights, cache, activations = (_ALL_ON[tier if it == share.group else "gpu"] for it in GROUPS)
    rows_wait = activations.gpu == 1  # for experts
    return replace(
        policy,
        expert_batches=policy.expert_batches if rows_wait else None,
        expert_slots=policy.expert_slots if rows_wait else None,
        weights=weights,
        cache=cache,
        activations=activations,
        cpu_attention=float(share.place != "streamed"),
    )


def policy_of(shape: Policy, layers: float, shares: Mapping[Share, float]) -> Policy:
    """The shape with these shares, in layers, as fractions of a policy."""

    def fraction(group: str, *places: str) -> float:
        parts = [shares.get(Share(group, place), 0.0) for place in places]
        return min(max(round(sum(parts) / layers, 4), 0.0), 1.0)

    def placement(group: str) -> Placement:
        disk = fraction(group, "disk")
        cpu = min(fraction(group, "cpu", "attended", "streamed"), 1 - disk)
        return Placement(round(1 - cpu - disk, 4), cpu, disk)

    host = fraction("cache", "attended", "streamed")
    attended = fraction("cache", "attended")
    return replace(
        shape,
        weights=placement("weights"),
        cache=placement("cache"),
        activations=placement("activations"),
        cpu_attention=min(round(attended / host, 4), 1.0) if host else 1.0,
    )


def shares_of(policy: Policy, layers: float) -> dict[Share, float]:
    """The policy's fractions as shares, in layers: the inverse of `policy_of`."""
    attended = policy.cpu_attention
    fractions = {
        Share(group, tier): getattr(getattr(policy, group), tier)
        for group in GROUPS
        for tier in TIERS
    }
    host = fractions.pop(Share("cache", "cpu"))
    fractions[Share("cache", "attended")] = host * attended
    fractions[Share("cache", "streamed")] = host * (1 - attended)
    return {share: layers * fraction for share, fraction in fractions.items()}


def _is_base(share: Share) -> bool:
    return share.place == GROUPS[share.group][0]


@lru_cache(maxsize=64)
def pattern_of(config: ModelConfig) -> tuple[int | None, ...]:
    """The windows of the model's shortest pattern of layers, None for a layer without.

    A model without a pattern of MOST_PATTERN layers at most counts as one without windows, so no
    layer is counted too low.
    """
    windows = tuple(map(config.window, range(1, config.num_layers + 1)))
    for length in range(1, MOST_PATTERN + 1):
        if windows[length:] == windows[:-length]:
            return windows[:length]
    return (None,)


def _small_stage(plan: StagePlan, patterns: int, policy: Policy) -> StagePlan:
    """A stage of the plan's kind with one pattern of layers or two."""
    pattern = pattern_of(plan.config)
    layers = patterns * len(pattern)
    before, after = not plan.stage.is_first, not plan.stage.is_last
    count = layers + before + after
    first = 2 if before else 0
    last = before + layers + (not after)
    window = next(filter(None, pattern), None)
    full = [before + at + 1 for at in range(layers) if pattern[at % len(pattern)] is None]
    config = replace(
        plan.config,
        num_layers=count,
        dense_layers=(),  # a mixture's layer takes more
        sliding_window=window,
        full_attention_layers=tuple(full) if window else (),
    )
    stage, workload = StageLayers(first, last, count), replace(plan.workload, num_requests=1)
    return replace(plan, config=config, stage=stage, policy=policy, workload=workload)


def _tier_bytes(plan: StagePlan) -> dict[str, int]:
    """{tier: bytes} of a small stage.

    Each batch beyond the second adds the same bytes, so two cached sizes serve any number of
    batches; they are those of so many batches that their rows have pages for the longest one. The
    exception is the staging buffer of weights on their way from disk: with more batches, weights
    move in smaller parts, so its size is asked for.
    """
    batches = plan.policy.num_gpu_batches
    few = max(2, -(-plan.longest_pages // (plan.policy.gpu_batch_size * plan.row_pages)))
    some, more = (_unstaged_bytes(_with_batches(plan, number)) for number in (few, few + 1))
    nbytes = {tier: some[tier] + (batches - few) * (more[tier] - some[tier]) for tier in TIERS}
    # These don't grow with every batch.
    nbytes["gpu"] += experts_bytes(plan)
    for tier in plan.prefix_tiers:
        nbytes[tier] += prefix_bytes(plan)
    return nbytes | {"cpu": nbytes["cpu"] + staged_bytes(plan)}


@lru_cache(maxsize=8192)
def _unstaged_bytes(plan: StagePlan) -> dict[str, int]:
    """{tier: bytes} without the staging buffer of weights, prefixes, and what experts take."""
    need = tier_totals(stage_bytes(plan))
    nbytes = {tier: getattr(need, tier) for tier in TIERS}
    for tier in plan.prefix_tiers:
        nbytes[tier] -= prefix_bytes(plan)
    nbytes["gpu"] -= experts_bytes(plan)
    return nbytes | {"cpu": nbytes["cpu"] - staged_bytes(plan)}


def _with_batches(plan: StagePlan, batches: int) -> StagePlan:
    return replace(plan, policy=replace(plan.policy, num_gpu_batches=batches))
