"""Which architectures there are, and how a model folder becomes a ModelConfig."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from flexgen_ray.config import DTYPE_BYTES
from flexgen_ray.model_config import ModelConfig
from flexgen_ray.models import gemma, gemma3, llama, olmo2, opt, phi3
from flexgen_ray.models.layers import ACTIVATIONS

ARCHITECTURES: dict[str, ModuleType] = {
    "OPTForCausalLM": opt,
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": llama,
    "Qwen2ForCausalLM": llama,
    "Qwen3ForCausalLM": llama,
    "Olmo2ForCausalLM": olmo2,
    "Phi3ForCausalLM": phi3,
    "GemmaForCausalLM": gemma,
    "Gemma3ForCausalLM": gemma3,
}
QUANT_METHOD = "flexgen_ray"  # of the quantization_config in a packed checkpoint's config.json
FAMILIES: dict[str, ModuleType] = {
    "opt": opt,
    "llama": llama,
    "olmo2": olmo2,
    "phi3": phi3,
    "gemma": gemma,
    "gemma3": gemma3,
}
_SIZES = (
    "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_seq_len",
)  # fmt: skip


def load_config(folder: str | Path) -> ModelConfig:
    """Reads config.json and, if there, generation_config.json.

    FileNotFoundError if the folder is no model folder; ValueError for what isn't supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; --model takes a Hugging Face model folder "
            "(config.json, *.safetensors, tokenizer.json)"
        )
    hf = _read_json(path)
    architecture = (hf.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: {architecture} is not supported; supported are {known}")
    hf["dtype"] = _checkpoint_dtype(path, hf)
    hf["eos_token_ids"] = _eos_token_ids(path, hf)
    try:
        config = ARCHITECTURES[architecture].parse_config(hf)
    except KeyError as error:
        raise ValueError(f"{path}: key {error} is missing") from error
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{path} has a value of another kind than it must ({error}); download it again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if config.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"{path}: activation {config.activation!r} is not one of {known}")
    for name in _SIZES:
        size = getattr(config, name)
        if type(size) is not int or size < 1:
            raise ValueError(f"{path}: {name} is {size!r}; it must be an integer from 1 up")
    return replace(config, **_packed_bits(path, hf))


def _packed_bits(path: Path, hf: dict) -> dict[str, int | None]:
    """Of a checkpoint that `flexgen-ray quantize` wrote; ValueError for one quantized otherwise."""
    found = hf.get("quantization_config")
    if found is None:
        return {}
    method = found.get("quant_method")
    if method != QUANT_METHOD:
        raise ValueError(
            f"{path}: weights quantized by {method!r} are not supported; take the original "
            "checkpoint, and --weight-bits 4"
        )
    return {name: found.get(name) for name in ("weight_bits", "embedding_bits")}


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def _checkpoint_dtype(path: Path, hf: dict) -> str:
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{path}: dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    return dtype


def _eos_token_ids(path: Path, hf: dict) -> tuple[int, ...]:
    """generation_config.json wins, as in transformers."""
    generation = path.with_name("generation_config.json")
    eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    eos = hf.get("eos_token_id") if eos is None else eos
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(token) is not int for token in ids):
        raise ValueError(
            f"{path.parent}: eos_token_id is {eos!r}; config.json or generation_config.json must "
            "give a token id, or a list of them"
        )
    return tuple(ids)
