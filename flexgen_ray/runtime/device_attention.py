"""CHOOSE and ATTEND_DEVICE: rows whose cache lies on the device, or was streamed to it.

Attention sees keys and values as the cache keeps them, a prompt's own too, so that tokens don't
depend on how prompts are cut nor on where caches lie. Knows runs of rows; no tiers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flexgen_ray.kernels import attention
from flexgen_ray.kernels.pack import pack, unpack
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import PlacedRows, Row
from flexgen_ray.layout.sizes import QUERY_TILE
from flexgen_ray.runtime.passes import DecodeRows, decode_runs
from flexgen_ray.schedule.ops import Op
from flexgen_ray.store.activations import CellBuffers
from flexgen_ray.store.kv_cache import KVCache
from flexgen_ray.store.tiers import TORCH_DTYPE


class DeviceAttention:
    """Of one stage."""

    def __init__(self, plan: StagePlan, cache: KVCache, device: torch.device) -> None:
        self._plan = plan
        self._config = plan.config
        self._cache = cache
        self._device = device
        self._bits = plan.policy.cache_bits
        self._sparsity = plan.policy.attention_sparsity
        self._dtype = TORCH_DTYPE[plan.dtype]
        self._weights: dict[int, list[Tensor]] = {}  # of tokens chosen, by cell slot

    def pack(self, work: CellBuffers, num_tokens: int) -> None:
        """New keys and values as a quantized cache keeps them; nothing for another cache.

        Those that can't be packed become NaN, and so do the logits of their row alone.
        """
        if self._bits is None or work.packed is None:
            return
        heads = self._config.num_kv_heads, -1
        for values, packed in zip((work.k, work.v), work.packed, strict=True):
            into = packed[:num_tokens].unflatten(-1, heads)
            pack(values[:num_tokens].unflatten(-1, heads), self._bits, into, raises=False)

    def choose(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """CHOOSE: the tokens that streamed rows attend, whose keys have come."""
        cache = self._cache
        cache.append_streamed(op, placed, work, prefills=False)
        self._weights[op.cell_slot] = []
        window = self._config.window(op.layer)
        for run in self._runs(placed, "streamed", placed.streamed, window):
            keys = cache.streamed_view(op, run.first, run.first + run.count)[0]
            chosen = self._chosen(work, run, keys[:, :, run.seen], window)
            cache.store_choice(op, run.first, chosen.tokens + run.seen.start)
            self._weights[op.cell_slot].append(chosen.weights)

    def attend(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """ATTEND_DEVICE: replaces the rows' queries by their attention."""
        cache, window = self._cache, self._config.window(op.layer)
        cache.append_streamed(op, placed, work, prefills=True)
        if not self._plan.is_sparse:
            cache.append_streamed(op, placed, work, prefills=False)
        resident = [(row, row.slot) for row in placed.resident]
        for name, rows, view in (
            ("resident", resident, cache.device_view),
            ("streamed", placed.streamed, cache.streamed_view),
        ):
            for number, run in enumerate(self._runs(placed, name, rows, window)):
                if name == "streamed" and self._plan.is_sparse:
                    out = self._weighed(op, run, self._weights[op.cell_slot][number])
                else:
                    cached = view(op, run.first, run.first + run.count)
                    out = self._decoded(work, run, cached[:, :, :, run.seen], window)
                self._query(work, run).copy_(out)
            for row, index in rows:
                if row.is_prefill:
                    self._prefill(work, row, view(op, index, index + 1), window)
        self._weights.pop(op.cell_slot, None)

    def _runs(
        self, placed: PlacedRows, name: str, rows: list[tuple[Row, int]], window: int | None
    ) -> list[DecodeRows]:
        make = partial(decode_runs, rows, self._plan.rows_at_a_time, self._device, window)
        return placed.memoized(f"{name} runs {window}", make)

    def _query(self, work: CellBuffers, run: DecodeRows) -> Tensor:
        return work.q[run.tokens].view(run.count, self._config.num_heads, self._config.head_dim)

    def _decoded(
        self, work: CellBuffers, run: DecodeRows, cached: Tensor, window: int | None
    ) -> Tensor:
        """cached: [2, rows, kv_heads, tokens seen, width]."""
        if self._plan.is_sparse:
            chosen = self._chosen(work, run, cached[0], window)
            return attention.weighted_sum(chosen.weights, self._values(chosen.gather(cached[1])))
        k, v = self._values(cached)
        return attention.decode(self._query(work, run), k, v, run.lens, run.mask, window)

    def _chosen(
        self, work: CellBuffers, run: DecodeRows, keys: Tensor, window: int | None
    ) -> attention.SelectedTokens:
        """keys: [rows, kv_heads, tokens seen, width]."""
        k, q = self._values(keys), self._query(work, run)
        return attention.select_tokens(q, k, run.lens, self._sparsity, run.mask, window)

    def _weighed(self, op: Op, run: DecodeRows, weights: Tensor) -> Tensor:
        """By the values that LOAD_VALUES brought."""
        values = self._cache.chosen_values(op, run.first, run.count, weights.shape[-1])
        return attention.weighted_sum(weights, self._values(values))

    def _prefill(self, work: CellBuffers, row: Row, cached: Tensor, window: int | None) -> None:
        """A prompt's first chunk needs no cache: all its keys are new."""
        config, tokens = self._config, row.tokens
        if row.position:
            k, v = self._values(cached[:, 0, :, : row.seq_len])
        else:
            heads = config.num_kv_heads, -1
            own = (each[tokens].unflatten(-1, heads).transpose(0, 1) for each in work.cached)
            k, v = map(self._values, own)
        query = work.q[tokens].view(row.num_new_tokens, config.num_heads, config.head_dim)
        found = attention.prefill(query, k, v, row.position, QUERY_TILE, window)
        work.q[tokens].copy_(found.flatten(1))

    def _values(self, cached: Tensor) -> Tensor:
        """[..., width] as the cache keeps them, as [..., head_dim]."""
        if self._bits is None:
            return cached
        shape = (*cached.shape[:-1], self._config.head_dim)
        values = torch.empty(shape, dtype=self._dtype, device=cached.device)
        unpack(cached, self._bits, values)
        return values
