"""Attention on the device (CHOOSE, ATTEND_DEVICE): rows cached there, or streamed to it.

Attention sees keys and values as the cache keeps them, also those of a prompt's own chunk, so that
tokens depend neither on how prompts are cut nor on where caches lie. Knows runs of rows; no tiers.

ATTEND_DEVICE of a cell with 3 decoding rows and a prompt's chunk of 5 tokens, for 32 query heads,
8 KV heads and head_dim 128 (the queries q are [8, 4096], one row a token):

    decoding rows    rows that are neighbours among the packed tokens form a run, say all 3
                     (passes.find_decode_runs); one call of a kernel walks the pages of their
                     tables and gives [3, 32, 128]
    prompt's chunk   what it sees of its pages is gathered, then attention.prefill over
                     [5, 32, 128], row by row: cached keys and values, then causally its own

FINISH projects the results. They replace the queries in q, or go to a buffer of their own if each
row brings one token. Streamed rows under sparse attention take three ops: CHOOSE selects tokens by
the keys that came, GATHER_VALUES and LOAD_VALUES bring the values of these tokens only, and
ATTEND_DEVICE weighs them.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from flexgen_ray.kernels import attention
from flexgen_ray.kernels.cuda_attention import page_kernel
from flexgen_ray.kernels.host_kernel import HostKernel, rows_together
from flexgen_ray.kernels.indices import place_indices
from flexgen_ray.kernels.pack import pack, unpack
from flexgen_ray.layout.pages import Home, page_table, pages_of
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import MemoKey, PlacedRows, Row, token_runs
from flexgen_ray.runtime.passes import DecodeRows, find_decode_runs
from flexgen_ray.schedule.ops import Op
from flexgen_ray.store.activations import CellBuffers
from flexgen_ray.store.kv_cache import KVCache, streamed_home
from flexgen_ray.store.tiers import TORCH_DTYPE

_Runs = list[DecodeRows]
_RESIDENT_RUNS = MemoKey[_Runs]()
_STREAMED_RUNS = MemoKey[_Runs]()


class DeviceAttention:
    """Attention of one stage's layers on the device; kernel: attends decoding rows there."""

    def __init__(
        self, plan: StagePlan, cache: KVCache, device: torch.device, kernel: HostKernel
    ) -> None:
        self._plan = plan
        self._config = plan.config
        self._cache = cache
        self._device = device
        self._kernel = kernel
        self._bits = plan.policy.cache_bits
        self._sparsity = plan.policy.attention_sparsity
        self._dtype = TORCH_DTYPE[plan.dtype]
        self._on_gpu = None
        if device.type == "cuda" and not plan.is_sparse:
            self._on_gpu = page_kernel(device, self._dtype, plan.config.head_dim)
        self._weights: dict[int, list[Tensor]] = {}  # of selected tokens, by cell slot and run

    def pack(self, work: CellBuffers, num_tokens: int) -> None:
        """Quantize a cell's new keys and values, if the cache is quantized.

        Values beyond the range become NaN, and so do the logits of their row alone.
        """
        if self._bits is not None:
            pack(work.kv[:num_tokens], self._bits, work.cached[:num_tokens], raises=False)

    def choose(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """CHOOSE: select the tokens that streamed rows attend, by their loaded keys."""
        cache, window = self._cache, self._config.window(op.layer)
        cache.append_streamed(op, placed, work)
        self._weights[op.cell_slot] = []
        keys = cache.streamed_pages(op)[0]
        for first, rows in placed.choosing_runs(self._plan.rows_at_a_time):
            lens = [row.seq_len for row in rows]
            homes = [(streamed_home(placed, row), pages_of(row.seq_len)) for row in rows]
            tables = page_table([home.table(count) for home, count in homes])
            tokens = attention.span(lens, window)
            k = attention.gather_pages(keys, self._on_device(tables), tokens)
            q = torch.cat([work.q[row.tokens] for row in rows])
            k, lens = self._dequantized(k), [end - tokens.start for end in lens]
            selected = attention.select_tokens(q, k, lens, self._sparsity, window=window)
            cache.store_choice(op, first, selected.tokens + tokens.start)
            self._weights[op.cell_slot].append(selected.weights)

    def attend(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """ATTEND_DEVICE: put the attention of resident and streamed rows where FINISH takes it.

        A prompt's chunk attends what its row had, and itself; then it is appended. Within a window
        its tokens may take the pages of those that its first ones attend.
        """
        cache, window = self._cache, self._config.window(op.layer)
        target = work.attention(placed.rows)
        if self._plan.is_sparse:
            self._attend_chosen(op, placed, target)
        else:
            cache.append_streamed(op, placed, work)
        for key, rows, pool, home in (
            (_RESIDENT_RUNS, placed.resident, cache.device_pages(op), placed.home),
            (
                _STREAMED_RUNS,
                placed.streamed,
                cache.streamed_pages(op),
                partial(streamed_home, placed),
            ),
        ):
            if key is _RESIDENT_RUNS or not self._plan.is_sparse:
                make = partial(find_decode_runs, rows, home, self._device)
                for run in placed.memoized(key, make):
                    q, out = work.q[run.tokens], target[run.tokens]
                    self._decode(q, pool, run, window, out)
            for row in rows:
                if row.is_prefill:
                    pages = home(row) if row.position else None
                    self._prefill(work, row, pool, pages, window, target[row.tokens])
        cache.append_resident(op, placed, work, prefills=True)

    def _decode(
        self, q: Tensor, pool: Tensor, run: DecodeRows, window: int | None, out: Tensor
    ) -> None:
        """Attend a run's rows into out, [rows, heads, head_dim]."""
        if self._on_gpu is not None:
            self._on_gpu.attend_pages(
                q, *pool, run.tables, run.num_tokens, out, most=max(run.lens), window=window
            )
            return
        how = self._sparsity, window
        for some in rows_together(self._kernel, len(run.lens), self._plan.rows_at_a_time):
            tables, lens = run.tables[some], run.lens[some]
            self._kernel(q[some], pool[0], pool[1], tables, lens, out[some], *how)

    def _attend_chosen(self, op: Op, placed: PlacedRows, target: Tensor) -> None:
        """Weigh the values that LOAD_VALUES brought for streamed rows that decode."""
        runs = placed.choosing_runs(self._plan.rows_at_a_time)
        for (first, rows), weights in zip(runs, self._weights.pop(op.cell_slot, ()), strict=True):
            values = self._cache.chosen_values(op, first, len(rows), weights.shape[-1])
            attended = attention.weighted_sum(weights, self._dequantized(values))
            for place, tokens in token_runs(rows):
                count = tokens.stop - tokens.start
                target[tokens].copy_(attended[place : place + count])

    def _prefill(
        self,
        work: CellBuffers,
        row: Row,
        pool: Tensor,
        home: Home | None,
        window: int | None,
        out: Tensor,
    ) -> None:
        """Attend a prompt's chunk into out; the first chunk needs no cache: all its keys are new.

        home: pages of the row in the pool, None for a first chunk. out: [tokens, heads, head_dim].
        """
        cached, first = work.cached[row.tokens].permute(1, 2, 0, 3), row.position
        k, v = cached
        if home is not None:
            first = max(0, row.position + 1 - window) if window is not None else 0
            tables = self._on_device(home.table(pages_of(row.position))[None])
            span = slice(first, row.position)
            k, v = (
                torch.cat((attention.gather_pages(plane, tables, span)[0], new), dim=1)
                for plane, new in zip(pool, cached, strict=True)
            )
        k, v = self._dequantized(k), self._dequantized(v)
        q, start, tokens = work.q[row.tokens], row.position - first, k.shape[1]
        sharing, some = q.shape[1] // len(k), self._plan.heads_at_a_time(tokens)
        tile = self._plan.queries_at_a_time(tokens)
        for head in range(0, len(k), some):
            these, queries = (
                slice(head, head + some),
                slice(head * sharing, (head + some) * sharing),
            )
            attended = attention.prefill(q[:, queries], k[these], v[these], start, tile, window)
            out[:, queries].copy_(attended)

    def _on_device(self, tables: np.ndarray) -> Tensor:
        return place_indices(tables, self._device, torch.int32)

    def _dequantized(self, cached: Tensor) -> Tensor:
        """Keys or values [..., head_dim] of [..., width] as the cache keeps them."""
        if self._bits is None:
            return cached
        shape = (*cached.shape[:-1], self._config.head_dim)
        values = torch.empty(shape, dtype=self._dtype, device=cached.device)
        unpack(cached, self._bits, values)
        return values
