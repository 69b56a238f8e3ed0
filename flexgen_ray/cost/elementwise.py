"""Element-wise work: values that the ops of a layer read or write beside its matrix products.

Knows the order of a layer's maths; no rates and no tensors.
"""

from __future__ import annotations

from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.schedule.ops import OpKind

# Values that a small op reads or writes for each value of its input.
_COPY, _ADD, _ACTIVATE, _MULTIPLY = 2, 3, 2, 3
_LAYER_NORM, _RMS_NORM, _ROTATE = 2, 2, 5
_CLAMPED_GATE = 16  # two clamps, a sum, a sigmoid and three products
_COMPOSITE_RMS_NORM = 9  # on a CPU it is several torch ops


def elementwise_values(plan: StagePlan, kind: OpKind) -> int:
    """Values per token that a decoder layer's op reads or writes beside its matrix products."""
    config, on_gpu = plan.config, plan.stages_disk
    hidden, q, kv = config.hidden_size, config.q_size, config.kv_size
    rms_norm = _RMS_NORM if on_gpu else _COMPOSITE_RMS_NORM
    norm = hidden * (rms_norm if config.rope else _LAYER_NORM)
    if kind is OpKind.PROJECT:
        values = norm * config.pre_norm + _COPY * 2 * kv
        if config.rope:
            share = config.rope.share  # other elements of queries and keys are copied
            values += round((_ROTATE * share + _COPY * (1 - share)) * (q + kv))
        if config.qk_norm:
            values += rms_norm * (q + 2 * kv) + _COPY * (q + kv)
        # One copy: of the values if the others are rotated, or of all that oneDNN has made.
        copied = kv if config.rope and not config.qk_norm else (q + 2 * kv) * (not on_gpu)
        return values + _COPY * copied
    if kind is OpKind.ATTEND_DEVICE:
        return _COPY * (q + 2 * kv)
    each = _ACTIVATE + (_MULTIPLY if config.gated_mlp else 0)
    norms = norm * (config.pre_norm + 2 * (config.branch_norms or not config.pre_norm))
    if kind is OpKind.FINISH:
        mlp = each * config.intermediate_size
        return 2 * _ADD * hidden + norms + mlp
    if kind is OpKind.OUT:
        scores = (_ACTIVATE + 1 + _ADD * config.corrects_choice) * config.num_experts
        shared = each * config.shared_expert_size
        shared += _ADD * hidden * (config.shared_expert_size > 0)
        return _ADD * hidden + norms + _COPY * hidden + scores + shared
    if kind is OpKind.EXPERTS:
        # Choices are gathered, put back and summed.
        gate = _CLAMPED_GATE if config.swiglu_limit is not None else each
        choice = gate * config.expert_size + (2 * _COPY + 1) * hidden
        if config.expert_bias:
            choice += (_COPY + _ADD) * (2 * config.expert_size + hidden)
        return config.experts_per_token * choice
    if kind is OpKind.COMBINE:
        return _ADD * hidden
    return 0
