"""A whole job in modelled time: the passes that its scheduler composes, op by op, without tensors.

Which rows a pass has depends on lengths alone, so nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.resources import Demand
from flexgen_ray.cost.simulate import OpStream, simulate
from flexgen_ray.cost.steady import CoreShares, OpDemands
from flexgen_ray.layout.active_ops import ActiveOps
from flexgen_ray.layout.admission import Admission
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import NO_ROWS
from flexgen_ray.request import Request, SamplingParams
from flexgen_ray.runtime.passes import Pass, Passes
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.schedule.dependencies import window_ops
from flexgen_ray.schedule.ops import OPS, Op, OpKind
from flexgen_ray.schedule.zigzag import zigzag


@dataclass(frozen=True)
class PlayedJob:
    """Modelled seconds and visits of a job, the number of rows of each pass, and each lane's work.

    busy: {lane: seconds}.
    """

    seconds: float
    visits: int
    rows: list[int]
    busy: dict[str, float]


def requests_of(
    lengths: Sequence[tuple[int, int]], shared: int = 0, groups: int = 1
) -> list[Request]:
    """Requests of these lengths, (prompt, answer), whose prompts begin with a group's tokens.

    shared: of the tokens of each prompt. Groups take turns.
    """
    prompts = (
        [index % groups] * shared + [groups + index] * (prompt - shared)
        for index, (prompt, _) in enumerate(lengths)
    )
    return [
        Request(index, prompt, SamplingParams(answer, 0.0, ignore_eos=True))
        for index, (prompt, (_, answer)) in enumerate(zip(prompts, lengths, strict=True))
    ]


def play(
    plan: StagePlan,
    hardware: HardwareSpec,
    requests: Sequence[Request],
    core_shares: CoreShares = (),
) -> PlayedJob:
    """Play requests on a stage of all layers."""
    scheduler = Scheduler(
        plan.policy.gpu_batch_size, plan.num_batches, plan.cell_tokens, frozenset(),
        admission=Admission([plan.space]),
    )  # fmt: skip
    scheduler.add(requests)
    passes = Passes(plan, scheduler, torch.device("cpu"))
    passes.begin()
    composed: dict[tuple[int, int], Pass] = {}
    rows: list[int] = []

    def visits() -> Iterator[int]:
        number = 0
        while not scheduler.is_done:
            yield number
            number += 1

    def ops() -> Iterator[Op]:
        is_active = ActiveOps(plan, in_ring=False)
        for op in zigzag(plan.stage, plan.policy.num_gpu_batches, visits(), plan.num_blocks):
            if op.kind is OpKind.COMPOSE:
                passes.compose(op)
                current = composed[op.visit, op.batch] = passes.pass_of(op)
                passes.accept(op, [0] * len(current.rows.sampled), [])
                rows.append(len(current.rows.rows))
            if is_active(op):
                yield op

    demands = _Demands(plan, hardware, composed, core_shares)
    run = simulate(OpStream(ops(), demands, window_ops(plan.policy.num_gpu_batches), False))
    return PlayedJob(run.visit_ends[-1], len(run.visit_ends), rows, run.busy)


class _Demands(OpDemands):
    """Demands of ops by the passes that were composed, of which `composed` holds all so far."""

    def __init__(
        self,
        plan: StagePlan,
        hardware: HardwareSpec,
        composed: dict[tuple[int, int], Pass],
        core_shares: CoreShares,
    ) -> None:
        super().__init__(plan, hardware, lambda op: NO_ROWS, core_shares)
        self._composed = composed

    def __call__(self, op: Op) -> Demand:
        if OPS[op.kind].moves_weights:
            return super().__call__(op)
        current = self._composed[op.visit, op.batch]
        amounts = self._cost.amounts(op, current if current.rows.rows else None)
        return self._demand(op, amounts)
