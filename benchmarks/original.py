"""The original FlexGen's own cost model and constants, frozen, to be compared with ours.

Source: FlexGen (Sheng et al., ICML 2023), section 4.3, and the formulas of its released code, in
which less overlaps than in ours. In prefill, loads and stores wait for the disk. In decode, copies
to the GPU come first and the rest overlaps; compute of the GPU and of the host add up, and the host
attends all of the cache that is off the GPU. No plan is made by this model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from flexgen_ray.config import Policy
from flexgen_ray.models.config import ModelConfig

_GIB = 2**30
_T = 1e12
# Constants that its authors fitted to their implementation on one machine with a T4: bytes/s of
# copies and disk, flops/s of products and attention.
LOAD = 12.89 * _GIB
STORE_CACHE, STORE_HIDDEN = 0.97 * _GIB, 4.82 * _GIB
READ = 0.473 * _GIB
WRITE_CACHE, WRITE_HIDDEN = 0.746 * _GIB, 2.015 * _GIB
GEMM_PREFILL, GEMM_DECODE = 21.24 * _T, 4.3 * _T
ATTENTION_PREFILL, ATTENTION_DECODE = 9.97 * _T, 0.079 * _T
HOST_ATTENTION = 0.0123 * _T
READ_WEIGHTS = 0.95 * READ


@dataclass(frozen=True)
class Original:
    """Predictions for one model, policy and workload; lengths in tokens."""

    config: ModelConfig
    policy: Policy
    prompt_len: int
    max_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of prefill and decode."""
        prefill, decode = self.prefill_seconds, (self.max_tokens - 1) * self.decode_seconds
        return self.policy.block_size * self.max_tokens / (prefill + decode)

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second of decode alone."""
        return self.policy.block_size / self.decode_seconds

    @property
    def prefill_seconds(self) -> float:
        """Seconds of a block's prefill, all layers."""
        policy, tokens = self.policy, self.policy.block_size * self.prompt_len
        hidden, cache = 2 * self._width * tokens, 4 * self._width * (tokens + policy.block_size)
        off_cache = policy.cache.cpu + policy.cache.disk
        off_hidden = policy.activations.cpu + policy.activations.disk
        load = (self._streamed + hidden * off_hidden) / LOAD
        store = cache * off_cache / STORE_CACHE + hidden * off_hidden / STORE_HIDDEN
        read = (self._weights * policy.weights.disk + hidden * policy.activations.disk) / READ
        write = cache * policy.cache.disk / WRITE_CACHE
        write += hidden * policy.activations.disk / WRITE_HIDDEN
        attention = 4 * tokens * self.prompt_len * self._width / ATTENTION_PREFILL
        compute = tokens * self._flops_per_token / GEMM_PREFILL + attention
        return self.config.num_layers * max(load + read, store + write, compute)

    @property
    def decode_seconds(self) -> float:
        """Seconds to decode one token of each sequence of a block, all layers."""
        policy, rows = self.policy, self.policy.block_size
        hidden, new = 2 * self._width * rows, 4 * self._width * rows
        cached = new * (self.prompt_len + self.max_tokens / 2)
        off_hidden = policy.activations.cpu + policy.activations.disk
        load = (self._streamed + hidden * off_hidden) / LOAD
        store = hidden * off_hidden / STORE_HIDDEN
        read = (cached * policy.cache.disk + hidden * policy.activations.disk) / READ
        read += self._weights * policy.weights.disk / READ_WEIGHTS
        write = (new * policy.cache.disk + hidden * policy.activations.disk) / WRITE_HIDDEN
        compute = rows * self._flops_per_token / GEMM_DECODE
        compute += cached * policy.cache.gpu / ATTENTION_DECODE
        compute += cached * (policy.cache.cpu + policy.cache.disk) / self._host_attention
        return self.config.num_layers * (load + max(store, read, write, compute))

    @property
    def _width(self) -> int:
        return self.config.hidden_size

    @property
    def _weights(self) -> float:
        """Bytes of a layer's weights in float16."""
        return 8 * self._width**2 + 4 * self._width * self.config.intermediate_size

    @property
    def _flops_per_token(self) -> float:
        """Flops of a layer's matrix products for a token: two a parameter, which has two bytes."""
        return self._weights

    @property
    def _streamed(self) -> float:
        return self._weights * (self.policy.weights.cpu + self.policy.weights.disk)

    @property
    def _host_attention(self) -> float:
        """Flops/s of host attention, fitted too: small batches and narrow layers are slower."""
        batch = max(0.0, log2(64 / self.policy.gpu_batch_size))
        width = max(0.0, log2(4096 / self._width))
        factor = 1 + 0.0168 * batch * width - 0.0328 * batch - 0.0621 * width
        return HOST_ATTENTION * max(0.1, factor)
