"""Routers of mixtures: which experts each token chooses, and each one's share of the sum.

Besides, some families have an expert that every token takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen_ray.models.config import ROUTER_CORRECTION, ModelConfig
from flexgen_ray.models.layers import Weights, gated, linear, product


def choose(config: ModelConfig, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token by the router's scores, in float32.

    x: [tokens, hidden]. Returns shares, in x's dtype, and experts' numbers, best first: both
    [tokens, experts_per_token]. Equal scores are ordered as torch.topk orders them.
    """
    choice = _by_sigmoid if config.corrects_choice else _by_softmax
    shares, chosen = choice(config, weights, x)
    if config.routed_scale != 1:
        shares *= config.routed_scale
    return shares.to(x.dtype), chosen


def _by_softmax(config: ModelConfig, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Shares sum to one over all experts, or over the chosen ones."""
    scores = linear(weights, "router", x).softmax(dim=-1, dtype=torch.float32)
    shares, chosen = scores.topk(config.experts_per_token, dim=-1)
    if config.norm_topk:
        shares /= shares.sum(dim=-1, keepdim=True)
    return shares, chosen


def _by_sigmoid(config: ModelConfig, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert has a score of its own, corrected for the choice alone (Wang et al. 2024).

    The choice may be limited to the groups of experts whose two best have the highest sum. Scores
    and correction are in float32, for in 16 bits they would choose other experts.
    """
    scores = product(x.float(), weights["router.weight"].float()).sigmoid_()
    ranks = scores + weights[ROUTER_CORRECTION]
    if config.chosen_groups < config.expert_groups:
        groups = ranks.unflatten(-1, (config.expert_groups, -1))
        best = groups.topk(2, dim=-1).values.sum(dim=-1)
        inside = best.topk(config.chosen_groups, dim=-1).indices
        is_outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, inside, False)
        groups.masked_fill_(is_outside[..., None], -torch.inf)
    chosen = ranks.topk(config.experts_per_token, dim=-1).indices
    shares = scores.gather(1, chosen)
    if config.norm_topk:
        shares /= shares.sum(dim=-1, keepdim=True).add_(1e-20)
    return shares, chosen


def add_shared(config: ModelConfig, weights: Weights, x: Tensor, hidden: Tensor) -> None:
    """Add the expert that every token takes, perhaps as far as a gate lets it, in place.

    x: normed hidden states, [tokens, hidden]; hidden: [tokens, hidden].
    """
    inner = gated(config, weights, x, "shared_gate_up_proj")
    out = linear(weights, "shared_down_proj", inner)
    if config.shared_expert_gate:
        hidden.addcmul_(out, linear(weights, "shared_gate", x).sigmoid_())
    else:
        hidden += out
