"""The KV cache of a stage's rows, in pages on three tiers, and the moves between them.

A row's pages lie on one tier, its home (layout/pages.py), with the same numbers in every layer of a
kind. In memory a tier's pages of a kind are one tensor [layer, key or value, page, kv_head, token,
width]; a vector of `width` elements is one token's key, or value, in one head, as it is computed or
as it is quantized (quant/packing.py). On disk a page is [key or value, kv_head, token, width], in
whole sectors; a row's newest page waits in a tail in host memory until it is full. Layers with an
attention window keep the pages that it touches: a token then overwrites one that lies behind it.

One decoding step of a row at position 37, by the row's division:

    division   before the step          the step
    gpu        37 tokens on the device  PROJECT appends token 37 there (append_resident; of prompts
                                        ATTEND_DEVICE does, when it has attended);
                                        ATTEND_DEVICE attends it in place
    attended   37 tokens in memory      STORE_CACHE copies token 37 and the query to the host,
                                        APPEND_CACHE appends it; ATTEND_HOST attends it in place
    streamed   37 tokens in memory      LOAD_CACHE copies three pages to the streaming slot,
                                        ATTEND_DEVICE appends token 37 to the slot
                                        (append_streamed) and attends it; STORE_CACHE and
                                        APPEND_CACHE bring token 37 to its place in memory
    disk       32 tokens in two pages   READ_CACHE reads both pages into a host slot, LOAD_CACHE
               on disk, 5 in the tail   puts them and the tail into the streaming slot; then as
                                        streamed, but APPEND_CACHE appends to the tail. The step at
                                        position 47 fills it: WRITE_CACHE writes a third page

New tokens of a prompt that fill pages are put into that layout on the device, and STORE_CACHE
brings them to their homes; APPEND_CACHE places the others.

With sparse attention LOAD_CACHE brings only keys of decoding rows. CHOOSE then appends the new key
and selects tokens, GATHER_VALUES puts their values side by side on the host, and LOAD_VALUES copies
them to the device.

Knows rows, pages and bytes; not how attention is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from flexgen_ray.layout.pages import PAGE_TOKENS, Home, SharedHome, page_table
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import (
    MemoKey,
    Piece,
    PlacedRows,
    Row,
    cut_at_pages,
    streamed_pages_of,
)
from flexgen_ray.layout.sizes import CHOICE_BYTES, arriving_bytes, new_kv_bytes
from flexgen_ray.schedule.ops import CELL_SLOTS, Op
from flexgen_ray.store import link
from flexgen_ray.store.activations import CellBuffers
from flexgen_ray.store.disk import Region
from flexgen_ray.store.new_tokens import NewTokens, append_tokens, as_pages, page_copies
from flexgen_ray.store.tiers import TORCH_DTYPE, MemoryTier, Tiers

# New tokens of a pass and their places, for all layers.
_RESIDENT_TOKENS = MemoKey[NewTokens]()
_STREAMED_TOKENS = MemoKey[NewTokens]()
_HOST_TOKENS = MemoKey[NewTokens]()


class KVCache:
    """The KV cache of a stage's layers; methods are named after the ops they run."""

    def __init__(self, plan: StagePlan, tiers: Tiers) -> None:
        self.plan = plan
        self._dtype = torch.uint8 if plan.policy.cache_bits else TORCH_DTYPE[plan.dtype]
        self._width = plan.vector_bytes // self._dtype.itemsize
        self._gpu, self._cpu, self._disk_layers = self._allocate_layers(tiers)
        self._streamed = self._allocate_pages(
            tiers.gpu, "cache in flight", CELL_SLOTS, plan.slot_pages + plan.space.prefix_slot
        )
        # A row from disk, in its layout there; a lane of its own fills and empties it, in order.
        memory = tiers.gpu.allocate("cache in flight", arriving_bytes(plan))
        self._arriving = memory.view(-1, plan.disk_page_bytes) if memory.nbytes else None
        self._allocate_disk(tiers)
        self._new = self._allocate_new(tiers.cpu)
        choices = (
            CELL_SLOTS, plan.choosing_rows, plan.config.num_kv_heads, plan.max_kept_tokens,
        )  # fmt: skip
        self._chosen_values, self._streamed_values = (
            self._allocate(tier, "cache in flight", (*choices, self._width))
            for tier in (tiers.cpu, tiers.gpu)
        )
        nbytes = torch.Size(choices).numel() * CHOICE_BYTES
        memory = tiers.cpu.allocate("cache in flight", nbytes)
        self._chosen = memory.view(torch.int32).view(choices)
        vectors = (CELL_SLOTS, plan.attended_rows, plan.config.num_heads, plan.config.head_dim)
        nbytes = torch.Size(vectors).numel() * plan.element_bytes
        self._host_query, self.host_attention = (
            tiers.cpu.allocate("host attention", nbytes).view(TORCH_DTYPE[plan.dtype]).view(vectors)
            for _ in range(2)
        )
        # Logarithms of the sums of exp(score), by which results merge with those of prefixes.
        rows = plan.attended_rows if plan.merges_parts else 0
        sums = CELL_SLOTS, rows, plan.config.num_heads
        memory = tiers.cpu.allocate("host attention", 4 * prod(sums))
        self.host_sums = memory.view(torch.float32).view(sums)

    def device_pages(self, op: Op) -> Tensor:
        """[2, pages, kv_heads, PAGE_TOKENS, width]: pages of the op's layer on the device."""
        return self._gpu[op.layer]

    def host_pages(self, op: Op) -> Tensor:
        """[2, pages, kv_heads, PAGE_TOKENS, width]: pages of the op's layer in host memory."""
        return self._cpu[op.layer]

    def streamed_pages(self, op: Op) -> Tensor:
        """[2, pages, kv_heads, PAGE_TOKENS, width]: the cell's streaming slot.

        Pages of prefixes follow those of rows.
        """
        return self._streamed[op.cell_slot]

    def prefix_pages(self, op: Op, placed: PlacedRows, shared: SharedHome) -> tuple[Tensor, Home]:
        """Tensor of pages on the device, as device_pages, and those of a prefix among them."""
        home = shared.home.on("gpu")
        if home is None:
            return self.streamed_pages(op), placed.loaded_prefixes[shared.number]
        return self.device_pages(op), home

    def append_resident(
        self, op: Op, placed: PlacedRows, work: CellBuffers, prefills: bool
    ) -> None:
        """Append new keys and values of rows whose cache lies on the device.

        prefills: append those of the rows that prefill, or else of the rows that decode.
        """
        pool = self.device_pages(op)

        def make() -> NewTokens:
            rows = (row for row in placed.resident if row.is_prefill is prefills)
            return NewTokens(_packed_pieces(placed, rows, placed.home), pool)

        append_tokens(pool, placed.memoized(_RESIDENT_TOKENS, make, prefills), work.cached)

    def append_streamed(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """Append new keys and values of decoding rows to what LOAD_CACHE brought."""
        pool = self.streamed_pages(op)

        def make() -> NewTokens:
            rows = (row for row in placed.streaming if not row.is_prefill)
            return NewTokens(_packed_pieces(placed, rows, partial(streamed_home, placed)), pool)

        append_tokens(pool, placed.memoized(_STREAMED_TOKENS, make), work.cached)

    def read(self, op: Op, placed: PlacedRows) -> None:
        """READ_CACHE: read the full pages of rows on disk into the cell's host slot."""
        for at, region in self._disk_runs(op, placed, placed.full_before):
            region.read_into(self._in[op.cell_slot, at])

    def load(self, op: Op, placed: PlacedRows) -> None:
        """LOAD_CACHE: copy the past tokens of every streamed row into the cell's device slot.

        Prefixes in host memory are copied, too. Of rows whose values are chosen later only keys
        are. Pages are copied whole, neighbouring ones together.
        """
        slot, host = self._streamed[op.cell_slot], self.host_pages(op)
        for place, page, count, prefills in (*placed.streamed_copies, *placed.prefix_copies):
            for plane in range(self._loaded_planes(prefills)):
                source = host[plane, page : page + count]
                link.copy_across(slot[plane, place : place + count], source)
        arrived = 0
        for row in placed.on_disk:
            if row.position:
                self._load_from_disk(op, placed, row, arrived)
            first, last = placed.full_before(row)
            arrived += last - first

    def _loaded_planes(self, prefills: bool) -> int:
        """Number of [keys, values] that LOAD_CACHE copies: both, or only the keys."""
        return 2 if prefills or not self.plan.is_sparse else 1

    def store_choice(self, op: Op, first: int, tokens: Tensor) -> None:
        """CHOOSE: copy the indices of chosen tokens to the host.

        first: number of chosen rows before; tokens: [rows, kv_heads, chosen].
        """
        target = _prefix_view(self._chosen[op.cell_slot], first, tokens.shape)
        link.copy_across(target, tokens.int())

    def gather_values(self, op: Op, placed: PlacedRows) -> None:
        """GATHER_VALUES: gather the chosen tokens' values side by side in the cell's host slot."""
        vectors = self.host_pages(op)[1].reshape(-1, self._width)
        kv_heads = self.plan.config.num_kv_heads
        for first, rows in placed.choosing_runs(self.plan.rows_at_a_time):
            shape = self._chosen_shape(op, placed, rows)
            tokens = _prefix_view(self._chosen[op.cell_slot], first, shape[:-1]).long()
            values = _prefix_view(self._chosen_values[op.cell_slot], first, shape)
            tables = page_table([placed.table(row, placed.home(row)) for row in rows])
            pages = torch.from_numpy(tables).long()
            page = pages[torch.arange(len(rows))[:, None, None], tokens // PAGE_TOKENS]
            heads = torch.arange(kv_heads)[None, :, None]
            lines = (page * kv_heads + heads) * PAGE_TOKENS + tokens % PAGE_TOKENS
            torch.index_select(vectors, 0, lines.flatten(), out=values.view(-1, self._width))

    def load_values(self, op: Op, placed: PlacedRows) -> None:
        """LOAD_VALUES: copy the gathered values to the device."""
        for first, rows in placed.choosing_runs(self.plan.rows_at_a_time):
            shape = self._chosen_shape(op, placed, rows)
            values = _prefix_view(self._chosen_values[op.cell_slot], first, shape)
            link.copy_across(
                _prefix_view(self._streamed_values[op.cell_slot], first, shape), values
            )

    def chosen_values(self, op: Op, first: int, count: int, num_tokens: int) -> Tensor:
        """[count, kv_heads, num_tokens, width]: loaded values of rows, from one row on."""
        shape = (count, self.plan.config.num_kv_heads, num_tokens, self._width)
        return _prefix_view(self._streamed_values[op.cell_slot], first, shape)

    def _chosen_shape(self, op: Op, placed: PlacedRows, rows: list[Row]) -> tuple[int, ...]:
        """Shape of the chosen values of a run, in which each row has as many as the longest."""
        num_tokens = self.plan.kept_tokens(op.layer, max(map(placed.length, rows)))
        return len(rows), self.plan.config.num_kv_heads, num_tokens, self._width

    def store(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """STORE_CACHE: copy new keys and values of rows off the device to the host, and queries.

        New tokens that fill pages go home to host memory, or to the slot from which they are
        written to disk; the others, and queries of rows that the host attends, to host slots.
        """
        if self._stores_rows(placed):
            target = self._new_rows(op, placed.num_loose)
            for place, tokens in placed.loose_runs:
                source = work.qkv[tokens]
                link.copy_across(target[place : place + len(source)], source)
            return
        self._store_pages(op, placed, work)
        target = self._new_kv(op, placed)
        for place, tokens in placed.loose_runs:
            source = work.cached[tokens]
            _copy_dense(target[place : place + len(source)], source)
        for place, tokens in placed.attended_runs:
            source = work.q[tokens]
            _copy_dense(self._host_query[op.cell_slot, place : place + len(source)], source)

    def _store_pages(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """Bring new tokens that fill pages to host memory, or to the slot of pages for the disk."""
        pool = self.host_pages(op)
        for piece in placed.whole:
            if placed.is_on_disk(piece.row):
                self._store_for_disk(op, placed, piece, work)
                continue
            for tokens, pages in page_copies(piece, placed.host_home(piece.row), piece.offset):
                source = as_pages(work.cached[tokens])
                if link.crosses_link(pool, source):
                    source = source.contiguous()
                for target, plane in zip(pool[:, pages], source, strict=True):
                    link.copy_across(target, plane)

    def _store_for_disk(self, op: Op, placed: PlacedRows, piece: Piece, work: CellBuffers) -> None:
        """Bring whole pages to the outgoing slot, where the planes of a page lie together."""
        at = self._out_place(placed, piece)
        target = self._out[op.cell_slot, at : at + piece.count // PAGE_TOKENS]
        source = as_pages(work.cached[piece.tokens]).transpose(0, 1)
        if not link.crosses_link(target, source):
            self._tokens_of(target).copy_(source)
            return
        dense = torch.empty_like(target, device=source.device)
        self._tokens_of(dense).copy_(source)
        link.copy_across(target, dense)

    def _out_place(self, placed: PlacedRows, piece: Piece) -> int:
        """Place in the outgoing slot of the first page that a piece of a row on disk fills."""
        before = 0
        for row in placed.on_disk:
            first, last = placed.filled_by(row)
            if row.slot == piece.row.slot:
                return before + piece.position // PAGE_TOKENS - first
            before += last - first
        raise AssertionError(f"{piece} is not of a row on disk")

    def append(self, op: Op, placed: PlacedRows) -> None:
        """APPEND_CACHE: append loose tokens to rows in host memory, and to tails."""
        kv, pool = self._new_kv(op, placed), self.host_pages(op)

        def make() -> NewTokens:
            pairs = [pair for pair in placed.loose_places if not placed.is_on_disk(pair[0].row)]
            return NewTokens([(it, placed.host_home(it.row), start) for it, start in pairs], pool)

        append_tokens(pool, placed.memoized(_HOST_TOKENS, make), kv)
        for piece, start in placed.loose_places if placed.on_disk else ():
            if placed.is_on_disk(piece.row):
                self._append_to_tail(op, placed, piece, kv[start : start + piece.count])

    def queries(self, op: Op, placed: PlacedRows) -> Tensor:
        """Queries on the host of the rows that the host attends, [rows, heads, head_dim]."""
        count = len(placed.attended)
        if not self._stores_rows(placed):
            return self._host_query[op.cell_slot, :count]
        places = placed.attended_places
        rows = self._new_rows(op, placed.num_loose)[:, : self.plan.config.q_size]
        rows = rows.unflatten(-1, self._host_query.shape[2:])
        first = places[0]
        if places == list(range(first, first + count)):
            return rows[first : first + count]
        return rows[torch.tensor(places)]

    def _stores_rows(self, placed: PlacedRows) -> bool:
        """True if queries, keys and values leave the device side by side, as they were computed.

        This takes one copy. Of prompts only keys and values are copied: they have many more tokens.
        """
        return self.plan.stored_rows > 0 and placed.rows.are_single

    def _new_rows(self, op: Op, count: int) -> Tensor:
        """View of the cell's host slot as queries, keys and values side by side, [count, …]."""
        width = self.plan.qkv_size
        return self._new[op.cell_slot, : count * width].view(count, width)

    def _new_kv(self, op: Op, placed: PlacedRows) -> Tensor:
        """Loose keys and values in the cell's host slot, [tokens, 2, kv_heads, width]."""
        count = placed.num_loose
        shape = 2, self.plan.config.num_kv_heads, self._width
        if self._stores_rows(placed):
            return self._new_rows(op, count)[:, self.plan.config.q_size :].unflatten(-1, shape)
        return self._new[op.cell_slot, : count * prod(shape)].view(count, *shape)

    def write(self, op: Op, placed: PlacedRows) -> None:
        """WRITE_CACHE: write the pages that this pass filled to disk."""
        for at, region in self._disk_runs(op, placed, placed.filled_by):
            region.write(self._out[op.cell_slot, at])

    def _append_to_tail(self, op: Op, placed: PlacedRows, piece: Piece, new: Tensor) -> None:
        """Append tokens of one page to a row's tail; copy it to the outgoing slot if it is full.

        new: keys and values, [tokens, 2, kv_heads, width].
        """
        tail = self._tails[self._layer(op), placed.home(piece.row).tail]
        start = piece.position % PAGE_TOKENS
        target = self._tokens_of(tail)[:, :, start : start + piece.count]
        target.copy_(new.permute(1, 2, 0, 3))
        if start + piece.count == PAGE_TOKENS:
            self._out[op.cell_slot, self._out_place(placed, piece)] = tail

    def _load_from_disk(self, op: Op, placed: PlacedRows, row: Row, arrived: int) -> None:
        """Copy a row's full pages from the cell's host slot, and the rest from its tail.

        arrived: number of pages of other rows before it in the host slot.
        """
        first, last = placed.full_before(row)
        pages, place = last - first, placed.streamed_pages[row.slot]
        sources = [(self._in[op.cell_slot, arrived : arrived + pages], place)]
        tail = self._tails[self._layer(op), placed.home(row).tail][None]
        sources.append((tail[: row.position % PAGE_TOKENS > 0], place + pages))
        for source, at in sources:
            if self._arriving is not None:
                # Only contiguous copies cross without being staged, so planes come together.
                dense = self._arriving[at - place : at - place + len(source)]
                link.copy_across(dense, source)
                source = dense
            target = self._streamed[op.cell_slot, :, at : at + len(source)]
            target.copy_(self._tokens_of(source).transpose(0, 1))

    def _tokens_of(self, pages: Tensor) -> Tensor:
        """View uint8 pages [..., page_bytes] as [..., 2, kv_heads, tokens, width]."""
        shape = (2, self.plan.config.num_kv_heads, PAGE_TOKENS, self._width)
        return pages.view(self._dtype)[..., : prod(shape)].unflatten(-1, shape)

    def _layer(self, op: Op) -> int:
        return op.layer - self.plan.stage.decoders.start

    def _disk_runs(
        self, op: Op, placed: PlacedRows, span: Callable[[Row], tuple[int, int]]
    ) -> Iterator[tuple[slice, Region]]:
        """(pages of a host slot, region on disk) of neighbouring pages on disk.

        span: the first and last of a row's pages that are moved; rows lie side by side in the slot.
        """
        nbytes, at, first_page = self.plan.disk_page_bytes, 0, self._disk_layers[op.layer]
        for row in placed.on_disk:
            for _, page, count in placed.home(row).runs(*span(row)):
                region = self._disk.part((first_page + page) * nbytes, count * nbytes)
                yield slice(at, at + count), region
                at += count

    def _allocate_layers(
        self, tiers: Tiers
    ) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, int]]:
        """{layer: its pages} on the device and in host memory, {layer: its first page on disk}."""
        plan, pages_before = self.plan, 0
        on_device: dict[int, Tensor] = {}
        on_host: dict[int, Tensor] = {}
        on_disk: dict[int, int] = {}
        for kind, (gpu, cpu, disk) in zip(plan.kinds, plan.space.all_pools, strict=True):
            layers = plan.layers_of(kind)
            device_pages = self._allocate_pages(tiers.gpu, "cache", len(layers), gpu)
            host_pages = self._allocate_pages(tiers.cpu, "cache", len(layers), cpu)
            on_device |= dict(zip(layers, device_pages, strict=True))
            on_host |= dict(zip(layers, host_pages, strict=True))
            on_disk |= {layer: pages_before + at * disk for at, layer in enumerate(layers)}
            pages_before += len(layers) * disk
        self._disk = tiers.disk.allocate("cache", pages_before * plan.disk_page_bytes)
        return on_device, on_host, on_disk

    def _allocate_pages(self, tier: MemoryTier, what: str, layers: int, pages: int) -> Tensor:
        shape = (
            layers, 2, pages, self.plan.config.num_kv_heads, PAGE_TOKENS, self._width,
        )  # fmt: skip
        return self._allocate(tier, what, shape)

    def _allocate_disk(self, tiers: Tiers) -> None:
        """Tails and slots in host memory of rows on disk."""
        plan, nbytes = self.plan, self.plan.disk_page_bytes
        shape = plan.num_decoder_layers, plan.space.disk_rows, nbytes
        self._tails = tiers.cpu.allocate("cache tails", prod(shape)).view(shape)
        flight = (2, CELL_SLOTS, plan.space.disk, nbytes)
        self._in, self._out = tiers.cpu.allocate("cache in flight", prod(flight)).view(flight)

    def _allocate_new(self, tier: MemoryTier) -> Tensor:
        """[cell slots, elements] on the host, for what STORE_CACHE brings: see _stores_rows."""
        nbytes = new_kv_bytes(self.plan)
        flat = tier.allocate("cache in flight", CELL_SLOTS * nbytes).view(self._dtype)
        return flat.view(CELL_SLOTS, nbytes // self._dtype.itemsize)

    def _allocate(self, tier: MemoryTier, what: str, shape: tuple[int, ...]) -> Tensor:
        nbytes = prod(shape) * self._dtype.itemsize
        return tier.allocate(what, nbytes).view(self._dtype).view(shape)


def _packed_pieces(
    placed: PlacedRows, rows: Iterable[Row], home: Callable[[Row], Home]
) -> list[tuple[Piece, Home, int]]:
    """Pieces of rows with their pages, and their places among the packed tokens."""
    pieces = ((row, piece) for row in rows for piece in cut_at_pages(row, placed.kind))
    return [(piece, home(row), piece.offset) for row, piece in pieces]


def streamed_home(placed: PlacedRows, row: Row) -> Home:
    """Pages of a streamed row in the streaming slot.

    They lie there in the order of its tokens, from the first that it attends on.
    """
    kind, start = placed.kind, placed.streamed_pages[row.slot]
    count, first = streamed_pages_of(row, kind), kind.first_page(row.position)
    pages = (start + (number - first) % count for number in range(count))
    return Home("gpu", tuple(pages), most=kind.most_pages)


def streamed_table(placed: PlacedRows, row: Row) -> np.ndarray:
    """Pages in the streaming slot of what a streamed row that decodes attends, as placed.table."""
    return placed.table(row, streamed_home(placed, row), in_slot=True)


def _prefix_view(slot: Tensor, first: int, shape: Sequence[int]) -> Tensor:
    """View of a slot's memory from row `first` on in a smaller shape.

    The view is contiguous, so that it crosses the link in one copy.
    """
    return slot[first : first + shape[0]].view(-1)[: prod(shape)].view(*shape)


def _copy_dense(target: Tensor, source: Tensor) -> None:
    """Copy to host memory; across the link without gaps, for which the source is copied first."""
    dense = source.contiguous() if link.crosses_link(target, source) else source
    link.copy_across(target, dense)
