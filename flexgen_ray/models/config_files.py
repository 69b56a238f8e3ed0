"""Reads config.json and generation_config.json of a model folder.

`load_config` makes a ModelConfig of them; config_parsers.py knows the keys of each family.
`load_sampling_defaults` returns the sampling parameters that the model's publisher recommends, the
same fields that vLLM reads. Imports no torch, so that planning needs none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexgen_ray.config import DTYPE_BYTES
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_parsers import (
    parse_gemma,
    parse_gemma3,
    parse_glm4_moe,
    parse_gpt_oss,
    parse_llama,
    parse_mixtral,
    parse_olmo2,
    parse_olmoe,
    parse_opt,
    parse_phi3,
    parse_qwen_moe,
)
from flexgen_ray.quant.formats import FORMATS
from flexgen_ray.request import SamplingParams

ARCHITECTURES: dict[str, Callable[[dict], ModelConfig]] = {
    "OPTForCausalLM": parse_opt,
    "LlamaForCausalLM": parse_llama,
    "MistralForCausalLM": parse_llama,
    "Qwen2ForCausalLM": parse_llama,
    "Qwen3ForCausalLM": parse_llama,
    "Olmo2ForCausalLM": parse_olmo2,
    "Phi3ForCausalLM": parse_phi3,
    "GemmaForCausalLM": parse_gemma,
    "Gemma3ForCausalLM": parse_gemma3,
    "Qwen2MoeForCausalLM": parse_qwen_moe,
    "Qwen3MoeForCausalLM": parse_qwen_moe,
    "MixtralForCausalLM": parse_mixtral,
    "OlmoeForCausalLM": parse_olmoe,
    "GptOssForCausalLM": parse_gpt_oss,
    "Glm4MoeForCausalLM": parse_glm4_moe,
}
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_new", "gelu_pytorch_tanh")  # implemented in layers.py
# The quant_method in config.json of a checkpoint that `flexgen-ray quantize` wrote.
QUANT_METHOD = "flexgen_ray"
# Limits of a model's sizes: far beyond every published model, and small enough that a damaged or
# hostile config.json is refused before any work.
_LARGEST = {
    "num_layers": 2**10, "hidden_size": 2**20, "num_heads": 2**14, "num_kv_heads": 2**14,
    "head_dim": 2**14, "intermediate_size": 2**24, "vocab_size": 2**24, "max_seq_len": 2**32,
}  # fmt: skip
_LARGEST_OF_MIXTURES = {"num_experts": 2**14, "expert_size": 2**24}
_MAX_CONFIG_BYTES = 2**24
# {field of generation_config.json: field of SamplingParams}
_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def load_config(folder: str | Path) -> ModelConfig:
    """Load a model folder's config.json and, for end tokens, its generation_config.json.

    Raises FileNotFoundError if there is no config.json, ValueError, naming the file, if it is
    damaged or the model isn't supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; --model takes a Hugging Face model folder "
            "(config.json, *.safetensors, tokenizer.json)"
        )
    hf = _read_json(path)
    try:
        return _parsed(path, hf)
    except KeyError as error:
        raise ValueError(f"{path}: key {error} is missing") from error
    except (TypeError, AttributeError, ArithmeticError, IndexError) as error:
        raise ValueError(
            f"{path} has a value of the wrong type ({error}); download it again"
        ) from error


def load_sampling_defaults(folder: Path) -> dict[str, Any]:
    """Return the fields of SamplingParams that generation_config.json sets; {} without the file.

    do_sample false means temperature 0. Raises ValueError, naming the file, for invalid values.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it must hold a JSON object")
        params = {ours: values[its] for its, ours in _FIELDS.items() if values.get(its) is not None}
        if values.get("do_sample") is False:
            params["temperature"] = 0.0
        SamplingParams(**params)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; correct the file, or remove it") from error
    return params


def _parsed(path: Path, hf: dict) -> ModelConfig:
    """Return the ModelConfig of config.json's content, every value checked. path: for errors."""
    architecture = (hf.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: {architecture} is not supported; supported are {known}")
    hf["dtype"] = _checkpoint_dtype(path, hf)
    hf["eos_token_ids"] = _eos_token_ids(path, hf)
    _check_size(path, "num_hidden_layers", hf["num_hidden_layers"], _LARGEST["num_layers"])
    try:
        config = ARCHITECTURES[architecture](hf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if config.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"{path}: activation {config.activation!r} is not one of {known}")
    for name, largest in _LARGEST.items():
        _check_size(path, name, getattr(config, name), largest)
    if hf.get("num_experts_per_tok") is not None:
        _check_experts(path, config)
    if config.sliding_window is not None:
        _check_size(path, "sliding_window", config.sliding_window, _LARGEST["max_seq_len"])
    for name in ("norm_eps", "query_scale", "swiglu_alpha", "routed_scale"):
        _check_number(path, name, getattr(config, name))
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"{path}: num_heads is {config.num_heads} and num_kv_heads {config.num_kv_heads}; the "
            "first must be a multiple of the second"
        )
    return replace(config, **_quantization(path, hf, config))  # type: ignore[arg-type]


def _check_size(path: Path, name: str, size: object, largest: int) -> None:
    if type(size) is not int or not 1 <= size <= largest:
        raise ValueError(f"{path}: {name} is {size!r}; it must be an integer, 1 to {largest}")


def _check_number(path: Path, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"{path}: {name} is {value!r}; it must be a number above 0")


def _check_experts(path: Path, config: ModelConfig) -> None:
    """Check the sizes of a mixture of experts."""
    for name, largest in _LARGEST_OF_MIXTURES.items():
        _check_size(path, name, getattr(config, name), largest)
    _check_size(path, "experts_per_token", config.experts_per_token, config.num_experts)
    if config.swiglu_limit is not None:
        _check_number(path, "swiglu_limit", config.swiglu_limit)
    if config.shared_expert_size:
        size = config.shared_expert_size
        _check_size(path, "shared_expert_size", size, _LARGEST["intermediate_size"])


def _quantization(path: Path, hf: dict, config: ModelConfig) -> dict[str, int | str | None]:
    """Return ModelConfig's fields about how a checkpoint is quantized.

    They are weight_bits and embedding_bits of one that `flexgen-ray quantize` wrote, or
    expert_format of a mixture whose publisher quantized its experts; {} for one that isn't
    quantized. Raises ValueError for one that other tools quantized.
    """
    quantization = hf.get("quantization_config")
    if quantization is None:
        return {}
    method = quantization.get("quant_method")
    if method in FORMATS and config.num_experts:
        return {"expert_format": method}
    if method != QUANT_METHOD:
        raise ValueError(
            f"{path}: weights quantized by {method!r} are not supported; take the original "
            "checkpoint, and --weight-bits 4"
        )
    return {name: quantization.get(name) for name in ("weight_bits", "embedding_bits")}


def _read_json(path: Path) -> dict:
    """Read a file that holds a JSON object. Raises ValueError, naming the file."""
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(
            f"{path} is larger than {_MAX_CONFIG_BYTES // 2**20} MiB; download it again"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def _checkpoint_dtype(path: Path, hf: dict) -> str:
    """Return the dtype in which the checkpoint was saved, such as "bfloat16"."""
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{path}: dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    return dtype


def _eos_token_ids(path: Path, hf: dict) -> tuple[int, ...]:
    """Return the end tokens of config.json and generation_config.json together.

    Fine-tuning often changes only one of the two files.
    """
    generation = path.with_name("generation_config.json")
    files = [hf, *([_read_json(generation)] if generation.is_file() else [])]
    token_ids: dict[int, None] = {}
    for eos in (it.get("eos_token_id") for it in files):
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if any(type(token) is not int for token in ids):
            raise ValueError(
                f"{path.parent}: eos_token_id is {eos!r}; config.json and generation_config.json "
                "must give a token id, or a list of them"
            )
        token_ids |= dict.fromkeys(ids)
    return tuple(token_ids)
