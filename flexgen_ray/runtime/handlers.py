"""Handlers of ops: the one place where a stage's stores and the model's maths meet.

HANDLERS names the function that runs each kind of op; schedule/ops.py says what the kinds are for.
Knows one op at a time; not their order (schedule/) nor when they run (executor.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from flexgen_ray.kernels.host_kernel import HostKernel, rows_together
from flexgen_ray.kernels.sampling import NOT_FINITE, Scores, sample, score
from flexgen_ray.layout.pages import page_table
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import Composition, MemoKey, PlacedRows, Rows
from flexgen_ray.layout.sizes import scored_tokens_at_a_time
from flexgen_ray.models.experts import add_group, mix, route
from flexgen_ray.models.registry import FAMILIES
from flexgen_ray.runtime.device_attention import DeviceAttention
from flexgen_ray.runtime.passes import Pass, Passes
from flexgen_ray.runtime.routed import RoutedRows
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.schedule.ops import CELL_SLOTS, OPS, Op, OpKind
from flexgen_ray.store.activations import CellBuffers, HiddenStore
from flexgen_ray.store.kv_cache import KVCache
from flexgen_ray.store.link import copy_across
from flexgen_ray.store.tiers import TORCH_DTYPE, Tiers
from flexgen_ray.store.weights import WeightStore

_HOST_TABLES = MemoKey[tuple[Tensor, list[int]]]()
LogitsHook = Callable[[list[int], Tensor], None]


class OpHandlers:
    """Runs the ops of one stage on its stores.

    attend_on_host, attend_on_device: kernels for decoding rows; number:
    of the stage in its ring.
    """

    def __init__(
        self,
        plan: StagePlan,
        weights: WeightStore,
        scheduler: Scheduler,
        tiers: Tiers,
        attend_on_host: HostKernel,
        attend_on_device: HostKernel,
        number: int = 0,
    ) -> None:
        self.plan = plan
        self.config = plan.config
        self.family = FAMILIES[plan.config.family]
        self.device = tiers.device
        self.weights = weights
        self._attend_on_host = attend_on_host
        self.cache = KVCache(plan, tiers)
        self.hidden = HiddenStore(plan, tiers)
        self._routed = RoutedRows(plan, tiers)
        sinks = {layer: both.on_device for layer, both in weights.sinks.items()}
        self._attention = DeviceAttention(plan, self.cache, tiers.device, attend_on_device, sinks)
        self.on_logits: LogitsHook | None = None
        self.passes = Passes(plan, scheduler, tiers.device, number)
        self._logits: dict[int, Tensor] = {}
        self._prompt_scores: dict[int, list[Scores]] = {}
        self._scores: dict[int, list[Scores]] = {}
        shape = (CELL_SLOTS, plan.policy.gpu_batch_size)
        pinned = self.device.type == "cuda"
        self._chosen = torch.empty(shape, dtype=torch.int64, pin_memory=pinned)
        # NaN for a slot whose prompt has hidden states that aren't finite, else 0.
        slots = plan.num_batches, plan.policy.gpu_batch_size
        self._not_finite = torch.zeros(slots, device=self.device)
        # The mark of a prompt, or of a prefix that others share, by its first page there.
        self._of_pages = torch.zeros(plan.marked_pages, device=self.device)

    def begin(self, on_logits: LogitsHook | None) -> None:
        """Start a run, whose visits are counted from 0; on_logits: see Stage.run."""
        self.on_logits = on_logits
        self.passes.begin()

    def run(self, op: Op, ready_at: float = 0.0) -> None:
        """Run an op, unless it is idle; ready_at is of no use here, but part of lanes.Run."""
        if not self.is_idle(op):
            HANDLERS[op.kind](self, op)

    def is_idle(self, op: Op) -> bool:
        """True if the op has nothing to do: no rows, or weights for a visit that has none."""
        spec = OPS[op.kind]
        if spec.moves_weights:
            return self.passes.is_empty(op.visit)
        return spec.needs_rows and self.composition(op) is None

    def rows(self, op: Op) -> Rows:
        """Rows of the op's pass; known when the op starts, and not when it is issued."""
        return self._pass(op).rows

    def placed(self, op: Op) -> PlacedRows:
        """Rows of the op's pass, divided by where the op's layer has their cache."""
        return self._pass(op).placed(op.batch, self.plan.kind_of(op.layer))

    def composition(self, op: Op) -> Composition | None:
        """Composition of the op's pass, or of all that it works for; None for ops without rows."""
        if not OPS[op.kind].needs_rows:
            return None
        if op.batches > 1:
            return self.passes.part_of(op)
        current = self._pass(op)
        return current if current.rows.rows else None

    def _pass(self, op: Op) -> Pass:
        return self.passes.pass_of(op)

    def _recv(self, op: Op) -> None:
        self.passes.ring_channel.recv(self.hidden.arrived[op.cell_slot, : self.rows(op).num_tokens])

    def _store_sent(self, op: Op) -> None:
        count = self.rows(op).num_tokens
        sent = self.hidden.sent[op.hidden_slot, :count]
        copy_across(sent, self.hidden.of_cell(op)[:count])

    def _send(self, op: Op) -> None:
        self.passes.ring_channel.send(self.hidden.sent[op.hidden_slot, : self.rows(op).num_tokens])

    def _gather(self, op: Op) -> None:
        rows = self.rows(op)
        ids, positions = torch.tensor(rows.token_ids), torch.tensor(rows.positions)
        for tile in self.plan.tiles(rows.num_tokens):
            hidden = self.family.embed(self.config, self.weights.lookup, ids[tile], positions[tile])
            self.hidden.arrived[op.cell_slot, tile].copy_(hidden)

    def _load_embedding(self, op: Op) -> None:
        count = self.rows(op).num_tokens
        arrived = self.hidden.arrived[op.cell_slot, :count]
        copy_across(self.hidden.of_cell(op)[:count], arrived)

    def _read_hidden(self, op: Op) -> None:
        self.hidden.read(op, self.rows(op).num_tokens)

    def _load_hidden(self, op: Op) -> None:
        self.hidden.load(op, self.rows(op).num_tokens)

    def _read_cache(self, op: Op) -> None:
        self.cache.read(op, self.placed(op))

    def _embed(self, op: Op) -> None:
        rows, target = self.rows(op), self.hidden.of_cell(op)
        if self.plan.stage.is_first and self.weights.embeds_on_device:
            ids, positions = self._pass(op).token_ids, self._pass(op).positions
            for tile in self.plan.tiles(rows.num_tokens):
                hidden = self.family.embed(
                    self.config, self.weights.lookup, ids[tile], positions[tile]
                )
                target[tile].copy_(hidden)
        self.hidden.keep_resident(op, rows.num_tokens)

    def _load_cache(self, op: Op) -> None:
        self.cache.load(op, self.placed(op))

    def _project(self, op: Op) -> None:
        rows, work = self.rows(op), self._work(op)
        self.hidden.fetch_resident(op, rows.num_tokens)
        tensors, hidden = self.weights.tensors(op), self.hidden.of_cell(op)
        for tile in self.plan.tiles(rows.num_tokens):
            rotation = self._rotation(op, tile)
            self.family.project(self.config, tensors, hidden[tile], rotation, work.qkv[tile])
        self._attention.pack(work, rows.num_tokens)
        self._attention.keep_queries(self.placed(op), work)
        self.cache.append_resident(op, self.placed(op), work, prefills=False)

    def _rotation(self, op: Op, tile: slice) -> Tensor | None:
        """Rotation of a tile's queries and keys by their positions; None without a rope."""
        rope, dtype = self.config.rope_of(op.layer), TORCH_DTYPE[self.plan.dtype]
        if rope is None:
            return None
        return self._pass(op).rotation(rope, self.config.head_dim, dtype, tile)

    def _store_cache(self, op: Op) -> None:
        self.cache.store(op, self.placed(op), self._work(op))

    def _append_cache(self, op: Op) -> None:
        self.cache.append(op, self.placed(op))

    def _write_cache(self, op: Op) -> None:
        self.cache.write(op, self.placed(op))

    def _choose(self, op: Op) -> None:
        self._attention.choose(op, self.placed(op), self._work(op))

    def _gather_values(self, op: Op) -> None:
        self.cache.gather_values(op, self.placed(op))

    def _load_values(self, op: Op) -> None:
        self.cache.load_values(op, self.placed(op))

    def _attend_device(self, op: Op) -> None:
        self._attention.attend(op, self.placed(op), self._work(op))

    def _attend_host(self, op: Op) -> None:
        placed = self.placed(op)
        rows = placed.attended
        if not rows:
            return
        tables, lens = placed.memoized(_HOST_TABLES, lambda: host_tables(placed))
        keys, values = self.cache.host_pages(op)
        queries, out = self.cache.queries(op, placed), self.cache.host_attention[op.cell_slot]
        how = self.plan.policy.attention_sparsity, self.config.window(op.layer)
        sums = self.cache.host_sums[op.cell_slot] if placed.sharing else None
        sinks = self.weights.sinks[op.layer].on_host if self.weights.sinks else None
        for some in rows_together(self._attend_on_host, len(rows), self.plan.rows_at_a_time):
            lse = None if sums is None else sums[some]
            self._attend_on_host(
                queries[some], keys, values, tables[some], lens[some], out[some], *how, lse, sinks
            )

    def _load_attention(self, op: Op) -> None:
        rows, placed = self.rows(op), self.placed(op)
        target = self._work(op).attention(rows)
        for place, tokens in placed.attended_runs:
            count = tokens.stop - tokens.start
            result = self.cache.host_attention[op.cell_slot, place : place + count]
            if not rows.are_single:
                # Between queries lie gaps: they are filled on the device, from a dense copy.
                result = result.to(self.device, non_blocking=True)
            copy_across(target[tokens], result)
            if placed.sharing:
                first = placed.places[placed.attended[place].slot]
                sums = self.cache.host_sums[op.cell_slot, place : place + count]
                copy_across(self._work(op).own_sums[first : first + count], sums)

    def _finish(self, op: Op) -> None:
        kind = self.plan.stage.kind(op.layer)
        _FINISH[kind](self, op)

    def _finish_decoder(self, op: Op) -> None:
        rows, hidden, tensors = self.rows(op), self.hidden.of_cell(op), self.weights.tensors(op)
        self._attention.merge(self.placed(op), self._work(op))
        attention = self._work(op).attention(rows).flatten(1)
        for tile in self.plan.tiles(rows.num_tokens):
            self.family.finish(self.config, tensors, hidden[tile], attention[tile])
        self.hidden.keep_resident(op, rows.num_tokens)

    def _out(self, op: Op) -> None:
        """OUT of a mixture; if there's no room for the batch's rows, those before it go first."""
        rows, hidden, tensors = self.rows(op), self.hidden.of_cell(op), self.weights.tensors(op)
        self._attention.merge(self.placed(op), self._work(op))
        attention = self._work(op).attention(rows).flatten(1)
        if not self._routed.has_room(rows.num_tokens):
            self._experts(replace(op, kind=OpKind.EXPERTS))
            for batch in self._routed.batches:
                self._add_mixed(batch, self.hidden.of_slot(op.hidden_slot - op.batch + batch))
        routed = self._routed.enter(op.batch, rows.num_tokens)
        for tile in self.plan.tiles(rows.num_tokens):
            some = routed.part(tile)
            route(self.config, tensors, hidden[tile], attention[tile], some)

    def _experts(self, op: Op) -> None:
        tensors = self.weights.tensors(op)
        for some, sums in self._routed.tiles():
            if sums is None:
                mix(self.config, tensors, some)
            else:
                add_group(self.config, tensors, some, sums, begins=not op.group)

    def _combine(self, op: Op) -> None:
        self._add_mixed(op.batch, self.hidden.of_cell(op))
        self.hidden.keep_resident(op, self.rows(op).num_tokens)

    def _add_mixed(self, batch: int, hidden: Tensor) -> None:
        """Add what experts gave to a batch's hidden states, unless that was done before."""
        mixed = self._routed.leave(batch)
        if mixed is not None:
            hidden[: len(mixed)].add_(mixed)

    def _head(self, op: Op) -> None:
        """FINISH of the head: logits of the sampled rows, and scores of tokens that are known.

        Logits are computed for the last token of each sampled row, and, a few at a time, for tokens
        before known tokens that are to be scored.
        """
        rows = self.rows(op)
        self.hidden.fetch_resident(op, rows.num_tokens)
        if self._pass(op).prefills:
            self._look_at_prompts(op)
        if rows.scored:
            self._prompt_scores[op.cell_slot] = self._score_prompts(op)
        if rows.sampled:
            x = self.hidden.of_cell(op)[self._pass(op).last_tokens]
            self._logits[op.cell_slot] = self.family.head(self.config, self.weights.tensors(op), x)

    def _look_at_prompts(self, op: Op) -> None:
        """Mark slots whose prompts have hidden states that aren't finite; waits for nothing.

        If layers have windows, the logits of a prompt's last token don't depend on all tokens. Of
        tokens in prefixes other rows' passes made the marks, which are kept by pages.
        """
        current, not_finite = self._pass(op), self._not_finite[op.batch]
        low, high = self.hidden.of_cell(op)[: current.rows.num_tokens].aminmax(dim=-1)
        not_finite.index_fill_(0, current.new_slots, 0)
        not_finite.index_add_(0, current.slots, (low * 0 + high * 0).float())
        if self.plan.prefix_pages:
            slots, pages = current.users
            not_finite.index_add_(0, slots, self._of_pages[pages])
            slots, pages = current.first_pages(self.plan.prefix_tiers[0])
            self._of_pages[pages] = not_finite[slots]

    def _score_prompts(self, op: Op) -> list[Scores]:
        """Scores of known tokens, computed for as many at a time as there is room for logits."""
        current, tensors = self._pass(op), self.weights.tensors(op)
        hidden = self.hidden.of_cell(op)
        step = scored_tokens_at_a_time(self.plan, current.top)
        tiles = zip(current.scored_tokens.split(step), current.scored_ids.split(step), strict=True)
        return [
            score(self.family.head(self.config, tensors, hidden[tokens]), ids, current.top)
            for tokens, ids in tiles
        ]

    def _store_hidden(self, op: Op) -> None:
        self.hidden.store(op, self.rows(op).num_tokens)

    def _write_hidden(self, op: Op) -> None:
        self.hidden.write(op, self.rows(op).num_tokens)

    def _sample(self, op: Op) -> None:
        current, slot = self._pass(op), op.cell_slot
        self._scores[slot] = self._prompt_scores.pop(slot) if current.rows.scored else []
        if not current.rows.sampled:
            return
        logits = self._logits.pop(slot)
        if self.on_logits is not None:
            self.on_logits(current.header.request_indices, logits)
        tokens = sample(logits, current.header.sampling_rows)
        if current.prefills:
            fails = self._not_finite[op.batch][current.sampled_slots].isnan()
            tokens.masked_fill_(fails & current.sampled_prompts, NOT_FINITE)
        self._chosen[slot, : len(tokens)].copy_(tokens, non_blocking=True)
        if current.scores_sampled:
            self._scores[slot].append(score(logits, tokens.clamp(min=0), current.top))

    def _accept(self, op: Op) -> None:
        rows, slot = self.rows(op), op.cell_slot
        if rows.num_logits:
            tokens = self._chosen[slot, : len(rows.sampled)].tolist()
            scores = chain.from_iterable(it.tolist() for it in self._scores.pop(slot))
            self.passes.accept(op, tokens, scores)

    def _work(self, op: Op) -> CellBuffers:
        return self.hidden.work[op.cell_slot]


def host_tables(placed: PlacedRows) -> tuple[Tensor, list[int]]:
    """Tables of the pages that the host attends, int32 [rows, pages], and rows' lengths there."""
    lens = [placed.length(row) for row in placed.attended]
    pages = [placed.table(row, placed.home(row)) for row in placed.attended]
    return torch.from_numpy(page_table(pages)), lens


Handler = Callable[[OpHandlers, Op], None]
HANDLERS: dict[OpKind, Handler] = {
    OpKind.RECV_TOKENS: lambda cells, op: cells.passes.recv_tokens(op),
    OpKind.COMPOSE: lambda cells, op: cells.passes.compose(op),
    OpKind.RECV_ROWS: lambda cells, op: cells.passes.recv_rows(op),
    OpKind.RECV: OpHandlers._recv,
    OpKind.GATHER: OpHandlers._gather,
    OpKind.LOAD_EMBEDDING: OpHandlers._load_embedding,
    OpKind.EMBED: OpHandlers._embed,
    OpKind.READ_WEIGHTS: lambda cells, op: cells.weights.read_part(op),
    OpKind.LOAD_WEIGHTS: lambda cells, op: cells.weights.load_part(op),
    OpKind.READ_EXPERTS: lambda cells, op: cells.weights.read_experts(op),
    OpKind.LOAD_EXPERTS: lambda cells, op: cells.weights.load_experts(op),
    OpKind.READ_HIDDEN: OpHandlers._read_hidden,
    OpKind.LOAD_HIDDEN: OpHandlers._load_hidden,
    OpKind.READ_CACHE: OpHandlers._read_cache,
    OpKind.LOAD_CACHE: OpHandlers._load_cache,
    OpKind.PROJECT: OpHandlers._project,
    OpKind.STORE_CACHE: OpHandlers._store_cache,
    OpKind.APPEND_CACHE: OpHandlers._append_cache,
    OpKind.WRITE_CACHE: OpHandlers._write_cache,
    OpKind.CHOOSE: OpHandlers._choose,
    OpKind.GATHER_VALUES: OpHandlers._gather_values,
    OpKind.LOAD_VALUES: OpHandlers._load_values,
    OpKind.ATTEND_DEVICE: OpHandlers._attend_device,
    OpKind.ATTEND_HOST: OpHandlers._attend_host,
    OpKind.LOAD_ATTENTION: OpHandlers._load_attention,
    OpKind.FINISH: OpHandlers._finish,
    OpKind.OUT: OpHandlers._out,
    OpKind.EXPERTS: OpHandlers._experts,
    OpKind.COMBINE: OpHandlers._combine,
    OpKind.STORE_HIDDEN: OpHandlers._store_hidden,
    OpKind.WRITE_HIDDEN: OpHandlers._write_hidden,
    OpKind.STORE_SENT: OpHandlers._store_sent,
    OpKind.SEND: OpHandlers._send,
    OpKind.SAMPLE: OpHandlers._sample,
    OpKind.ACCEPT: OpHandlers._accept,
}
_FINISH: dict[str, Handler] = {
    "decoder": OpHandlers._finish_decoder,
    "head": OpHandlers._head,
    "exit": lambda cells, op: cells.hidden.fetch_resident(op, cells.rows(op).num_tokens),
}
