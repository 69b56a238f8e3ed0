"""Built-in configs of published models, by name, for planning and measuring without a checkpoint.

The numbers are those of the config.json with which each model was published.
"""

from __future__ import annotations

from dataclasses import replace

from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_parsers import (
    parse_gemma,
    parse_gemma3,
    parse_glm4_moe,
    parse_gpt_oss,
    parse_llama,
    parse_mixtral,
    parse_olmoe,
    parse_opt,
    parse_phi3,
    parse_qwen_moe,
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
# (layers, hidden size, heads, elements of an expert and of a plain MLP); 8 of 128 experts a token.
_QWEN3_MOE = {
    "qwen3-30b-a3b": (48, 2048, 32, 768, 6144),
    "qwen3-235b-a22b": (94, 4096, 64, 1536, 12288),
}
# (layers, hidden size, heads, elements of an expert, context length); 2 of 8 experts a token.
_MIXTRAL = {
    "mixtral-8x7b": (32, 4096, 32, 14336, 32768),
    "mixtral-8x22b": (56, 6144, 48, 16384, 65536),
}
# (layers, experts); 4 experts a token; experts are in MXFP4.
_GPT_OSS = {
    "gpt-oss-20b": (24, 32),
    "gpt-oss-120b": (36, 128),
}
# (layers, layers without experts, hidden size, elements of an expert and of a plain MLP, experts,
# factor of their shares, whether queries and keys are normed); 8 experts a token, and a shared one.
_GLM = {
    "glm-4.5-air": (46, 1, 4096, 1408, 10944, 128, 1.0, False),
    "glm-4.5": (92, 3, 5120, 1536, 12288, 160, 2.5, True),
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
    "olmoe-1b-7b": (
        parse_olmoe,
        {
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "vocab_size": 50304,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_ids": (50279,),
        },
    ),
}
_QWEN3_ALIKE = {
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "dtype": "bfloat16",
    "eos_token_ids": (151645, 151643),
}
SHAPES = (*_OPT, *_LLAMA, *_QWEN3, *_QWEN3_MOE, *_MIXTRAL, *_GLM, *_GPT_OSS, *_OTHERS)


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
    if name in _QWEN3_MOE:
        return parse_qwen_moe(_qwen3_moe_keys(name))
    if name in _MIXTRAL:
        return parse_mixtral(_mixtral_keys(name))
    if name in _GPT_OSS:
        return replace(parse_gpt_oss(_gpt_oss_keys(name)), expert_format="mxfp4")
    if name in _GLM:
        return parse_glm4_moe(_glm_keys(name))
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
    return _QWEN3_ALIKE | {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": intermediate,
    }


def _qwen3_moe_keys(name: str) -> dict:
    layers, hidden, heads, expert, intermediate = _QWEN3_MOE[name]
    return _QWEN3_ALIKE | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "intermediate_size": intermediate,
        "moe_intermediate_size": expert,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }


def _glm_keys(name: str) -> dict:
    layers, dense, hidden, expert, intermediate, experts, scale, norms = _GLM[name]
    return {
        "model_type": "glm4_moe",
        "num_hidden_layers": layers,
        "first_k_dense_replace": dense,
        "hidden_size": hidden,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "use_qk_norm": norms,
        "intermediate_size": intermediate,
        "moe_intermediate_size": expert,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": scale,
        "partial_rotary_factor": 0.5,
        "rope_theta": 1e6,
        "vocab_size": 151552,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
        "eos_token_ids": (151329, 151336, 151338),
    }


def _mixtral_keys(name: str) -> dict:
    layers, hidden, heads, expert, context = _MIXTRAL[name]
    return {
        "model_type": "mixtral",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": expert,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "dtype": "bfloat16",
        "eos_token_ids": (2,),
    }


def _gpt_oss_keys(name: str) -> dict:
    layers, experts = _GPT_OSS[name]
    return {
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "hidden_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "dtype": "bfloat16",
        "eos_token_ids": (200002,),
    }
