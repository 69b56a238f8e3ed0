"""The KV cache of a stage's batches on three tiers, and the moves between them.

The slots of each (layer, batch) are divided (layout/placement.RowSplit): the first lie on the
device, the next in host memory, the last on disk. In memory the slots are one tensor [key or value,
slot, kv_head, seq, width]; a vector of `width` elements is one token's key, or value, in one head,
as it is computed or as it is quantized (quant/packing.py). On disk a row is a sequence of blocks of
CACHE_BLOCK_TOKENS (16) tokens, [key or value, kv_head, token, width]; its newest tokens wait in a
tail in host memory until they fill a block. Layers with an attention window keep all tokens, as
others do.

One decoding step of a row at position 37, by the division that the row's slot belongs to:

    division   before the step          the step
    gpu        37 tokens on the device  PROJECT appends token 37 there (append_resident);
                                        ATTEND_DEVICE attends it in place
    attended   37 tokens in memory      STORE_CACHE copies token 37 and the query to the host,
                                        APPEND_CACHE appends it; ATTEND_HOST attends it in place
    streamed   37 tokens in memory      LOAD_CACHE copies tokens 0..36 to the streaming slot,
                                        ATTEND_DEVICE appends token 37 to the slot
                                        (append_streamed) and attends it; STORE_CACHE and
                                        APPEND_CACHE bring token 37 to its place in memory
    disk       32 tokens in two blocks  READ_CACHE reads both blocks into a host slot, LOAD_CACHE
               on disk, 5 in the tail   puts them and the tail in order in the streaming slot; then
                                        as streamed, but APPEND_CACHE appends to the tail. The step
                                        at position 47 fills it: WRITE_CACHE writes a third block

With sparse attention LOAD_CACHE brings only keys of decoding rows. CHOOSE then appends the new key
and selects tokens, GATHER_VALUES puts their values side by side on the host, and LOAD_VALUES copies
them to the streaming slot.

Knows rows and bytes; not how attention is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from flexgen_ray.kernels.host_threads import HostThreads
from flexgen_ray.layout.placement import RowSplit
from flexgen_ray.layout.plan import CACHE_BLOCK_TOKENS, StagePlan
from flexgen_ray.layout.rows import MemoKey, PlacedRows, Row
from flexgen_ray.layout.sizes import CHOICE_BYTES, arriving_bytes, new_kv_bytes
from flexgen_ray.schedule.ops import CELL_SLOTS, Op
from flexgen_ray.store import link
from flexgen_ray.store.activations import CellBuffers
from flexgen_ray.store.disk import Region
from flexgen_ray.store.new_tokens import NewTokens, append_tokens
from flexgen_ray.store.tiers import TORCH_DTYPE, Tiers

# New tokens of a pass and their places, for all layers that divide their slots alike.
_RESIDENT_TOKENS = MemoKey[NewTokens]()
_STREAMED_TOKENS = MemoKey[NewTokens]()
_HOST_TOKENS = MemoKey[NewTokens]()


class KVCache:
    """The KV cache of a stage's layers and batches; methods are named after the ops they run.

    threads: number of threads that place prompts' keys and values in host memory.
    """

    def __init__(self, plan: StagePlan, tiers: Tiers, threads: int = 1) -> None:
        self.plan = plan
        self._threads = HostThreads(threads) if threads > 1 else None
        self._dtype = torch.uint8 if plan.policy.cache_bits else TORCH_DTYPE[plan.dtype]
        self._width = plan.vector_bytes // self._dtype.itemsize
        self._splits = plan.splits
        self._gpu = self._allocate_homes(tiers.gpu, "gpu")
        self._cpu = self._allocate_homes(tiers.cpu, "cpu")
        self._streamed = self._allocate_slots(
            tiers.gpu, "cache in flight", CELL_SLOTS, plan.streamed_rows
        )
        # A row from disk, in its layout there; a lane of its own fills and empties it, in order.
        arriving = arriving_bytes(plan), plan.cache_block_bytes
        memory = tiers.gpu.allocate("cache in flight", arriving[0])
        self._arriving = memory.view(-1, arriving[1]) if arriving[0] else None
        self._tails, self._disk = self._allocate_disk_homes(tiers)
        flight = (2, CELL_SLOTS, plan.disk_rows, plan.cache_blocks, plan.cache_block_bytes)
        nbytes = torch.Size(flight).numel()
        self._in, self._out = tiers.cpu.allocate("cache in flight", nbytes).view(flight)
        self._new = self._allocate_new(tiers.cpu)
        choices = (
            CELL_SLOTS, plan.choosing_rows, plan.config.num_kv_heads, plan.max_kept_tokens,
        )  # fmt: skip
        self._chosen_values = self._allocate(tiers.cpu, "cache in flight", (*choices, self._width))
        nbytes = torch.Size(choices).numel() * CHOICE_BYTES
        memory = tiers.cpu.allocate("cache in flight", nbytes)
        self._chosen = memory.view(torch.int32).view(choices)
        vectors = (CELL_SLOTS, plan.attended_rows, plan.config.num_heads, plan.config.head_dim)
        nbytes = torch.Size(vectors).numel() * plan.element_bytes
        self._host_query, self.host_attention = (
            tiers.cpu.allocate("host attention", nbytes).view(TORCH_DTYPE[plan.dtype]).view(vectors)
            for _ in range(2)
        )

    def split(self, op: Op) -> RowSplit:
        """Division of the slots of the op's layer and batch."""
        return self._splits[op.layer, op.batch]

    def device_view(self, op: Op, first: int, last: int) -> Tensor:
        """[2, rows, kv_heads, seq, width]: cache of slots first..last, on the device."""
        return self._gpu[op.layer, op.batch][:, first:last]

    def host_view(self, op: Op, first: int, last: int) -> Tensor:
        """[2, rows, kv_heads, seq, width]: cache of slots first..last, in host memory."""
        gpu = self.split(op).gpu
        return self._cpu[op.layer, op.batch][:, first - gpu : last - gpu]

    def streamed_view(self, op: Op, first: int, last: int) -> Tensor:
        """[2, rows, kv_heads, seq, width]: places first..last of the streaming slot."""
        return self._streamed[op.cell_slot][:, first:last]

    def append_resident(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """Append new keys and values of the rows whose cache lies on the device."""
        home = self._gpu[op.layer, op.batch]
        rows = [(row, row.slot) for row in placed.resident]
        append_tokens(
            home, placed.memoized(_RESIDENT_TOKENS, partial(NewTokens, rows, home)), work.cached
        )

    def append_streamed(
        self, op: Op, placed: PlacedRows, work: CellBuffers, prefills: bool
    ) -> None:
        """Append new keys and values of streamed rows to what LOAD_CACHE brought.

        prefills: append those of the rows that prefill, or else of the rows that decode.
        """
        home = self._streamed[op.cell_slot]
        rows = [
            (row, place)
            for row, place in placed.streamed
            if row.is_prefill is prefills and (row.position or not prefills)
        ]
        make = partial(NewTokens, rows, home)
        append_tokens(home, placed.memoized(_STREAMED_TOKENS, make, prefills), work.cached)

    def read(self, op: Op, placed: PlacedRows) -> None:
        """READ_CACHE: read the whole blocks of rows on disk into the cell's host slot."""
        for row, index in placed.on_disk:
            blocks = row.position // CACHE_BLOCK_TOKENS
            if blocks:
                self._region(op, index).read_into(self._in[op.cell_slot, index, :blocks])

    def load(self, op: Op, placed: PlacedRows) -> None:
        """LOAD_CACHE: copy the past tokens of every streamed row into the cell's device slot.

        Only the keys, for rows whose values are chosen later. Decoding rows are attended together,
        up to the length of the longest, so beyond a row's own tokens the slot is filled with zeros,
        in place of what another row left there.
        """
        split, target = self.split(op), self._streamed[op.cell_slot]
        home = self._cpu[op.layer, op.batch]
        for index, place, count, past, prefills in placed.streamed_copies:
            parts, end = self._loaded_parts(prefills), past if prefills else placed.streamed_end
            source = home[parts, index : index + count]
            _copy_rows(target[parts, place : place + count], source, past, end)
        for row, place in placed.streamed:
            index, parts = row.slot - split.gpu - split.cpu, self._loaded_parts(row.is_prefill)
            if index >= 0 and row.position:
                self._load_from_disk(op, index, row.position, parts, target[parts, place])
                if not row.is_prefill and row.seq_len < placed.streamed_end:
                    target[parts, place, :, row.seq_len : placed.streamed_end].zero_()

    def _loaded_parts(self, prefills: bool) -> slice:
        """Slice of [keys, values] that LOAD_CACHE copies: both, or only the keys."""
        return slice(2 if prefills or not self.plan.is_sparse else 1)

    def store_choice(self, op: Op, first: int, tokens: Tensor) -> None:
        """CHOOSE: copy the indices of chosen tokens to the host.

        first: place of the first row in the streaming slot; tokens: [rows, kv_heads, chosen].
        """
        target = _prefix_view(self._chosen[op.cell_slot], first, tokens.shape)
        link.copy_across(target, tokens.int())

    def gather_values(self, op: Op, placed: PlacedRows) -> None:
        """GATHER_VALUES: gather the chosen tokens' values side by side in the cell's host slot."""
        split, home = self.split(op), self._cpu[op.layer, op.batch][1]
        for first, rows in placed.choosing_runs(self.plan.rows_at_a_time):
            shape = self._chosen_shape(op, rows)
            tokens = _prefix_view(self._chosen[op.cell_slot], first, shape[:-1])
            values = _prefix_view(self._chosen_values[op.cell_slot], first, shape)
            start = rows[0].slot - split.gpu
            # Rows in memory come before those on disk.
            count = max(0, min(len(rows), split.cpu - start))
            if count:
                vectors = home[start : start + count].flatten(0, 2)
                # The first vector of each (row, head), to which the tokens are indices.
                starts = torch.arange(0, len(vectors), home.shape[2]).view(count, -1, 1)
                lines = tokens[:count] + starts
                into = values[:count].view(-1, self._width)
                torch.index_select(vectors, 0, lines.flatten(), out=into)
            for row, chosen, into in zip(rows[count:], tokens[count:], values[count:], strict=True):
                self._gather_from_disk(op, row, chosen, into)

    def load_values(self, op: Op, placed: PlacedRows) -> None:
        """LOAD_VALUES: copy the gathered values over the values of the rows' first tokens."""
        for first, rows in placed.choosing_runs(self.plan.rows_at_a_time):
            shape = self._chosen_shape(op, rows)
            values = _prefix_view(self._chosen_values[op.cell_slot], first, shape)
            link.copy_across(_prefix_view(self._streamed[op.cell_slot][1], first, shape), values)

    def chosen_values(self, op: Op, first: int, count: int, num_tokens: int) -> Tensor:
        """[count, kv_heads, num_tokens, width]: loaded values of rows from place `first` on."""
        shape = (count, self.plan.config.num_kv_heads, num_tokens, self._width)
        return _prefix_view(self._streamed[op.cell_slot][1], first, shape)

    def _chosen_shape(self, op: Op, rows: list[Row]) -> tuple[int, ...]:
        """Shape of the chosen values of a run, in which each row has as many as the longest."""
        num_tokens = self.plan.kept_tokens(op.layer, max(row.seq_len for row in rows))
        return len(rows), self.plan.config.num_kv_heads, num_tokens, self._width

    def store(self, op: Op, placed: PlacedRows, work: CellBuffers) -> None:
        """STORE_CACHE: copy new keys and values of rows off the device, and queries of rows that
        the host attends, to the cell's host slots."""
        first, last = placed.first_off_device, placed.rows.num_tokens
        if first == last:
            return
        if self._stores_rows(placed):
            link.copy_across(self._new_rows(op, last - first), work.qkv[first:last])
            return
        _copy_dense(self._new_kv(op, placed), work.cached[first:last])
        for run in placed.attended_runs:
            places, tokens = self.vector_places(op, run)
            _copy_dense(self._host_query[op.cell_slot, places], work.q[tokens])

    def append(self, op: Op, placed: PlacedRows) -> None:
        """APPEND_CACHE: append what STORE_CACHE brought to rows in host memory, and to tails."""
        first, kv = placed.first_off_device, self._new_kv(op, placed)
        home = self._cpu[op.layer, op.batch]
        make = partial(NewTokens, placed.in_memory, home, first)
        append_tokens(home, placed.memoized(_HOST_TOKENS, make), kv, self._threads)
        to_disk = []
        for row, index in placed.on_disk:
            tokens = slice(row.offset - first, row.tokens.stop - first)
            new = kv[tokens].permute(1, 2, 0, 3)
            to_disk.append(partial(self._append_blocks, op, row, index, new))
        if self._threads is not None and any(row.is_prefill for row, _ in placed.on_disk):
            self._threads.run(to_disk)
        else:
            for append in to_disk:
                append()

    def queries(self, op: Op, placed: PlacedRows, run: list[Row]) -> Tensor:
        """Queries on the host of a run of attended rows, [rows, heads, head_dim]."""
        if not self._stores_rows(placed):
            return self._host_query[op.cell_slot, self.vector_places(op, run)[0]]
        first = run[0].offset - placed.first_off_device
        rows = self._new_rows(op, first + len(run))[first:, : self.plan.config.q_size]
        return rows.unflatten(-1, self._host_query.shape[2:])

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
        """New keys and values in the cell's host slot, [tokens, 2, kv_heads, width]."""
        count = placed.rows.num_tokens - placed.first_off_device
        shape = 2, self.plan.config.num_kv_heads, self._width
        if self._stores_rows(placed):
            return self._new_rows(op, count)[:, self.plan.config.q_size :].unflatten(-1, shape)
        return self._new[op.cell_slot, : count * prod(shape)].view(count, *shape)

    def vector_places(self, op: Op, run: list[Row]) -> tuple[slice, slice]:
        """(places in host_attention, packed tokens) of a run of attended rows."""
        first = run[0].slot - self.split(op).gpu
        return slice(first, first + len(run)), slice(run[0].offset, run[0].offset + len(run))

    def write(self, op: Op, placed: PlacedRows) -> None:
        """WRITE_CACHE: write the blocks that this pass filled to disk."""
        for row, index in placed.on_disk:
            first, last = row.position // CACHE_BLOCK_TOKENS, row.seq_len // CACHE_BLOCK_TOKENS
            if first < last:
                offset = first * self.plan.cache_block_bytes
                self._region(op, index).write(self._out[op.cell_slot, index, first:last], offset)

    def _append_blocks(self, op: Op, row: Row, index: int, new: Tensor) -> None:
        """Append new tokens to a row's tail; copy the tail to the outgoing slot when it is full.

        new: keys and values, [2, kv_heads, tokens, width].
        """
        tail, done = self._tails[op.layer, op.batch][index], 0
        while done < row.num_new_tokens:
            block, start = divmod(row.position + done, CACHE_BLOCK_TOKENS)
            count = min(CACHE_BLOCK_TOKENS - start, row.num_new_tokens - done)
            self._tokens_of(tail)[:, :, start : start + count] = new[:, :, done : done + count]
            done += count
            if start + count == CACHE_BLOCK_TOKENS:
                self._out[op.cell_slot, index, block] = tail

    def _load_from_disk(self, op: Op, index: int, past: int, parts: slice, target: Tensor) -> None:
        """Copy a row's whole blocks from the cell's host slot, and the rest from its tail.

        target: [parts, kv_heads, seq, width], one row of the streaming slot.
        """
        blocks, rest = divmod(past, CACHE_BLOCK_TOKENS)
        whole = blocks * CACHE_BLOCK_TOKENS
        arrived, tail = (
            self._in[op.cell_slot, index, :blocks],
            self._tails[op.layer, op.batch][index],
        )
        if self._arriving is not None:
            # Only contiguous copies cross without being staged. So blocks cross whole, be it with
            # values that sparse attention doesn't ask for: the disk takes far longer to read them.
            device_blocks, device_tail = self._arriving[:blocks], self._arriving[-1]
            link.copy_across(device_blocks, arrived)
            link.copy_across(device_tail, tail)
            arrived, tail = device_blocks, device_tail
        if blocks:
            tokens = self._tokens_of(arrived).permute(1, 2, 0, 3, 4)
            of_blocks = target[:, :, :whole].unflatten(2, (blocks, CACHE_BLOCK_TOKENS))
            of_blocks.copy_(tokens[parts])
        target[:, :, whole:past].copy_(self._tokens_of(tail)[parts, :, :rest])

    def _gather_from_disk(self, op: Op, row: Row, chosen: Tensor, target: Tensor) -> None:
        """Gather the values of a row's chosen tokens from the cell's host slot and the tail.

        chosen: [kv_heads, tokens]; target: [kv_heads, tokens, width].
        """
        split = self.split(op)
        index = row.slot - split.gpu - split.cpu
        blocks = row.position // CACHE_BLOCK_TOKENS
        arrived = self._tokens_of(self._in[op.cell_slot, index, :blocks])[:, 1]
        tail = self._tokens_of(self._tails[op.layer, op.batch][index])[1]
        heads = torch.arange(len(chosen))[:, None].expand(chosen.shape)
        block, place = chosen.long() // CACHE_BLOCK_TOKENS, chosen.long() % CACHE_BLOCK_TOKENS
        target.copy_(tail[heads, place])
        past = block < blocks
        target[past] = arrived[block[past], heads[past], place[past]]

    def _tokens_of(self, blocks: Tensor) -> Tensor:
        """View uint8 blocks [..., block_bytes] as [..., 2, kv_heads, tokens, width]."""
        shape = (2, self.plan.config.num_kv_heads, CACHE_BLOCK_TOKENS, self._width)
        used = torch.Size(shape).numel()
        return blocks.view(self._dtype)[..., :used].unflatten(-1, shape)

    def _region(self, op: Op, index: int) -> Region:
        """Region of one row on disk."""
        nbytes = self.plan.cache_blocks * self.plan.cache_block_bytes
        return self._disk[op.layer, op.batch].part(index * nbytes, nbytes)

    def _allocate_homes(self, tier, name: str) -> dict[tuple[int, int], Tensor]:
        """{(layer, batch): [2, slots, kv_heads, seq, width]} of the slots on a memory tier."""
        counts = {cell: getattr(split, name) for cell, split in self._splits.items()}
        nbytes = sum(counts.values()) * self.plan.row_bytes
        flat = tier.allocate("cache", nbytes).view(self._dtype)
        each = flat.split([n * self.plan.row_bytes // flat.itemsize for n in counts.values()])
        return {
            cell: part.view(self._shape(count))
            for (cell, count), part in zip(counts.items(), each, strict=True)
        }

    def _allocate_disk_homes(self, tiers: Tiers) -> tuple[dict, dict]:
        """{(layer, batch): tails} in host memory and {(layer, batch): region} on disk."""
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

    def _allocate_new(self, tier) -> Tensor:
        """[cell slots, elements] on the host, for what STORE_CACHE brings: see _stores_rows."""
        nbytes = new_kv_bytes(self.plan)
        flat = tier.allocate("cache in flight", CELL_SLOTS * nbytes).view(self._dtype)
        return flat.view(CELL_SLOTS, nbytes // self._dtype.itemsize)

    def _allocate_slots(self, tier, what: str, slots: int, rows: int) -> Tensor:
        return self._allocate(tier, what, (slots, *self._shape(rows)))

    def _shape(self, rows: int) -> tuple[int, ...]:
        return 2, rows, self.plan.config.num_kv_heads, self.plan.max_seq_len, self._width

    def _allocate(self, tier, what: str, shape: tuple[int, ...]) -> Tensor:
        nbytes = torch.Size(shape).numel() * self._dtype.itemsize
        return tier.allocate(what, nbytes).view(self._dtype).view(shape)


def _prefix_view(slot: Tensor, first: int, shape: Sequence[int]) -> Tensor:
    """View of a slot's memory from row `first` on in a smaller shape.

    The view is contiguous, so that it crosses the link in one copy.
    """
    return slot[first : first + shape[0]].view(-1)[: prod(shape)].view(*shape)


def _copy_dense(target: Tensor, source: Tensor) -> None:
    """Copy to host memory; across the link without gaps, for which the source is copied first."""
    dense = source.contiguous() if link.crosses_link(target, source) else source
    link.copy_across(target, dense)


def _copy_rows(target: Tensor, source: Tensor, past: int, end: int) -> None:
    """Copy the first `past` tokens of each row, and zero the target from there to `end`.

    target, source: [1 or 2, rows, kv_heads, seq, width]. Between host and device whole rows are
    copied, since only contiguous copies cross without being staged; the source has zeros beyond its
    tokens.
    """
    if not link.crosses_link(target, source):
        target[:, :, :, :past].copy_(source[:, :, :, :past])
        if past < end:
            target[:, :, :, past:end].zero_()
    else:
        for to, of in zip(target, source, strict=True):
            link.copy_across(to, of)
