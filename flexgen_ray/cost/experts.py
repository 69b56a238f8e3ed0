"""Products of a mixture's experts: amounts and rows of groups that routing makes ragged.

Each of a layer's E experts multiplies the rows of the tokens that chose it, k experts a token. All
experts are taken to be as likely; real routers are less even. Then of n tokens

- some choose E (1 - (1 - k/E)^n) experts. Only those are read from device memory, once a tile of
  tokens. Experts that lie off the device cross the link whole, chosen or not, since they are on
  their way before the router has chosen.
- an expert has n k / E rows on average, with the variance of n draws, and the largest group has as
  many standard deviations more as the largest of E normal variables has on average: about the
  quantile (E - 3/8) / (E + 1/4) (Blom, Statistical Estimates and Transformed Beta-Variables, 1958).
  While a GPU multiplies what that group has above the mean, the others have ended.
- a GPU multiplies rows in tiles of its own, of which each group fills the last one by half.

The rate of such products is that of dense ones with as many rows as an expert multiplies, which
calibration measures: with few rows it is that of reading the matrices.

Knows counts; no rates and no tensors.
"""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

from flexgen_ray.cost.resources import Amounts, Resource
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.config import ModelConfig

# Rows that a GPU's product works on at a time: assumed, kernels have 16 to 128.
_TILE_ROWS = 32


def touched_experts(config: ModelConfig, tokens: int) -> float:
    """Experts of a layer that at least one of so many tokens chooses."""
    missed = (1 - config.experts_per_token / config.num_experts) ** tokens
    return config.num_experts * (1 - missed)


def largest_group(config: ModelConfig, tokens: int) -> float:
    """Rows of the expert that most of so many tokens choose."""
    share, experts = config.experts_per_token / config.num_experts, config.num_experts
    deviations = NormalDist().inv_cdf((experts - 0.375) / (experts + 0.25))
    return min(tokens, tokens * share + deviations * sqrt(tokens * share * (1 - share)))


def multiplied_rows(config: ModelConfig, tokens: int, on_gpu: bool) -> float:
    """Rows of all groups, with those for which a GPU works in vain or waits.

    A single group is that of a dense product, whose measured rate includes them.
    """
    choices = tokens * config.experts_per_token
    if not on_gpu or not tokens:
        return choices
    ends = max(touched_experts(config, tokens) - 1, 0) * _TILE_ROWS / 2
    tail = largest_group(config, tokens) - choices / config.num_experts
    return choices + ends + tail


def rows_of_expert(config: ModelConfig, tokens: int, on_gpu: bool) -> float:
    """Rows that an expert multiplies on average, of those that so many tokens choose."""
    return multiplied_rows(config, tokens, on_gpu) / touched_experts(config, tokens)


def expert_products(plan: StagePlan, tokens: int, tile: int, decodes: bool) -> Amounts:
    """Amounts of the products of so many tokens with the experts that they choose.

    tile: tokens that are multiplied at a time. decodes: True for no more tokens than decode.
    """
    config, on_gpu = plan.config, plan.stages_disk
    expert = 3 * config.hidden_size * config.expert_size
    counts = [tile] * (tokens // tile) + [tokens % tile] * (tokens % tile > 0)
    rows = sum(multiplied_rows(config, count, on_gpu) for count in counts)
    read = sum(touched_experts(config, count) for count in counts) * expert
    moved = 4 * tokens * config.experts_per_token * config.hidden_size
    flops = Resource.DECODE_EXPERT_FLOPS if decodes else Resource.EXPERT_FLOPS
    return {flops: 2 * rows * expert, Resource.DEVICE_MEMORY: (read + moved) * plan.element_bytes}
