"""Launches: how many torch ops each op of a layer makes, which on a GPU are kernels.

A test counts them on a pretend GPU. What a pass makes once for all layers, such as masks, is left
out. Knows the order of a layer's maths; no rates and no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.prefix_tiles import PrefixTile, User
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.schedule.ops import Op, OpKind

# Launches of ops outside decoder layers, per tile of tokens.
LAUNCHES = {OpKind.EMBED: 3, OpKind.FINISH: 4, OpKind.SAMPLE: 8}
LAUNCHES_OF_RUN, LAUNCHES_OF_SPARSE_RUN, LAUNCHES_OF_PROMPT = 1, 17, 2
_ROTATE, _MAKE_ROTATION = 3, 6
# In mixtures:
_CHOOSE = 3  # a router, its scores and the best of them
_CORRECT = 2  # the best of corrected scores
_LIMIT_GROUPS = 6  # the best within some groups of experts
_SHARED, _SHARED_GATE = 5, 2  # an expert that every token takes, and how far it does
_SORT = 3  # choices by expert
_PART, _MOVE_PART = 7, 7  # a part of the experts, and its place among several
_IN_TURN = 3  # rows put in place one expert after the other
_SUM = 1
_CLAMP = 5  # of a gate
_FIND_EXPERTS, _ADD_BIAS = 3, 2  # with biases: each row's expert, and the bias of each product
_JOIN_SINK = 10  # a prompt's queries, keys and values are copied to where the sink is beside them
_SINK_OF_RUN = 2  # of sparse attention: it joins both softmaxes
_ENTER = 3  # a row, its shares and its choices enter the buffer of those that wait for experts
_COMPOSITE_RMS_NORM = 6  # on a CPU; on a GPU it is one kernel
# A tile of a prefix is gathered; its products with some rows take queries, scores and a softmax,
# perhaps under a mask; and each part is merged with the others (kernels/prefix_attention.py).
# A CPU attends in one op if there is no mask.
GATHER_TILE, _ATTEND_TILE, _MASK, _MERGE = 10, 11, 3, 12
_ATTEND_TILE_ON_CPU = 2
KEEP_QUERIES, MERGE_CHUNK, JOIN = 2, 5, 2


def launches(plan: StagePlan, op: Op) -> int:
    """Launches of a decoder layer's op for each tile of tokens.

    Appending to the cache, and moves of hidden states, are not in it.
    """
    on_gpu, kind = plan.stages_disk, op.kind
    if kind is OpKind.PROJECT:
        return _project(plan.config, on_gpu)
    if kind is OpKind.OUT:
        return _out(plan)
    if kind is OpKind.EXPERTS:
        return _experts(plan, op)
    return 1 if kind is OpKind.COMBINE else _finish(plan.config, on_gpu)


def rotation_launches(config: ModelConfig) -> int:
    """Launches that make the rotation of a tile of prompts' tokens; decoding makes it once."""
    if config.rope is None:
        return 0
    return _MAKE_ROTATION + (config.rope.attention_factor != 1)


def prompt_launches(plan: StagePlan) -> int:
    """Launches that attend a prompt's first chunk; query heads that share a KV head copy it."""
    repeats = 2 * (plan.config.num_heads > plan.config.num_kv_heads)
    joins = _JOIN_SINK if plan.config.attention_sinks else repeats
    return LAUNCHES_OF_PROMPT + joins + bool(plan.policy.cache_bits)


def run_launches(plan: StagePlan) -> int:
    """Launches that attend a run of decoding rows."""
    if plan.is_sparse:
        sinks = _SINK_OF_RUN * plan.config.attention_sinks
        return LAUNCHES_OF_SPARSE_RUN + 2 * bool(plan.policy.cache_bits) + sinks
    return LAUNCHES_OF_RUN


def _project(config: ModelConfig, on_gpu: bool) -> int:
    """Norm, product, norm of queries and keys, rotation, and scale of queries."""
    count = 1 + (_norm(config, on_gpu) if config.pre_norm else 0)
    if config.rope is None:
        return count
    count += _ROTATE + (config.rope.share < 1) + (config.query_scale != 1)
    if config.qk_norm is None:
        return count + 1  # values are copied to where rotated queries and keys are put
    if config.qk_norm == "all":
        return count + 2 * (_norm(config, on_gpu) + 1) + 1
    converts = 4 * (config.norm_offset is not None)
    return count + (1 if on_gpu else _COMPOSITE_RMS_NORM) + 1 + converts


def _finish(config: ModelConfig, on_gpu: bool) -> int:
    """Three products, activation, norms, and sums with the residual.

    On a GPU a product without a bias adds up as it goes.
    """
    norm, count = _norm(config, on_gpu), 3 + 1 + config.gated_mlp
    count += norm if config.pre_norm else 0
    norms_branches = config.branch_norms or (config.rope is not None and not config.pre_norm)
    if norms_branches or not config.pre_norm:
        count += 2 * norm + 2
    if not norms_branches:
        count += (config.output_bias or not on_gpu) + (config.mlp_bias or not on_gpu)
    return count


def _out(plan: StagePlan) -> int:
    """Output projection, norm, the router's choice, and an expert that every token takes."""
    config, on_gpu = plan.config, plan.stages_disk
    count = 1 + (config.output_bias or not on_gpu) + _norm(config, on_gpu) + _choose(plan)
    return count + _ENTER + _shared(config)


def _experts(plan: StagePlan, op: Op) -> int:
    """Products of experts.

    In bfloat16 a GPU multiplies all groups of a part at once, however many there are; elsewhere
    each expert has its two products. A group of experts is a part among several.
    """
    config, cuts = plan.config, plan.weights.cuts[op.layer]
    if groups := plan.weights.groups.get(op.layer):
        cuts = {key: cuts[key] for key in groups[op.group].keys}
    counts = [cut.shape[0] for cut in cuts.values() if cut.name == "gate_up_experts.weight"]
    parts, is_part = len(counts), sum(counts) < config.num_experts
    gates = _CLAMP * parts if config.swiglu_limit is not None else 0
    if plan.stages_disk and plan.dtype == "bfloat16":
        moved = _MOVE_PART * parts + 1 if parts > 1 or is_part else 0
        biases = (_FIND_EXPERTS + 2 * _ADD_BIAS) * parts if config.expert_bias else 0
        return _SORT + _PART * parts + moved + gates + biases + _SUM + is_part
    products = 2 * sum(counts) * (2 if config.expert_bias else 1)
    return _SORT + 2 * parts + gates + products + _IN_TURN * parts + _SUM + is_part


def _choose(plan: StagePlan) -> int:
    """A router's choice: scores are in float32."""
    config, converts = plan.config, plan.element_bytes < 4
    count = _CHOOSE + 2 * config.norm_topk + 2 * converts + (config.routed_scale != 1)
    if config.corrects_choice:
        count += _CORRECT + converts + config.norm_topk
        count += _LIMIT_GROUPS if config.chosen_groups < config.expert_groups else 0
    return count


def _shared(config: ModelConfig) -> int:
    """An expert that every token takes."""
    if not config.shared_expert_size:
        return 0
    return _SHARED + _SHARED_GATE * config.shared_expert_gate


def _norm(config: ModelConfig, on_gpu: bool) -> int:
    """A norm; weights that are stored with an offset multiply in float32."""
    if config.rope is None:
        return 1
    converts = 4 if config.norm_offset else 0
    return (1 if on_gpu else _COMPOSITE_RMS_NORM) + converts


def prefix_launches(plan: StagePlan, tiles: Sequence[PrefixTile]) -> int:
    """Launches that attend the tiles of prefixes that decoding rows share."""
    count = 2 if tiles else 0  # results are cleared first
    for tile in tiles:
        count += GATHER_TILE + 2 * bool(plan.policy.cache_bits)
        count += sum(_chunk(plan, chunk) for chunk in tile.chunks)
    return count


def merge_launches(plan: StagePlan) -> int:
    """Launches that merge attention to prefixes with that to rows' own tokens."""
    return _MERGE + 4 + 2 * (plan.element_bytes < 4)


def _chunk(plan: StagePlan, users: Sequence[User]) -> int:
    """Launches of some rows' products with a tile, and of merging the result."""
    kv_heads, queries = plan.config.num_kv_heads, plan.config.num_heads // plan.config.num_kv_heads
    # Queries, results and sums of heads that share a KV head change their order.
    copies = 3 * (len(users) > 1 and kv_heads > 1 and queries > 1)
    is_masked = any(start for _, start in users)
    products = _ATTEND_TILE if plan.stages_disk or is_masked else _ATTEND_TILE_ON_CPU
    count = products + _MASK * is_masked + copies + _MERGE
    # On a GPU weights are converted for a product; elsewhere queries, keys and values are.
    return count + (1 if plan.stages_disk else 3) * (plan.element_bytes < 4)
