"""Checkpoints with random weights, for benchmarks of speed, where the answers don't matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Names give the checkpoint's size in float32.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1.2gb": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    # Each head has its own keys and values, which makes 384 KiB of cache for a token.
    "llama-2.6gb-mha": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "llama-2.5gb": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    # A token takes 4 of 32 experts; 3 GB in bfloat16.
    "qwen3-moe-6gb": {
        "model_type": "qwen3_moe",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "moe_intermediate_size": 512,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}


def make_checkpoint(shape: str, folder: Path, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a new Hugging Face folder of a named shape, without a tokenizer; returns the folder.

    All weights are in memory together. Their scale makes greedy tokens differ from each other.
    Raises ValueError for an unknown shape, FileExistsError if the folder is there.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is unknown; there are {', '.join(SHAPES)}")
    config = AutoConfig.for_model(**SHAPES[shape])
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        weight = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            weight.mul_(0.1).add_("norm" in name and name.endswith("weight"))
        elif "embed" not in name and "lm_head" not in name:
            weight.mul_(1.5 / parameter.shape[-1] ** 0.5)
        weights[name] = weight.to(getattr(torch, dtype))
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder
