"""The step that measures the rates which the cases need, and keeps them in a hardware file.

Knows which dtypes the cases have; calibration/ measures.
"""

from __future__ import annotations

from flexgen_ray.calibration.calibrate import calibrate as measure
from flexgen_ray.calibration.calibrate import save, summary
from flexgen_ray.calibration.rates import Scope
from flexgen_ray.qualification.cases import GPU_MEMORY
from flexgen_ray.qualification.setting import Figures, Setting, run_step
from flexgen_ray.units import parse_bytes

MACHINE = "machine.yaml"
_MOST_SECONDS = 30.0  # of the step's limit; the rest is for starting


def calibrate(setting: Setting, figures: Figures) -> None:
    """Measure this machine without Ray, in the cases' dtypes and for one query head a KV head."""
    dtype = "float16" if setting.on_cuda else "float32"
    gpu_memory = parse_bytes(GPU_MEMORY) if setting.on_cuda else None
    hardware = measure(
        setting.device, setting.folder, gpu_memory, is_quick=setting.is_tiny, uses_ray=False,
        scope=Scope((dtype, "int4"), (1,), _MOST_SECONDS),
    )  # fmt: skip
    save(hardware, setting.folder / MACHINE)
    for subject, rates in summary(hardware):
        figures.add(subject=subject.strip(), rates=rates)


if __name__ == "__main__":
    run_step(calibrate)
