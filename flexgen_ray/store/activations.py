"""Hidden states of a stage's batches on three tiers, and the working tensors of each cell.

A cell works on tensors of all its packed tokens on the device. Between layers the first tokens stay
on the device, the next ones go to host memory, and the last ones to disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from flexgen_ray.layout.placement import SECTOR, aligned, split_tokens
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import Rows
from flexgen_ray.layout.sizes import stage_bytes
from flexgen_ray.schedule.ops import CELL_SLOTS, Op
from flexgen_ray.store.link import copy_across
from flexgen_ray.store.tiers import TORCH_DTYPE, Tiers


@dataclass(frozen=True)
class CellBuffers:
    """Working tensors of one cell on the device.

    hidden: [cell_tokens, hidden]; without tokens if hidden states stay on the device.
    qkv: [cell_tokens, q_size + 2 * kv_size], queries, keys and values of a token side by side.
    q: [cell_tokens, heads, head_dim], the queries; a view.
    kv: [cell_tokens, 2, kv_heads, head_dim], keys and values; a view.
    cached: [cell_tokens, 2, kv_heads, width], keys and values as the cache stores them: kv, or a
    tensor of their own if it is quantized.
    attended: [gpu_batch_size, heads, head_dim], attention of passes whose rows bring one token
    each, without gaps, so that the link takes it. In other passes attention replaces q.
    of_prefixes: float32 [gpu_batch_size, heads, head_dim], attention of decoding rows to prefixes
    that they share; prefix_sums, own_sums: float32 [gpu_batch_size, heads], the logarithms of the
    sums of exp(score) over these, and over a row's own tokens. sharing_q: [gpu_batch_size, heads,
    head_dim], queries of decoding rows in passes in which attention replaces them. All four are
    without rows if nothing is shared.
    """

    hidden: Tensor
    qkv: Tensor
    q: Tensor
    kv: Tensor
    cached: Tensor
    attended: Tensor
    of_prefixes: Tensor
    prefix_sums: Tensor
    own_sums: Tensor
    sharing_q: Tensor

    def attention(self, rows: Rows) -> Tensor:
        """Buffer of these rows' attention, [tokens, heads, head_dim]."""
        return self.attended if rows.are_single else self.q


class HiddenStore:
    """Hidden states of a stage's batches; methods are named after the ops they run.

    If they all stay on the device, layers work on them where they lie, and nothing is copied.
    """

    def __init__(self, plan: StagePlan, tiers: Tiers) -> None:
        self.plan = plan
        self._dtype = TORCH_DTYPE[plan.dtype]
        batches = plan.hidden_slots
        hidden = plan.config.hidden_size
        gpu, cpu, disk = plan.hidden_tokens
        self.work = self._allocate_work(tiers)
        self._gpu = self._allocate(tiers.gpu, "hidden states", (batches, gpu, hidden))
        self._cpu = self._allocate(tiers.cpu, "hidden states", (batches, cpu, hidden))
        each = self._sectors(disk)
        slots = (2, CELL_SLOTS, each // plan.element_bytes)
        self._in, self._out = self._allocate(tiers.cpu, "hidden states in flight", slots)
        region = tiers.disk.allocate("hidden states", batches * each)
        self._disk = [region.part(batch * each, each) for batch in range(batches)]
        entry, hop = getattr(tiers, plan.arrival_tier), getattr(tiers, plan.hop_tier)
        sizes = stage_bytes(plan)[plan.arrival_tier]
        arrived = plan.cell_tokens if sizes["hidden states arrived"] else 0
        shape = (CELL_SLOTS, arrived, hidden)
        self.arrived = self._allocate(entry, "hidden states arrived", shape)
        shape = (0 if plan.stage.is_last else batches, plan.cell_tokens, hidden)
        self.sent = self._allocate(hop, "hidden states sent", shape)

    def of_cell(self, op: Op) -> Tensor:
        """Hidden states that the op works on, [cell_tokens, hidden]."""
        if self.plan.hidden_stays:
            return self._gpu[op.hidden_slot]
        return self.work[op.cell_slot].hidden

    def of_slot(self, slot: int) -> Tensor:
        """Hidden states of a slot, [cell_tokens, hidden], if all stay on the device."""
        return self._gpu[slot]

    def read(self, op: Op, num_tokens: int) -> None:
        """READ_HIDDEN: read the tokens on disk into the cell's host slot."""
        count = self._split(num_tokens)[2]
        if count:
            self._disk[op.hidden_slot].read_into(self._in_sectors(self._in[op.cell_slot], count))

    def load(self, op: Op, num_tokens: int) -> None:
        """LOAD_HIDDEN: copy the tokens off the device to the cell's working tensor."""
        gpu, cpu, disk = self._split(num_tokens)
        hidden = self.work[op.cell_slot].hidden
        copy_across(hidden[gpu : gpu + cpu], self._cpu[op.hidden_slot, :cpu])
        copy_across(hidden[gpu + cpu : num_tokens], self._tokens(self._in[op.cell_slot], disk))

    def fetch_resident(self, op: Op, num_tokens: int) -> None:
        """Copy the tokens that lie on the device to the cell's working tensor, if it has one."""
        if self.plan.hidden_stays:
            return
        gpu = self._split(num_tokens)[0]
        self.work[op.cell_slot].hidden[:gpu].copy_(self._gpu[op.hidden_slot, :gpu])

    def keep_resident(self, op: Op, num_tokens: int) -> None:
        """Keep the first tokens of the cell's result on the device, unless they lie there."""
        if self.plan.hidden_stays:
            return
        gpu = self._split(num_tokens)[0]
        self._gpu[op.hidden_slot, :gpu].copy_(self.work[op.cell_slot].hidden[:gpu])

    def store(self, op: Op, num_tokens: int) -> None:
        """STORE_HIDDEN: copy the other tokens to host memory, those for disk to a host slot."""
        gpu, cpu, disk = self._split(num_tokens)
        hidden = self.work[op.cell_slot].hidden
        copy_across(self._cpu[op.hidden_slot, :cpu], hidden[gpu : gpu + cpu])
        copy_across(self._tokens(self._out[op.cell_slot], disk), hidden[gpu + cpu : num_tokens])

    def write(self, op: Op, num_tokens: int) -> None:
        """WRITE_HIDDEN: write the tokens in the cell's host slot to disk."""
        count = self._split(num_tokens)[2]
        if count:
            self._disk[op.hidden_slot].write(self._in_sectors(self._out[op.cell_slot], count))

    def _split(self, num_tokens: int) -> tuple[int, int, int]:
        """Tokens on GPU, CPU and disk."""
        return split_tokens(self.plan.policy.activations, num_tokens)

    def _sectors(self, num_tokens: int) -> int:
        """Bytes of the whole sectors that num_tokens take."""
        return aligned(num_tokens * self.plan.config.hidden_size * self.plan.element_bytes, SECTOR)

    def _in_sectors(self, slot: Tensor, num_tokens: int) -> Tensor:
        """The whole sectors of a cell's host slot that num_tokens take."""
        return slot[: self._sectors(num_tokens) // self.plan.element_bytes]

    def _tokens(self, slot: Tensor, num_tokens: int) -> Tensor:
        """View the first tokens of a cell's host slot as [num_tokens, hidden]."""
        hidden = self.plan.config.hidden_size
        return slot[: num_tokens * hidden].view(num_tokens, hidden)

    def _allocate_work(self, tiers: Tiers) -> list[CellBuffers]:
        """Working tensors of each cell slot."""
        plan, config = self.plan, self.plan.config
        tokens, rows = plan.cell_tokens, plan.policy.gpu_batch_size
        shapes = (
            (0 if plan.hidden_stays else tokens, config.hidden_size),
            (tokens, plan.qkv_size),
            (rows, config.num_heads, config.head_dim),
        )
        sizes = [prod(shape) for shape in shapes]
        memory = self._allocate(tiers.gpu, "cell", (CELL_SLOTS, sum(sizes)))
        packed, merged = self._allocate_packed(tiers), self._allocate_merged(tiers)
        slots = []
        for flat, packed_kv, parts_to_merge in zip(memory, packed, merged, strict=True):
            parts = zip(flat.split(sizes), shapes, strict=True)
            hidden, qkv, attended = (part.view(shape) for part, shape in parts)
            vectors = qkv.unflatten(-1, (-1, config.head_dim))
            q, kv = vectors.split([config.num_heads, 2 * config.num_kv_heads], dim=1)
            kv = kv.unflatten(1, (2, config.num_kv_heads))
            cached = kv if packed_kv is None else packed_kv
            slots.append(CellBuffers(hidden, qkv, q, kv, cached, attended, *parts_to_merge))
        return slots

    def _allocate_packed(self, tiers: Tiers) -> list[Tensor | None]:
        """Packed keys and values of each cell slot; None if the cache is not quantized."""
        plan = self.plan
        if not plan.policy.cache_bits:
            return [None] * CELL_SLOTS
        shape = CELL_SLOTS, plan.cell_tokens, 2, plan.config.num_kv_heads, plan.vector_bytes
        return list(tiers.gpu.allocate("cell", prod(shape)).view(shape))

    def _allocate_merged(self, tiers: Tiers) -> list[tuple[Tensor, ...]]:
        """Float32 tensors of each cell slot by which parts of attention merge."""
        plan, heads = self.plan, self.plan.config.num_heads
        rows = plan.policy.gpu_batch_size if plan.merges_parts else 0
        vectors, sums = (rows, heads, plan.config.head_dim), (rows, heads)
        shapes = [(vectors, torch.float32), (sums, torch.float32), (sums, torch.float32)]
        shapes.append((vectors, self._dtype))
        tensors = []
        for shape, dtype in shapes:
            nbytes = CELL_SLOTS * prod(shape) * dtype.itemsize
            memory = tiers.gpu.allocate("cell", nbytes).view(dtype)
            tensors.append(memory.view(CELL_SLOTS, *shape))
        return list(zip(*tensors, strict=True))

    def _allocate(self, tier, what: str, shape: tuple[int, ...]) -> Tensor:
        nbytes = torch.Size(shape).numel() * self.plan.element_bytes
        return tier.allocate(what, nbytes).view(self._dtype).view(shape)
