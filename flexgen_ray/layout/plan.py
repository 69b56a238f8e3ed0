"""The plan of a stage: model, policy and longest sequences, which fix its memory and its work.

Sizes, costs and stores all derive from it. Knows no bytes of buffers (sizes.py), and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from flexgen_ray.config import DTYPE_BYTES, Policy, Workload, kept_tokens
from flexgen_ray.layout.placement import SECTOR, RowSplit, aligned, split_rows, split_tokens
from flexgen_ray.layout.weights import WeightLayout, lay_out_weights
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.packing import packed_bytes
from flexgen_ray.schedule.zigzag import StageLayers

PREFILL_TILES = 8  # a batch takes at most this many tiles of max_batch_tokens in a pass
# Most bytes that attention of several decoding rows takes on the device beside their cache.
ATTENTION_WORKSPACE = 64 * 2**20
CACHE_BLOCK_TOKENS = 16  # tokens of one row that go to disk together


@dataclass(frozen=True)
class StagePlan:
    """Everything that fixes a stage's memory: model, layers, policy, longest sequences.

    stages_disk: True if weights on disk pass through host memory, as a GPU needs; a CPU that is the
    device reads them directly into its slots. num_blocks: blocks in flight, each with its own
    cache. hops_on_device: True if hidden states go from GPU to GPU, not through the hosts.
    """

    config: ModelConfig
    stage: StageLayers
    policy: Policy
    workload: Workload
    dtype: str
    stages_disk: bool = True
    num_blocks: int = 1
    hops_on_device: bool = False

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
        """Most tokens that one slot of the cache holds."""
        return self.workload.max_seq_len

    @property
    def cell_tokens(self) -> int:
        """Most tokens of one batch in one pass; prompts with more take several passes."""
        batch = self.policy.gpu_batch_size
        prompts = batch * self.workload.max_prompt_len
        return max(batch, min(prompts, PREFILL_TILES * self.policy.max_batch_tokens))

    @property
    def tile_tokens(self) -> int:
        """Most tokens that a linear layer processes at a time."""
        return min(self.policy.max_batch_tokens, self.cell_tokens)

    def tiles(self, num_tokens: int) -> list[slice]:
        """Slices of a pass's packed tokens, each of which linear layers process at a time."""
        step = self.tile_tokens
        return [slice(at, min(at + step, num_tokens)) for at in range(0, num_tokens, step)]

    @property
    def chunks_prompts(self) -> bool:
        """True if a batch's prompts may not fit one pass."""
        return self.policy.gpu_batch_size * self.workload.max_prefill_len > self.cell_tokens

    @cached_property
    def splits(self) -> dict[tuple[int, int], RowSplit]:
        """{(decoder layer, batch): division of its slots}."""
        return split_rows(self.policy, self.stage, self.num_blocks)

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
    def row_bytes(self) -> int:
        """Bytes of one slot's keys and values in one layer."""
        return self.max_seq_len * self.kv_bytes

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
        """Bytes that attending one decoding row on the device takes beside its cache and scores.

        A quantized cache takes its keys and values dequantized; sparse attention takes keys in
        float32, the weights and their order.
        """
        config = self.config
        dequantized = 2 * config.kv_size * self.element_bytes if self.policy.cache_bits else 0
        sparse = 4 * config.kv_size + 16 * config.num_kv_heads + 8 * config.num_heads
        return self.max_seq_len * (dequantized + (sparse if self.is_sparse else 0))

    @property
    def rows_at_a_time(self) -> int:
        """Decoding rows that the device attends at a time, within ATTENTION_WORKSPACE."""
        rows, each = self.policy.gpu_batch_size, self.attended_row_bytes
        return max(1, min(rows, ATTENTION_WORKSPACE // each)) if each else rows

    @property
    def cache_block_bytes(self) -> int:
        """Bytes of a cache block on disk: CACHE_BLOCK_TOKENS of a row and layer, in whole sectors."""
        return aligned(CACHE_BLOCK_TOKENS * self.kv_bytes, SECTOR)

    @property
    def cache_blocks(self) -> int:
        """Cache blocks on disk of one row and layer; its newest tokens lie in a tail in memory."""
        return self.max_seq_len // CACHE_BLOCK_TOKENS

    @property
    def streamed_rows(self) -> int:
        """Rows of the device's streaming slot: those that decode, and one for chunked prompts.

        Chunks of a prompt whose row is otherwise attended on the host use the spare place.
        """
        splits = self.splits.values()
        most = max((split.streamed + split.disk for split in splits), default=0)
        return most + (self.chunks_prompts and any(split.attended for split in splits))

    @property
    def choosing_rows(self) -> int:
        """Rows of the streaming slot of which only the chosen tokens' values are streamed."""
        return self.streamed_rows if self.is_sparse else 0

    @property
    def attended_rows(self) -> int:
        """Most rows of a batch that the host attends."""
        return max((split.attended for split in self.splits.values()), default=0)

    @property
    def stored_tokens(self) -> int:
        """Most tokens of a pass whose keys and values leave the device."""
        off_device = max((split.off_device for split in self.splits.values()), default=0)
        return min(self.cell_tokens, off_device * self.workload.max_prefill_len)

    @property
    def qkv_size(self) -> int:
        """Elements of one token's queries, keys and values."""
        return self.config.q_size + 2 * self.config.kv_size

    @property
    def stored_rows(self) -> int:
        """Most rows whose queries, keys and values leave the device side by side, one token each.

        None do if the cache is quantized: it takes other bytes than were computed.
        """
        off_device = max((split.off_device for split in self.splits.values()), default=0)
        return 0 if self.policy.cache_bits else off_device

    @property
    def hidden_stays(self) -> bool:
        """True if hidden states stay on the device between layers, which then work in place."""
        return self.policy.activations.gpu == 1

    @property
    def disk_rows(self) -> int:
        """Most rows of a batch whose cache lies on disk."""
        return max((split.disk for split in self.splits.values()), default=0)

    @property
    def hidden_tokens(self) -> tuple[int, int, int]:
        """Most tokens of one batch's hidden states on GPU, CPU and disk."""
        split = split_tokens(self.policy.activations, self.cell_tokens)
        spare = [int(0 < fraction < 1) for fraction in self.policy.activations.fractions]
        gpu, cpu, disk = (count + extra for count, extra in zip(split, spare, strict=True))
        return gpu, cpu, disk

    @cached_property
    def weights(self) -> WeightLayout:
        return lay_out_weights(self.config, self.stage, self.policy.weights, self.weight_format)

    @property
    def weight_format(self) -> WeightFormat:
        return WeightFormat(self.dtype, self.policy.weight_bits, self.policy.embedding_bits)
