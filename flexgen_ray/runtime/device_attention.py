"""Attention on the device (CHOOSE, ATTEND_DEVICE): rows cached there, or streamed to it.

Attention sees keys and values as the cache keeps them, also those of a prompt's own chunk, so that
tokens depend neither on how prompts are cut nor on where caches lie. Knows runs of rows; no tiers.

ATTEND_DEVICE of a cell with 3 decoding rows and a prompt's chunk of 5 tokens, for 32 query heads,
8 KV heads and head_dim 128 (the queries q are [8, 4096], one row a token):

    decoding rows    rows side by side in the cache form a run, say all 3 (passes.find_decode_runs);
                     the cache's view is [2, 3, 8, longest row, 128], keys and values
                     dense    attention.decode over the run, [3, 32, 128]
                     sparse   attention.select_tokens on the keys, weighted_sum on their values
    prompt's chunk   attention.prefill over [5, 32, 128], row by row: cached keys and values, then
                     causally its own

FINISH projects the results. They replace the queries in q, or go to a buffer of their own if each
row brings one token. Streamed rows under sparse attention take three ops: CHOOSE selects tokens by
the keys that came, GATHER_VALUES and LOAD_VALUES bring the values of these tokens only, and
ATTEND_DEVICE weighs them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flexgen_ray.kernels import attention
from flexgen_ray.kernels.pack import pack, unpack
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import MemoKey, PlacedRows, Row
from flexgen_ray.layout.sizes import QUERY_TILE
from flexgen_ray.runtime.passes import DecodeRows, find_decode_runs
from flexgen_ray.schedule.ops import Op
from flexgen_ray.store.activations import CellBuffers
from flexgen_ray.store.kv_cache import KVCache
from flexgen_ray.store.tiers import TORCH_DTYPE

_Runs = list[DecodeRows]
_RESIDENT_RUNS = MemoKey[_Runs]()
_STREAMED_RUNS = MemoKey[_Runs]()


class DeviceAttention:
    """Attention of one stage's layers on the device."""

    def __init__(self, plan: StagePlan, cache: KVCache, device: torch.device) -> None:
        self._plan = plan
        self._config = plan.config
        self._cache = cache
        self._device = device
        self._bits = plan.policy.cache_bits
        self._sparsity = plan.policy.attention_sparsity
        self._dtype = TORCH_DTYPE[plan.dtype]
        self._weights: dict[int, list[Tensor]] = {}  # of selected tokens, by cell slot and run

    def pack(self, work: CellBuffers, num_tokens: int) -> None:
        """Quantize a cell's new keys and values, if the cache is quantized.

        Values beyond the range become NaN, and so do the logits of their row alone.
        """
        if self._bits is not None:
            pack(work.kv[:num_tokens], self._bits, work.cached[:num_tokens], raises=False)

    def choose(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """CHOOSE: select the tokens that streamed rows attend, by their loaded keys."""
        cache = self._cache
        cache.append_streamed(op, placed, work, prefills=False)
        self._weights[op.cell_slot] = []
        window = self._config.window(op.layer)
        for run in self._runs(placed, _STREAMED_RUNS, placed.streamed, window):
            keys = cache.streamed_view(op, run.first, run.first + run.count)[0]
            selected = self._select(work, run, keys[:, :, run.seen], window)
            cache.store_choice(op, run.first, selected.tokens + run.seen.start)
            self._weights[op.cell_slot].append(selected.weights)

    def attend(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """ATTEND_DEVICE: put the attention of resident and streamed rows where FINISH takes it."""
        cache, window = self._cache, self._config.window(op.layer)
        target = work.attention(placed.rows)
        cache.append_streamed(op, placed, work, prefills=True)
        if not self._plan.is_sparse:
            cache.append_streamed(op, placed, work, prefills=False)
        resident = [(row, row.slot) for row in placed.resident]
        for key, rows, view in (
            (_RESIDENT_RUNS, resident, cache.device_view),
            (_STREAMED_RUNS, placed.streamed, cache.streamed_view),
        ):
            for number, run in enumerate(self._runs(placed, key, rows, window)):
                if key is _STREAMED_RUNS and self._plan.is_sparse:
                    weights = self._weights[op.cell_slot][number]
                    target[run.tokens].copy_(self._weigh_loaded(op, run, weights))
                else:
                    cached = view(op, run.first, run.first + run.count)[:, :, :, run.seen]
                    self._decode(work, run, cached, window, target[run.tokens])
            for row, index in rows:
                if row.is_prefill:
                    cached = view(op, index, index + 1)
                    target[row.tokens].copy_(self._prefill(work, row, cached, window))
        self._weights.pop(op.cell_slot, None)

    def _runs(
        self,
        placed: PlacedRows,
        key: MemoKey[_Runs],
        rows: list[tuple[Row, int]],
        window: int | None,
    ) -> _Runs:
        """Runs of decoding rows, computed once for a pass and window."""
        dtype = None if self._plan.is_sparse else self._dtype
        most = self._plan.rows_at_a_time
        make = partial(find_decode_runs, rows, most, self._device, window, dtype)
        return placed.memoized(key, make, window)

    def _decode(
        self, work: CellBuffers, run: DecodeRows, cached: Tensor, window: int | None, out: Tensor
    ) -> None:
        """Attend a run's rows into out, [rows, heads, head_dim].

        cached: [2, rows, kv_heads, tokens seen, width].
        """
        if self._plan.is_sparse:
            selected = self._select(work, run, cached[0], window)
            values = self._dequantized(selected.gather(cached[1]))
            out.copy_(attention.weighted_sum(selected.weights, values))
            return
        k, v = self._dequantized(cached)
        attention.decode(work.q[run.tokens], k, v, run.lens, run.mask, window, out)

    def _select(
        self, work: CellBuffers, run: DecodeRows, keys: Tensor, window: int | None
    ) -> attention.SelectedTokens:
        """Tokens that a run's rows attend; keys: [rows, kv_heads, tokens seen, width]."""
        k, q = self._dequantized(keys), work.q[run.tokens]
        return attention.select_tokens(q, k, run.lens, self._sparsity, run.mask, window)

    def _weigh_loaded(self, op: Op, run: DecodeRows, weights: Tensor) -> Tensor:
        """Weighted sum of the values that LOAD_VALUES brought, for a run's rows."""
        values = self._cache.chosen_values(op, run.first, run.count, weights.shape[-1])
        return attention.weighted_sum(weights, self._dequantized(values))

    def _prefill(self, work: CellBuffers, row: Row, cached: Tensor, window: int | None) -> Tensor:
        """Attend a prompt's chunk; the first chunk needs no cache, because all its keys are new.

        Returns [tokens, heads, head_dim].
        """
        own = work.cached[row.tokens].permute(1, 2, 0, 3)
        k, v = self._dequantized(cached[:, 0, :, : row.seq_len] if row.position else own)
        return attention.prefill(work.q[row.tokens], k, v, row.position, QUERY_TILE, window)

    def _dequantized(self, cached: Tensor) -> Tensor:
        """Keys or values [..., head_dim] of [..., width] as the cache keeps them."""
        if self._bits is None:
            return cached
        shape = (*cached.shape[:-1], self._config.head_dim)
        values = torch.empty(shape, dtype=self._dtype, device=cached.device)
        unpack(cached, self._bits, values)
        return values
