"""What each op does: the one place where stores and the model's maths meet.

Knows one op at a time; not their order (schedule) nor when they run (executor).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexgen_ray.cost.sizes import QUERY_TILE, StagePlan
from flexgen_ray.models import attention
from flexgen_ray.models.registry import FAMILIES
from flexgen_ray.rows import Row, Rows, runs
from flexgen_ray.runtime.batcher import Batcher
from flexgen_ray.runtime.sampler import sample
from flexgen_ray.schedule.ops import Op, OpKind
from flexgen_ray.store.activations import HiddenStore, Work
from flexgen_ray.store.kv_cache import KVCache
from flexgen_ray.store.tier import Tiers
from flexgen_ray.store.weights import WeightStore

LogitsHook = Callable[[list[int], Tensor], None]


class Cells:
    """Runs ops on a stage's stores."""

    def __init__(
        self, plan: StagePlan, weights: WeightStore, batcher: Batcher, tiers: Tiers
    ) -> None:
        self.plan = plan
        self.config = plan.config
        self.family = FAMILIES[plan.config.family]
        self.device = tiers.device
        self.weights = weights
        self.batcher = batcher
        self.cache = KVCache(plan, tiers)
        self.hidden = HiddenStore(plan, tiers)
        self.on_logits: LogitsHook | None = None
        self._rows: dict[tuple[int, int], Rows] = {}
        self._logits: dict[int, Tensor] = {}

    def handlers(self) -> dict[OpKind, Callable[[Op], None]]:
        """Made anew: kept, it would tie the stores into a cycle that outlives the stage."""
        return {kind: getattr(self, f"_{kind.value}") for kind in OpKind}

    def moves(self, op: Op) -> bool:
        """False if the op can't do anything under this placement; then it isn't dispatched."""
        kind, layer = op.kind, op.layer
        if kind is OpKind.LOAD_WEIGHTS:
            return self.weights.streams(layer)
        if kind is OpKind.READ_WEIGHTS:
            return self.weights.streams(layer, "disk")
        if kind in (OpKind.GATHER, OpKind.LOAD_EMBEDDING):
            return not self.weights.embeds_on_device
        if kind in (OpKind.READ_HIDDEN, OpKind.WRITE_HIDDEN):
            return self.plan.policy.activations.disk > 0
        if kind in (OpKind.LOAD_HIDDEN, OpKind.STORE_HIDDEN):
            return self.plan.policy.activations.gpu < 1
        if kind in (OpKind.READ_CACHE, OpKind.WRITE_CACHE):
            return self.cache.split(op).disk > 0
        if kind in (OpKind.LOAD_CACHE, OpKind.STORE_CACHE):
            return self.cache.split(op).off_device > 0
        if kind in (OpKind.ATTEND_HOST, OpKind.LOAD_ATTENTION):
            return self.cache.split(op).attended > 0
        return True

    def rows(self, op: Op) -> Rows:
        """The composition of the op's pass; looked up when the op starts, not when it is issued."""
        return self._rows[op.visit % 2, op.batch]

    def _compose(self, op: Op) -> None:
        self._rows[op.visit % 2, op.batch] = self.batcher.compose(op.batch)

    def _gather(self, op: Op) -> None:
        rows = self.rows(op)
        ids, positions = torch.tensor(rows.token_ids), torch.tensor(rows.positions)
        for tile in self._tiles(rows.num_tokens):
            found = self.family.embed(self.config, self.weights.lookup, ids[tile], positions[tile])
            self.hidden.gathered[op.cell_slot, tile].copy_(found)

    def _load_embedding(self, op: Op) -> None:
        count = self.rows(op).num_tokens
        gathered = self.hidden.gathered[op.cell_slot, :count]
        self._work(op).hidden[:count].copy_(gathered, non_blocking=True)

    def _read_weights(self, op: Op) -> None:
        self.weights.read_part(op)

    def _load_weights(self, op: Op) -> None:
        self.weights.load_part(op)

    def _read_hidden(self, op: Op) -> None:
        self.hidden.read(op, self.rows(op).num_tokens)

    def _load_hidden(self, op: Op) -> None:
        self.hidden.load(op, self.rows(op).num_tokens)

    def _read_cache(self, op: Op) -> None:
        self.cache.read(op, self.rows(op))

    def _load_cache(self, op: Op) -> None:
        self.cache.load(op, self.rows(op))

    def _project(self, op: Op) -> None:
        rows, work = self.rows(op), self._work(op)
        self.hidden.fetch_resident(op, rows.num_tokens)
        positions = torch.tensor(rows.positions, device=self.device)
        tensors = self.weights.tensors(op)
        for tile in self._tiles(rows.num_tokens):
            parts = self.family.project(self.config, tensors, work.hidden[tile], positions[tile])
            for target, part in zip((work.q, work.k, work.v), parts, strict=True):
                target[tile].copy_(part.flatten(1))
        self.cache.append_resident(op, rows, work)

    def _store_cache(self, op: Op) -> None:
        self.cache.store(op, self.rows(op), self._work(op))

    def _write_cache(self, op: Op) -> None:
        self.cache.write(op, self.rows(op))

    def _attend_device(self, op: Op) -> None:
        rows, work, cache = self.rows(op), self._work(op), self.cache
        cache.append_streamed(op, rows, work)
        resident = [(row, row.slot) for row in cache.on_device(op, rows.rows)]
        streamed = cache.streamed(op, rows.rows)
        for placed, view in ((resident, cache.device_view), (streamed, cache.streamed_view)):
            place = {row.slot: index for row, index in placed}
            for run in runs(row for row, _ in placed if row.num_new_tokens == 1):
                first = place[run[0].slot]
                self._decode_run(work, run, view(op, first, first + len(run)))
            for row, index in placed:
                if row.num_new_tokens > 1:
                    self._prefill_row(work, row, view(op, index, index + 1))

    def _decode_run(self, work: Work, run: list[Row], cached: Tensor) -> None:
        tokens = slice(run[0].offset, run[0].offset + len(run))
        query = work.q[tokens].view(len(run), self.config.num_heads, self.config.head_dim)
        out = attention.decode(query, cached[0], cached[1], [row.seq_len for row in run])
        work.q[tokens].copy_(out.flatten(1))

    def _prefill_row(self, work: Work, row: Row, cached: Tensor) -> None:
        """A prompt's first chunk needs no cache: all its keys are new."""
        config, tokens = self.config, row.tokens
        shape = (row.num_new_tokens, config.num_kv_heads, config.head_dim)
        if row.position:
            k, v = cached[0, 0, :, : row.seq_len], cached[1, 0, :, : row.seq_len]
        else:
            k, v = (x[tokens].view(shape).transpose(0, 1) for x in (work.k, work.v))
        query = work.q[tokens].view(row.num_new_tokens, config.num_heads, config.head_dim)
        work.q[tokens].copy_(attention.prefill(query, k, v, row.position, QUERY_TILE).flatten(1))

    def _attend_host(self, op: Op) -> None:
        rows = self.cache.attended_on_host(op, self.rows(op).rows)
        for run in runs(rows):
            places, _ = self.cache.vector_places(op, run)
            cached = self.cache.host_view(op, run[0].slot, run[-1].slot + 1)
            query = self.cache.host_query[op.cell_slot, places]
            out = attention.decode(query, cached[0], cached[1], [row.seq_len for row in run])
            self.cache.host_attention[op.cell_slot, places].copy_(out)

    def _load_attention(self, op: Op) -> None:
        work = self._work(op)
        for run in runs(self.cache.attended_on_host(op, self.rows(op).rows)):
            places, tokens = self.cache.vector_places(op, run)
            result = self.cache.host_attention[op.cell_slot, places]
            work.q[tokens].copy_(result.flatten(1), non_blocking=True)

    def _finish(self, op: Op) -> None:
        kind = self.plan.stage.kind(op.layer)
        {"embedding": self._embed, "decoder": self._finish_decoder, "head": self._head}[kind](op)

    def _embed(self, op: Op) -> None:
        rows, work = self.rows(op), self._work(op)
        if self.weights.embeds_on_device:
            ids = torch.tensor(rows.token_ids, device=self.device)
            positions = torch.tensor(rows.positions, device=self.device)
            for tile in self._tiles(rows.num_tokens):
                found = self.family.embed(
                    self.config, self.weights.lookup, ids[tile], positions[tile]
                )
                work.hidden[tile].copy_(found)
        self.hidden.keep_resident(op, rows.num_tokens)

    def _finish_decoder(self, op: Op) -> None:
        rows, work, tensors = self.rows(op), self._work(op), self.weights.tensors(op)
        for tile in self._tiles(rows.num_tokens):
            out = self.family.finish(self.config, tensors, work.hidden[tile], work.q[tile])
            work.hidden[tile].copy_(out)
        self.hidden.keep_resident(op, rows.num_tokens)

    def _head(self, op: Op) -> None:
        """Logits of the last token of each row that is to be followed by another."""
        rows = self.rows(op)
        self.hidden.fetch_resident(op, rows.num_tokens)
        last = torch.tensor([row.tokens.stop - 1 for row in rows.sampled], device=self.device)
        if len(last):
            x = self._work(op).hidden[last]
            self._logits[op.cell_slot] = self.family.head(self.config, self.weights.tensors(op), x)

    def _store_hidden(self, op: Op) -> None:
        self.hidden.store(op, self.rows(op).num_tokens)

    def _write_hidden(self, op: Op) -> None:
        self.hidden.write(op, self.rows(op).num_tokens)

    def _sample(self, op: Op) -> None:
        sampled = self.rows(op).sampled
        if not sampled:
            return
        logits = self._logits.pop(op.cell_slot)
        slots = [row.slot for row in sampled]
        draws = self.batcher.draws(op.batch, slots)
        if self.on_logits is not None:
            self.on_logits(self.batcher.request_indices(op.batch, slots), logits)
        self.batcher.accept(op.batch, slots, sample(logits, draws))

    def _work(self, op: Op) -> Work:
        return self.hidden.work[op.cell_slot]

    def _tiles(self, num_tokens: int) -> list[slice]:
        step = self.plan.tile_tokens
        return [slice(at, min(at + step, num_tokens)) for at in range(0, num_tokens, step)]
