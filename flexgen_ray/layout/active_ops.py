"""The ops of the schedule that have work under a stage's plan; the others are never dispatched.

The executor and the simulation filter ops by the same answer. Knows plans; not the rows of a pass.
"""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import cached_property

from flexgen_ray.layout.placement import RowSplit
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.schedule.ops import OPS, Condition, Op, OpKind


class ActiveOps:
    """Predicate over one stage's ops: False if an op has no work, whatever rows its pass has.

    in_ring: True if the stage is one of several.
    """

    def __init__(self, plan: StagePlan, in_ring: bool) -> None:
        self._plan = plan
        self._in_ring = in_ring
        self._answers: dict[tuple[OpKind, int, int], bool] = {}

    def __call__(self, op: Op) -> bool:
        key = op.kind, op.layer, op.group
        answer = self._answers.get(key)
        if answer is None:
            condition = OPS[op.kind].condition
            answer = self._answers[key] = self._holds(condition, op.layer, op.group)
        return answer

    def _holds(self, condition: Condition, layer: int, group: int) -> bool:
        plan = self._plan
        match condition:
            case Condition.ALWAYS:
                return True
            case Condition.IN_RING:
                return self._in_ring
            case Condition.STREAMS_WEIGHTS:
                return bool(plan.weights.streams[layer].extents)
            case Condition.STAGES_DISK_WEIGHTS:
                return plan.stages_disk and plan.weights.streams[layer].nbytes("disk") > 0
            case Condition.STAGES_DISK_EXPERTS:
                return plan.stages_disk and plan.weights.groups[layer][group].tier == "disk"
            case Condition.INPUT_FROM_HOST:
                return not plan.stage.is_first or not plan.weights.embeds_on_device
            case Condition.HIDDEN_OFF_DEVICE:
                return plan.policy.activations.gpu < 1
            case Condition.HIDDEN_ON_DISK:
                return plan.policy.activations.disk > 0
            case _:
                return self._holds_of_cache(condition, self._split)

    @cached_property
    def _split(self) -> RowSplit:
        """Rows that any batch may have in each division, as far as they are zero or not.

        Unequal rows may lie on any tier that the plan uses, and so may rows that came from another
        batch; which rows in host memory are attended there is chosen anew in each pass.
        """
        plan = self._plan
        split = RowSplit(*(max(part) for part in zip(*map(astuple, plan.splits), strict=True)))
        if 0 < plan.policy.cpu_attention < 1:
            split = replace(split, attended=split.cpu, streamed=split.cpu)
        return split

    def _holds_of_cache(self, condition: Condition, split: RowSplit) -> bool:
        """Conditions on how the rows of a batch are divided."""
        prefixes = self._plan.space.prefix_slot  # in host memory, whichever batch computes them
        off_device = split.attended + split.streamed + split.disk + prefixes
        streamed = split.streamed + split.disk
        match condition:
            case Condition.CACHE_OFF_DEVICE:
                return off_device > 0
            case Condition.CACHE_ON_DISK:
                return split.disk > 0
            case Condition.STREAMS_CACHE:
                # Chunked prompts are attended on the device, even if decoding rows are not.
                chunks = off_device > 0 and self._plan.chunks_prompts
                return streamed + prefixes > 0 or chunks
            case Condition.STREAMS_CHOSEN_VALUES:
                return self._plan.is_sparse and streamed > 0
            case Condition.ATTENDS_ON_HOST:
                return split.attended > 0
        raise AssertionError(condition)
