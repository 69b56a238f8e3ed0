"""Makes a ModelConfig of the keys of a published config.json, one function for each family.

Imports no torch, so that planning needs none. To add a family: write `parse_NAME` here, starting
from its nearest sibling, list it in config_files.ARCHITECTURES, write models/NAME.py with its maths
and list that in registry.py.
"""

from __future__ import annotations

from dataclasses import replace

from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.rope import parse_rope

POSITION_OFFSET = 2  # OPT's position table begins with two rows that are never used
PARTIAL_ROTATION = ("phi3", "glm4_moe")  # model types whose heads may be rotated in part


def parse_opt(hf: dict) -> ModelConfig:
    """Parse Hugging Face's OPTConfig."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    pre_norm = hf.get("do_layer_norm_before", True)
    affine = hf.get("layer_norm_elementwise_affine", True)
    bias = hf.get("enable_bias", True)
    return ModelConfig(
        family="opt",
        num_layers=hf["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=hf["ffn_dim"],
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"],
        embedding_size=hf.get("word_embed_proj_dim", hidden),
        dtype=hf["dtype"],
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
        activation=hf.get("activation_function", "relu"),
        norm_eps=1e-5,
        norm_weight=affine,
        norm_bias=affine,
        pre_norm=pre_norm,
        final_norm=pre_norm and not hf.get("_remove_final_layer_norm", False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        position_table=hf["max_position_embeddings"] + POSITION_OFFSET,
        eos_token_ids=hf["eos_token_ids"],
    )


def parse_llama(hf: dict) -> ModelConfig:
    """Parse Hugging Face's LlamaConfig, MistralConfig, Qwen2Config or Qwen3Config.

    Other families start from this and replace what differs. Raises ValueError, naming it, for an
    unknown rope type or layer type.
    """
    kind = hf.get("model_type", "llama")
    bias = kind == "qwen2" or hf.get("attention_bias", False)
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    rope = parse_rope(hf, kind in PARTIAL_ROTATION)
    # Linear scaling stretches max_position_embeddings, as in vLLM; yarn names its own context.
    stretched = rope.factor if rope.type == "linear" else 1
    return ModelConfig(
        family="llama",
        num_layers=hf["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hidden // heads,
        intermediate_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        max_seq_len=rope.context or int(hf["max_position_embeddings"] * stretched),
        embedding_size=hidden,
        dtype=hf["dtype"],
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        activation=hf.get("hidden_act", "silu"),
        norm_eps=hf["rms_norm_eps"],
        gated_mlp=True,
        attention_bias=bias,
        output_bias=bias and kind != "qwen2",
        qk_norm="heads" if kind == "qwen3" else None,
        mlp_bias=hf.get("mlp_bias", False),
        rope=rope,
        **_windows(hf, kind),
        eos_token_ids=hf["eos_token_ids"],
    )


def _windows(hf: dict, kind: str) -> dict:
    """Return ModelConfig's fields about sliding windows.

    All layers of Mistral and Phi have one, and Qwen's layers from max_window_layers on.
    """
    window, count = hf.get("sliding_window"), hf["num_hidden_layers"]
    if kind in ("mistral", "mixtral", "phi3"):
        return {"sliding_window": window}
    if kind not in ("qwen2", "qwen3") or not window or not hf.get("use_sliding_window"):
        return {}
    kinds = hf.get("layer_types")
    if not kinds:
        full = min(hf.get("max_window_layers", 28), count)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (count - full)
    return _windows_of(kinds, window)


def _windows_of(layer_types: list[str], window: int | None) -> dict:
    """Return ModelConfig's fields about sliding windows from Hugging Face's list of layer types.

    Raises ValueError for an unknown layer type, or a missing window.
    """
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if "sliding_attention" in layer_types and not window:
        raise ValueError("layer_types has sliding_attention, but there is no sliding_window")
    if unknown:
        raise ValueError(f"layer_types {sorted(unknown)} are not supported")
    full = [i for i, it in enumerate(layer_types, start=1) if it == "full_attention"]
    if len(full) == len(layer_types):
        return {}
    return {"sliding_window": window, "full_attention_layers": tuple(full)}


def parse_phi3(hf: dict) -> ModelConfig:
    """Parse Hugging Face's Phi3Config. Raises ValueError, naming it, for an unknown rope type."""
    return replace(parse_llama(hf), family="phi3")


def parse_olmo2(hf: dict) -> ModelConfig:
    """Parse Hugging Face's Olmo2Config. Raises ValueError, naming it, for an unknown rope type."""
    config = parse_llama(hf)
    return replace(config, family="olmo2", pre_norm=False, qk_norm="all", norm_offset=0.0)


def parse_mixtral(hf: dict) -> ModelConfig:
    """Parse Hugging Face's MixtralConfig.

    Raises ValueError, naming it, for an unknown rope type.
    """
    return replace(
        parse_llama({"rope_theta": 1e6} | hf),
        family="mixtral",
        expert_size=hf["intermediate_size"],
        norm_topk=True,
        **_choices(hf),
    )


def parse_olmoe(hf: dict) -> ModelConfig:
    """Parse Hugging Face's OlmoeConfig.

    Raises ValueError, naming it, for an unsupported feature.
    """
    _refuse(hf, "clip_qkv")
    return replace(
        parse_llama(hf),
        family="olmoe",
        qk_norm="all",
        expert_size=hf["intermediate_size"],
        norm_topk=hf.get("norm_topk_prob", False),
        **_choices(hf),
    )


def parse_qwen_moe(hf: dict) -> ModelConfig:
    """Parse Hugging Face's Qwen2MoeConfig or Qwen3MoeConfig.

    Raises ValueError, naming it, for an unsupported feature.
    """
    _refuse(hf, "use_sliding_window")
    config, is_qwen2 = parse_llama(hf), hf["model_type"] == "qwen2_moe"
    every, plain = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers") or ()
    layers = range(config.num_layers)
    return replace(
        config,
        family="qwen_moe",
        attention_bias=hf.get("qkv_bias", True) if is_qwen2 else config.attention_bias,
        output_bias=config.output_bias and not is_qwen2,
        qk_norm=None if is_qwen2 else "heads",
        expert_size=hf["moe_intermediate_size"],
        norm_topk=hf.get("norm_topk_prob", False),
        shared_expert_size=hf["shared_expert_intermediate_size"] if is_qwen2 else 0,
        shared_expert_gate=is_qwen2,
        dense_layers=tuple(it + 1 for it in layers if it in plain or (it + 1) % every),
        **_choices(hf),
    )


def parse_gpt_oss(hf: dict) -> ModelConfig:
    """Parse Hugging Face's GptOssConfig.

    Raises ValueError, naming it, for an unsupported feature.
    """
    kinds = hf.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention"
        for layer in range(hf["num_hidden_layers"])
    ]
    return replace(
        parse_llama({"attention_bias": True, "rope_theta": 150000.0} | hf),
        family="gpt_oss",
        # Training in float16 had losses without end, and no run in it is known to stay in range.
        overflows_float16=True,
        attention_sinks=True,
        expert_size=hf["intermediate_size"],
        norm_topk=True,
        expert_bias=True,
        swiglu_limit=hf.get("swiglu_limit", 7.0),
        swiglu_alpha=hf.get("swiglu_alpha", 1.702),
        **_choices(hf),
        **_windows_of(kinds, hf.get("sliding_window")),
    )


def parse_glm4_moe(hf: dict) -> ModelConfig:
    """Parse Hugging Face's Glm4MoeConfig.

    Raises ValueError, naming it, for an unknown rope type or groups of experts that don't fit.
    """
    config = parse_llama({"partial_rotary_factor": 0.5} | hf)
    expert_size, dense = hf["moe_intermediate_size"], hf.get("first_k_dense_replace", 1)
    return replace(
        config,
        family="glm4_moe",
        output_bias=False,
        qk_norm="heads" if hf.get("use_qk_norm") else None,
        expert_size=expert_size,
        norm_topk=hf.get("norm_topk_prob", True),
        shared_expert_size=expert_size * hf.get("n_shared_experts", 1),
        corrects_choice=True,
        routed_scale=hf.get("routed_scaling_factor", 1.0),
        dense_layers=tuple(range(1, min(dense, config.num_layers) + 1)),
        **_groups(hf),
        **_choices(hf),
    )


def _groups(hf: dict) -> dict:
    """Return ModelConfig's fields about groups of experts, of which a token chooses some first."""
    count, groups, chosen = hf["n_routed_experts"], hf.get("n_group", 1), hf.get("topk_group", 1)
    size = count // max(groups, 1)
    if groups < 1 or count % groups or (size < 2 and groups > 1):
        raise ValueError(
            f"n_group is {groups} and n_routed_experts {count}; groups must be of one size, 2 or "
            "more: correct config.json"
        )
    if not 1 <= chosen <= groups or chosen * size < hf["num_experts_per_tok"]:
        raise ValueError(
            f"topk_group is {chosen} of {groups} groups of {size} experts; these must hold the "
            f"num_experts_per_tok, {hf['num_experts_per_tok']}: correct config.json"
        )
    return {"expert_groups": groups, "chosen_groups": chosen}


def _choices(hf: dict) -> dict:
    """Return ModelConfig's fields about how many experts there are, and how many a token takes."""
    count = hf.get("num_experts") or hf.get("n_routed_experts") or hf["num_local_experts"]
    return {"num_experts": count, "experts_per_token": hf["num_experts_per_tok"]}


def parse_gemma(hf: dict) -> ModelConfig:
    """Parse Hugging Face's GemmaConfig.

    Raises ValueError, naming it, for an unsupported feature.
    """
    _refuse(hf, "use_bidirectional_attention")
    config = parse_llama({"tie_word_embeddings": True} | hf)
    activation = hf.get("hidden_act") or "gelu"
    # Published configs say "gelu", but the models were trained with its tanh approximation.
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    return replace(config, family="gemma", activation=activation, norm_offset=1.0)


def _refuse(hf: dict, *features: str) -> None:
    """Raise ValueError, naming it, if the config sets one of these unsupported features."""
    for name in features:
        if hf.get(name):
            raise ValueError(f"{name} {hf[name]} is not supported")


def parse_gemma3(hf: dict) -> ModelConfig:
    """Parse Hugging Face's Gemma3TextConfig.

    Raises ValueError, naming it, for an unsupported feature.
    """
    _refuse(hf, "attn_logit_softcapping", "final_logit_softcapping")
    config = parse_gemma(hf | {"hidden_act": hf.get("hidden_activation")})
    ropes = hf.get("rope_parameters")
    if not ropes:
        # Before transformers 5: scaled frequencies for full attention, plain ones within windows.
        far = {"rope_theta": hf.get("rope_theta", 1e6)} | (hf.get("rope_scaling") or {})
        near = {"rope_theta": hf.get("rope_local_base_freq", 1e4)}
        ropes = {"full_attention": far, "sliding_attention": near}
    return replace(
        config,
        family="gemma3",
        overflows_float16=True,
        max_seq_len=hf["max_position_embeddings"],  # includes rope scaling already
        qk_norm="heads",
        branch_norms=True,
        query_scale=(config.head_dim / hf.get("query_pre_attn_scalar", 256)) ** 0.5,
        rope=parse_rope(hf | {"rope_scaling": ropes["full_attention"]}),
        window_rope=parse_rope(hf | {"rope_scaling": ropes["sliding_attention"]}),
        **_windows_of(_layer_types(hf), hf["sliding_window"]),
    )


def _layer_types(hf: dict) -> list[str]:
    """Return the attention type of each layer; if the config lists none, every sixth is full.

    The published config.json files list none.
    """
    every = hf.get("sliding_window_pattern") or 6
    layers = range(1, hf["num_hidden_layers"] + 1)
    return hf.get("layer_types") or [
        "sliding_attention" if layer % every else "full_attention" for layer in layers
    ]
