"""Tiny random models and transformers' greedy answers to compare with. Knows no runs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

VOCABULARY = 97
NUM_LAYERS = 4


@dataclass(frozen=True)
class Reference:
    """A prompt and the tokens with which transformers continues it."""

    prompt: list[int]
    tokens: list[int]


def llama() -> PretrainedConfig:
    """Configuration of a tiny Llama."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=160, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip


def mixture() -> PretrainedConfig:
    """Configuration of a tiny mixture: a token takes 4 of 9 experts."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=16,
        num_experts=9, num_experts_per_tok=4, norm_topk_prob=True,
        max_position_embeddings=160, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip


def save_tiny_model(folder: Path, config: PretrainedConfig) -> None:
    """Write a model folder with random weights, large enough that its tokens are diverse."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "embed" in name:
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(1 + 0.1 * noise)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


def references(folder: Path, count: int, longest: int, max_tokens: int) -> list[Reference]:
    """Greedy continuations of ragged prompts, computed on the CPU one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(0)
    answers = []
    for _ in range(count):
        prompt = [rng.randrange(4, VOCABULARY) for _ in range(rng.randint(1, longest))]
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        answers.append(Reference(prompt, out[0, len(prompt) :].tolist()))
    return answers
