"""The linear program: where each stage keeps what, and how many layers it has.

FlexGen's (Sheng et al., 2023, section 4.3), for any number of stages: minimise the time of a
block's prefill and decode, T >= seconds of every lane and resource of every stage, and of what the
stages of a node share, with every tier within its budget. Knows corners; chooses no block's shape.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import highspy
import pulp

from flexgen_ray.config import Budget
from flexgen_ray.cost.corners import GROUPS, PHASES, SHARES, Corners, Share
from flexgen_ray.schedule.ops import Lane
from flexgen_ray.units import format_bytes

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
class Aim:
    """What is minimised: seconds of a block's visits, prefill_visits that bring prompts and
    decode_visits that don't. max_seconds: of these, at most. shares: where things may lie.
    overlaps: lanes work at once; else their seconds add up."""

    prefill_visits: float
    decode_visits: float
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


def solve(stages: list[StageProblem], num_layers: int, aim: Aim) -> Solution:
    """The optimum. Raises Infeasible with what lacks."""
    program = _Program(stages, num_layers, aim)
    solution = program.solve()
    if solution is None:
        raise Infeasible(program.what_lacks())
    return solution


def whole(layers: list[float], total: int) -> tuple[int, ...]:
    """Whole numbers of layers, one at least, that sum to the total; the largest remainders up."""
    counts = [max(int(it + 1e-6), 1) for it in layers]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        free = [it for it, count in enumerate(counts) if count + step >= 1]
        counts[max(free, key=lambda it: step * (layers[it] - counts[it]))] += step
    return tuple(counts)


class _Program:
    """Its variables and constraints."""

    def __init__(self, stages: list[StageProblem], num_layers: int, aim: Aim) -> None:
        self._stages = stages
        self._num_layers = num_layers
        self._aim = aim
        self._times = {phase: pulp.LpVariable(f"seconds_{phase}", 0) for phase in PHASES}
        self._shares = [
            {share: pulp.LpVariable(f"s{i}_{share.what}_{share.where}", 0) for share in aim.shares}
            for i, _ in enumerate(stages)
        ]
        self._layers = [
            pulp.LpVariable(f"s{i}_layers", 1, num_layers) if stage.layers is None else stage.layers
            for i, stage in enumerate(stages)
        ]

    def solve(self) -> Solution | None:
        problem = pulp.LpProblem("placement", pulp.LpMinimize)
        seconds = list(self._seconds())
        problem += self._total() + SPARE_WEIGHT * pulp.lpSum(
            self._aim.visits(phase) * it for phase, it in seconds
        )
        if self._aim.max_seconds is not None:
            problem += self._total() <= self._aim.max_seconds
        for constraint in self._of_placement():
            problem += constraint
        for over, _, _ in self._over_budgets():
            problem += over <= 0
        for phase, it in seconds:
            problem += self._times[phase] >= it
        if not _is_solved(problem):
            return None
        return Solution(
            {phase: _value(it) for phase, it in self._times.items()},
            [{share: _value(it) for share, it in shares.items()} for shares in self._shares],
            [_value(it) for it in self._layers],
        )

    def what_lacks(self) -> str:
        """The least by which budgets would have to grow, whatever the time."""
        problem = pulp.LpProblem("lack", pulp.LpMinimize)
        slacks = []
        for number, (over, where, budget) in enumerate(self._over_budgets()):
            slack = pulp.LpVariable(f"lack{number}", 0)
            problem += over <= slack
            slacks.append((slack, where, budget))
        problem += pulp.lpSum(slack for slack, _, _ in slacks)
        for constraint in self._of_placement():
            problem += constraint
        if not _is_solved(problem):
            return f"{len(self._stages)} stages don't divide {self._num_layers} layers"
        lacks = [(_value(slack) * _GB, where, budget) for slack, where, budget in slacks]
        most, where, budget = max(lacks, key=lambda it: it[0])
        if most < 1:
            limit = self._aim.max_seconds
            return f"no placement answers a block within {limit:g} s; raise --max-latency"
        return (
            f"{where} lacks {format_bytes(int(most))} beyond its budget of {format_bytes(budget)}; "
            "raise that (in a run --gpu-memory, --cpu-memory or --disk-memory), or use more stages"
        )

    def _total(self):
        return pulp.lpSum(self._aim.visits(phase) * it for phase, it in self._times.items())

    def _of_placement(self) -> Iterator[pulp.LpConstraint]:
        """Every layer has its weights, cache and hidden states somewhere."""
        for layers, shares in zip(self._layers, self._shares, strict=True):
            for what, places in GROUPS.items():
                there = (Share(what, where) for where in places)
                yield pulp.lpSum(shares[it] for it in there if it in shares) == layers
        if any(stage.layers is None for stage in self._stages):
            yield pulp.lpSum(self._layers) == self._num_layers

    def _over_budgets(self) -> Iterator[tuple[pulp.LpAffineExpression, str, int]]:
        """(GB over the budget, what has it, its bytes)."""
        for number, stage in enumerate(self._stages):
            over = (self._of(number, ("bytes", "gpu")) - stage.budget.gpu) * (1 / _GB)
            yield over, f"the GPU of stage {number}", stage.budget.gpu
        for node, numbers in self._nodes().items():
            for tier in SHARED_TIERS:
                budget = getattr(self._stages[numbers[0]].budget, tier)
                used = pulp.lpSum(self._of(it, ("bytes", tier)) for it in numbers)
                name = {"cpu": "host memory", "disk": "the disk"}[tier]
                yield (used - budget) * (1 / _GB), f"{name} of {node or 'the node'}", budget

    def _seconds(self) -> Iterator[tuple[str, pulp.LpAffineExpression]]:
        """(phase, seconds that its visits can't be shorter than)."""
        for phase in PHASES:
            for number, stage in enumerate(self._stages):
                names = [name for of, name in stage.corners.quantities if of == phase]
                if self._aim.overlaps:
                    yield from ((phase, self._of(number, (phase, name))) for name in names)
                else:
                    lanes = (name for name in names if name in LANES)
                    yield phase, pulp.lpSum(self._of(number, (phase, it)) for it in lanes)
                if stage.core_shares:
                    yield phase, self._cores(number, phase, stage.core_shares)
            for numbers in self._nodes().values():
                for name in SHARED_SECONDS if len(numbers) > 1 else ():
                    yield phase, pulp.lpSum(self._of(it, (phase, name)) for it in numbers)

    def _cores(self, number: int, phase: str, shares: dict[str, float]):
        return pulp.lpSum(share * self._of(number, (phase, name)) for name, share in shares.items())

    def _of(self, number: int, quantity: tuple[str, str]):
        stage, near = self._stages[number], self._num_layers / len(self._stages)
        if stage.layers is not None:
            near = stage.layers
        # An expression even where nothing of it may vary.
        value = stage.corners.value(quantity, self._layers[number], self._shares[number], near)
        return pulp.lpSum([value])

    def _nodes(self) -> dict[str, list[int]]:
        nodes: dict[str, list[int]] = {}
        for number, stage in enumerate(self._stages):
            nodes.setdefault(stage.node, []).append(number)
        return nodes


def _is_solved(problem: pulp.LpProblem) -> bool:
    return pulp.LpStatus[problem.solve(_solver())] == "Optimal"


@cache
def _solver() -> pulp.HiGHS:
    """HiGHS says its name on standard output, which is for results, when it is first made."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
    return pulp.HiGHS(msg=False)


def _value(variable: pulp.LpVariable | float) -> float:
    return float(pulp.value(variable) or 0.0)
