"""The model families: {name: the module with its maths and weight names}.

A family's module has WEIGHT_NAMES, perhaps TAKES_TURNS, and the functions embed, project, finish
and head, which work on one layer's weights (llama.py is the example); experts.py finishes a
mixture's layers. Its config.json is parsed by config_parsers.py.
"""

from __future__ import annotations

from types import ModuleType

from flexgen_ray.models import (
    gemma,
    gemma3,
    glm4_moe,
    gpt_oss,
    llama,
    mixtral,
    olmo2,
    olmoe,
    opt,
    phi3,
    qwen_moe,
)

FAMILIES: dict[str, ModuleType] = {
    "opt": opt,
    "llama": llama,
    "olmo2": olmo2,
    "phi3": phi3,
    "gemma": gemma,
    "gemma3": gemma3,
    "qwen_moe": qwen_moe,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "glm4_moe": glm4_moe,
}
# Modules of a mixture whose tensors some checkpoints hold stacked, by these names, for all experts.
_STACKED = {
    "gate_up_experts": "model.layers.{}.mlp.experts.gate_up_proj",
    "down_experts": "model.layers.{}.mlp.experts.down_proj",
}


def checkpoint_names(family: str, layer: int, name: str, expert: int = 0) -> list[str]:
    """Return the checkpoint's names of a weight of a layer, such as "qkv_proj.weight".

    Several, if the weight consists of several tensors, one above the other (ModelConfig.stacked).
    expert: number of the one whose tensors are named, of those that are stacked in a weight.
    """
    module, _, kind = name.rpartition(".")
    names = FAMILIES[family].WEIGHT_NAMES[module]
    each = (names,) if isinstance(names, str) else names
    return [f"{there.format(layer - 1, expert)}.{kind}" for there in each]


def stacked_name(layer: int, name: str) -> str | None:
    """Return the name of the tensor in which a checkpoint may have all experts stacked.

    Returns None for weights that no experts have.
    name: of this project's weight, such as "down_experts.weight".
    """
    module, _, kind = name.rpartition(".")
    if module not in _STACKED:
        return None
    return _STACKED[module].format(layer - 1) + ("_bias" if kind == "bias" else "")


def takes_turns(family: str) -> bool:
    """True if a family's stacked tensors are not in this project's order.

    Their matrices are [experts, in, out], and outputs of gate and up projection take turns.
    """
    return getattr(FAMILIES[family], "TAKES_TURNS", False)
