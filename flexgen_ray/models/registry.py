"""The families of models there are. What their config.json files say, config_parsers.py reads."""

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
