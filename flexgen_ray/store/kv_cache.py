"""Keys and values of a block on three tiers, and what moves them.

Of each (layer, batch) the first slots live on the device, the next in host memory, the last on disk
(cost/placement.RowSplit). Memory holds [key or value, slot, kv_head, seq, width]. On disk a row is
a sequence of blocks [key or value, kv_head, token, width]; its newest tokens wait in a tail in host
memory until they fill a block. A vector of width elements is a head's key or value of one token, as
it is computed or packed (quant/packing.py). Layers that attend within a window keep all tokens, as
others do. Knows rows and bytes; not how attention is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from flexgen_ray.layout.placement import RowSplit
from flexgen_ray.layout.plan import CACHE_BLOCK_TOKENS, StagePlan
from flexgen_ray.layout.rows import PlacedRows, Row
from flexgen_ray.layout.sizes import CHOICE_BYTES
from flexgen_ray.schedule.ops import CELL_SLOTS, Op
from flexgen_ray.store.activations import CellBuffers
from flexgen_ray.store.disk import Region
from flexgen_ray.store.new_tokens import NewTokens, append_tokens, split_heads
from flexgen_ray.store.tiers import TORCH_DTYPE, Tiers


class KVCache:
    """The cache of a stage's layers and batches."""

    def __init__(self, plan: StagePlan, tiers: Tiers) -> None:
        self.plan = plan
        self._dtype = torch.uint8 if plan.policy.cache_bits else TORCH_DTYPE[plan.dtype]
        self._width = plan.vector_bytes // self._dtype.itemsize
        self._splits = plan.splits
        self._gpu = self._homes(tiers.gpu, "gpu")
        self._cpu = self._homes(tiers.cpu, "cpu")
        self._streamed = self._memory(tiers.gpu, "cache in flight", CELL_SLOTS, plan.streamed_rows)
        self._tails, self._disk = self._disk_homes(tiers)
        flight = (2, CELL_SLOTS, plan.disk_rows, plan.cache_blocks, plan.cache_block_bytes)
        nbytes = torch.Size(flight).numel()
        self._in, self._out = tiers.cpu.allocate("cache in flight", nbytes).view(flight)
        new = (CELL_SLOTS, 2, plan.stored_tokens, plan.config.num_kv_heads * self._width)
        self._new = self._typed(tiers.cpu, "cache in flight", new)
        kept = plan.max_kept_tokens
        choices = (CELL_SLOTS, plan.choosing_rows, plan.config.num_kv_heads, kept)
        self._kept = self._typed(tiers.cpu, "cache in flight", (*choices, self._width))
        nbytes = torch.Size(choices).numel() * CHOICE_BYTES
        self._chosen = tiers.cpu.allocate("cache in flight", nbytes).view(torch.int32).view(choices)
        vectors = (CELL_SLOTS, plan.attended_rows, plan.config.num_heads, plan.config.head_dim)
        nbytes = torch.Size(vectors).numel() * plan.element_bytes
        self.host_query, self.host_attention = (
            tiers.cpu.allocate("host attention", nbytes).view(TORCH_DTYPE[plan.dtype]).view(vectors)
            for _ in range(2)
        )

    def split(self, op: Op) -> RowSplit:
        return self._splits[op.layer, op.batch]

    def device_view(self, op: Op, first: int, last: int) -> Tensor:
        """[2, rows, kv_heads, seq, width] of slots first..last, resident on the device."""
        return self._gpu[op.layer, op.batch][:, first:last]

    def host_view(self, op: Op, first: int, last: int) -> Tensor:
        """The same of slots in host memory."""
        gpu = self.split(op).gpu
        return self._cpu[op.layer, op.batch][:, first - gpu : last - gpu]

    def streamed_view(self, op: Op, first: int, last: int) -> Tensor:
        """The same of places in the streaming slot."""
        return self._streamed[op.cell_slot][:, first:last]

    def append_resident(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """New keys and values of the rows that live on the device."""
        home = self._gpu[op.layer, op.batch]
        rows = [(row, row.slot) for row in placed.resident]
        append_tokens(
            home, placed.memoized("resident", partial(NewTokens, rows, home)), work.cached
        )

    def append_streamed(
        self, op: Op, placed: PlacedRows, work: CellBuffers, prefills: bool
    ) -> None:
        """New keys and values of the streamed rows that prefill, or of those that decode, next to
        what LOAD_CACHE brought."""
        home = self._streamed[op.cell_slot]
        rows = [
            (row, place)
            for row, place in placed.streamed
            if row.is_prefill is prefills and (row.position or not prefills)
        ]
        make = partial(NewTokens, rows, home)
        append_tokens(home, placed.memoized(f"streamed {prefills}", make), work.cached)

    def read(self, op: Op, placed: PlacedRows) -> None:
        """READ_CACHE: whole blocks of the rows on disk, into the cell's host slot."""
        for row, index in placed.on_disk:
            blocks = row.position // CACHE_BLOCK_TOKENS
            if blocks:
                self._region(op, index).read_into(self._in[op.cell_slot, index, :blocks])

    def load(self, op: Op, placed: PlacedRows) -> None:
        """LOAD_CACHE: the tokens so far of every streamed row, into the cell's device slot; their
        keys, if values are to be chosen.

        Decoding rows are attended together, as far as the longest: beyond a row's own tokens the
        slot has zeros, its home's or new ones, in place of what another row left there.
        """
        split, target = self.split(op), self._streamed[op.cell_slot]
        home = self._cpu[op.layer, op.batch]
        for index, place, count, past, prefills in placed.streamed_copies:
            parts, end = self._parts(prefills), past if prefills else placed.streamed_end
            source = home[parts, index : index + count]
            _copy_rows(target[parts, place : place + count], source, past, end)
        for row, place in placed.streamed:
            index, parts = row.slot - split.gpu - split.cpu, self._parts(row.is_prefill)
            if index >= 0 and row.position:
                self._load_from_disk(op, index, row.position, parts, target[parts, place])
                if not row.is_prefill and row.seq_len < placed.streamed_end:
                    target[parts, place, :, row.seq_len : placed.streamed_end].zero_()

    def _parts(self, prefills: bool) -> slice:
        """Keys and values, or keys only, of which LOAD_CACHE brings the past."""
        return slice(2 if prefills or not self.plan.is_sparse else 1)

    def store_choice(self, op: Op, first: int, tokens: Tensor) -> None:
        """CHOOSE: tells the host the tokens chosen of rows from a place on, [rows, heads, kept]."""
        told = _prefix_view(self._chosen[op.cell_slot], first, tokens.shape)
        told.copy_(tokens.int(), non_blocking=True)

    def gather_values(self, op: Op, placed: PlacedRows) -> None:
        """GATHER_VALUES: of the tokens chosen, side by side, into the cell's host slot."""
        split, home = self.split(op), self._cpu[op.layer, op.batch][1]
        for first, rows in placed.choosing_runs(self.plan.rows_at_a_time):
            shape = self._kept_shape(op, rows)
            tokens = _prefix_view(self._chosen[op.cell_slot], first, shape[:-1])
            values = _prefix_view(self._kept[op.cell_slot], first, shape)
            start = rows[0].slot - split.gpu
            # Rows in memory come before those on disk.
            count = max(0, min(len(rows), split.cpu - start))
            if count:
                vectors = home[start : start + count].flatten(0, 2)
                of_heads = torch.arange(0, len(vectors), home.shape[2]).view(count, -1, 1)
                lines = tokens[:count] + of_heads
                into = values[:count].view(-1, self._width)
                torch.index_select(vectors, 0, lines.flatten(), out=into)
            for row, chosen, into in zip(rows[count:], tokens[count:], values[count:], strict=True):
                self._gather_from_disk(op, row, chosen, into)

    def load_values(self, op: Op, placed: PlacedRows) -> None:
        """LOAD_VALUES: those, in the place of values of the rows' first tokens."""
        for first, rows in placed.choosing_runs(self.plan.rows_at_a_time):
            shape = self._kept_shape(op, rows)
            values = _prefix_view(self._kept[op.cell_slot], first, shape)
            _prefix_view(self._streamed[op.cell_slot][1], first, shape).copy_(
                values, non_blocking=True
            )

    def chosen_values(self, op: Op, first: int, count: int, kept: int) -> Tensor:
        """Those of so many rows from a place on: [rows, kv_heads, kept, width]."""
        shape = (count, self.plan.config.num_kv_heads, kept, self._width)
        return _prefix_view(self._streamed[op.cell_slot][1], first, shape)

    def _kept_shape(self, op: Op, rows: list[Row]) -> tuple[int, ...]:
        kept = self.plan.kept_tokens(op.layer, max(row.seq_len for row in rows))
        return len(rows), self.plan.config.num_kv_heads, kept, self._width

    def store(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """STORE_CACHE: new keys and values of rows off the device, queries of attended rows."""
        first, last = placed.first_off_device, placed.rows.num_tokens
        if first == last:
            return
        for target, source in zip(self._new[op.cell_slot], work.cached, strict=True):
            target[: last - first].copy_(source[first:last], non_blocking=True)
        for run in placed.attended_runs:
            places, tokens = self.vector_places(op, run)
            query = work.q[tokens].view(len(run), *self.host_query.shape[2:])
            self.host_query[op.cell_slot, places].copy_(query, non_blocking=True)

    def append(self, op: Op, placed: PlacedRows) -> None:
        """APPEND_CACHE: what STORE_CACHE brought, to its homes in host memory, tails included."""
        k, v = self._new[op.cell_slot]
        first = placed.first_off_device
        home = self._cpu[op.layer, op.batch]
        make = partial(NewTokens, placed.in_memory, home, first)
        append_tokens(home, placed.memoized("in memory", make), (k, v))
        for row, index in placed.on_disk:
            tokens = slice(row.offset - first, row.tokens.stop - first)
            heads = [split_heads(x[tokens], self._width) for x in (k, v)]
            self._append_blocks(op, row, index, torch.stack(heads))

    def vector_places(self, op: Op, run: list[Row]) -> tuple[slice, slice]:
        """Of a run of host-attended rows: places in the host's vectors, and packed tokens."""
        first = run[0].slot - self.split(op).gpu
        return slice(first, first + len(run)), slice(run[0].offset, run[0].offset + len(run))

    def write(self, op: Op, placed: PlacedRows) -> None:
        """WRITE_CACHE: the blocks that this pass filled, to disk."""
        for row, index in placed.on_disk:
            first, last = row.position // CACHE_BLOCK_TOKENS, row.seq_len // CACHE_BLOCK_TOKENS
            if first < last:
                offset = first * self.plan.cache_block_bytes
                self._region(op, index).write(self._out[op.cell_slot, index, first:last], offset)

    def _append_blocks(self, op: Op, row: Row, index: int, new: Tensor) -> None:
        """Through the tail into whole blocks of the cell's outgoing slot."""
        tail = self._tails[op.layer, op.batch][index]
        done = 0
        while done < row.num_new_tokens:
            block, start = divmod(row.position + done, CACHE_BLOCK_TOKENS)
            count = min(CACHE_BLOCK_TOKENS - start, row.num_new_tokens - done)
            self._tokens_of(tail)[:, :, start : start + count] = new[:, :, done : done + count]
            done += count
            if start + count == CACHE_BLOCK_TOKENS:
                self._out[op.cell_slot, index, block] = tail

    def _load_from_disk(self, op: Op, index: int, past: int, parts: slice, target: Tensor) -> None:
        """Whole blocks from the cell's host slot, the rest from the tail; target: one row's keys,
        values, or both."""
        blocks, rest = divmod(past, CACHE_BLOCK_TOKENS)
        whole = blocks * CACHE_BLOCK_TOKENS
        arrived, tail = (
            self._in[op.cell_slot, index, :blocks],
            self._tails[op.layer, op.batch][index],
        )
        if not self.plan.is_sparse:
            # One piece crosses without being waited for, and is put in order over there.
            arrived, tail = (x.to(target.device, non_blocking=True) for x in (arrived, tail))
        if blocks:
            tokens = self._tokens_of(arrived).permute(1, 2, 0, 3, 4)
            of_blocks = target[:, :, :whole].unflatten(2, (blocks, CACHE_BLOCK_TOKENS))
            of_blocks.copy_(tokens[parts])
        target[:, :, whole:past].copy_(self._tokens_of(tail)[parts, :, :rest])

    def _gather_from_disk(self, op: Op, row: Row, chosen: Tensor, into: Tensor) -> None:
        """The same for the values of chosen tokens, [kv_heads, kept]; new ones lie in the tail."""
        split = self.split(op)
        index = row.slot - split.gpu - split.cpu
        blocks = row.position // CACHE_BLOCK_TOKENS
        arrived = self._tokens_of(self._in[op.cell_slot, index, :blocks])[:, 1]
        tail = self._tokens_of(self._tails[op.layer, op.batch][index])[1]
        heads = torch.arange(len(chosen))[:, None].expand(chosen.shape)
        block, place = chosen.long() // CACHE_BLOCK_TOKENS, chosen.long() % CACHE_BLOCK_TOKENS
        into.copy_(tail[heads, place])
        past = block < blocks
        into[past] = arrived[block[past], heads[past], place[past]]

    def _tokens_of(self, blocks: Tensor) -> Tensor:
        """uint8 blocks [..., block_bytes] as [..., 2, kv_heads, tokens, width]."""
        shape = (2, self.plan.config.num_kv_heads, CACHE_BLOCK_TOKENS, self._width)
        used = torch.Size(shape).numel()
        return blocks.view(self._dtype)[..., :used].unflatten(-1, shape)

    def _region(self, op: Op, index: int) -> Region:
        nbytes = self.plan.cache_blocks * self.plan.cache_block_bytes
        return self._disk[op.layer, op.batch].part(index * nbytes, nbytes)

    def _homes(self, tier, name: str) -> dict[tuple[int, int], Tensor]:
        counts = {cell: getattr(split, name) for cell, split in self._splits.items()}
        nbytes = sum(counts.values()) * self.plan.row_bytes
        flat = tier.allocate("cache", nbytes).view(self._dtype)
        each = flat.split([n * self.plan.row_bytes // flat.itemsize for n in counts.values()])
        return {
            cell: part.view(self._shape(count))
            for (cell, count), part in zip(counts.items(), each, strict=True)
        }

    def _disk_homes(self, tiers: Tiers) -> tuple[dict, dict]:
        plan = self.plan
        block, row = plan.cache_block_bytes, plan.cache_blocks * plan.cache_block_bytes
        total = sum(split.disk for split in self._splits.values())
        tails = tiers.cpu.allocate("cache tails", total * block).view(total, block)
        region = tiers.disk.allocate("cache", total * row)
        tail_of, region_of, used = {}, {}, 0
        for cell, split in self._splits.items():
            tail_of[cell] = tails[used : used + split.disk]
            region_of[cell] = region.part(used * row, split.disk * row)
            used += split.disk
        return tail_of, region_of

    def _memory(self, tier, what: str, slots: int, rows: int) -> Tensor:
        return self._typed(tier, what, (slots, *self._shape(rows)))

    def _shape(self, rows: int) -> tuple[int, ...]:
        return 2, rows, self.plan.config.num_kv_heads, self.plan.max_seq_len, self._width

    def _typed(self, tier, what: str, shape: tuple[int, ...]) -> Tensor:
        nbytes = torch.Size(shape).numel() * self._dtype.itemsize
        return tier.allocate(what, nbytes).view(self._dtype).view(shape)


def _prefix_view(slot: Tensor, first: int, shape: Sequence[int]) -> Tensor:
    """The memory of a slot's rows from `first` on in a smaller shape: one piece, which crosses in
    one copy."""
    return slot[first : first + shape[0]].view(-1)[: prod(shape)].view(*shape)


def _copy_rows(target: Tensor, source: Tensor, past: int, end: int) -> None:
    """[1 or 2, rows, kv_heads, seq, width], of which the first `past` tokens count; zeros to `end`.

    Between host and device whole rows go, in contiguous copies: in pieces they would be staged.
    Beyond its tokens the source has zeros.
    """
    if target.device == source.device:
        target[:, :, :, :past].copy_(source[:, :, :, :past])
        if past < end:
            target[:, :, :, past:end].zero_()
    else:
        for to, of in zip(target, source, strict=True):
            to.copy_(of, non_blocking=True)
