"""The step that predicts each measured case, with a preset's rates and with calibrated ones.

Needs no device: all figures come from the files of other steps. Knows the planner; runs no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flexgen_ray.config import Budget
from flexgen_ray.hardware.spec import Hardware, adapt_preset, find_preset
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.pipeline_plan import ModelRates, PlannedJob, StageDevice
from flexgen_ray.planner.search import Planner
from flexgen_ray.qualification.calibrate import MACHINE
from flexgen_ray.qualification.cases import Case, cases
from flexgen_ray.qualification.setting import Figures, Setting, Skipped, read_figures, run_step
from flexgen_ray.units import parse_bytes


def predictions(setting: Setting, figures: Figures) -> None:
    """Predict the cases that were measured; each figure has the measured one beside it."""
    machines = dict(_machines(setting))
    if not machines:
        raise Skipped("neither a preset for this device nor calibrated rates")
    measured = False
    for case in cases(setting.is_tiny):
        for run in read_figures(setting.folder / f"{case.name}.json"):
            measured = True
            for source, hardware in machines.items():
                figures.add(case=case.name, rates=source, **predict(case, run, hardware))
    if not measured:
        raise Skipped("no case was measured")


def predict(case: Case, run: dict, hardware: Hardware) -> dict[str, Any]:
    """The cost model's throughput of a case, and the measured one as a multiple of it.

    run: result of `flexgen-ray bench throughput`; a mark of a doubtful run is kept.
    """
    config, dtype = shape_config(case.model), "float32" if hardware.device.is_cpu else "float16"
    rates = ModelRates(hardware, config, dtype, case.policy.cache_bits)
    budget = Budget(parse_bytes(case.gpu_memory), parse_bytes(case.cpu_memory), 0)
    device = StageDevice(rates, budget, "this node", hardware.core_shares)
    job = PlannedJob.uniform(run["num_prompts"], case.prompt_len, case.max_tokens)
    planner = Planner(config, (device,), job, dtype, stages_disk=False)
    plan = planner.simulate(planner.evaluate((config.num_layers,), [case.policy]))
    measured = {name: run[name] for name in ("generated_tokens_per_s", "decode_tokens_per_s")}
    predicted = (plan.tokens_per_s, plan.decode_tokens_per_s)
    return {
        "measured": measured,
        "predicted": {name: round(rate, 3) for name, rate in zip(measured, predicted, strict=True)},
        "measured_to_predicted": {
            name: round(measured[name] / rate, 4)
            for name, rate in zip(measured, predicted, strict=True)
        },
        "bottleneck": plan.bottleneck[1],
    } | ({"doubtful": run["doubtful"]} if run.get("doubtful") else {})


def _machines(setting: Setting) -> Iterator[tuple[str, Hardware]]:
    """(source, rates) of this machine: its preset's, and the calibrated ones."""
    path = setting.folder / MACHINE
    calibrated = Hardware.from_yaml(path) if path.is_file() else None
    preset = _preset(setting)
    if preset is not None:
        yield f"preset {preset.name}", preset
    if calibrated is not None:
        yield "calibrated", calibrated


def _preset(setting: Setting) -> Hardware | None:
    """The preset of this machine's device, for its number of cores; None if there is none."""
    from flexgen_ray.runtime.worker import Worker

    if not setting.on_cuda:
        return Hardware.preset("cpu")
    machine = Worker().probe(setting.device, str(setting.folder), with_rates=False)
    preset = find_preset(machine.device_name)
    return preset and adapt_preset(preset, preset.memory, machine.num_threads, None)


if __name__ == "__main__":
    run_step(predictions)
