"""Hypothesis strategies and builders that several test modules share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import strategies as st

from flexgen_ray import Placement, Policy
from flexgen_ray.config import HardwareSpec
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.stage_policies import StagePolicies
from flexgen_ray.store.disk import DiskTier
from flexgen_ray.store.memory import MemoryTier
from flexgen_ray.store.tiers import Tiers


@st.composite
def placements(draw) -> Placement:
    """Fractions of the three tiers, in tenths."""
    gpu = draw(st.integers(0, 10))
    cpu = draw(st.integers(0, 10 - gpu))
    return Placement(gpu / 10, cpu / 10, (10 - gpu - cpu) / 10)


policies = st.builds(
    Policy,
    gpu_batch_size=st.integers(1, 5),
    num_gpu_batches=st.integers(1, 4),
    max_batch_tokens=st.sampled_from([1, 2, 3, 7, 64]),
    weights=placements(),
    cache=placements(),
    activations=placements(),
    cpu_attention=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)


@st.composite
def pipelines(draw, num_layers: int) -> StagePolicies:
    """A split of the layers; placements for each stage; one shape and one number of blocks."""
    ends = draw(st.sets(st.integers(1, num_layers - 1), max_size=num_layers - 1))
    cuts = [0, *sorted(ends), num_layers]
    layers = tuple(b - a for a, b in zip(cuts, cuts[1:], strict=False))
    shape = draw(policies)
    blocks = draw(st.integers(len(layers), len(layers) + 2))
    each = [draw(policies) for _ in layers]
    return StagePolicies(
        tuple(
            type(shape)(
                shape.gpu_batch_size, shape.num_gpu_batches, shape.max_batch_tokens,
                it.weights, it.cache, it.activations, it.cpu_attention, blocks,
            )
            for it in each
        ),
        layers,
    )  # fmt: skip


def with_sparsity(policy: Policy, sparsity: float) -> Policy:
    """The policy with this sparsity; below 1 what it has of the cache on disk is in memory."""
    cache = policy.cache
    if sparsity < 1:
        cache = Placement(cache.gpu, 1 - cache.gpu, 0)
    return replace(policy, cache=cache, attention_sparsity=sparsity)


sparse = st.builds(
    lambda policy, sparsity, bits: replace(with_sparsity(policy, sparsity), cache_bits=bits),
    policies,
    st.sampled_from([0.1, 0.5]),
    st.sampled_from([None, 4]),
)
UNIT = HardwareSpec(*[1.0] * 8)  # so that seconds are bytes


def opt(layers: int, hidden: int, heads: int) -> ModelConfig:
    return ModelConfig(
        "opt", layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50272, 2048, hidden,
        "float16", True, "relu", 1e-5, norm_bias=True, attention_bias=True,
        output_bias=True, mlp_bias=True,
        position_table=2050,
    )  # fmt: skip


def llama(layers, hidden, heads, kv_heads, intermediate, vocab, tied=False) -> ModelConfig:
    return ModelConfig(
        "llama", layers, hidden, heads, kv_heads, hidden // heads, intermediate, vocab, 8192,
        hidden, "bfloat16", tied, "silu", 1e-5, gated_mlp=True,
    )  # fmt: skip


REAL = {
    "smollm2-135m": llama(30, 576, 9, 3, 1536, 49152, tied=True),
    "llama-3-8b": llama(32, 4096, 32, 8, 14336, 128256),
    "opt-6.7b": opt(32, 4096, 32),
    "opt-30b": opt(48, 7168, 56),
    "opt-175b": opt(96, 12288, 96),
}


MIB = 2**20
CPU = torch.device("cpu")


def tiers(folder: str | Path, budget: int = 64 * MIB) -> Tiers:
    """Three tiers in host memory and a folder, each with this budget in bytes."""
    gpu, cpu = (MemoryTier(name, budget, CPU) for name in ("gpu", "cpu"))
    return Tiers(gpu, cpu, DiskTier(budget, Path(folder)))
