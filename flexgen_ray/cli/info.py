"""`flexgen-ray info`: this machine, and the resources that a run on it would use. Runs nothing."""

from __future__ import annotations

from pathlib import Path

from flexgen_ray.hardware.known import CALIBRATED
from flexgen_ray.paths import calibration_dir, hardware_file
from flexgen_ray.planner.budgets import settle_budgets
from flexgen_ray.reporting.report import environment
from flexgen_ray.runtime.worker import Worker
from flexgen_ray.units import format_bytes


def lines(device: str, offload_dir: Path) -> list[tuple[str, str]]:
    """Lines to show, as (name, figures). Raises ValueError if the device doesn't exist."""
    machine = Worker().probe(device, str(offload_dir))
    (budget,) = settle_budgets([machine], {"gpu": None, "cpu": None, "disk": None}, 0)
    known = environment(machine.device_name)
    hardware = machine.hardware
    free = (machine.gpu_bytes, machine.cpu_bytes, machine.disk_bytes)
    used = (budget.gpu, budget.cpu, budget.disk)
    kinds = ("GPU memory", "host memory", "disk")
    if not machine.on_cuda:
        kinds = ("device memory", *kinds[1:])
    return [
        ("node", f"{machine.host}, {machine.num_threads} cores of {known['hardware']['cpu']}"),
        ("device", f"{machine.device_name} ({machine.device})"),
        *(
            (kind, f"{format_bytes(size)} free, {format_bytes(taken)} used by default")
            for kind, size, taken in zip(kinds, free, used, strict=True)
        ),
        ("offload folder", str(offload_dir)),
        ("fast bfloat16", "yes" if machine.is_fast_in_bfloat16 else "no"),
        (
            "calibrated",
            f"on {hardware.date}: {hardware_file()}"
            if hardware and machine.rates_source == CALIBRATED
            else f"no; runs are planned with the rates of preset {hardware.name} instead (measure "
            "this machine with `flexgen-ray calibrate`)"
            if hardware
            else "no; runs without a policy fill memory, fastest tier first, until you measure "
            "this machine with `flexgen-ray calibrate`",
        ),
        ("cache folder", str(calibration_dir().parent)),
        ("versions", ", ".join(f"{name} {it}" for name, it in known["versions"].items())),
    ]
