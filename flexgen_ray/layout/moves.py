"""Which ops of the schedule can do anything under a placement; the others are never dispatched.

The executor and the simulation go by the same answer. Knows plans; not what a pass brings.
"""

from __future__ import annotations

from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.schedule.ops import Op, OpKind


class Moves:
    """Of one stage's ops. is_linked: whether it is one of a ring's stages."""

    def __init__(self, plan: StagePlan, is_linked: bool) -> None:
        self._plan = plan
        self._is_linked = is_linked
        self._layout = plan.weights
        self._known: dict[tuple[OpKind, int, int], bool] = {}

    def __call__(self, op: Op) -> bool:
        """False if the op can't do anything, whatever rows its pass has."""
        key = op.kind, op.layer, op.batch
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._moves(*key)
        return known

    def _moves(self, kind: OpKind, layer: int, batch: int) -> bool:
        plan = self._plan
        if kind is OpKind.LOAD_WEIGHTS:
            return bool(self._layout.streams[layer].extents)
        if kind is OpKind.READ_WEIGHTS:
            return plan.stages_disk and self._layout.streams[layer].nbytes("disk") > 0
        if kind is OpKind.RECV_TOKENS:
            return self._is_linked
        if kind in (OpKind.GATHER, OpKind.LOAD_EMBEDDING):
            return not plan.stage.is_first or not self._layout.embeds_on_device
        if kind in (OpKind.READ_HIDDEN, OpKind.WRITE_HIDDEN):
            return plan.policy.activations.disk > 0
        if kind in (OpKind.LOAD_HIDDEN, OpKind.STORE_HIDDEN):
            return plan.policy.activations.gpu < 1
        return kind not in _OF_CACHE or self._moves_cache(kind, layer, batch)

    def _moves_cache(self, kind: OpKind, layer: int, batch: int) -> bool:
        split = self._plan.splits[layer, batch]
        if kind in (OpKind.READ_CACHE, OpKind.WRITE_CACHE):
            return split.disk > 0
        if kind in (OpKind.ATTEND_HOST, OpKind.LOAD_ATTENTION):
            return split.attended > 0
        if kind in (OpKind.CHOOSE, OpKind.GATHER_VALUES, OpKind.LOAD_VALUES):
            return self._plan.is_sparse and split.off_device > split.attended
        if kind is OpKind.LOAD_CACHE and split.attended == split.off_device:
            return split.off_device > 0 and self._plan.chunks_prompts
        return split.off_device > 0


_OF_CACHE = frozenset(
    {
        OpKind.READ_CACHE,
        OpKind.WRITE_CACHE,
        OpKind.STORE_CACHE,
        OpKind.APPEND_CACHE,
        OpKind.LOAD_CACHE,
        OpKind.CHOOSE,
        OpKind.GATHER_VALUES,
        OpKind.LOAD_VALUES,
        OpKind.ATTEND_HOST,
        OpKind.LOAD_ATTENTION,
    }
)
