"""What stands between matrix products: norms, residuals, activations, rotations, copies, sampling.

Ops of torch, each of which costs a launch and reads and writes values of every token; no product
hides them. Knows the order of a layer's maths; no rates.
"""

from __future__ import annotations

from flexgen_ray.model_config import ModelConfig
from flexgen_ray.schedule.ops import OpKind

# Launches of an op, each tile's; of attention, of a run of decoding rows and of each prompt. Ops
# that scatter, or that attend a few tokens, take as long as several.
LAUNCHES = {OpKind.EMBED: 8, OpKind.PROJECT: 12, OpKind.FINISH: 8, OpKind.SAMPLE: 8}
LAUNCHES_OF_RUN, LAUNCHES_OF_PROMPT = 8, 5

_OF_SOME = 0.6  # of drawing from all the vocabulary, what drawing from its top_k takes

# Values that ops read or write for each one they are given.
_COPY, _ADD, _ACTIVATE, _MULTIPLY = 2, 3, 2, 3
_LAYER_NORM, _RMS_NORM, _ROTATE = 2, 9, 10  # the latter two are made of several ops


def passed_values(config: ModelConfig, kind: OpKind) -> int:
    """Values of each token that a decoder layer's op reads or writes beside its products."""
    hidden, q, kv = config.hidden_size, config.q_size, config.kv_size
    norm = hidden * (_RMS_NORM if config.rope else _LAYER_NORM)
    if kind is OpKind.PROJECT:
        rotated = _ROTATE * (q + kv) if config.rope else 0
        rotated += _RMS_NORM * (q + kv) if config.qk_norm else 0
        return _COPY * hidden + norm + rotated + _COPY * (q + 2 * kv) + 2 * _COPY * kv
    if kind is OpKind.ATTEND_DEVICE:
        return _COPY * (q + 2 * kv)
    if kind is OpKind.FINISH:
        each = _ACTIVATE + (_MULTIPLY if config.gated_mlp else 0)
        norms = norm * (3 if config.branch_norms else 1)
        return 2 * (_ADD + _COPY) * hidden + norms + each * config.intermediate_size
    return 0


def drawn_share(temperature: float, top_k: int) -> float:
    """Of the work in which a token is drawn of a whole vocabulary, what these settings take: the
    likeliest are found without sorting the others, and greedy decoding only looks for one."""
    if not temperature:
        return 0.0
    return _OF_SOME if top_k > 0 else 1.0
