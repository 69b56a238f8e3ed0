"""Gemma (Gemma Team 2024): Llama, with embeddings scaled by sqrt(hidden_size).

Weights of norms are stored minus one; that is ModelConfig.norm_offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen_ray.models import llama
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.layers import Lookup

WEIGHT_NAMES = llama.WEIGHT_NAMES
project, finish, head = llama.project, llama.finish, llama.head


def embed(config: ModelConfig, lookup: Lookup, tokens: Tensor, positions: Tensor) -> Tensor:
    """Embed tokens: [tokens]. Returns hidden states [tokens, hidden]."""
    x = lookup("embed_tokens.weight", tokens)
    # The factor is rounded to the dtype, as it was in training.
    return x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype)
