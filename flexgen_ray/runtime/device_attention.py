"""ATTEND_DEVICE: rows whose cache lies on the device, or was streamed to it.

Attention sees keys and values as the cache keeps them, a prompt's own too, so that tokens don't
depend on how prompts are cut nor on where caches lie. Knows runs of rows; no tiers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flexgen_ray.cost.placed_rows import PlacedRows
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.sizes import QUERY_TILE
from flexgen_ray.models import attention
from flexgen_ray.quant.quantize import pack, unpack
from flexgen_ray.rows import Row
from flexgen_ray.runtime.passes import DecodeRun, decode_runs
from flexgen_ray.schedule.ops import Op
from flexgen_ray.store.activations import Work
from flexgen_ray.store.kv_cache import KVCache
from flexgen_ray.store.tier import TORCH_DTYPE


class DeviceAttention:
    """Of one stage."""

    def __init__(self, plan: StagePlan, cache: KVCache, device: torch.device) -> None:
        self._plan = plan
        self._config = plan.config
        self._cache = cache
        self._device = device
        self._bits = plan.policy.cache_bits
        self._dtype = TORCH_DTYPE[plan.dtype]

    def pack(self, work: Work, num_tokens: int) -> None:
        """New keys and values as a quantized cache keeps them; nothing for another cache."""
        if self._bits is None or work.packed is None:
            return
        heads = self._config.num_kv_heads, -1
        for values, packed in zip((work.k, work.v), work.packed, strict=True):
            into = packed[:num_tokens].unflatten(-1, heads)
            pack(values[:num_tokens].unflatten(-1, heads), self._bits, into)

    def attend(self, op: Op, placed: PlacedRows, work: Work) -> None:
        """Replaces the rows' queries by their attention."""
        cache = self._cache
        cache.append_streamed(op, placed, work)
        resident = [(row, row.slot) for row in placed.resident]
        for name, rows, view in (
            ("resident runs", resident, cache.device_view),
            ("streamed runs", placed.streamed, cache.streamed_view),
        ):
            for run in placed.once(name, partial(decode_runs, rows, self._device)):
                self._decode(work, run, view(op, run.first, run.first + run.count))
            for row, index in rows:
                if row.is_prefill:
                    self._prefill(work, row, view(op, index, index + 1))

    def _decode(self, work: Work, run: DecodeRun, cached: Tensor) -> None:
        """A few rows at a time where they must be unpacked."""
        query = work.q[run.tokens].view(run.count, self._config.num_heads, self._config.head_dim)
        step = self._plan.unpacked_rows if self._bits else run.count
        for first in range(0, run.count, step):
            rows = slice(first, min(first + step, run.count))
            lens = run.lens[rows]
            k, v = self._values(cached[:, rows, :, : max(lens)])
            mask = None if run.mask is None else run.mask[rows, ..., : max(lens)]
            query[rows] = self._attended(query[rows], k, v, lens, mask)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, lens: list[int], mask: Tensor | None
    ) -> Tensor:
        sparsity = self._plan.policy.attention_sparsity
        if sparsity == 1:
            return attention.decode(q, k, v, lens, mask)
        return attention.decode_sparse(q, k, v, lens, sparsity, mask)

    def _prefill(self, work: Work, row: Row, cached: Tensor) -> None:
        """A prompt's first chunk needs no cache: all its keys are new."""
        config, tokens = self._config, row.tokens
        if row.position:
            k, v = self._values(cached[:, 0, :, : row.seq_len])
        else:
            heads = config.num_kv_heads, -1
            own = (each[tokens].unflatten(-1, heads).transpose(0, 1) for each in work.cached)
            k, v = map(self._values, own)
        query = work.q[tokens].view(row.num_new_tokens, config.num_heads, config.head_dim)
        work.q[tokens].copy_(attention.prefill(query, k, v, row.position, QUERY_TILE).flatten(1))

    def _values(self, cached: Tensor) -> Tensor:
        """[..., width] as the cache keeps them, as [..., head_dim]."""
        if self._bits is None:
            return cached
        shape = (*cached.shape[:-1], self._config.head_dim)
        values = torch.empty(shape, dtype=self._dtype, device=cached.device)
        unpack(cached, self._bits, values)
        return values
