"""The plan of a stage: model, policy and longest sequences, which fix its memory and its work.

Sizes, costs and stores all derive from it. Knows no bytes of buffers (sizes.py), and no torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from flexgen_ray.config import DTYPE_BYTES, SINK_DIMS, TIERS, Policy, Workload, kept_tokens
from flexgen_ray.layout.pages import PAGE_TOKENS, CacheSpace, LayerKind, pages_of
from flexgen_ray.layout.placement import SECTOR, RowSplit, aligned, split_rows, split_tokens
from flexgen_ray.layout.weights import WeightLayout, lay_out_weights
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.packing import packed_bytes
from flexgen_ray.schedule.zigzag import Mixtures, StageLayers

# A batch takes at most this many tiles of max_batch_tokens in a pass; or one, if the whole block
# waits for experts.
PREFILL_TILES = 8
EXPERT_GROUP_BYTES = 256 * 2**20  # of experts that stream apart from their layer's other weights
# Most bytes that attention of several decoding rows takes beside their cache; that a prompt's
# repeated keys and values take, if those of one KV head don't take more; and that its mask does.
ATTENTION_WORKSPACE = 64 * 2**20
# Decoding rows from which on a prefix is attended once for all of them. Fewer attend it as pages of
# their own, which takes no launches of its own and no merge; with sparse attention any number does.
FOLDED_ROWS = 8
QUERY_TILE = 512  # most queries whose mask over a cached prefix is built at a time
EXPERT_ROWS = 256  # rows of an expert from which on reading it takes less time than its products
WAITING = 4096  # tokens of prompts that wait for experts, or as many as decode
MASK_BYTES = 1 + 4  # of a query and key: the mask, and what torch makes of it


@dataclass(frozen=True)
class StagePlan:
    """Everything that fixes a stage's memory: model, layers, policy, longest sequences.

    stages_disk: True if weights on disk pass through host memory, as a GPU needs; a CPU that is the
    device reads them directly into its slots. num_blocks: blocks in flight, each with its own
    cache. hops_on_device: True if hidden states go from GPU to GPU, not through the hosts.
    pages_per_row: pages of the cache for each row of the block; None for those of a row of mean
    length. prefix_tier: "gpu" or "cpu", where prefixes lie that rows share and attend whole.
    """

    config: ModelConfig
    stage: StageLayers
    policy: Policy
    workload: Workload
    dtype: str
    stages_disk: bool = True
    num_blocks: int = 1
    hops_on_device: bool = False
    pages_per_row: int | None = None
    prefix_tier: str = "gpu"

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def num_decoder_layers(self) -> int:
        """Decoder layers of the stage, without embedding and head."""
        return len(self.stage.decoders)

    @property
    def num_batches(self) -> int:
        """Batches of all blocks in flight."""
        return self.num_blocks * self.policy.num_gpu_batches

    @property
    def hop_tier(self) -> str:
        """Tier of hidden states that are about to be sent to, or came from, another stage."""
        return "gpu" if self.hops_on_device else "cpu"

    @property
    def arrival_tier(self) -> str:
        """Tier of a stage's input: embeddings looked up on the host, or received hidden states."""
        return "cpu" if self.stage.is_first else self.hop_tier

    @property
    def hidden_slots(self) -> int:
        """Batches whose hidden states lie between layers at a time: those of two blocks at most."""
        return min(self.num_blocks, 2) * self.policy.num_gpu_batches

    @property
    def max_seq_len(self) -> int:
        """Most tokens of a row's cache."""
        return self.workload.max_seq_len

    @property
    def max_prefill_len(self) -> int:
        """Tokens of the longest prefill; a row that was set back brings its answer so far, too."""
        may_lack_pages = self.row_pages < self.longest_pages
        return self.max_seq_len if may_lack_pages else self.workload.max_prefill_len

    @property
    def cell_tokens(self) -> int:
        """Most tokens of one batch in one pass; prompts with more take several passes."""
        batch = self.policy.gpu_batch_size
        prompts = batch * self.workload.max_prompt_len
        tiles = 1 if self.policy.expert_slots else PREFILL_TILES
        return max(batch, min(prompts, tiles * self.policy.max_batch_tokens))

    @property
    def tile_tokens(self) -> int:
        """Most tokens that a linear layer processes at a time."""
        return min(self.policy.max_batch_tokens, self.cell_tokens)

    @cached_property
    def mixtures(self) -> Mixtures:
        """The stage's mixtures of experts, and how many batches' rows their experts take at once.

        While the host attends one half of a block, the experts take the other.
        """
        layers = frozenset(filter(self.config.has_experts, self.stage.decoders))
        batches, size = self.policy.num_gpu_batches, self.policy.expert_batches
        if size is None:
            size = -(-batches // 2) if self.attends_on_host else batches
        if self.policy.expert_slots is None:
            return Mixtures(layers, min(size, batches) if self.hidden_stays else 1)
        groups = {}
        for layer, of_layer in self.weights.groups.items():
            resident = sum(group.tier == "gpu" for group in of_layer)
            groups[layer] = resident, len(of_layer) - resident
        return Mixtures(layers, batches, groups, self.policy.expert_slots)

    @cached_property
    def routed_tokens(self) -> int:
        """Most tokens that wait for experts at a time: decoding rows of a part, or some prompts."""
        mixtures = self.mixtures
        if not mixtures.layers:
            return 0
        if self.policy.expert_slots:
            # A group crosses the link once, so all of the block wait for it.
            return mixtures.batches * self.cell_tokens
        decoding, most = (
            mixtures.batches * each for each in (self.policy.gpu_batch_size, self.cell_tokens)
        )
        return max(self.cell_tokens, min(most, max(decoding, WAITING)))

    @cached_property
    def expert_tokens(self) -> int:
        """Most tokens that experts take at a time: so many that products take longer than reads."""
        if not self.routed_tokens:
            return 0
        enough = EXPERT_ROWS * self.config.num_experts // self.config.experts_per_token
        return min(self.routed_tokens, max(self.tile_tokens, enough))

    def tiles(self, num_tokens: int) -> list[slice]:
        """Slices of a pass's packed tokens, each of which linear layers process at a time."""
        step = self.tile_tokens
        return [slice(at, min(at + step, num_tokens)) for at in range(0, num_tokens, step)]

    @property
    def chunks_prompts(self) -> bool:
        """True if a batch's prompts may not fit one pass."""
        return self.policy.gpu_batch_size * self.max_prefill_len > self.cell_tokens

    @cached_property
    def splits(self) -> tuple[RowSplit, ...]:
        """Division of the rows of each batch of all blocks, if all rows are equal."""
        return split_rows(self.policy, self.num_blocks)

    @property
    def row_pages(self) -> int:
        """Pages of an average row, in layers that attend all tokens."""
        return self.pages_per_row or pages_of(self.workload.mean_len)

    @property
    def longest_pages(self) -> int:
        """Pages of the longest row, in layers that attend all tokens."""
        return pages_of(self.max_seq_len)

    @property
    def most_pages(self) -> int:
        """Most pages that a row has in a layer."""
        return self.kinds[0].pages_of(self.max_seq_len)

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Kinds of the stage's decoder layers: those that attend all tokens come first.

        Layers whose window touches as many pages as the longest row has are of that kind, too.
        """
        windows = dict.fromkeys(self._kept_windows.values()) or {None: None}
        ordered = sorted(windows, key=lambda window: window is not None)
        return tuple(LayerKind(number, window) for number, window in enumerate(ordered))

    @cached_property
    def _kept_windows(self) -> dict[int, int | None]:
        """{decoder layer: last tokens of a row for which it has pages}; None for all."""
        windows = {layer: self.config.window(layer) for layer in self.stage.decoders}
        return {
            layer: window if LayerKind(0, window).most_pages < self.longest_pages else None
            for layer, window in windows.items()
        }

    @cached_property
    def _kind_of_layer(self) -> dict[int, LayerKind]:
        kinds = {kind.window: kind for kind in self.kinds}
        return {layer: kinds[window] for layer, window in self._kept_windows.items()}

    def kind_of(self, layer: int) -> LayerKind:
        """Kind of a decoder layer."""
        return self._kind_of_layer[layer]

    def layers_of(self, kind: LayerKind) -> list[int]:
        """Decoder layers of a kind, in order."""
        return [layer for layer, it in self._kind_of_layer.items() if it == kind]

    def attended_tokens(self, tokens: int) -> int:
        """Tokens that the last of a row's `tokens` attends, summed over the stage's layers."""
        return sum(count * min(tokens, window or tokens) for window, count in self._windows.items())

    @cached_property
    def _windows(self) -> Counter[int | None]:
        """Number of the stage's decoder layers with each window."""
        return Counter(self.config.window(layer) for layer in self.stage.decoders)

    @cached_property
    def space(self) -> CacheSpace:
        """Room for cached rows: as many of mean length as the policy says, or one of the longest.

        The largest pool has room for the longest row, and so has the streaming slot, if the rows
        of that pool are streamed.
        """
        splits = self.splits
        rows = [sum(split.tiers[number] for split in splits) for number in range(len(TIERS))]
        pools = [self._pool_pages(kind, rows) for kind in self.kinds]
        each = min(self.row_pages, self.kinds[0].most_pages)
        on_disk = max(split.disk for split in splits) * each
        streamed = max(split.streamed + split.disk for split in splits) * each
        # Rows of host memory that are streamed are chosen in each pass.
        may_stream = streamed or (rows[1] > 0 and self.policy.cpu_attention < 1)
        return CacheSpace(
            kinds=self.kinds,
            pools=tuple(pools),
            splits=splits,
            batch_pages=-(-sum(pools[0]) // len(splits)),
            streamed=max(streamed, self.most_pages) if may_stream else 0,
            disk=max(on_disk, self.most_pages) if on_disk else 0,
            streams_all=self.policy.cpu_attention == 0,
            disk_rows=rows[2],
            prefix_pages=self.prefix_pages,
            prefix_tiers=self.prefix_tiers,
            prefix_slot=self._prefix_slot(bool(may_stream)),
        )

    @cached_property
    def prefix_pages(self) -> int:
        """Pages of prefixes that rows share, on each of their tiers."""
        sharing = self.workload.sharing
        if sharing is None:
            return 0
        batches = self.num_batches + 1  # prefixes are computed ahead for one batch
        rows = batches * self.policy.gpu_batch_size
        return sharing.pages(rows)

    @property
    def marked_pages(self) -> int:
        """Pages of the tier with prefixes, which are marked if hidden states aren't finite."""
        number = TIERS.index(self.prefix_tiers[0])
        return self.space.all_pools[0][number] if self.prefix_pages else 0

    @property
    def prefix_tiers(self) -> tuple[str, ...]:
        """Tiers where prefixes lie; the first is the one on which they are computed.

        A sparse row chooses among the tokens of its prefixes and its own, so prefixes lie wherever
        rows do.
        """
        if not self.is_sparse:
            return (self.prefix_tier,)
        return tuple(tier for tier in ("gpu", "cpu") if getattr(self.policy.cache, tier) > 0)

    @property
    def folded_rows(self) -> int:
        """Decoding rows below which those that share a prefix attend it as pages of their own."""
        return self.policy.gpu_batch_size + 1 if self.is_sparse else FOLDED_ROWS

    @property
    def merges_parts(self) -> bool:
        """True if attention to prefixes may be merged with that to rows' own tokens."""
        return self.prefix_pages > 0 and not self.is_sparse

    def _prefix_slot(self, may_stream: bool) -> int:
        """Pages of prefixes that a batch has streamed to the device; may_stream: rows, too."""
        sharing = self.workload.sharing
        tiers, needs_slot = self.prefix_tiers, self.is_sparse and may_stream
        if not self.prefix_pages or sharing is None or "cpu" not in tiers:
            return 0
        if "gpu" in tiers and not needs_slot:
            return 0
        pages = sharing.pages(self.policy.gpu_batch_size)
        return min(pages, self.prefix_pages)

    def _pool_pages(self, kind: LayerKind, rows: list[int]) -> tuple[int, int, int]:
        """Pages of each tier's pool of a kind of layers; rows: rows of mean length by tier."""
        gpu, cpu, disk = (count * min(self.row_pages, kind.most_pages) for count in rows)
        largest, most = rows.index(max(rows)), kind.pages_of(self.max_seq_len)
        pages = [gpu, cpu, disk]
        pages[largest] = max(pages[largest], most)
        return pages[0], pages[1], pages[2]

    @property
    def uses_host(self) -> bool:
        """True if some rows' cache lies in host memory."""
        return self.space.pages[1] > 0

    @property
    def uses_disk(self) -> bool:
        """True if some rows' cache lies on disk."""
        return self.space.pages[2] > 0

    @property
    def attends_on_host(self) -> bool:
        """True if the host attends some rows."""
        return self.uses_host and self.policy.cpu_attention > 0

    @property
    def vector_bytes(self) -> int:
        """Bytes of one token's key, or value, in one KV head, as the cache stores it."""
        bits, head_dim = self.policy.cache_bits, self.config.head_dim
        return packed_bytes(head_dim, bits) if bits else head_dim * self.element_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.config.num_kv_heads * self.vector_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in one layer, in memory."""
        return PAGE_TOKENS * self.kv_bytes

    @property
    def disk_page_bytes(self) -> int:
        """Bytes of a page in one layer on disk: whole sectors."""
        return aligned(self.page_bytes, SECTOR)

    @property
    def is_sparse(self) -> bool:
        """True if decoding attends only some of a row's tokens."""
        return self.policy.attention_sparsity < 1

    def kept_tokens(self, layer: int, tokens: int) -> int:
        """Number of a row's `tokens` that decoding attends in a layer."""
        return kept_tokens(
            self.config.attended_tokens(layer, tokens), self.policy.attention_sparsity
        )

    @property
    def max_kept_tokens(self) -> int:
        """Most tokens that decoding attends, of any row in any layer."""
        return kept_tokens(self.max_seq_len, self.policy.attention_sparsity)

    @property
    def attended_row_bytes(self) -> int:
        """Bytes that attending a decoding row takes beside its cache, if no kernel walks pages.

        Pages are copied side by side, and take a mask and scores; a quantized cache takes keys and
        values dequantized too, and sparse attention keys in float32, the weights and their order.
        """
        config = self.config
        dequantized = 2 * config.kv_size * self.element_bytes if self.policy.cache_bits else 0
        sparse = 4 * config.kv_size + 16 * config.num_kv_heads + 8 * config.num_heads
        scores = 4 * (1 + config.num_heads)
        # Sinks take the sum of all scores, and so keys in float32.
        sums = 4 * config.kv_size + 8 * config.num_heads if config.attention_sinks else 0
        each = self.kv_bytes + dequantized + scores + sums + (sparse if self.is_sparse else 0)
        return self.longest_pages * PAGE_TOKENS * each

    @property
    def walks_pages(self) -> bool:
        """True if there are kernels that attend all decoding rows where their pages lie."""
        head_dim = self.config.head_dim
        return not self.is_sparse and head_dim % 16 == 0 and head_dim <= 256

    @property
    def rows_at_a_time(self) -> int:
        """Decoding rows that are attended at a time where no kernel walks pages.

        It is one where a kernel does, in case that Triton fails on a GPU.
        """
        if self.walks_pages:
            return 1
        rows, each = self.policy.gpu_batch_size, self.attended_row_bytes
        return max(1, min(rows, ATTENTION_WORKSPACE // each))

    def repeated_bytes(self, tokens: int) -> int:
        """Bytes of a KV head's keys and values of a row's tokens, repeated for its query heads.

        With sinks they are repeated in any case, and a token and some dimensions longer.
        """
        config = self.config
        repeats = config.num_heads // config.num_kv_heads
        if config.attention_sinks:
            wide = config.head_dim + SINK_DIMS
            return 2 * repeats * (tokens + 1) * wide * self.element_bytes
        return 2 * repeats * tokens * config.head_dim * self.element_bytes if repeats > 1 else 0

    def heads_at_a_time(self, tokens: int) -> int:
        """KV heads with which a prompt of so many tokens is attended at a time."""
        most = ATTENTION_WORKSPACE // max(self.repeated_bytes(tokens), 1)
        return max(1, min(self.config.num_kv_heads, most))

    def queries_at_a_time(self, tokens: int) -> int:
        """Queries of a prompt's chunk that are attended at a time, if a row has so many tokens."""
        most = ATTENTION_WORKSPACE // (tokens * MASK_BYTES)
        return max(PAGE_TOKENS, min(QUERY_TILE, most))

    @property
    def slot_pages(self) -> int:
        """Pages of the streaming slot: those of rows that decode, and of a chunked prompt.

        Chunks of a prompt whose row the host otherwise attends need room of their own, and so do
        those of a prefix, which counts among no rows.
        """
        spare = self.chunks_prompts and (self.attends_on_host or self.space.prefix_slot > 0)
        return self.space.streamed + spare * self.kinds[0].pages_of(self.max_prefill_len)

    @property
    def choosing_rows(self) -> int:
        """Most streamed rows of which only the chosen tokens' values are streamed."""
        streams = self.is_sparse and self.space.streamed
        return self.policy.gpu_batch_size if streams else 0

    @property
    def attended_rows(self) -> int:
        """Most rows of a batch that the host attends."""
        return self.policy.gpu_batch_size if self.attends_on_host else 0

    @property
    def off_device_rows(self) -> int:
        """Most rows of a batch whose cache lies off the device."""
        return self.policy.gpu_batch_size if self.uses_host or self.uses_disk else 0

    @property
    def stored_tokens(self) -> int:
        """Most tokens of a pass that leave the device without filling pages.

        A row has them before its first whole page, and after its last one.
        """
        most = min(self.max_prefill_len, 2 * (PAGE_TOKENS - 1))
        return min(self.cell_tokens, self.off_device_rows * most)

    @property
    def qkv_size(self) -> int:
        """Elements of one token's queries, keys and values."""
        return self.config.q_size + 2 * self.config.kv_size

    @property
    def stored_rows(self) -> int:
        """Most rows whose queries, keys and values leave the device side by side, one token each.

        None do if the cache is quantized: it takes other bytes than were computed.
        """
        return 0 if self.policy.cache_bits else self.off_device_rows

    @property
    def hidden_stays(self) -> bool:
        """True if hidden states stay on the device between layers, which then work in place."""
        return self.policy.activations.gpu == 1

    @property
    def hidden_tokens(self) -> tuple[int, int, int]:
        """Most tokens of one batch's hidden states on GPU, CPU and disk."""
        split = split_tokens(self.policy.activations, self.cell_tokens)
        spare = [int(0 < fraction < 1) for fraction in self.policy.activations.fractions]
        gpu, cpu, disk = (count + extra for count, extra in zip(split, spare, strict=True))
        return gpu, cpu, disk

    @cached_property
    def weights(self) -> WeightLayout:
        group_bytes = EXPERT_GROUP_BYTES if self.policy.expert_slots else 0
        return lay_out_weights(
            self.config, self.stage, self.policy.weights, self.weight_format, group_bytes
        )

    @property
    def weight_format(self) -> WeightFormat:
        return weight_format_of(self.config, self.policy, self.dtype)


def weight_format_of(config: ModelConfig, policy: Policy, dtype: str) -> WeightFormat:
    """Format in which a model's weights are stored under a policy."""
    return WeightFormat(dtype, policy.weight_bits, policy.embedding_bits, config.expert_format)
