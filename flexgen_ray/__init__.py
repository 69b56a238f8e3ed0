"""Bulk text generation with models larger than the GPUs at hand.

Start with `LLM(model).generate(prompts, SamplingParams(...))`. Names are imported on first use, so
importing the package alone is fast.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexgen_ray.config import Faults, HardwareSpec, Placement, Policy
    from flexgen_ray.hardware.spec import Hardware
    from flexgen_ray.llm import LLM
    from flexgen_ray.planner.stage_policies import StagePolicies
    from flexgen_ray.request import CompletionOutput, RequestOutput, SamplingParams

try:
    __version__ = version("flexgen-ray")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.0.0"


def package_versions(*names: str) -> dict[str, str]:
    """{package: version} for results; "unknown" for packages that nothing installed, only a path.

    This package's own is __version__.
    """
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return __version__ if name == "flexgen-ray" else version(name)
    except PackageNotFoundError:
        return "unknown"


_HOME = {
    "CompletionOutput": "flexgen_ray.request",
    "Faults": "flexgen_ray.config",
    "Hardware": "flexgen_ray.hardware.spec",
    "HardwareSpec": "flexgen_ray.config",
    "LLM": "flexgen_ray.llm",
    "Placement": "flexgen_ray.config",
    "Policy": "flexgen_ray.config",
    "RequestOutput": "flexgen_ray.request",
    "SamplingParams": "flexgen_ray.request",
    "StagePolicies": "flexgen_ray.planner.stage_policies",
}
__all__ = [
    "LLM",
    "CompletionOutput",
    "Faults",
    "Hardware",
    "HardwareSpec",
    "Placement",
    "Policy",
    "RequestOutput",
    "SamplingParams",
    "StagePolicies",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
