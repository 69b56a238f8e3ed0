"""Built-in configs of published models, by name, for planning and measuring without a checkpoint.

The numbers are those of the config.json with which each model was published.
"""

from __future__ import annotations

from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_parsers import (
    parse_gemma,
    parse_gemma3,
    parse_llama,
    parse_opt,
    parse_phi3,
)

# (layers, hidden size, heads); `_opt_keys` derives the rest.
_OPT = {
    "opt-125m": (12, 768, 12),
    "opt-350m": (24, 1024, 16),
    "opt-1.3b": (24, 2048, 32),
    "opt-2.7b": (32, 2560, 32),
    "opt-6.7b": (32, 4096, 32),
    "opt-13b": (40, 5120, 40),
    "opt-30b": (48, 7168, 56),
    "opt-66b": (64, 9216, 72),
    "opt-175b": (96, 12288, 96),
}
# (layers, hidden size, heads, intermediate size), with the context length of Llama 3.1.
_LLAMA = {
    "llama-3-8b": (32, 4096, 32, 14336),
    "llama-3-70b": (80, 8192, 64, 28672),
}
# (layers, hidden size, heads, intermediate size); heads have 128 elements.
_QWEN3 = {
    "qwen3-8b": (36, 4096, 32, 12288),
    "qwen3-32b": (64, 5120, 64, 25600),
}
# One model of each other family: (parser, the keys of its config.json).
_OTHERS = {
    "phi-3-mini": (
        parse_phi3,
        {
            "model_type": "phi3",
            "num_hidden_layers": 32,
            "hidden_size": 3072,
            "num_attention_heads": 32,
            "intermediate_size": 8192,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": 2047,
            "eos_token_ids": (32000,),
        },
    ),
    "gemma-7b": (
        parse_gemma,
        {
            "num_hidden_layers": 28,
            "hidden_size": 3072,
            "num_attention_heads": 16,
            "head_dim": 256,
            "intermediate_size": 24576,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "eos_token_ids": (1,),
        },
    ),
    "gemma-3-1b": (
        parse_gemma3,
        {
            "num_hidden_layers": 26,
            "hidden_size": 1152,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "intermediate_size": 6912,
            "vocab_size": 262144,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "sliding_window": 512,
            "eos_token_ids": (1,),
        },
    ),
}
SHAPES = (*_OPT, *_LLAMA, *_QWEN3, *_OTHERS)


def shape_config(name: str) -> ModelConfig:
    """Return the config of a built-in model, such as "opt-30b".

    Raises ValueError for other names.
    """
    if name in _OPT:
        return parse_opt(_opt_keys(name))
    if name in _LLAMA:
        return parse_llama(_llama_keys(name))
    if name in _QWEN3:
        return parse_llama(_qwen3_keys(name))
    if name in _OTHERS:
        parse, keys = _OTHERS[name]
        return parse(keys | {"dtype": "bfloat16"})
    raise ValueError(f"there is no built-in shape {name!r}; known are {', '.join(SHAPES)}")


def _opt_keys(name: str) -> dict:
    layers, hidden, heads = _OPT[name]
    keys = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "dtype": "float16",
        "eos_token_ids": (2,),
    }
    if name == "opt-350m":
        keys |= {"word_embed_proj_dim": 512, "do_layer_norm_before": False}
    return keys


def _llama_keys(name: str) -> dict:
    layers, hidden, heads, intermediate = _LLAMA[name]
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": intermediate,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "dtype": "bfloat16",
        "eos_token_ids": (128001,),
    }


def _qwen3_keys(name: str) -> dict:
    layers, hidden, heads, intermediate = _QWEN3[name]
    return {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": intermediate,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "dtype": "bfloat16",
        "eos_token_ids": (151645, 151643),
    }
