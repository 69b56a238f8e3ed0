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
