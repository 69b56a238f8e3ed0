"""The steps of a qualification, the most valuable first: their commands and limits.

Each step asks the machine one question in a process of its own. Knows commands; runs nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from flexgen_ray.files.output_files import write_text
from flexgen_ray.files.yaml import to_yaml
from flexgen_ray.qualification.cases import FIRST_CASES, LAST_CASES, Case, cases
from flexgen_ray.qualification.setting import Setting
from flexgen_ray.units import parse_bytes

_TINY_LIMIT_S = 600


@dataclass(frozen=True)
class Step:
    """One question to the machine.

    figures: file that the command writes, within the qualification's folder. least_s: seconds that
    must be left to begin it. limit_s: seconds after which it is killed. host_bytes: free host
    memory that it needs.
    """

    name: str
    command: list[str]
    figures: str
    least_s: float
    limit_s: float
    host_bytes: int = 0


def make_steps(setting: Setting) -> list[Step]:
    """All steps in their order; `write_policies` makes the files that they read.

    Tiny ones may be given any time, since they are for trying the command on any machine.
    """
    steps = [
        _own_step("probe", setting, 40, 60),
        _own_step("gpu_tests", setting, 60, 110),
        *(_case_step(case, setting) for case in FIRST_CASES),
        _own_step("calibrate", setting, 30, 50),
        _own_step("predictions", setting, 10, 30),
        *(_case_step(case, setting) for case in LAST_CASES),
        _own_step("mixture", setting, 25, 50),
        _own_step("two_actors", setting, 35, 60),
        _own_step("nccl", setting, 35, 60),
    ]
    if setting.is_tiny:
        return [replace(step, least_s=1, limit_s=_TINY_LIMIT_S) for step in steps]
    return steps


def write_policies(setting: Setting) -> None:
    """Write each case's policy into the setting's folder."""
    for case in cases(setting.is_tiny):
        write_text(setting.folder / f"{case.name}.yaml", to_yaml(case.policy))


def choose_steps(steps: list[Step], names: str | None) -> list[Step]:
    """The steps with these names, which commas separate; all if names is None.

    Raises ValueError for a name that no step has.
    """
    if names is None:
        return steps
    wanted = {name.strip() for name in names.split(",")}
    known = [step.name for step in steps]
    if unknown := sorted(wanted - set(known)):
        raise ValueError(
            f"--steps: there is no step {unknown[0]!r}; the steps are {', '.join(known)}"
        )
    return [step for step in steps if step.name in wanted]


def _own_step(name: str, setting: Setting, least_s: float, limit_s: float) -> Step:
    """A step that a module of this package does."""
    command = [sys.executable, "-m", f"flexgen_ray.qualification.{name}", *setting.arguments()]
    return Step(name, command, f"{name}.jsonl", least_s, limit_s)


def _case_step(case: Case, setting: Setting) -> Step:
    """A benchmark as a user would run it, with a fixed policy and made-up weights."""
    least_s, limit_s = case.least_s, case.limit_s
    case = case.tiny() if setting.is_tiny else case
    folder = setting.folder
    policy = folder / f"{case.name}.yaml"
    module = "flexgen_ray.qualification.with_cudnn" if case.allows_cudnn else "flexgen_ray"
    command = [
        sys.executable, "-m", module, "bench", "throughput", "--model", case.model,
        "--policy", str(policy), "--prompt-len", str(case.prompt_len),
        "--max-tokens", str(case.max_tokens), "--device", setting.device,
        "--gpu-memory", case.gpu_memory, "--cpu-memory", case.cpu_memory, "--disk-memory", "0",
        "--offload-dir", str(folder), "--json", str(folder / f"{case.name}.json"),
    ]  # fmt: skip
    needed = parse_bytes(case.cpu_memory)
    return Step(case.name, command, f"{case.name}.json", least_s, limit_s, needed)


def package_root() -> Path:
    """Folder that holds this package: a checkout, or where packages are installed."""
    return Path(__file__).parents[2]
