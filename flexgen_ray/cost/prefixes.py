"""Amounts that prefixes which rows share take of each resource, beside the rows' own tokens.

Decoding rows attend tiles of them, each read once for all of its rows, and merge the results with
those of their own tokens. Prompts' chunks attend them as if they were their own, but chunks of rows
with the same prefixes gather them once. Knows rows and their homes; no rates and no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flexgen_ray.cost.launches import (
    GATHER_TILE,
    JOIN,
    KEEP_QUERIES,
    MERGE_CHUNK,
    merge_launches,
    prefix_launches,
)
from flexgen_ray.cost.resources import Amounts, Resource
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.prefix_tiles import prefix_tiles
from flexgen_ray.layout.rows import PlacedRows, Row, first_attended, may_attend_apart

_R = Resource
_FLOAT32 = 4
# Values that are read or written: for each score, its product, its maximum, its difference to that,
# exp and sum, and the product with values; for each value of a row's result, that and its merge.
_OF_SCORE, _OF_RESULT, _OF_MERGE = 8, 20, 12


def attended_prefixes(plan: StagePlan, placed: PlacedRows, layer: int) -> Amounts:
    """Attention of decoding rows to the prefixes that they share."""
    config, element = plan.config, plan.element_bytes
    tiles = prefix_tiles(placed, plan, config.window(layer))
    tokens = pairs = scores = chunk_tokens = results = 0
    for tile in tiles:
        count = tile.last - tile.first
        tokens += count
        for users in tile.chunks:
            chunk_tokens, results = chunk_tokens + count, results + len(users)
            pairs += count * len(users)
            # A CPU keeps no scores if there is no mask.
            if plan.stages_disk or any(start for _, start in users):
                scores += count * len(users) * config.num_heads
    converted = 0
    if element < _FLOAT32 and plan.stages_disk:
        # Scores are scaled in float32, and weights converted to 16 bits for a product.
        converted = scores * (element + 3 * _FLOAT32)
    elif element < _FLOAT32:
        converted = chunk_tokens * 2 * config.kv_size * (element + _FLOAT32)
    amounts: Amounts = {
        _R.FLOPS: 4 * config.q_size * pairs,
        _R.DEVICE_ATTENTION: 2 * tokens * config.kv_size * element,
        _R.DEVICE_OPS: prefix_launches(plan, tiles),
        _R.ELEMENTWISE: 2 * tokens * 2 * config.kv_size * element  # gathered
        + converted
        + _OF_SCORE * scores * _FLOAT32
        + _OF_RESULT * results * config.q_size * _FLOAT32,
    }
    if plan.policy.cache_bits:
        amounts[_R.DEQUANTIZE] = 4 * tokens * config.kv_size
    return amounts


def prefilled_prefixes(
    plan: StagePlan, placed: PlacedRows, rows: Sequence[Row], layer: int
) -> Amounts:
    """Prefixes that prompts' chunks attend, gathered once for rows that share the same.

    Flops are those of the rows, which count them with their own tokens. rows: on one tier.
    """
    config, window = plan.config, plan.config.window(layer)
    gathered = joined = launches = 0
    chains = set()
    for row in rows:
        first = first_attended(row, window)
        if not row.is_prefill or first >= row.before:
            continue
        shared = [it.number for it in placed.prefixes(row) if first < it.end]
        chain = tuple(shared), first
        if chain not in chains:
            chains.add(chain)
            gathered += row.before - first
            joined += (row.before - first) * (len(shared) > 1)
            launches += GATHER_TILE * len(shared) + JOIN * (len(shared) > 1)
        if not plan.stages_disk and may_attend_apart(row, window):
            launches += MERGE_CHUNK
        else:
            joined += row.before - first + row.seq_len
            launches += JOIN
    nbytes = 2 * config.kv_size * plan.element_bytes
    amounts: Amounts = {
        _R.DEVICE_ATTENTION: gathered * nbytes,
        _R.DEVICE_OPS: launches,
        _R.ELEMENTWISE: 2 * (gathered + joined) * nbytes,
    }
    if plan.policy.cache_bits:
        amounts[_R.DEQUANTIZE] = 4 * gathered * config.kv_size
    return amounts


def merged_parts(plan: StagePlan, placed: PlacedRows) -> Amounts:
    """Merge of rows' attention to prefixes with that to their own tokens."""
    rows, each = len(placed.sharing), plan.config.q_size * _FLOAT32
    if not rows:
        return {}
    return {_R.DEVICE_OPS: merge_launches(plan), _R.ELEMENTWISE: _OF_MERGE * rows * each}


def kept_queries(plan: StagePlan, placed: PlacedRows) -> Amounts:
    """Copy of the queries of rows that share prefixes, if attention may replace them."""
    if not placed.sharing or placed.rows.are_single:
        return {}
    nbytes = 4 * len(placed.sharing) * plan.config.q_size * plan.element_bytes
    return {_R.DEVICE_OPS: KEEP_QUERIES, _R.ELEMENTWISE: nbytes}


def sums_bytes(plan: StagePlan, placed: PlacedRows) -> int:
    """Bytes of the sums by which results of the host merge with those of prefixes."""
    return bool(placed.sharing) * len(placed.attended) * plan.config.num_heads * _FLOAT32


def added(parts: Iterable[Amounts]) -> Amounts:
    """Sum of amounts."""
    total: Amounts = {}
    for part in parts:
        for resource, amount in part.items():
            total[resource] = total.get(resource, 0) + amount
    return total
