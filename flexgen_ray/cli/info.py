"""What a run on this node would find and use, for people and for bug reports. Runs nothing."""

from __future__ import annotations

from pathlib import Path

from flexgen_ray.hardware.known import CALIBRATED
from flexgen_ray.paths import calibration_dir, hardware_file
from flexgen_ray.planner.budgets import settle_budgets
from flexgen_ray.reporting.report import environment
from flexgen_ray.runtime.worker import Worker
from flexgen_ray.units import format_bytes


def lines(device: str, offload_dir: Path) -> list[tuple[str, str]]:
    """(what, figures) in the order to show them; ValueError if the device isn't there."""
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
            (kind, f"{format_bytes(has)} free, {format_bytes(takes)} used where nobody says")
            for kind, has, takes in zip(kinds, free, used, strict=True)
        ),
        ("offload folder", str(offload_dir)),
        ("fast in bfloat16", "yes" if machine.is_fast_in_bfloat16 else "no"),
        (
            "calibrated",
            f"on {hardware.date}: {hardware_file()}"
            if hardware and machine.rates_source == CALIBRATED
            else f"no, so runs are planned by the rates of preset {hardware.name}, not its own"
            if hardware
            else "no, so runs without a policy aren't planned; `flexgen-ray calibrate` does it",
        ),
        ("kept in", str(calibration_dir().parent)),
        ("versions", ", ".join(f"{name} {it}" for name, it in known["versions"].items())),
    ]
