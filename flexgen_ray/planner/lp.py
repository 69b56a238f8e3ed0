"""The linear program: where each stage keeps what, and how many layers it has.

FlexGen's (Sheng et al., 2023, section 4.3), for any number of stages: minimise the time of a
block's prefill and decode, T >= seconds of every lane and resource of every stage, and of what the
stages of a node share, with every tier within its budget; and T, times the blocks in flight, no
less than one batch's way through all stages, on which nothing of its own overlaps. Knows corners;
chooses no block's shape.

Limits common to the stages of a pipeline: of nodes, and of batches that pass through all.

Knows bytes and seconds of each stage; chooses nothing.

Linear programs, solved by HiGHS. Knows numbers; not what they mean.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf

import highspy
import numpy as np

from flexgen_ray.config import TIERS, Budget
from flexgen_ray.cost.bound import PHASES, WAYS, Quantity
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import stage_bytes, totals
from flexgen_ray.planner.corners import GROUPS, SHARES, Corners, Share
from flexgen_ray.planner.pipeline_plan import ONE_BATCH, StageDevice
from flexgen_ray.schedule.ops import Lane
from flexgen_ray.units import format_bytes

# A linear function of the variables: a coefficient for each, and a constant at the end.
Linear = np.ndarray
Constraint = tuple[Linear, float, float]  # that lies between these two


def minimise(aim: Linear, rows: list[Constraint], low: Linear, high: Linear) -> Linear | None:
    """The variables' values, each between its `low` and `high`, where `aim` is least, and a one for
    the constant; None if no values satisfy all rows."""
    matrix = np.array([row for row, _, _ in rows])
    constants = matrix[:, -1]
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = len(low), len(rows)
    program.col_cost_ = aim[:-1]
    program.col_lower_, program.col_upper_ = low, high
    program.row_lower_ = np.array([least for _, least, _ in rows]) - constants
    program.row_upper_ = np.array([most for _, _, most in rows]) - constants
    at, columns = np.nonzero(matrix[:, :-1])
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = np.searchsorted(at, np.arange(len(rows) + 1)).astype(np.int32)
    program.a_matrix_.index_ = columns.astype(np.int32)
    program.a_matrix_.value_ = matrix[at, columns]
    solver = _solver()
    solver.passModel(program)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    return np.append(solver.getSolution().col_value, 1.0)


@cache
def _solver() -> highspy.Highs:
    """HiGHS says its name on standard output, which is for results, when it is first made."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
    return solver


def excess_bytes(devices: Sequence[StageDevice], stages: list[StagePlan]) -> list[dict[str, int]]:
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


def tighten_budget(budget: Budget, over: dict[str, int]) -> Budget:
    """By what was too much, and a little more, for a row or a tensor is a step."""
    cuts = {tier: nbytes + getattr(budget, tier) // 256 for tier, nbytes in over.items()}
    left = {tier: getattr(budget, tier) - cuts.get(tier, 0) for tier in TIERS}
    return Budget(**{tier: max(nbytes, 0) for tier, nbytes in left.items()})


def add_batch_latency(seconds: list[dict[str, float]], num_blocks: int) -> None:
    """A batch's way through all stages, in one phase, by the blocks under way meanwhile."""
    ways = [sum(stage.pop(way, 0.0) for stage in seconds) for way in WAYS]
    seconds[-1][ONE_BATCH] = max(ways) / num_blocks


def add_shared_seconds(
    devices: Sequence[StageDevice], seconds: list[dict[str, float]], overlaps: bool
) -> None:
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


def _mates(devices: Sequence[StageDevice], device: StageDevice) -> list[int]:
    """The stages on its node."""
    return [number for number, other in enumerate(devices) if other.node == device.node]


# Of a node, whatever stages run on it; the GPU's memory and device are each stage's own.
SHARED_TIERS = ("cpu", "disk")
SHARED_SECONDS = ("host_memory", "disk_read", "disk_write")
LANES = frozenset(lane.value for lane in Lane)
# What binds decides; of placements that are alike in that, those that spare the other lanes.
SPARE_WEIGHT = 0.01
_GB = 1e9  # in which the program counts, for solvers like numbers near one


@dataclass(frozen=True)
class StageProblem:
    """One stage: its costs, its budget, and the node it runs on.

    budget: gpu of the stage, cpu and disk of all the node's stages together. layers: None lets the
    program choose. core_shares: {lane or resource: cores that it takes, of all there are}, where
    the device is the host's cores.
    """

    corners: Corners
    budget: Budget
    node: str = ""
    layers: float | None = None
    core_shares: dict[str, float] | None = None


@dataclass(frozen=True)
class Objective:
    """What is minimised: seconds of a block's visits, prefill_visits that bring prompts and
    decode_visits that don't. num_blocks: in flight. max_seconds: of a block's visits, at most.
    shares: where things may lie. overlaps: lanes work at once; else their seconds add up."""

    prefill_visits: float
    decode_visits: float
    num_blocks: int = 1
    max_seconds: float | None = None
    shares: tuple[Share, ...] = SHARES
    overlaps: bool = True

    def visits(self, phase: str) -> float:
        return self.prefill_visits if phase == "prefill" else self.decode_visits


@dataclass(frozen=True)
class Solution:
    """seconds: {phase: of a visit of the slowest stage}; shares in layers, and layers, by stage."""

    seconds: dict[str, float]
    shares: list[dict[Share, float]]
    layers: list[float]


class Infeasible(ValueError):
    """No placement fits; the message names the budget that lacks most, and by how much."""


def solve(stages: list[StageProblem], num_layers: int, aim: Objective) -> Solution | None:
    """The optimum; None if no placement fits."""
    return _Program(stages, num_layers, aim).solve()


def explain_infeasible(stages: list[StageProblem], num_layers: int, aim: Objective) -> str:
    """The budget that lacks most for the smallest need there is, and by how much."""
    return _Program(stages, num_layers, aim).explain_infeasible()


def round_layers(layers: list[float], total: int) -> tuple[int, ...]:
    """Whole numbers of layers, one at least, that sum to the total; the largest remainders up."""
    counts = [max(int(it + 1e-6), 1) for it in layers]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        free = [it for it, count in enumerate(counts) if count + step >= 1]
        counts[max(free, key=lambda it: step * (layers[it] - counts[it]))] += step
    return tuple(counts)


class _Program:
    """The variables and constraints of the linear program.

    Variables: the seconds of each phase's visit; then each stage's shares and its layers; at the
    end, for `explain_infeasible`, what each budget lacks.
    """

    def __init__(self, stages: list[StageProblem], num_layers: int, aim: Objective) -> None:
        self._stages = stages
        self._num_layers = num_layers
        self._aim = aim
        self._of_stage = len(aim.shares) + 1
        self._placed = len(PHASES) + len(stages) * self._of_stage
        self._size = self._placed + len(stages) + len(SHARED_TIERS) * len(self._nodes)

    def solve(self) -> Solution | None:
        seconds = list(self._seconds())
        total = self._sum(self._aim.visits(phase) * self._time(phase) for phase in PHASES)
        spared = self._sum(self._aim.visits(phase) * it for phase, it in seconds)
        rows = [*self._of_placement(), *((over, -inf, 0.0) for over, _, _ in self._over_budgets())]
        rows += [(self._time(phase) - it, 0.0, inf) for phase, it in seconds]
        rows += [(self._time(phase) - it, 0.0, inf) for phase, it in self._ways()]
        if self._aim.max_seconds is not None:
            rows.append((total, -inf, self._aim.max_seconds))
        found = minimise(total + SPARE_WEIGHT * spared, rows, *self._bounds)
        if found is None:
            return None
        return Solution(
            {phase: float(self._time(phase) @ found) for phase in PHASES},
            [
                {share: float(self._share(number, share) @ found) for share in self._aim.shares}
                for number, _ in enumerate(self._stages)
            ],
            [float(self._layers(number) @ found) for number, _ in enumerate(self._stages)],
        )

    def explain_infeasible(self) -> str:
        """The least by which budgets would have to grow, whatever the time."""
        budgets = list(self._over_budgets())
        slacks = [self._variable(self._placed + it) for it, _ in enumerate(budgets)]
        rows = list(self._of_placement())
        for (over, _, _), slack in zip(budgets, slacks, strict=True):
            rows.append((over - slack, -inf, 0.0))
        found = minimise(self._sum(slacks), rows, *self._bounds)
        if found is None:
            return f"{len(self._stages)} stages don't divide {self._num_layers} layers"
        lacks = [
            (float(slack @ found) * _GB, where, budget)
            for slack, (_, where, budget) in zip(slacks, budgets, strict=True)
        ]
        most, where, budget = max(lacks, key=lambda it: it[0])
        if most < 1:
            limit = self._aim.max_seconds
            return f"no placement answers a block within {limit:g} s; raise --max-latency"
        return (
            f"{where} lacks {format_bytes(int(most))} beyond its budget of {format_bytes(budget)}; "
            "raise that (--gpu-memory, --cpu-memory or --disk-memory), or use more stages"
        )

    @property
    def _bounds(self) -> tuple[Linear, Linear]:
        """The least and the most that variables may be."""
        low, high = np.zeros(self._size), np.full(self._size, inf)
        for number, stage in enumerate(self._stages):
            at = self._at(number, len(self._aim.shares))
            low[at] = 1 if stage.layers is None else stage.layers
            high[at] = self._num_layers if stage.layers is None else stage.layers
        return low, high

    def _at(self, stage: int, of_stage: int) -> int:
        return len(PHASES) + stage * self._of_stage + of_stage

    def _sum(self, linears: Iterable[Linear]) -> Linear:
        return sum(linears, np.zeros(self._size + 1))

    def _variable(self, at: int) -> Linear:
        found = np.zeros(self._size + 1)
        found[at] = 1
        return found

    def _time(self, phase: str) -> Linear:
        return self._variable(PHASES.index(phase))

    def _share(self, stage: int, share: Share) -> Linear:
        return self._variable(self._at(stage, self._aim.shares.index(share)))

    def _layers(self, stage: int) -> Linear:
        return self._variable(self._at(stage, len(self._aim.shares)))

    def _of_placement(self) -> Iterator[Constraint]:
        """Every layer has its weights, cache and hidden states somewhere."""
        for number, _ in enumerate(self._stages):
            for what in GROUPS:
                places = (self._share(number, it) for it in self._aim.shares if it.what == what)
                yield self._sum(places) - self._layers(number), 0.0, 0.0
        if any(stage.layers is None for stage in self._stages):
            layers = self._sum(self._layers(number) for number, _ in enumerate(self._stages))
            yield layers, self._num_layers, self._num_layers

    def _over_budgets(self) -> Iterator[tuple[Linear, str, int]]:
        """(GB over the budget, what has it, its bytes)."""
        for number, stage in enumerate(self._stages):
            used = self._of(number, ("bytes", "gpu"))
            yield self._over(used, stage.budget.gpu), f"the GPU of stage {number}", stage.budget.gpu
        for node, numbers in self._nodes.items():
            for tier in SHARED_TIERS:
                budget = getattr(self._stages[numbers[0]].budget, tier)
                used = self._sum(self._of(it, ("bytes", tier)) for it in numbers)
                name = {"cpu": "host memory", "disk": "the disk"}[tier]
                yield self._over(used, budget), f"{name} of {node or 'the node'}", budget

    def _over(self, used: Linear, budget: int) -> Linear:
        over = used.copy()
        over[-1] -= budget
        return over / _GB

    def _seconds(self) -> Iterator[tuple[str, Linear]]:
        """(phase, seconds that its visits can't be shorter than)."""
        for phase in PHASES:
            for number, stage in enumerate(self._stages):
                known = stage.corners.quantities
                names = [name for of, name in known if of == phase and name not in WAYS]
                if self._aim.overlaps:
                    yield from ((phase, self._of(number, (phase, name))) for name in names)
                else:
                    yield (
                        phase,
                        self._sum(self._of(number, (phase, it)) for it in names if it in LANES),
                    )
                if stage.core_shares:
                    shares = stage.core_shares.items()
                    yield (
                        phase,
                        self._sum(own * self._of(number, (phase, it)) for it, own in shares),
                    )
            for numbers in self._nodes.values():
                for name in SHARED_SECONDS if len(numbers) > 1 else ():
                    yield phase, self._sum(self._of(it, (phase, name)) for it in numbers)

    def _ways(self) -> Iterator[tuple[str, Linear]]:
        """(phase, a batch's way through all stages, by the blocks that are under way meanwhile)."""
        for phase in PHASES if self._aim.overlaps else ():
            for way in WAYS:
                through = self._sum(self._of(it, (phase, way)) for it, _ in enumerate(self._stages))
                yield phase, through / self._aim.num_blocks

    def _of(self, number: int, quantity: Quantity) -> Linear:
        """A quantity of a stage, by its layers and shares."""
        found = np.zeros(self._size + 1)
        row = self._rows[number].get(quantity)
        if row is not None:
            at = self._at(number, 0)
            found[-1] = row[0]
            found[at : at + len(self._columns)] = row[self._columns]
        return found

    @cached_property
    def _rows(self) -> list[dict[Quantity, np.ndarray]]:
        """The coefficients of each stage's quantities."""
        usual = self._num_layers / len(self._stages)
        return [stage.corners.linear(stage.layers or usual) for stage in self._stages]

    @cached_property
    def _columns(self) -> list[int]:
        """Where in those the aim's shares and the layers are."""
        return [2 + SHARES.index(share) for share in self._aim.shares] + [1]

    @cached_property
    def _nodes(self) -> dict[str, list[int]]:
        nodes: dict[str, list[int]] = {}
        for number, stage in enumerate(self._stages):
            nodes.setdefault(stage.node, []).append(number)
        return nodes
