"""Memory that so many rows take if each has a slot as long as the longest request.

That is how cache was laid out before it had pages. Benchmarks give the same memory to both, so the
sums are written out here, for two batches, tiles of TILE tokens, hidden states on the device, and a
cache in host memory that is attended there. Knows sizes of a model; no plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from flexgen_ray.models.config import ModelConfig

TILE, TILES = 512, 8  # tokens of a tile, and tiles of a batch in a pass
QUERIES = 512  # whose mask is built at a time
ALLOCATED = 1.5  # bytes that an allocator holds for a byte in use


@dataclass(frozen=True)
class FixedSlots:
    """Bytes of a stage of all layers.

    rows: slots of the block. longest_prompt, longest: tokens of the longest prompt, and of the
    longest request. element: bytes of a value. on_streams: True if temporaries of attention and of
    the MLP add up, as on a GPU.
    """

    config: ModelConfig
    rows: int
    longest_prompt: int
    longest: int
    element: int
    on_streams: bool = False

    @property
    def weights(self) -> int:
        """Bytes of all weights; a tied head has no table of its own."""
        layers = range(self.config.num_layers + 2)
        return sum(map(self._layer_bytes, layers)) - self._tied_bytes

    @property
    def cache(self) -> int:
        """Bytes of the block's cache: rows x longest x keys and values x layers."""
        kv = 2 * self.config.kv_size * self.element
        return self.rows * self.longest * kv * self.config.num_layers

    @property
    def weights_in_flight(self) -> int:
        """Bytes of the slots for streamed weights: two layers and the head."""
        return 2 * self._layer_bytes(1) + self._layer_bytes(self.config.head_layer)

    @property
    def device_work(self) -> int:
        """Bytes of hidden states, buffers of cells, and temporaries on the device."""
        config, batch, element = self.config, self._batch, self.element
        hidden = 2 * self._cell * config.hidden_size * element
        cells = 2 * (self._cell * (config.q_size + 2 * config.kv_size) + batch * config.q_size)
        # A prompt that takes several passes has a place of its own, of one layer, in both slots.
        chunked = 4 * self.longest * config.kv_size if self._cell < self._prompts else 0
        masks = 4 * batch * (self.longest + config.head_dim) * element
        ahead, finishing = self._attention_bytes(), max(self._tile_bytes(), self._logits_bytes())
        temporaries = ahead + finishing if self.on_streams else max(ahead, finishing)
        return hidden + (cells + chunked) * element + int(ALLOCATED * (temporaries + masks))

    @property
    def host_work(self) -> int:
        """Bytes of new keys and values, queries, scores and embeddings in host memory."""
        config, element = self.config, self.element
        new = 2 * self._cell * (2 * config.kv_size + config.hidden_size) * element
        queries = 4 * self._batch * config.q_size * element
        scores = self._batch * self.longest * 4 * (1 + config.num_heads)
        gathered = 3 * TILE * config.hidden_size * element
        moved = 2 * self.longest * config.kv_size * element
        return new + queries + max(scores, gathered, moved)

    def as_dict(self) -> dict[str, int]:
        """Rows, tokens of the longest request, and bytes of each part."""
        parts = ("weights", "cache", "weights_in_flight", "device_work", "host_work")
        return {name: getattr(self, name) for name in ("rows", "longest", *parts)}

    @property
    def _batch(self) -> int:
        return -(-self.rows // 2)

    @property
    def _cell(self) -> int:
        """Most tokens of a batch in a pass."""
        return max(self._batch, min(self._prompts, TILES * TILE))

    @property
    def _prompts(self) -> int:
        """Tokens of a batch's prompts, if all are as long as the longest."""
        return self._batch * self.longest_prompt

    @property
    def _tied_bytes(self) -> int:
        config = self.config
        table = config.vocab_size * config.embedding_size * self.element
        return table if config.tie_word_embeddings else 0

    def _layer_bytes(self, layer: int) -> int:
        return sum(map(prod, self.config.tensors(layer).values())) * self.element

    def _tile_bytes(self) -> int:
        """Bytes of a tile's MLP."""
        config = self.config
        wide = config.intermediate_size * (3 if config.gated_mlp else 2)
        beside = (config.hidden_size + config.head_dim) * (2 * self.element + 12)
        return min(TILE, self._cell) * (wide * self.element + beside)

    def _attention_bytes(self) -> int:
        """Bytes of a prompt's attention, with its mask, and of decoding rows' scores."""
        config, element = self.config, self.element
        chunk = min(self._cell, self.longest_prompt)
        repeated = self.longest * (config.q_size + config.kv_size) * 2 * element
        queries = chunk * config.q_size * (2 * element + 4)
        mask = min(QUERIES, chunk) * self.longest * 5
        return repeated + queries + mask + self._batch * self.longest * 4 * (1 + config.num_heads)

    def _logits_bytes(self) -> int:
        return self.config.vocab_size * (8 * self._batch + 48)
