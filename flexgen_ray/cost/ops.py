"""Cost of each kind of op: the bytes and flops that it takes of each resource.

`COSTS`, at the end, names the function of every kind. Amounts add up over ops. Knows rows, their
placement and the order of a layer's maths; no rates, clock or tensors.

Beside its matrix products a layer runs small torch ops: norms, residuals, activations, rotary
embeddings, copies, sampling. Each costs a kernel launch, and reads and writes values of every
token; no product hides them, so they are counted as resources of their own (DEVICE_OPS,
ELEMENTWISE, SAMPLING).

With a GPU one thread launches the kernels and copies of all streams (ISSUE, LAUNCHES), beside what
the streams do; there DEVICE_OPS are free. With a CPU it is the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from flexgen_ray.cost.elementwise import elementwise_values
from flexgen_ray.cost.experts import expert_products
from flexgen_ray.cost.launches import (
    LAUNCHES,
    launches,
    prompt_launches,
    rotation_launches,
    run_launches,
)
from flexgen_ray.cost.prefixes import (
    added,
    attended_prefixes,
    kept_queries,
    merged_parts,
    prefilled_prefixes,
    sums_bytes,
)
from flexgen_ray.cost.resources import Amounts, Resource
from flexgen_ray.layout.pages import pages_of
from flexgen_ray.layout.placement import COPY_PIECE, SECTOR, aligned, split_tokens
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import NO_ROWS, Composition, PlacedRows, Row
from flexgen_ray.layout.sizes import (
    CHOICE_BYTES,
    quantized_shapes,
    quantized_values,
    streamed_bytes,
)
from flexgen_ray.quant.formats import part_of_op
from flexgen_ray.schedule.ops import ON_STREAMS, OPS, Lane, Op, OpKind

LAUNCHES_OF_DISK_ROW = 4  # copies of a cache row's blocks and tail, and their way to their places
_ISSUED = frozenset(kind for kind, spec in OPS.items() if spec.lane in ON_STREAMS)
_KEEPS_NOTHING = (OpKind.OUT, OpKind.EXPERTS)  # hidden states go home after COMBINE
_DEQUANTIZES = (OpKind.PROJECT, OpKind.FINISH, OpKind.OUT, OpKind.EXPERTS)
_ON_DEVICE = frozenset(kind for kind, spec in OPS.items() if spec.lane.worker is Lane.DEVICE)

_TOP_K_SHARE = 0.6  # work of sampling from the top_k, as a share of sampling from all tokens

_R = Resource
_NO_PASS = Composition(NO_ROWS, ())


def sampling_share(temperature: float, top_k: int) -> float:
    """Work of sampling one token, as a share of sampling from the whole sorted vocabulary.

    With top_k the likeliest tokens are found without sorting the others, and greedy decoding only
    looks for one.
    """
    if not temperature:
        return 0.0
    return _TOP_K_SHARE if top_k > 0 else 1.0


class CostModel:
    """Amounts that the ops of one stage take."""

    def __init__(self, plan: StagePlan) -> None:
        self.plan = plan
        self._element = plan.element_bytes
        self._kv_token = plan.kv_bytes
        # Host attention reads all keys, and the values of the tokens that are kept.
        self._share_read = (1 + plan.policy.attention_sparsity) / 2
        self._hidden_token = plan.config.hidden_size * plan.element_bytes
        self._num_parts = plan.policy.num_gpu_batches
        self._streamed = cache(lambda layer: streamed_bytes(plan, layer))
        self._quantized_values = cache(lambda *part: quantized_values(plan, *part))
        self._quantized_matrices = cache(lambda *part: len(quantized_shapes(plan, *part)))

    def amounts(self, op: Op, composition: Composition | None) -> Amounts:
        """Bytes and flops of an op.

        composition: the rows of the op's pass; None if the pass has none, and for moves of weights,
        whose cost depends on none.
        """
        if composition is None:
            if not OPS[op.kind].moves_weights:
                return {}
            composition = _NO_PASS
        amounts = COSTS[op.kind](self, op, composition)
        if op.kind in _ISSUED:
            amounts[_R.ISSUE] = 1
            amounts[_R.LAUNCHES] = self._launches(op, composition, amounts)
        return amounts

    def _launches(self, op: Op, composition: Composition, amounts: Amounts) -> float:
        """Torch ops of an op on a stream: kernels, or copies, which are cut into pieces."""
        if op.kind in _ON_DEVICE:
            return amounts.get(_R.DEVICE_OPS, 0) + self._unpacked_matrices(op)
        nbytes = amounts.get(_R.H2D, 0) + amounts.get(_R.D2H, 0)
        copies = COPIES[op.kind](self, op, composition) if op.kind in COPIES else 1
        return max(copies, -(-nbytes // COPY_PIECE)) if nbytes else 0

    def _copies_of_cache(self, op: Op, composition: Composition) -> int:
        placed = self._placed(op, composition)
        copies = len(placed.streamed_copies) + len(placed.prefix_copies)
        return 2 * copies + LAUNCHES_OF_DISK_ROW * len(placed.on_disk)

    def _copies_of_new_tokens(self, op: Op, composition: Composition) -> int:
        if self.plan.stored_rows and composition.rows.are_single:
            return 1
        # Views are made dense first, by a kernel each.
        runs = len(self._placed(op, composition).attended_runs)
        return 1 + (not self.plan.policy.cache_bits) + 2 * runs

    def _copies_of_attention(self, op: Op, composition: Composition) -> int:
        placed = self._placed(op, composition)
        return len(placed.attended_runs) * (2 if placed.sharing else 1)

    def _copies_of_values(self, op: Op, composition: Composition) -> int:
        return len(self._placed(op, composition).choosing_runs(self.plan.rows_at_a_time))

    # Weights

    def _read_weights(self, op: Op, _: Composition) -> Amounts:
        return self._transfer(_R.DISK_READ, self._streamed(op.layer)["disk"] / self._num_parts)

    def _load_weights(self, op: Op, _: Composition) -> Amounts:
        nbytes = self._streamed(op.layer)
        part = sum(nbytes.values()) / self._num_parts
        if self.plan.stages_disk or not nbytes["disk"]:
            return self._transfer(_R.H2D, part)
        on_disk = nbytes["disk"] / self._num_parts
        return {_R.H2D: part - on_disk, _R.DISK_READ: on_disk, _R.HOST_MEMORY: part}

    # Hidden states

    def _gather(self, _: Op, composition: Composition) -> Amounts:
        return {_R.HOST_MEMORY: 2 * composition.rows.num_tokens * self._hidden_token}

    def _load_embedding(self, _: Op, composition: Composition) -> Amounts:
        return self._transfer(_R.H2D, composition.rows.num_tokens * self._hidden_token)

    def _embed(self, op: Op, composition: Composition) -> Amounts:
        tokens = composition.rows.num_tokens
        return self._copy(tokens) | self._small_ops(op, tokens)

    def _read_hidden(self, _: Op, composition: Composition) -> Amounts:
        return self._transfer(_R.DISK_READ, self._hidden_on_disk(composition))

    def _load_hidden(self, _: Op, composition: Composition) -> Amounts:
        return self._transfer(_R.H2D, self._hidden_off_device(composition))

    def _store_hidden(self, _: Op, composition: Composition) -> Amounts:
        return self._transfer(_R.D2H, self._hidden_off_device(composition))

    def _write_hidden(self, _: Op, composition: Composition) -> Amounts:
        return self._transfer(_R.DISK_WRITE, self._hidden_on_disk(composition))

    def _store_sent(self, _: Op, composition: Composition) -> Amounts:
        return self._transfer(_R.D2H, composition.rows.num_tokens * self._hidden_token)

    def _send(self, _: Op, composition: Composition) -> Amounts:
        return self._transfer(_R.NETWORK, composition.rows.num_tokens * self._hidden_token)

    def _hidden_off_device(self, composition: Composition) -> int:
        _, cpu, disk = split_tokens(self.plan.policy.activations, composition.rows.num_tokens)
        return (cpu + disk) * self._hidden_token

    def _hidden_on_disk(self, composition: Composition) -> int:
        disk = split_tokens(self.plan.policy.activations, composition.rows.num_tokens)[2]
        return aligned(disk * self._hidden_token, SECTOR)

    # A layer's maths on the device

    def _project(self, op: Op, composition: Composition) -> Amounts:
        config, tokens = self.plan.config, composition.rows.num_tokens
        parameters = config.hidden_size * (config.q_size + 2 * config.kv_size)
        product = self._linear(tokens, parameters)
        amounts = product | self._dequantize(op) | self._small_ops(op, tokens)
        appends = any(not row.is_prefill for row in self._placed(op, composition).resident)
        amounts[_R.DEVICE_OPS] += appends + bool(self.plan.policy.cache_bits)
        if not composition.rows.are_single:
            amounts[_R.DEVICE_OPS] += rotation_launches(config) * self._tiles(tokens)
        copied = kept_queries(self.plan, self._placed(op, composition))
        return added((amounts, copied)) if copied else amounts

    def _finish(self, op: Op, composition: Composition) -> Amounts:
        config, tokens = self.plan.config, composition.rows.num_tokens
        if self.plan.stage.kind(op.layer) == "exit":
            product = self._copy(tokens)
        elif op.layer == config.head_layer:
            head = config.vocab_size * config.embedding_size
            product = self._linear(composition.rows.num_logits, head)
        else:
            mlp = config.hidden_size * config.intermediate_size * (3 if config.gated_mlp else 2)
            product = self._linear(tokens, config.q_size * config.hidden_size + mlp)
        amounts = product | self._dequantize(op) | self._small_ops(op, tokens)
        if self.plan.stage.kind(op.layer) != "decoder":
            return amounts
        merged = merged_parts(self.plan, self._placed(op, composition))
        return added((amounts, merged)) if merged else amounts

    def _sample(self, op: Op, composition: Composition) -> Amounts:
        count, drawn = len(composition.rows.sampled), composition.drawn
        drawn = count * self.plan.workload.drawn if drawn is None else drawn
        size = self.plan.config.vocab_size
        logits = {_R.DEVICE_MEMORY: 2 * 4 * size * count, _R.SAMPLING: size * drawn}
        return logits | self._small_ops(op, composition.rows.num_tokens)

    def _linear(self, tokens: int, parameters: int) -> Amounts:
        """A matrix product reads its weights once per tile of tokens."""
        config, tiles = self.plan.config, self._tiles(tokens)
        moved = parameters * tiles + 4 * tokens * config.hidden_size
        flops = _R.DECODE_FLOPS if tokens <= self.plan.policy.gpu_batch_size else _R.FLOPS
        return {flops: 2 * tokens * parameters, _R.DEVICE_MEMORY: moved * self._element}

    def _out(self, op: Op, composition: Composition) -> Amounts:
        """Work of a mixture before its experts, and an expert that every token takes."""
        config, tokens = self.plan.config, composition.rows.num_tokens
        for_all = config.q_size + config.num_experts + 3 * config.shared_expert_size
        product = self._linear(tokens, config.hidden_size * for_all)
        amounts = product | self._dequantize(op) | self._small_ops(op, tokens)
        merged = merged_parts(self.plan, self._placed(op, composition))
        return added((amounts, merged)) if merged else amounts

    def _experts(self, op: Op, composition: Composition) -> Amounts:
        """Products of experts with the rows of a part: each tile reads those that it chooses."""
        tokens = composition.tokens_of(op.batches)
        tile, most = self.plan.expert_tokens, self.plan.policy.gpu_batch_size * op.batches
        products = expert_products(self.plan, tokens, tile, decodes=tokens <= most)
        share = self._share_of_experts(op)
        products = {resource: amount * share for resource, amount in products.items()}
        return products | self._dequantize(op) | self._small_ops(op, tokens, tile)

    def _share_of_experts(self, op: Op) -> float:
        """Share of a layer's experts that an op runs."""
        groups = self.plan.weights.groups.get(op.layer)
        if not groups:
            return 1.0
        cuts = self.plan.weights.cuts[op.layer]
        return cuts[groups[op.group].keys[0]].shape[0] / self.plan.config.num_experts

    def _load_experts(self, op: Op, _: Composition) -> Amounts:
        group = self.plan.weights.groups[op.layer][op.group]
        nbytes = group.stream.nbytes(group.tier)
        amounts = self._transfer(_R.H2D, nbytes)
        if group.tier == "disk" and not self.plan.stages_disk:
            return {_R.DISK_READ: nbytes, _R.HOST_MEMORY: nbytes}
        return amounts

    def _read_experts(self, op: Op, _: Composition) -> Amounts:
        group = self.plan.weights.groups[op.layer][op.group]
        return self._transfer(_R.DISK_READ, group.stream.nbytes("disk"))

    def _combine(self, op: Op, composition: Composition) -> Amounts:
        return self._small_ops(op, composition.rows.num_tokens, self.plan.cell_tokens)

    def _copy(self, tokens: int) -> Amounts:
        return {_R.DEVICE_MEMORY: 2 * tokens * self._hidden_token}

    def _dequantize(self, op: Op) -> Amounts:
        """Weights are dequantized for all batches of a block, in the op of the first one."""
        if not self._is_first(op):
            return {}
        values = self._quantized_values(op.layer, self._part(op), op.group)
        return {_R.DEQUANTIZE: 2 * values} if values else {}

    def _unpacked_matrices(self, op: Op) -> int:
        """Matrices that an op dequantizes, each by a kernel."""
        if not self._is_first(op) or op.kind not in _DEQUANTIZES:
            return 0
        return self._quantized_matrices(op.layer, self._part(op), op.group)

    def _is_first(self, op: Op) -> bool:
        """True if an op works for a block's first batch."""
        return not (op.batch - op.batches + 1) % self._num_parts

    def _part(self, op: Op) -> str:
        return part_of_op(op.kind, op.layer == self.plan.config.head_layer)

    def _small_ops(self, op: Op, tokens: int, tile: int = 0) -> Amounts:
        """Launches and element-wise values beside the products.

        tile: tokens at a time; 0 for as many as linear layers take.
        """
        plan, tiles = self.plan, -(-tokens // (tile or self.plan.tile_tokens))
        if plan.stage.kind(op.layer) != "decoder":
            return {_R.DEVICE_OPS: LAUNCHES[op.kind] * tiles}
        values = elementwise_values(plan, op.kind)
        moves = int(0 < plan.policy.activations.gpu < 1) * (op.kind not in _KEEPS_NOTHING)
        return {
            _R.DEVICE_OPS: launches(plan, op) * tiles + moves,
            _R.ELEMENTWISE: values * tokens * self._element,
        }

    def _tiles(self, tokens: int) -> int:
        return -(-tokens // self.plan.tile_tokens)

    # The KV cache

    def _read_cache(self, op: Op, composition: Composition) -> Amounts:
        placed = self._placed(op, composition)
        pages = sum(last - first for first, last in map(placed.full_before, placed.on_disk))
        return self._transfer(_R.DISK_READ, pages * self.plan.disk_page_bytes)

    def _load_cache(self, op: Op, composition: Composition) -> Amounts:
        placed, page = self._placed(op, composition), self.plan.page_bytes
        nbytes = sum(
            count * page * self._share_loaded(prefills)
            for _, _, count, prefills in (*placed.streamed_copies, *placed.prefix_copies)
        )
        # A GPU gets pages from disk as they lie there.
        page = self.plan.disk_page_bytes if self.plan.stages_disk else page
        first_page = placed.kind.first_page
        on_disk = ((row.position, first_page(row.position)) for row in placed.on_disk)
        nbytes += page * sum(pages_of(position) - first for position, first in on_disk)
        return self._transfer(_R.H2D, nbytes)

    def _share_loaded(self, prefills: bool) -> float:
        """Only keys (half) of decoding rows whose tokens sparse attention has yet to choose."""
        return 0.5 if self.plan.is_sparse and not prefills else 1.0

    def _store_cache(self, op: Op, composition: Composition) -> Amounts:
        placed = self._placed(op, composition)
        tokens, plan = placed.num_stored, self.plan
        if plan.stored_rows and placed.rows.are_single:
            return self._transfer(_R.D2H, tokens * plan.qkv_size * self._element)
        queries = len(placed.attended) * plan.config.q_size * self._element
        return self._transfer(_R.D2H, tokens * self._kv_token + queries)

    def _append_cache(self, op: Op, composition: Composition) -> Amounts:
        nbytes = self._placed(op, composition).num_loose * self._kv_token
        return {_R.HOST_MEMORY: 2 * nbytes, _R.APPEND: nbytes}

    def _write_cache(self, op: Op, composition: Composition) -> Amounts:
        placed = self._placed(op, composition)
        filled = sum(last - first for first, last in map(placed.filled_by, placed.on_disk))
        return self._transfer(_R.DISK_WRITE, filled * self.plan.disk_page_bytes)

    # Attention

    def _choose(self, op: Op, composition: Composition) -> Amounts:
        placed = self._placed(op, composition)
        chosen = self._chosen_tokens(placed, op.layer)
        indices = chosen * self.plan.config.num_kv_heads * CHOICE_BYTES
        rows = [row for _, rows in placed.choosing_runs(self.plan.rows_at_a_time) for row in rows]
        scored = self._scored(placed, rows, op.layer)
        return scored | self._transfer(_R.D2H, indices) | {_R.DEVICE_OPS: run_launches(self.plan)}

    def _gather_values(self, op: Op, composition: Composition) -> Amounts:
        chosen = self._chosen_tokens(self._placed(op, composition), op.layer)
        return {_R.HOST_MEMORY: chosen * self._kv_token}

    def _load_values(self, op: Op, composition: Composition) -> Amounts:
        chosen = self._chosen_tokens(self._placed(op, composition), op.layer)
        return self._transfer(_R.H2D, chosen * self._kv_token / 2)

    def _chosen_tokens(self, placed: PlacedRows, layer: int) -> int:
        """Tokens whose values are gathered: each row of a run keeps as many as the longest one."""
        chosen = (rows for _, rows in placed.choosing_runs(self.plan.rows_at_a_time))
        most = ((len(rows), max(map(placed.length, rows))) for rows in chosen)
        return sum(count * self.plan.kept_tokens(layer, tokens) for count, tokens in most)

    def _attend_device(self, op: Op, composition: Composition) -> Amounts:
        placed, layer = self._placed(op, composition), op.layer
        streamed = placed.streamed
        rows = [*placed.resident, *streamed]
        # CHOOSE has scored the keys of streamed rows that decode sparsely.
        scored = [row for row in streamed if row.is_prefill or not self.plan.is_sparse]
        keys = self._scored(placed, [*placed.resident, *scored], layer)
        share = self.plan.policy.attention_sparsity
        shares = ((row, 1.0 if row.is_prefill else share) for row in rows)
        values = self._attended(placed, shares, layer)
        runs = self._runs(placed.resident) + self._runs(streamed)
        prompts = sum(row.is_prefill for row in rows)
        passed = elementwise_values(self.plan, OpKind.ATTEND_DEVICE)
        chunks = sum(row.is_prefill for row in placed.resident)
        appended = chunks + any(not row.is_prefill for row in placed.streaming)
        attended = run_launches(self.plan) * runs + prompt_launches(self.plan) * prompts
        small = {
            _R.DEVICE_OPS: appended + attended,
            _R.ELEMENTWISE: passed * sum(row.num_new_tokens for row in rows) * self._element,
        }
        own = {resource: keys[resource] + values[resource] for resource in keys} | small
        if not placed.rows.share_prefixes:
            return own
        parts = [own, attended_prefixes(self.plan, placed, layer)]
        for some in (placed.resident, streamed):
            parts.append(prefilled_prefixes(self.plan, placed, some, layer))
        return added(parts)

    def _runs(self, rows: list[Row]) -> int:
        """Runs of decoding rows that are attended together, if they are neighbours."""
        decoding = sum(not row.is_prefill for row in rows)
        if self.plan.walks_pages:
            return min(decoding, 1)
        return -(-decoding // self.plan.rows_at_a_time)

    def _scored(self, placed: PlacedRows, rows: list[Row], layer: int) -> Amounts:
        """Scores of all keys that these rows' queries see."""
        return self._attended(placed, ((row, 1.0) for row in rows), layer)

    def _attended(
        self, placed: PlacedRows, rows: Iterable[tuple[Row, float]], layer: int
    ) -> Amounts:
        """Keys, or values, that attention reads: of each row, a share of its tokens.

        Folded prefixes of a decoding row count as its own, once for each row. A quantized cache is
        dequantized first, and then attended like any other.
        """
        config, pairs, tokens = self.plan.config, 0.0, 0.0
        for row, share in rows:
            # Decoding rows attend other prefixes apart, and prompts' chunks gather them apart.
            own = row.seq_len if row.is_prefill else placed.length(row)
            before = row.before if row.is_prefill else own - row.seq_len
            window = config.attended_tokens(layer, before + row.seq_len)
            pairs += share * _attended_pairs(row, before, window)
            tokens += share * min(own, window + row.num_new_tokens - 1)
        amounts = {
            _R.FLOPS: 2 * config.q_size * pairs,
            _R.DEVICE_ATTENTION: tokens * config.kv_size * self._element,
        }
        if self.plan.policy.cache_bits:
            amounts[_R.DEQUANTIZE] = 2 * tokens * config.kv_size
        return amounts

    def _attend_host(self, op: Op, composition: Composition) -> Amounts:
        placed, config = self._placed(op, composition), self.plan.config
        lens = map(placed.length, placed.attended)
        tokens = sum(config.attended_tokens(op.layer, count) for count in lens)
        read = tokens * self._kv_token * self._share_read
        return {_R.HOST_ATTENTION: read, _R.HOST_MEMORY: read}

    def _load_attention(self, op: Op, composition: Composition) -> Amounts:
        placed = self._placed(op, composition)
        attended = placed.attended
        nbytes = len(attended) * self.plan.config.q_size * self._element
        return self._transfer(_R.H2D, nbytes + sums_bytes(self.plan, placed))

    def _placed(self, op: Op, composition: Composition) -> PlacedRows:
        return composition.placed(op.batch, self.plan.kind_of(op.layer))

    def _transfer(self, resource: Resource, nbytes: float) -> Amounts:
        """Bytes that cross a link, the disk's bus or the network also cross host memory."""
        return {resource: nbytes, _R.HOST_MEMORY: nbytes}

    def _nothing(self, _: Op, __: Composition) -> Amounts:
        return {}


def _attended_pairs(row: Row, before: int, window: int) -> float:
    """(query, key) pairs of a row's new tokens under a causal mask.

    Each token sees itself and the tokens before it, up to `window` tokens in all: a growing number
    until the window is full, then the whole window. before: tokens that precede the row's own.
    """
    position = before + row.position
    growing = min(max(window - position, 0), row.num_new_tokens)
    return growing * (position + (growing + 1) / 2) + (row.num_new_tokens - growing) * window


# Copies of ops on the link that bring more than one piece of memory.
COPIES: dict[OpKind, Callable[[CostModel, Op, Composition], int]] = {
    OpKind.LOAD_CACHE: CostModel._copies_of_cache,
    OpKind.STORE_CACHE: CostModel._copies_of_new_tokens,
    OpKind.LOAD_ATTENTION: CostModel._copies_of_attention,
    OpKind.LOAD_VALUES: CostModel._copies_of_values,
}
COSTS: dict[OpKind, Callable[[CostModel, Op, Composition], Amounts]] = {
    OpKind.RECV_TOKENS: CostModel._nothing,
    OpKind.COMPOSE: CostModel._nothing,
    OpKind.RECV_ROWS: CostModel._nothing,
    OpKind.RECV: CostModel._nothing,  # SEND of the stage before takes the network
    OpKind.GATHER: CostModel._gather,
    OpKind.LOAD_EMBEDDING: CostModel._load_embedding,
    OpKind.EMBED: CostModel._embed,
    OpKind.READ_WEIGHTS: CostModel._read_weights,
    OpKind.LOAD_WEIGHTS: CostModel._load_weights,
    OpKind.READ_EXPERTS: CostModel._read_experts,
    OpKind.LOAD_EXPERTS: CostModel._load_experts,
    OpKind.READ_HIDDEN: CostModel._read_hidden,
    OpKind.LOAD_HIDDEN: CostModel._load_hidden,
    OpKind.READ_CACHE: CostModel._read_cache,
    OpKind.LOAD_CACHE: CostModel._load_cache,
    OpKind.PROJECT: CostModel._project,
    OpKind.STORE_CACHE: CostModel._store_cache,
    OpKind.APPEND_CACHE: CostModel._append_cache,
    OpKind.WRITE_CACHE: CostModel._write_cache,
    OpKind.CHOOSE: CostModel._choose,
    OpKind.GATHER_VALUES: CostModel._gather_values,
    OpKind.LOAD_VALUES: CostModel._load_values,
    OpKind.ATTEND_DEVICE: CostModel._attend_device,
    OpKind.ATTEND_HOST: CostModel._attend_host,
    OpKind.LOAD_ATTENTION: CostModel._load_attention,
    OpKind.FINISH: CostModel._finish,
    OpKind.OUT: CostModel._out,
    OpKind.EXPERTS: CostModel._experts,
    OpKind.COMBINE: CostModel._combine,
    OpKind.STORE_HIDDEN: CostModel._store_hidden,
    OpKind.WRITE_HIDDEN: CostModel._write_hidden,
    OpKind.STORE_SENT: CostModel._store_sent,
    OpKind.SEND: CostModel._send,
    OpKind.SAMPLE: CostModel._sample,
    OpKind.ACCEPT: CostModel._nothing,
}
