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

FINISH, or OUT of a mixture, projects the results. They replace the queries in q, or go to a buffer
of their own if each row brings one token. Streamed rows under sparse attention take three ops:
CHOOSE selects tokens by the keys that came, GATHER_VALUES and LOAD_VALUES bring the values of these
tokens only, and ATTEND_DEVICE weighs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexgen_ray.kernels import attention
from flexgen_ray.kernels.cuda_attention import page_kernel
from flexgen_ray.kernels.host_kernel import HostKernel, rows_together
from flexgen_ray.kernels.indices import place_indices
from flexgen_ray.kernels.pack import pack, unpack
from flexgen_ray.kernels.prefix_attention import (
    attend_in_parts,
    attend_shared,
    merge_part,
    takes_parts,
)
from flexgen_ray.layout.pages import Home, SharedHome, page_table, pages_of
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.prefix_tiles import User, prefix_tiles
from flexgen_ray.layout.rows import (
    MemoKey,
    PlacedRows,
    Row,
    first_attended,
    may_attend_apart,
    token_runs,
)
from flexgen_ray.runtime.passes import DecodeRows, find_decode_runs
from flexgen_ray.schedule.ops import Op
from flexgen_ray.store.activations import CellBuffers
from flexgen_ray.store.kv_cache import KVCache, streamed_home, streamed_table
from flexgen_ray.store.tiers import TORCH_DTYPE

_Runs = list[DecodeRows]
_RESIDENT_RUNS = MemoKey[_Runs]()
_STREAMED_RUNS = MemoKey[_Runs]()
_SHARING = MemoKey[tuple[Tensor, Tensor]]()
_MERGED = MemoKey[tuple[Tensor, Tensor]]()
_PREFIX_TABLES = MemoKey[Tensor]()
_PROMPT_TABLES = MemoKey[Tensor]()
_CHOOSING_TABLES = MemoKey[Tensor]()


class _Tile(NamedTuple):
    """Tokens of a prefix that are attended at a time, from `first` to before `last`.

    rows: (packed tokens, places, starts) of some of the decoding rows that attend any of them;
    starts: the first that each attends, counted from `first`, or None for all.
    """

    shared: SharedHome
    first: int
    last: int
    rows: list[tuple[Tensor, Tensor, Tensor | None]]


_TILES = MemoKey[list[_Tile]]()


class DeviceAttention:
    """Attention of one stage's layers on the device; kernel: attends decoding rows there.

    sinks: by layer, float32 [heads]; {} for a model without. A row's own tokens take them in, so
    that they count once however many parts it has.
    """

    def __init__(
        self,
        plan: StagePlan,
        cache: KVCache,
        device: torch.device,
        kernel: HostKernel,
        sinks: Mapping[int, Tensor],
    ) -> None:
        self._plan = plan
        self._config = plan.config
        self._cache = cache
        self._device = device
        self._kernel = kernel
        self._sinks = sinks
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
            lens = [placed.length(row) for row in rows]
            make = partial(self._choosing_tables, placed, rows)
            tables = placed.memoized(_CHOOSING_TABLES, make, first)
            tokens = attention.span(lens, window)
            k = attention.gather_pages(keys, tables, tokens)
            q = torch.cat([work.q[row.tokens] for row in rows])
            k, lens = self._dequantized(k), [end - tokens.start for end in lens]
            selected = attention.select_tokens(
                q, k, lens, self._sparsity, window=window, sinks=self._sinks.get(op.layer)
            )
            cache.store_choice(op, first, selected.tokens + tokens.start)
            self._weights[op.cell_slot].append(selected.weights)

    def attend(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """ATTEND_DEVICE: put the attention of resident and streamed rows where FINISH or OUT
        takes it.

        A prompt's chunk attends what its row had, and itself; then it is appended. Within a window
        its tokens may take the pages of those that its first ones attend.
        """
        cache, target = self._cache, work.attention(placed.rows)
        if self._plan.is_sparse:
            self._attend_chosen(op, placed, target)
        else:
            cache.append_streamed(op, placed, work)
        for key, rows, pool in (
            (_RESIDENT_RUNS, placed.resident, cache.device_pages(op)),
            (_STREAMED_RUNS, placed.streamed, cache.streamed_pages(op)),
        ):
            if key is _RESIDENT_RUNS or not self._plan.is_sparse:
                for run in placed.memoized(key, partial(self._runs, placed, key)):
                    sums = work.own_sums[run.places] if placed.sharing else None
                    self._decode(op, work.q[run.tokens], pool, run, target[run.tokens], sums)
            home = placed.home if key is _RESIDENT_RUNS else partial(streamed_home, placed)
            self._prefill_rows(op, placed, work, rows, pool, home)
        if placed.sharing:
            self._attend_prefixes(op, placed, work)
        cache.append_resident(op, placed, work, prefills=True)

    def _runs(self, placed: PlacedRows, key: MemoKey[_Runs]) -> _Runs:
        """Runs of decoding rows on the device, or of those that are streamed to it."""
        if key is _STREAMED_RUNS:
            table = partial(streamed_table, placed)
            return find_decode_runs(placed, placed.streamed, table, self._device)
        return find_decode_runs(
            placed,
            placed.resident,
            lambda row: placed.table(row, placed.home(row)),
            self._device,
        )

    def _decode(
        self,
        op: Op,
        q: Tensor,
        pool: Tensor,
        run: DecodeRows,
        out: Tensor,
        sums: Tensor | None,
    ) -> None:
        """Attend a run's rows into out, [rows, heads, head_dim]; sums: as HostAttention's lse."""
        window, sinks = self._config.window(op.layer), self._sinks.get(op.layer)
        if self._on_gpu is not None:
            most = max(run.lens)
            self._on_gpu.attend_pages(
                q, *pool, run.tables, run.num_tokens, out, most=most, window=window, lse=sums,
                sinks=sinks,
            )  # fmt: skip
            return
        how = self._sparsity, window
        for some in rows_together(self._kernel, len(run.lens), self._plan.rows_at_a_time):
            tables, lens = run.tables[some], run.lens[some]
            lse = None if sums is None else sums[some]
            self._kernel(q[some], pool[0], pool[1], tables, lens, out[some], *how, lse, sinks)

    def _attend_prefixes(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """Attend the prefixes that decoding rows share, those of rows that the host attends too.

        A tile of a prefix is read once for all of its rows.
        """
        count, window = len(placed.places), self._config.window(op.layer)
        out, sums = work.of_prefixes[:count], work.prefix_sums[:count]
        out.zero_()
        sums.fill_(-torch.inf)
        for tile in placed.memoized(_TILES, lambda: self._find_tiles(placed, window), window):
            k, v = self._prefix_tokens(op, placed, tile.shared, tile.first, tile.last)
            k, v = self._dequantized(k), self._dequantized(v)
            for tokens, places, starts in tile.rows:
                q = work.q[tokens] if placed.rows.are_single else work.sharing_q[places]
                merge_part(out, sums, places, attend_shared(q, k, v, starts))

    def _find_tiles(self, placed: PlacedRows, window: int | None) -> list[_Tile]:
        """Tiles of all prefixes that decoding rows of a pass attend, each with some of the rows."""
        return [
            _Tile(shared, first, last, [self._chunk(placed, chunk) for chunk in chunks])
            for shared, first, last, chunks in prefix_tiles(placed, self._plan, window)
        ]

    def _chunk(self, placed: PlacedRows, users: list[User]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Part of _Tile.rows for these rows; users: each with the first token that it attends."""
        tokens = place_indices([row.offset for row, _ in users], self._device)
        places = place_indices([placed.places[row.slot] for row, _ in users], self._device)
        starts = [start for _, start in users]
        return tokens, places, place_indices(starts, self._device) if any(starts) else None

    def _prefix_tokens(
        self, op: Op, placed: PlacedRows, shared: SharedHome, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, tokens, width] of a prefix's tokens; those before it count."""
        pool, home = self._cache.prefix_pages(op, placed, shared)
        tokens = slice(first - shared.start, last - shared.start)
        # In all layers of a kind, and in all tiles, the same table.
        table = home.table(pages_of(shared.end - shared.start))[None]
        tables = placed.memoized(_PREFIX_TABLES, lambda: self._on_device(table), shared.number)
        k, v = (attention.gather_pages(plane, tables, tokens)[0] for plane in pool)
        return k, v

    def keep_queries(self, placed: PlacedRows, work: CellBuffers) -> None:
        """Keep the queries of rows that share prefixes, if attention may replace them."""
        if placed.sharing and not placed.rows.are_single:
            tokens, places = placed.memoized(_SHARING, lambda: self._sharing_rows(placed))
            work.sharing_q[places] = work.q[tokens]

    def merge(self, placed: PlacedRows, work: CellBuffers) -> None:
        """Merge what decoding rows attended of prefixes with the attention to their own tokens."""
        if not placed.sharing:
            return
        # Tensors of its own, for FINISH and OUT run on another stream than ATTEND_DEVICE.
        tokens, places = placed.memoized(_MERGED, lambda: self._sharing_rows(placed))
        target = work.attention(placed.rows)
        out, sums = work.of_prefixes, work.prefix_sums
        merge_part(out, sums, places, (target[tokens].float(), work.own_sums[places]))
        target[tokens] = out[places].to(target.dtype)

    def _attend_chosen(self, op: Op, placed: PlacedRows, target: Tensor) -> None:
        """Weigh the values that LOAD_VALUES brought for streamed rows that decode."""
        runs = placed.choosing_runs(self._plan.rows_at_a_time)
        for (first, rows), weights in zip(runs, self._weights.pop(op.cell_slot, ()), strict=True):
            values = self._cache.chosen_values(op, first, len(rows), weights.shape[-1])
            attended = attention.weighted_sum(weights, self._dequantized(values))
            for place, tokens in token_runs(rows):
                count = tokens.stop - tokens.start
                target[tokens].copy_(attended[place : place + count])

    def _sharing_rows(self, placed: PlacedRows) -> tuple[Tensor, Tensor]:
        """Packed tokens of the decoding rows that share prefixes, and their places."""
        tokens = [row.offset for row in placed.sharing]
        places = [placed.places[row.slot] for row in placed.sharing]
        return place_indices(tokens, self._device), place_indices(places, self._device)

    def _prefill_rows(
        self,
        op: Op,
        placed: PlacedRows,
        work: CellBuffers,
        rows: list[Row],
        pool: Tensor,
        home: Callable[[Row], Home],
    ) -> None:
        """Attend prompts' chunks; rows that share prefixes follow each other, which read them once.

        A row's first chunk needs no cache of its own: all its keys are new.
        """
        window, target = self._config.window(op.layer), work.attention(placed.rows)
        prompts = [(tuple(it.number for it in placed.prefixes(row)), row) for row in rows]
        loaded: tuple[tuple, tuple[Tensor, Tensor] | None] = (), None
        for chain, row in sorted((it for it in prompts if it[1].is_prefill), key=itemgetter(0)):
            first = first_attended(row, window)
            if loaded[0] != (chain, first):
                loaded = (chain, first), self._prefix_before(op, placed, row, first)
            own = max(0, first - row.before)
            k, v = work.cached[row.tokens].permute(1, 2, 0, 3)
            if own < row.position:
                table = partial(self._own_table, row, home)
                tables = placed.memoized(_PROMPT_TABLES, table, row.slot)
                tokens = slice(own, row.position)
                before = [attention.gather_pages(plane, tables, tokens)[0] for plane in pool]
                k, v = torch.cat((before[0], k), 1), torch.cat((before[1], v), 1)
            k, v = self._dequantized(k), self._dequantized(v)
            q, out = work.q[row.tokens], target[row.tokens]
            if loaded[1] and takes_parts(self._device) and may_attend_apart(row, window):
                # Prefixes needn't be copied beside the chunk.
                attend_in_parts(q, loaded[1], (k, v), out, self._sinks.get(op.layer))
                continue
            if loaded[1]:
                k, v = (torch.cat(parts, 1) for parts in zip(loaded[1], (k, v), strict=True))
            self._prefill(op, q, k, v, k.shape[1] - row.num_new_tokens, out)

    def _prefix_before(
        self, op: Op, placed: PlacedRows, row: Row, first: int
    ) -> tuple[Tensor, Tensor] | None:
        """Keys and values [kv_heads, tokens, head_dim] of a row's prefixes from a token on."""
        parts = [
            self._prefix_tokens(op, placed, shared, max(first, shared.start), shared.end)
            for shared in placed.prefixes(row)
            if first < shared.end
        ]
        if not parts:
            return None
        k, v = parts[0]
        if len(parts) > 1:
            k, v = (torch.cat(planes, 1) for planes in zip(*parts, strict=True))
        return self._dequantized(k), self._dequantized(v)

    def _prefill(self, op: Op, q: Tensor, k: Tensor, v: Tensor, start: int, out: Tensor) -> None:
        """Attend a prompt's chunk into out, [tokens, heads, head_dim].

        k, v: [kv_heads, start + tokens, head_dim]; start: tokens before it.
        """
        tokens, window, sinks = k.shape[1], self._config.window(op.layer), self._sinks.get(op.layer)
        sharing, some = q.shape[1] // len(k), self._plan.heads_at_a_time(tokens)
        tile = self._plan.queries_at_a_time(tokens)
        for head in range(0, len(k), some):
            these, queries = (
                slice(head, head + some),
                slice(head * sharing, (head + some) * sharing),
            )
            own = None if sinks is None else sinks[queries]
            attended = attention.prefill(
                q[:, queries], k[these], v[these], start, tile, window, own
            )
            out[:, queries].copy_(attended)

    def _own_table(self, row: Row, home: Callable[[Row], Home]) -> Tensor:
        """Pages on the device of the tokens that a prompt's row had, [1, pages]."""
        return self._on_device(home(row).table(pages_of(row.position))[None])

    def _choosing_tables(self, placed: PlacedRows, rows: list[Row]) -> Tensor:
        """Pages on the device of what streamed rows choose among, [rows, pages]."""
        return self._on_device(page_table([streamed_table(placed, row) for row in rows]))

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
