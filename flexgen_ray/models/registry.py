"""The model families: {name: the module with its maths and weight names}.

A family's module has WEIGHT_NAMES and the functions embed, project, finish and head, which work on
one layer's weights (llama.py is the example). Its config.json is parsed by config_parsers.py.
"""

from __future__ import annotations

from types import ModuleType

from flexgen_ray.models import gemma, gemma3, llama, olmo2, opt, phi3

FAMILIES: dict[str, ModuleType] = {
    "opt": opt,
    "llama": llama,
    "olmo2": olmo2,
    "phi3": phi3,
    "gemma": gemma,
    "gemma3": gemma3,
}


def checkpoint_names(family: str, layer: int, name: str) -> list[str]:
    """Return the checkpoint's names of a weight of a layer, such as "qkv_proj.weight".

    Several, if the weight consists of several tensors, one above the other (ModelConfig.stacked).
    """
    module, _, kind = name.rpartition(".")
    names = FAMILIES[family].WEIGHT_NAMES[module]
    each = (names,) if isinstance(names, str) else names
    return [f"{there.format(layer - 1)}.{kind}" for there in each]
