"""Gemma (Gemma Team 2024): Llama's, with embeddings scaled by the square root of the hidden size,
and norms whose weights are kept less one.
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
    """tokens: [tokens]; returns hidden states [tokens, hidden]."""
    x = lookup("embed_tokens.weight", tokens)
    # Rounded to the dtype, as it was in training.
    return x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype)
