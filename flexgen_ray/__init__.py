"""Bulk text generation with models larger than the GPUs at hand.

`LLM(model).generate(prompts, SamplingParams(...))` is the front door; names are resolved on first
use so that importing the package costs nothing.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("flexgen-ray")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.0.0"

_HOME = {
    "Hardware": "flexgen_ray.cost.hardware",
    "HardwareSpec": "flexgen_ray.config",
    "LLM": "flexgen_ray.llm",
    "Placement": "flexgen_ray.config",
    "Policy": "flexgen_ray.config",
    "SamplingParams": "flexgen_ray.request",
    "RequestOutput": "flexgen_ray.request",
}
__all__ = [
    "LLM",
    "Hardware",
    "HardwareSpec",
    "Placement",
    "Policy",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
