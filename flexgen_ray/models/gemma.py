"""Gemma (Gemma Team 2024): Llama's, with embeddings scaled by the square root of the hidden size,
and norms whose weights are kept less one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flexgen_ray.model_config import ModelConfig
from flexgen_ray.models import llama
from flexgen_ray.models.layers import Lookup

WEIGHT_NAMES = llama.WEIGHT_NAMES
project, finish, head = llama.project, llama.finish, llama.head


def parse_config(hf: dict) -> ModelConfig:
    """From the keys of Hugging Face's GemmaConfig; ValueError names what is not supported."""
    refuse(hf, "use_bidirectional_attention")
    config = llama.parse_config({"tie_word_embeddings": True} | hf)
    activation = hf.get("hidden_act") or "gelu"
    # What was published says gelu, and means its approximation.
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    return replace(config, family="gemma", activation=activation, norm_offset=1.0)


def refuse(hf: dict, *features: str) -> None:
    """ValueError names the first feature that the model has."""
    for name in features:
        if hf.get(name):
            raise ValueError(f"{name} {hf[name]} is not supported")


def embed(config: ModelConfig, lookup: Lookup, tokens: Tensor, positions: Tensor) -> Tensor:
    """tokens: [tokens]; returns hidden states [tokens, hidden]."""
    x = lookup("embed_tokens.weight", tokens)
    # Rounded to the dtype, as it was in training.
    return x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype)
