"""What each op takes of each resource, in bytes and flops.

Amounts add up over ops. Knows rows and placement; no rates, no clock, no tensor.

What stands between matrix products: norms, residuals, activations, rotations, copies, sampling.

Ops of torch, each of which costs a launch and reads and writes values of every token; no product
hides them. Knows the order of a layer's maths; no rates.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from flexgen_ray.cost.resources import Amounts, Resource
from flexgen_ray.layout.placement import PAGE, aligned, split_tokens
from flexgen_ray.layout.plan import CACHE_BLOCK_TOKENS, StagePlan
from flexgen_ray.layout.rows import Composition, PlacedRows, Row
from flexgen_ray.layout.sizes import CHOICE_BYTES, packed_values, streamed_bytes
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.quant.formats import part_of_op
from flexgen_ray.schedule.ops import Op, OpKind

# Launches of an op, each tile's; of attention, of a run of decoding rows and of each prompt. Ops
# that scatter, or that attend a few tokens, take as long as several.
LAUNCHES = {OpKind.EMBED: 8, OpKind.PROJECT: 12, OpKind.FINISH: 8, OpKind.SAMPLE: 8}
LAUNCHES_OF_RUN, LAUNCHES_OF_PROMPT = 8, 5

_OF_SOME = 0.6  # of drawing from all the vocabulary, what drawing from its top_k takes

# Values that ops read or write for each one they are given.
_COPY, _ADD, _ACTIVATE, _MULTIPLY = 2, 3, 2, 3
_LAYER_NORM, _RMS_NORM, _ROTATE = 2, 9, 10  # the latter two are made of several ops


def passed_values(config: ModelConfig, kind: OpKind) -> int:
    """Values of each token that a decoder layer's op reads or writes beside its products."""
    hidden, q, kv = config.hidden_size, config.q_size, config.kv_size
    norm = hidden * (_RMS_NORM if config.rope else _LAYER_NORM)
    if kind is OpKind.PROJECT:
        rotated = _ROTATE * (q + kv) if config.rope else 0
        rotated += _RMS_NORM * (q + kv) if config.qk_norm else 0
        return _COPY * hidden + norm + rotated + _COPY * (q + 2 * kv) + 2 * _COPY * kv
    if kind is OpKind.ATTEND_DEVICE:
        return _COPY * (q + 2 * kv)
    if kind is OpKind.FINISH:
        each = _ACTIVATE + (_MULTIPLY if config.gated_mlp else 0)
        norms = norm * (3 if config.branch_norms else 1)
        return 2 * (_ADD + _COPY) * hidden + norms + each * config.intermediate_size
    return 0


def drawn_share(temperature: float, top_k: int) -> float:
    """Of the work in which a token is drawn of a whole vocabulary, what these settings take: the
    likeliest are found without sorting the others, and greedy decoding only looks for one."""
    if not temperature:
        return 0.0
    return _OF_SOME if top_k > 0 else 1.0


_NONE: Amounts = {}
_R = Resource


class CostModel:
    """Of one stage's ops."""

    def __init__(self, plan: StagePlan) -> None:
        self.plan = plan
        self._element = plan.element_bytes
        self._kv_token = plan.kv_bytes
        # All keys, and the values of what is kept.
        self._share_read = (1 + plan.policy.attention_sparsity) / 2
        self._hidden_token = plan.config.hidden_size * plan.element_bytes
        self._streamed = cache(lambda layer: streamed_bytes(plan, layer))
        self._packed_values = cache(lambda *part: packed_values(plan, *part))

    def amounts(self, op: Op, composition: Composition | None) -> Amounts:
        """Bytes and flops of an op; composition: of its pass, None for moves of weights."""
        if op.kind is OpKind.LOAD_WEIGHTS:
            return self._load_weights(op.layer)
        if op.kind is OpKind.READ_WEIGHTS:
            return self._link(_R.DISK_READ, self._streamed(op.layer)["disk"] / self._num_parts)
        if composition is None:
            return _NONE
        amounts = self._of_rows(op, composition)
        if op.kind not in LAUNCHES:
            return amounts
        tokens = composition.rows.num_tokens
        amounts = amounts | {_R.DEVICE_OPS: LAUNCHES[op.kind] * self._tiles(tokens)}
        if self.plan.stage.kind(op.layer) == "decoder":
            amounts[_R.ELEMENTWISE] = self._passed(op.kind, tokens)
        return amounts

    def _passed(self, kind: OpKind, tokens: int) -> int:
        return passed_values(self.plan.config, kind) * tokens * self._element

    def _of_rows(self, op: Op, composition: Composition) -> Amounts:
        tokens = composition.rows.num_tokens
        if op.kind in _HIDDEN:
            return self._hidden(op.kind, tokens)
        if op.kind is OpKind.EMBED:
            return self._copied(tokens)
        if op.kind is OpKind.FINISH:
            finished = self._finish(op.layer, tokens, composition.rows.num_logits)
            return finished | self._unpacked(op)
        if op.kind is OpKind.SAMPLE:
            return self._sample(composition)
        if op.kind not in _OF_CACHE and op.kind not in _OF_ATTENTION:
            return _NONE
        placed = composition.placed(self.plan.splits[op.layer, op.batch])
        if op.kind in _OF_ATTENTION:
            return _OF_ATTENTION[op.kind](self, placed, op.layer)
        amounts = _OF_CACHE[op.kind](self, placed)
        return amounts | self._unpacked(op) if op.kind is OpKind.PROJECT else amounts

    def _sample(self, composition: Composition) -> Amounts:
        count, drawn = len(composition.rows.sampled), composition.drawn
        drawn = count * self.plan.workload.drawn if drawn is None else drawn
        size = self.plan.config.vocab_size
        return {_R.DEVICE_MEMORY: 2 * 4 * size * count, _R.SAMPLING: size * drawn}

    @property
    def _num_parts(self) -> int:
        return self.plan.policy.num_gpu_batches

    def _load_weights(self, layer: int) -> Amounts:
        nbytes = self._streamed(layer)
        part = sum(nbytes.values()) / self._num_parts
        if self.plan.stages_disk or not nbytes["disk"]:
            return self._link(_R.H2D, part)
        on_disk = nbytes["disk"] / self._num_parts
        return {_R.H2D: part - on_disk, _R.DISK_READ: on_disk, _R.HOST_MEMORY: part}

    def _link(self, resource: Resource, nbytes: float) -> Amounts:
        """Whatever crosses a link or the disk's bus is read from, or written to, host memory."""
        return {resource: nbytes, _R.HOST_MEMORY: nbytes}

    def _hidden(self, kind: OpKind, tokens: int) -> Amounts:
        _, cpu, disk = split_tokens(self.plan.policy.activations, tokens)
        crossing = {
            OpKind.GATHER: tokens,
            OpKind.LOAD_EMBEDDING: tokens,
            OpKind.READ_HIDDEN: disk,
            OpKind.LOAD_HIDDEN: cpu + disk,
            OpKind.STORE_HIDDEN: cpu + disk,
            OpKind.WRITE_HIDDEN: disk,
            OpKind.STORE_SENT: tokens,
            OpKind.SEND: tokens,
        }[kind]
        nbytes = crossing * self._hidden_token
        resource = _HIDDEN[kind]
        if resource in (_R.DISK_READ, _R.DISK_WRITE):
            nbytes = aligned(nbytes, PAGE)
        return self._link(resource, nbytes) if resource else {_R.HOST_MEMORY: 2 * nbytes}

    def _linear(self, tokens: int, parameters: int) -> Amounts:
        """A matrix product reads its weights and moves its tokens once a tile."""
        config, tiles = self.plan.config, self._tiles(tokens)
        moved = parameters * tiles + 4 * tokens * config.hidden_size
        flops = _R.DECODE_FLOPS if tokens <= self.plan.policy.gpu_batch_size else _R.FLOPS
        return {flops: 2 * tokens * parameters, _R.DEVICE_MEMORY: moved * self._element}

    def _tiles(self, tokens: int) -> int:
        return -(-tokens // self.plan.tile_tokens)

    def _unpacked(self, op: Op) -> Amounts:
        """Weights that are unpacked for all batches, in the first one's op."""
        if op.batch % self._num_parts:
            return _NONE
        part = part_of_op(op.kind, op.layer == self.plan.config.head_layer)
        values = self._packed_values(op.layer, part)
        return {_R.DEQUANTIZE: 2 * values} if values else _NONE

    def _project(self, placed: PlacedRows) -> Amounts:
        config = self.plan.config
        parameters = config.hidden_size * (config.q_size + 2 * config.kv_size)
        return self._linear(placed.rows.num_tokens, parameters)

    def _finish(self, layer: int, tokens: int, num_logits: int) -> Amounts:
        config = self.plan.config
        if self.plan.stage.kind(layer) == "exit":
            return self._copied(tokens)
        if layer == config.head_layer:
            return self._linear(num_logits, config.vocab_size * config.embedding_size)
        mlp = config.hidden_size * config.intermediate_size * (3 if config.gated_mlp else 2)
        return self._linear(tokens, config.q_size * config.hidden_size + mlp)

    def _copied(self, tokens: int) -> Amounts:
        return {_R.DEVICE_MEMORY: 2 * tokens * self._hidden_token}

    def _read_cache(self, placed: PlacedRows) -> Amounts:
        blocks = sum(row.position // CACHE_BLOCK_TOKENS for row, _ in placed.on_disk)
        return self._link(_R.DISK_READ, blocks * self.plan.cache_block_bytes)

    def _load_cache(self, placed: PlacedRows) -> Amounts:
        """Of rows whose tokens are yet to be chosen, the keys."""
        tokens = sum(
            count * past * self._share_loaded(prefills)
            for _, _, count, past, prefills in placed.streamed_copies
        )
        on_disk = (row for row, _ in placed.on_disk)
        tokens += sum(row.position * self._share_loaded(row.is_prefill) for row in on_disk)
        return self._link(_R.H2D, tokens * self._kv_token)

    def _share_loaded(self, prefills: bool) -> float:
        return 0.5 if self.plan.is_sparse and not prefills else 1.0

    def _chosen(self, placed: PlacedRows, layer: int) -> int:
        """Tokens whose values are gathered: runs of rows keep as many as the longest."""
        chosen = (rows for _, rows in placed.choosing(self.plan.rows_at_a_time))
        most = ((len(rows), max(row.seq_len for row in rows)) for rows in chosen)
        return sum(count * self.plan.kept_tokens(layer, tokens) for count, tokens in most)

    def _choose(self, placed: PlacedRows, layer: int) -> Amounts:
        told = self._chosen(placed, layer) * self.plan.config.num_kv_heads * CHOICE_BYTES
        rows = [row for _, rows in placed.choosing(self.plan.rows_at_a_time) for row in rows]
        small = {_R.DEVICE_OPS: LAUNCHES_OF_RUN}
        return self._scored(rows, layer) | self._link(_R.D2H, told) | small

    def _gather_values(self, placed: PlacedRows, layer: int) -> Amounts:
        return {_R.HOST_MEMORY: self._chosen(placed, layer) * self._kv_token}

    def _load_values(self, placed: PlacedRows, layer: int) -> Amounts:
        return self._link(_R.H2D, self._chosen(placed, layer) * self._kv_token / 2)

    def _store_cache(self, placed: PlacedRows) -> Amounts:
        tokens = placed.rows.num_tokens - placed.first_off_device
        queries = len(placed.attended) * self.plan.config.q_size * self._element
        return self._link(_R.D2H, tokens * self._kv_token + queries)

    def _append_cache(self, placed: PlacedRows) -> Amounts:
        tokens = placed.rows.num_tokens - placed.first_off_device
        return {_R.HOST_MEMORY: 2 * tokens * self._kv_token}

    def _write_cache(self, placed: PlacedRows) -> Amounts:
        block = CACHE_BLOCK_TOKENS
        filled = sum(r.seq_len // block - r.position // block for r, _ in placed.on_disk)
        return self._link(_R.DISK_WRITE, filled * self.plan.cache_block_bytes)

    def _attend_device(self, placed: PlacedRows, layer: int) -> Amounts:
        """Of a packed cache all that is attended is unpacked, and then attended like another."""
        streamed = [row for row, _ in placed.streamed]
        scored = [row for row in streamed if row.is_prefill or not self.plan.is_sparse]
        keys = self._scored([*placed.resident, *scored], layer)
        share = self.plan.policy.attention_sparsity
        shares = ((row, 1.0 if row.is_prefill else share) for row in [*placed.resident, *streamed])
        values = self._attended(shares, layer)
        runs = bool(placed.resident) + bool(streamed)
        prompts = sum(row.is_prefill for row in [*placed.resident, *streamed])
        tokens = sum(row.num_new_tokens for row in [*placed.resident, *streamed])
        small = {
            _R.DEVICE_OPS: LAUNCHES_OF_RUN * runs + LAUNCHES_OF_PROMPT * prompts,
            _R.ELEMENTWISE: self._passed(OpKind.ATTEND_DEVICE, tokens),
        }
        return {resource: keys[resource] + values[resource] for resource in keys} | small

    def _scored(self, rows: list[Row], layer: int) -> Amounts:
        """All keys that these rows' queries see."""
        return self._attended(((row, 1.0) for row in rows), layer)

    def _attended(self, rows: Iterable[tuple[Row, float]], layer: int) -> Amounts:
        """Keys, or values, of shares of rows' tokens."""
        config, pairs, tokens = self.plan.config, 0.0, 0.0
        for row, share in rows:
            window = config.attended_tokens(layer, row.seq_len)
            pairs += share * _attended_pairs(row, window)
            tokens += share * min(row.seq_len, window + row.num_new_tokens - 1)
        amounts = {
            _R.FLOPS: 2 * config.q_size * pairs,
            _R.DEVICE_ATTENTION: tokens * config.kv_size * self._element,
        }
        if self.plan.policy.cache_bits:
            amounts[_R.DEQUANTIZE] = 2 * tokens * config.kv_size
        return amounts

    def _attend_host(self, placed: PlacedRows, layer: int) -> Amounts:
        tokens = sum(
            self.plan.config.attended_tokens(layer, row.seq_len) for row in placed.attended
        )
        read = tokens * self._kv_token * self._share_read
        return {_R.HOST_ATTENTION: read, _R.HOST_MEMORY: read}

    def _load_attention(self, placed: PlacedRows) -> Amounts:
        results = len(placed.attended) * self.plan.config.q_size * self._element
        return self._link(_R.H2D, results)


def _attended_pairs(row: Row, window: int) -> float:
    """(query, key) pairs of a row's new tokens, each seeing what is before it and itself, up to a
    window of tokens."""
    growing = min(max(window - row.position, 0), row.num_new_tokens)
    return growing * (row.position + (growing + 1) / 2) + (row.num_new_tokens - growing) * window


_HIDDEN: dict[OpKind, Resource | None] = {
    OpKind.GATHER: None,
    OpKind.LOAD_EMBEDDING: _R.H2D,
    OpKind.READ_HIDDEN: _R.DISK_READ,
    OpKind.LOAD_HIDDEN: _R.H2D,
    OpKind.STORE_HIDDEN: _R.D2H,
    OpKind.WRITE_HIDDEN: _R.DISK_WRITE,
    OpKind.STORE_SENT: _R.D2H,
    OpKind.SEND: _R.NETWORK,
}
_OF_CACHE = {
    OpKind.PROJECT: CostModel._project,
    OpKind.READ_CACHE: CostModel._read_cache,
    OpKind.LOAD_CACHE: CostModel._load_cache,
    OpKind.STORE_CACHE: CostModel._store_cache,
    OpKind.APPEND_CACHE: CostModel._append_cache,
    OpKind.WRITE_CACHE: CostModel._write_cache,
    OpKind.LOAD_ATTENTION: CostModel._load_attention,
}
_OF_ATTENTION = {
    OpKind.CHOOSE: CostModel._choose,
    OpKind.GATHER_VALUES: CostModel._gather_values,
    OpKind.LOAD_VALUES: CostModel._load_values,
    OpKind.ATTEND_DEVICE: CostModel._attend_device,
    OpKind.ATTEND_HOST: CostModel._attend_host,
}
