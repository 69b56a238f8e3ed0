"""Roofline of a job: tokens per second that no schedule exceeds on a machine, and what binds.

Each resource is taken alone, and as if it never waited: the link, host attention, host memory, the
disk, the device's products, and its memory. A block of rows makes pass after pass. In each pass,
weights that lie off the device cross the link once, every row's cache is read, and a part of the
next rows' prompts is computed. Of a mixture's experts those cross that lie off the device, chosen
or not; those that a pass's rows choose are read from the device's memory.

`best` is the best schedule: prompts are computed beside decoding, each expert is read once a pass,
and rows have memory for what they hold on average. `flexgen` is FlexGen's: prompts and decoding
take turns, rows have memory for all they will hold, each batch reads the weights that it takes from
the device's memory, and the device and host attention wait for each other.

Weights lie on the device first, then rows' caches. Host memory holds rows before weights if that is
faster, whose rest lies on the disk. The host attends as many bytes of the cache as is fastest, and
the others cross the link. Knows sizes and rates; no schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from flexgen_ray.config import Budget, HardwareSpec
from flexgen_ray.cost.experts import touched_experts
from flexgen_ray.layout.placement import is_stacked
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.config import ModelConfig

FLEXGEN_ROWS = 32  # of a batch of FlexGen's: its paper's have 24 to 48, MoE-Lightning's 36
_STEP = 1.02  # ratio of numbers of rows that are tried


@dataclass(frozen=True)
class Roof:
    """A bound on throughput: generated tokens per second, what binds, and the rows of its block.

    bound: "h2d", "host_attention", "host_memory", "disk_read", "flops" or "device_memory", as
    resources are named. rows: 0 if not even one fits.
    """

    tokens_per_s: float
    bound: str
    rows: int


@dataclass(frozen=True)
class _Block:
    """A number of rows with the bytes that a pass reads for them.

    weights: of weights off the device. cache: off the device; cached: on it. on_disk: of weights
    on the disk.
    """

    rows: int
    weights: float
    cache: float
    cached: float
    on_disk: float


@dataclass(frozen=True)
class Roofline:
    """The roofs of a stage on a machine.

    plan: gives the model, its layers, dtype and formats; placement and shape don't matter. prompt,
    new: mean tokens of a request's prompt and answer. requests: no block has more rows.
    """

    plan: StagePlan
    hardware: HardwareSpec
    budget: Budget
    prompt: float
    new: float
    requests: int = 10**6

    @property
    def best(self) -> Roof:
        """The best schedule's roof."""
        return max(self._roofs(flexgen=False), key=lambda roof: roof.tokens_per_s)

    @property
    def flexgen(self) -> Roof:
        """The roof of FlexGen's schedule."""
        return max(self._roofs(flexgen=True), key=lambda roof: roof.tokens_per_s)

    def _roofs(self, flexgen: bool) -> Iterator[Roof]:
        """Roofs of blocks of all sizes that fit, a nameless one of no rows first."""
        yield Roof(0.0, "", 0)
        number = 1.0
        while number <= self.requests:
            rows, number = int(number), max(number + 1, number * _STEP)
            block = self._block(rows, self.prompt + self.new / (1 if flexgen else 2))
            if block is None:
                return
            seconds = self._pass_seconds(block, flexgen)
            bound = max(seconds, key=lambda name: seconds[name])
            taken = seconds[bound]
            if flexgen:
                in_turn = max(seconds["flops"], seconds["device_memory"])
                taken = max(taken, in_turn + seconds["host_attention"])
                taken += self._prompt_seconds(rows) / self.new
            yield Roof(rows / taken, bound, rows)

    def _pass_seconds(self, block: _Block, flexgen: bool) -> dict[str, float]:
        """{resource: seconds of it alone} of a pass in which a block's rows decode.

        In the best schedule the prompts of so many rows come in as many passes as an answer has
        tokens.
        """
        rates, rows = self.hardware, block.rows
        tokens = rows * (1 if flexgen else 1 + self.prompt / self.new)
        products = 2 * (tokens * self._active + rows * self._head) / rates.device_flops_per_s
        batch = min(rows, FLEXGEN_ROWS) if flexgen else rows
        read = rows / batch * self._read_weights(batch) / rates.device_bytes_per_s
        streamed = self._streamed(block, max(products, read) if flexgen else 0.0)
        attended = (streamed + block.cached) / rates.device_attention_bytes_per_s
        return {
            "h2d": (block.weights + streamed) / rates.h2d_bytes_per_s,
            "host_attention": (block.cache - streamed) / rates.host_attention_bytes_per_s,
            "host_memory": (block.weights + block.cache) / rates.host_bytes_per_s,
            "disk_read": block.on_disk / rates.disk_read_bytes_per_s,
            "flops": products,
            "device_memory": read + attended,
        }

    def _prompt_seconds(self, rows: int) -> float:
        """Seconds of FlexGen's prefill of so many rows: products, or weights that cross once."""
        off = max(self._weights - self.budget.gpu, 0)  # bytes
        flops = 2 * rows * (self.prompt * self._active + self._head)
        return max(
            flops / self.hardware.device_flops_per_s,
            off / self.hardware.h2d_bytes_per_s,
            max(off - self.budget.cpu, 0) / self.hardware.disk_read_bytes_per_s,
        )

    def _block(self, rows: int, held: float) -> _Block | None:
        """A block of rows with memory for so many tokens each; None if they don't fit."""
        budget, nbytes = self.budget, rows * self._cache_bytes(held)
        weights = max(self._weights - budget.gpu, 0)
        cached = min(max(budget.gpu - self._weights, 0), nbytes)
        on_disk = max(weights + self._table + nbytes - cached - budget.cpu, 0)
        if on_disk > min(weights, budget.disk):
            return None
        read = self._cache_bytes(self.prompt + self.new / 2) / self._cache_bytes(held)
        return _Block(rows, weights, (nbytes - cached) * read, cached * read, on_disk)

    def _streamed(self, block: _Block, before: float) -> float:
        """Bytes of the cache that cross the link, so that it and host attention end together.

        before: seconds for which host attention waits.
        """
        link, host = self.hardware.h2d_bytes_per_s, self.hardware.host_attention_bytes_per_s
        together = (block.weights + block.cache + before * host) / (link + host)
        return min(max(together * link - block.weights, 0), block.cache)

    def _read_weights(self, tokens: int) -> float:
        """Bytes of weights that a pass of so many tokens reads from the device's memory."""
        return sum(
            nbytes * (touched_experts(self.plan.config, tokens) / experts if experts else 1)
            for experts, nbytes in self._parts.items()
        )

    @cached_property
    def _parts(self) -> dict[int, int]:
        """{experts stacked in a weight, 0 for none: bytes} of all but the table of embeddings."""
        config = self.plan.config
        nbytes = {0: 0, config.num_experts: 0}
        for layer in self._layers:
            for each in config.tensors(layer).items():
                nbytes[_experts(config, each[1])] += self.plan.weight_format.stored_bytes(*each)
        return nbytes

    @property
    def _layers(self) -> list[int]:
        return [layer for layer in self.plan.stage.layers if layer]

    @cached_property
    def _weights(self) -> float:
        """Bytes of the weights that a pass multiplies by: all but the table of embeddings."""
        return float(sum(self._parts.values()))

    @cached_property
    def _table(self) -> float:
        """Bytes of the table of embeddings, which the host looks up."""
        config = self.plan.config
        if not self.plan.stage.is_first:
            return 0.0
        shape = config.vocab_size, config.embedding_size
        return float(self.plan.weight_format.stored_bytes("embed_tokens.weight", shape))

    @cached_property
    def _active(self) -> float:
        """Values of a token's products in all decoder layers."""
        config = self.plan.config
        chosen = config.experts_per_token / (config.num_experts or 1)
        return sum(
            prod(shape) * (chosen if _experts(config, shape) else 1.0)
            for layer in self.plan.stage.decoders
            for shape in config.tensors(layer).values()
            if len(shape) > 1
        )

    @cached_property
    def _head(self) -> float:
        config = self.plan.config
        has_head = config.head_layer in self.plan.stage.layers
        return float(config.vocab_size * config.embedding_size * has_head)

    def _cache_bytes(self, tokens: float) -> float:
        """Bytes of a row's cache in all layers, with so many tokens."""
        return self.plan.attended_tokens(int(tokens)) * self.plan.kv_bytes


def _experts(config: ModelConfig, shape: tuple[int, ...]) -> int:
    """Experts that are stacked in a weight of this shape; 0 for one that all tokens take."""
    return config.num_experts if is_stacked(shape) else 0
