"""The linear program: where each stage of a pipeline keeps what, and how many layers it has.

This is FlexGen's program (Sheng et al., 2023, section 4.3), for any number of stages. It minimises
the time T of a block's prefill and decode. T is at least the seconds of every lane and resource of
every stage, and of everything that the stages of a node share. Every tier stays within its budget.
T times the blocks in flight is at least the latency of one batch through all stages, because the
ops of one batch don't overlap each other.

The module knows each stage's costs as linear functions (corners.py). It doesn't choose the shape
of a block, and its solution is in fractions of layers: search.py rounds it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from flexgen_ray.config import TIERS, Budget
from flexgen_ray.cost.bound import PATHS, Quantity
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import stage_bytes, tier_totals
from flexgen_ray.planner.corners import GROUPS, SHARES, Corners, Share
from flexgen_ray.planner.pipeline_plan import ONE_BATCH, StageDevice
from flexgen_ray.schedule.ops import Lane
from flexgen_ray.units import format_bytes

if TYPE_CHECKING:
    import highspy

# Tiers and resources of which a node has one, for all of its stages; each stage has its own GPU.
SHARED_TIERS = ("cpu", "disk")
SHARED_SECONDS = ("host_memory", "disk_read", "disk_write")
LANES = frozenset(lane.value for lane in Lane)
# Weight of all lanes' seconds beside T: of placements with the same T, prefer the one that leaves
# the lanes that are no bottleneck most idle.
SPARE_WEIGHT = 0.01
_GB = 1e9  # The program counts bytes in GB, since solvers are most accurate with numbers near one.


@dataclass(frozen=True)
class StageProblem:
    """One stage: its costs, its budget, and the node it runs on.

    budget: `gpu` is the stage's own, `cpu` and `disk` are those of all stages on the node.
    layers: number of decoder layers; None lets the program choose.
    core_shares: {lane or resource: fraction of the cores that it occupies} where the device is the
    host's cores, else None.
    """

    corners: Corners
    budget: Budget
    node: str = ""
    layers: float | None = None
    core_shares: dict[str, float] | None = None


@dataclass(frozen=True)
class Objective:
    """The objective: seconds of all visits.

    visits: {kind: number of such visits}. mixes: {kind: {phase or LEAST: times that it counts}},
    as in visits.Visits.mix: a visit that decodes and brings prompts keeps every lane busy with
    both. num_blocks: blocks in flight. max_seconds: limit on the block's visits, None for no limit.
    shares: the places that the program may use.
    overlaps: True if lanes work in parallel; False adds up their seconds.
    """

    visits: dict[str, float]
    mixes: dict[str, dict[str, float]]
    num_blocks: int = 1
    max_seconds: float | None = None
    shares: tuple[Share, ...] = SHARES
    overlaps: bool = True


@dataclass(frozen=True)
class Solution:
    """An optimum of the program, in fractions of layers.

    seconds: {kind: seconds that a visit takes on the slowest stage}.
    shares: {share: number of layers} of each stage. layers: number of layers of each stage.
    """

    seconds: dict[str, float]
    shares: list[dict[Share, float]]
    layers: list[float]


class Infeasible(ValueError):
    """No placement fits; the message names the budget that lacks most, and by how much."""


def solve(stages: list[StageProblem], num_layers: int, objective: Objective) -> Solution | None:
    """The optimal placement; None if the program is infeasible."""
    return _LinearProgram(stages, num_layers, objective).solve()


def explain_infeasible(stages: list[StageProblem], num_layers: int, objective: Objective) -> str:
    """A sentence that names the budget which lacks most, by how much, and the remedy."""
    return _LinearProgram(stages, num_layers, objective).explain_infeasible()


def round_layers(layers: list[float], total: int) -> tuple[int, ...]:
    """Round layers of stages to whole numbers, at least one each, that sum to the total.

    Stages are rounded down first; the largest remainders then get one layer more.
    """
    counts = [max(int(count + 1e-6), 1) for count in layers]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        stages = [stage for stage, count in enumerate(counts) if count + step >= 1]
        counts[max(stages, key=lambda it: step * (layers[it] - counts[it]))] += step
    return tuple(counts)


# A linear function of the variables: their coefficients, and a constant at the end.
Linear = np.ndarray
Constraint = tuple[Linear, float, float]  # a linear function, and the least and most it may be


class _LinearProgram:
    """The variables and constraints of the program.

    The columns, in an example of two stages on one node, with the 10 places of SHARES:

        column   variable
        0        seconds of the slowest stage's visit of the first kind, such as prefill (its T)
        1        seconds of the slowest stage's visit of the second kind, such as decode
        2..11    stage 0: layers whose weights lie on the GPU, in host memory, on disk; whose cache
                 is on the GPU, attended on the host, streamed, on disk; and so on, as in SHARES
        12       stage 0: number of layers (fixed if StageProblem.layers is)
        13..23   stage 1: its shares and its number of layers
        24..27   GB that the GPU of stage 0, that of stage 1, the node's host memory and its disk
                 lack; used by `explain_infeasible` alone

    The constraints of the example:

        placement   for each stage and each of weights, cache, activations:
                    sum of its shares - layers = 0; layers of all stages = the model's
        budgets     for each GPU, and for each node's host memory and disk:
                    GB in use - GB of the budget <= 0
        time        for each kind of visits and each lane or resource of a stage, and for what
                    the node's stages share: T of the kind - its seconds >= 0
        latency     for each kind and both ways of attending a batch:
                    T of the kind - seconds of one batch through all stages / num_blocks >= 0

    The objective is the sum over kinds of visits * T of the kind.
    """

    def __init__(self, stages: list[StageProblem], num_layers: int, objective: Objective) -> None:
        self._stages = stages
        self._num_layers = num_layers
        self._objective = objective
        self._kinds = list(objective.visits)
        self._columns_per_stage = len(objective.shares) + 1
        self._first_slack = len(self._kinds) + len(stages) * self._columns_per_stage
        self._num_columns = (
            self._first_slack + len(stages) + len(SHARED_TIERS) * len(self._stages_of_node)
        )

    def solve(self) -> Solution | None:
        objective = self._objective
        busy = list(self._busy_seconds())
        total = self._sum(objective.visits[kind] * self._time(kind) for kind in self._kinds)
        all_lanes = self._sum(objective.visits[kind] * seconds for kind, seconds in busy)
        rows = [*self._placement_constraints()]
        rows += [(excess, -inf, 0.0) for excess, _, _ in self._budget_excess()]
        rows += [(self._time(kind) - seconds, 0.0, inf) for kind, seconds in busy]
        rows += [(self._time(kind) - it, 0.0, inf) for kind, it in self._batch_latencies()]
        if objective.max_seconds is not None:
            rows.append((total, -inf, objective.max_seconds))
        values = minimise(total + SPARE_WEIGHT * all_lanes, rows, *self._bounds)
        if values is None:
            return None
        numbers = range(len(self._stages))
        return Solution(
            {kind: float(self._time(kind) @ values) for kind in self._kinds},
            [
                {share: float(self._share(number, share) @ values) for share in objective.shares}
                for number in numbers
            ],
            [float(self._layers(number) @ values) for number in numbers],
        )

    def explain_infeasible(self) -> str:
        """Find the smallest additions to budgets with which a placement fits, whatever its time.

        Each budget gets a slack variable, and the sum of the slacks is minimised.
        """
        budgets = list(self._budget_excess())
        slacks = [self._variable(self._first_slack + it) for it, _ in enumerate(budgets)]
        rows = list(self._placement_constraints())
        for (excess, _, _), slack in zip(budgets, slacks, strict=True):
            rows.append((excess - slack, -inf, 0.0))
        values = minimise(self._sum(slacks), rows, *self._bounds)
        if values is None:
            return f"{len(self._stages)} stages don't divide {self._num_layers} layers"
        missing = [
            (float(slack @ values) * _GB, owner, budget)
            for slack, (_, owner, budget) in zip(slacks, budgets, strict=True)
        ]
        most, owner, budget = max(missing, key=lambda it: it[0])
        if most < 1:
            limit = self._objective.max_seconds
            return f"no placement answers a block within {limit:g} s; raise --max-latency"
        return (
            f"{owner} lacks {format_bytes(int(most))} beyond its budget of {format_bytes(budget)}; "
            "raise that (--gpu-memory, --cpu-memory or --disk-memory), or use more stages"
        )

    @property
    def _bounds(self) -> tuple[Linear, Linear]:
        """Lower and upper bounds of the variables; a number of layers that is fixed has both."""
        lower, upper = np.zeros(self._num_columns), np.full(self._num_columns, inf)
        for number, stage in enumerate(self._stages):
            column = self._column(number, len(self._objective.shares))
            lower[column] = 1 if stage.layers is None else stage.layers
            upper[column] = self._num_layers if stage.layers is None else stage.layers
        return lower, upper

    def _column(self, stage: int, number: int) -> int:
        """Column of a stage's variable; number: among those of the stage."""
        return len(self._kinds) + stage * self._columns_per_stage + number

    def _sum(self, functions: Iterable[Linear]) -> Linear:
        return sum(functions, np.zeros(self._num_columns + 1))

    def _variable(self, column: int) -> Linear:
        """The linear function that is one variable."""
        function = np.zeros(self._num_columns + 1)
        function[column] = 1
        return function

    def _time(self, kind: str) -> Linear:
        return self._variable(self._kinds.index(kind))

    def _share(self, stage: int, share: Share) -> Linear:
        return self._variable(self._column(stage, self._objective.shares.index(share)))

    def _layers(self, stage: int) -> Linear:
        return self._variable(self._column(stage, len(self._objective.shares)))

    def _placement_constraints(self) -> Iterator[Constraint]:
        """Every layer has its weights, cache and hidden states in some place."""
        for number, _ in enumerate(self._stages):
            for group in GROUPS:
                places = [it for it in self._objective.shares if it.group == group]
                placed = self._sum(self._share(number, share) for share in places)
                yield placed - self._layers(number), 0.0, 0.0
        if any(stage.layers is None for stage in self._stages):
            layers = self._sum(self._layers(number) for number, _ in enumerate(self._stages))
            yield layers, self._num_layers, self._num_layers

    def _budget_excess(self) -> Iterator[tuple[Linear, str, int]]:
        """(GB in use beyond a budget, the budget's owner for people, the budget in bytes)."""
        for number, stage in enumerate(self._stages):
            used, budget = self._quantity(number, ("bytes", "gpu")), stage.budget.gpu
            yield self._excess(used, budget), f"the GPU of stage {number}", budget
        for node, numbers in self._stages_of_node.items():
            for tier in SHARED_TIERS:
                budget = getattr(self._stages[numbers[0]].budget, tier)
                used = self._sum(self._quantity(it, ("bytes", tier)) for it in numbers)
                name = {"cpu": "host memory", "disk": "the disk"}[tier]
                yield self._excess(used, budget), f"{name} of {node or 'the node'}", budget

    def _excess(self, used: Linear, budget: int) -> Linear:
        excess = used.copy()
        excess[-1] -= budget
        return excess / _GB

    def _busy_seconds(self) -> Iterator[tuple[str, Linear]]:
        """(kind, seconds that a lane or a resource is busy in a visit): lower bounds of T."""
        for kind in self._kinds:
            for number, stage in enumerate(self._stages):
                yield from ((kind, it) for it in self._stage_seconds(kind, number, stage))
            for numbers in self._stages_of_node.values():
                for name in SHARED_SECONDS if len(numbers) > 1 else ():
                    yield kind, self._sum(self._quantity(it, (kind, name)) for it in numbers)

    def _stage_seconds(self, kind: str, number: int, stage: StageProblem) -> Iterator[Linear]:
        """Seconds of each of the stage's lanes and resources, or of all lanes one by one."""
        names = [
            name
            for of_kind, name in self._coefficients[number]
            if of_kind == kind and name not in PATHS
        ]
        if self._objective.overlaps:
            yield from (self._quantity(number, (kind, name)) for name in names)
        else:
            yield self._sum(self._quantity(number, (kind, it)) for it in names if it in LANES)
        if stage.core_shares:
            shares = stage.core_shares.items()
            yield self._sum(cores * self._quantity(number, (kind, it)) for it, cores in shares)

    def _batch_latencies(self) -> Iterator[tuple[str, Linear]]:
        """(kind, seconds of one batch through all stages, divided by the blocks in flight)."""
        for kind in self._kinds if self._objective.overlaps else ():
            for way in PATHS:
                stages = range(len(self._stages))
                latency = self._sum(self._quantity(it, (kind, way)) for it in stages)
                yield kind, latency / self._objective.num_blocks

    def _quantity(self, number: int, quantity: Quantity) -> Linear:
        """A quantity of a stage as a function of its layers and shares; zero if it never counts."""
        function = np.zeros(self._num_columns + 1)
        coefficients = self._coefficients[number].get(quantity)
        if coefficients is not None:
            first = self._column(number, 0)
            order = self._coefficient_order
            function[-1] = coefficients[0]
            function[first : first + len(order)] = coefficients[order]
        return function

    @cached_property
    def _coefficients(self) -> list[dict[Quantity, np.ndarray]]:
        """Each stage's bytes, and its seconds of a visit of each kind.

        Coefficients are ordered as those of `Corners.linear`.
        """
        usual = self._num_layers / len(self._stages)
        result = []
        for stage in self._stages:
            near = stage.layers or usual
            linear = stage.corners.linear(near)
            own = {it: row for it, row in linear.items() if it[0] == "bytes"}
            for kind, mix in self._objective.mixes.items():
                mixed = stage.corners.mixed(mix, near)
                own |= {(kind, name): row for name, row in mixed.items()}
            result.append(own)
        return result

    @cached_property
    def _coefficient_order(self) -> list[int]:
        """Index in a row of `Corners.linear` of each of a stage's columns."""
        return [2 + SHARES.index(share) for share in self._objective.shares] + [1]

    @cached_property
    def _stages_of_node(self) -> dict[str, list[int]]:
        nodes: dict[str, list[int]] = {}
        for number, stage in enumerate(self._stages):
            nodes.setdefault(stage.node, []).append(number)
        return nodes


def minimise(
    objective: Linear, constraints: list[Constraint], lower: Linear, upper: Linear
) -> Linear | None:
    """Solve a linear program with HiGHS.

    objective: [columns + 1], the constant last. lower, upper: [columns], bounds of the variables.
    Returns the variables' optimal values, with a one at the end for the constant, so that
    `function @ values` evaluates a linear function; None if the program is infeasible.
    Raises RuntimeError, with the remedy, if HiGHS isn't installed.
    """
    highs = _highs()
    matrix = np.array([function for function, _, _ in constraints])
    constants = matrix[:, -1]
    program = highs.HighsLp()
    program.num_col_, program.num_row_ = len(lower), len(constraints)
    program.col_cost_ = objective[:-1]
    program.col_lower_, program.col_upper_ = lower, upper
    program.row_lower_ = np.array([least for _, least, _ in constraints]) - constants
    program.row_upper_ = np.array([most for _, _, most in constraints]) - constants
    # The matrix is passed sparsely, row by row: for each entry its column and its value, and for
    # each row the index of its first entry.
    rows, columns = np.nonzero(matrix[:, :-1])
    program.a_matrix_.format_ = highs.MatrixFormat.kRowwise
    program.a_matrix_.start_ = np.searchsorted(rows, np.arange(len(constraints) + 1)).astype(
        np.int32
    )
    program.a_matrix_.index_ = columns.astype(np.int32)
    program.a_matrix_.value_ = matrix[rows, columns]
    solver = _solver()
    solver.passModel(program)
    solver.run()
    if solver.getModelStatus() != highs.HighsModelStatus.kOptimal:
        return None
    return np.append(solver.getSolution().col_value, 1.0)


def _highs() -> ModuleType:
    """The solver's package, imported where a plan is made: runs of a given policy need none."""
    try:
        import highspy
    except ImportError as error:
        raise RuntimeError(
            f"a plan takes the solver HiGHS, which can't be imported ({error}); pip install "
            "highspy, or give a policy"
        ) from error
    return highspy


@cache
def _solver() -> highspy.Highs:
    """A silent solver. HiGHS prints its name to standard output when it is first made; standard
    output is for results, so it is redirected meanwhile."""
    sys.stdout.flush()
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        solver = _highs().Highs()
        solver.setOptionValue("output_flag", False)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)
    return solver


# Below, the program's limits for a plan that is rounded already: seconds and bytes are numbers.


def add_shared_seconds(
    devices: Sequence[StageDevice], seconds: list[dict[str, float]], overlaps: bool
) -> None:
    """Add to each stage's seconds those of everything that its lanes, or a node's stages, share.

    seconds: {lane or resource: seconds} of each stage in one phase. overlaps: as in Objective.
    """
    for device, own in zip(devices, seconds, strict=True):
        stages = _stages_on_node(devices, device)
        for name in SHARED_SECONDS if len(stages) > 1 else ():
            own[f"the node's {name}"] = sum(seconds[it].get(name, 0.0) for it in stages)
        if device.core_shares:
            own["cores"] = sum(share * own.get(lane, 0) for lane, share in device.core_shares)
        if not overlaps:
            own["all lanes"] = sum(busy for lane, busy in own.items() if lane in LANES)


def add_batch_latency(seconds: list[dict[str, float]], num_blocks: int) -> None:
    """Replace each stage's share of one batch's latency by that of all stages, in one phase.

    The latency is divided by the blocks in flight, and counted with the last stage.
    """
    latencies = [sum(stage.pop(way, 0.0) for stage in seconds) for way in PATHS]
    seconds[-1][ONE_BATCH] = max(latencies) / num_blocks


def excess_bytes(devices: Sequence[StageDevice], stages: list[StagePlan]) -> list[dict[str, int]]:
    """{tier: bytes beyond the budget} of each stage; host memory and disk count per node."""
    needs = [tier_totals(stage_bytes(stage)) for stage in stages]
    result = []
    for number, device in enumerate(devices):
        excess = {}
        for tier in TIERS:
            users = [number] if tier == "gpu" else _stages_on_node(devices, device)
            need = sum(getattr(needs[user], tier) for user in users)
            if need > getattr(device.budget, tier):
                excess[tier] = need - getattr(device.budget, tier)
        result.append(excess)
    return result


def tighten_budget(budget: Budget, excess: dict[str, int]) -> Budget:
    """Reduce a budget by the excess and 1/256 of it, because rows and tensors are coarse steps."""
    cuts = {tier: nbytes + getattr(budget, tier) // 256 for tier, nbytes in excess.items()}
    return Budget(**{it: max(getattr(budget, it) - cuts.get(it, 0), 0) for it in TIERS})


def _stages_on_node(devices: Sequence[StageDevice], device: StageDevice) -> list[int]:
    return [number for number, other in enumerate(devices) if other.node == device.node]
