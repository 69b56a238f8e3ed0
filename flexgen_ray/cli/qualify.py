"""`flexgen-ray qualify`: is this project right on a GPU machine, and as fast as predicted?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexgen_ray.cli.app import Writes
from flexgen_ray.cli.options import FILES, DeviceOption
from flexgen_ray.reporting.terminal import display, say

_STEPS = "Steps"


def qualify(
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            rich_help_panel=FILES,
            help="Folder to write the results and the logs of all steps to; it must not exist yet.",
        ),
        Writes.FOLDER,
    ],
    device: DeviceOption = "auto",
    seconds: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=30,
            rich_help_panel=_STEPS,
            help="Time limit of all steps together. A step for which too little is left is skipped "
            "and named.",
        ),
    ] = 520.0,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            rich_help_panel=_STEPS,
            help="Names of the steps to run, in their usual order. [default: all]",
        ),
    ] = None,
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny",
            rich_help_panel=_STEPS,
            help="Use shapes that take seconds, to try the command itself, also on a CPU; the "
            "figures mean nothing.",
        ),
    ] = False,
) -> None:
    """Measure this project on this machine's GPU: probes, tests, benchmarks, predictions.

    Use it once on each kind of GPU, in a checkout, with nothing else running. Every step runs in a
    process of its own with a time limit, the most valuable first, and leaves a line in DIR as it
    ends. Benchmarks use 16 GiB of GPU memory and made-up weights.

    \b
    Example: flexgen-ray qualify --output qualification

    Exit status: 0 if no step failed, 1 if one failed or was killed at its limit.
    """
    from flexgen_ray.qualification.result import describe, save_result
    from flexgen_ray.qualification.runner import failures, run_steps
    from flexgen_ray.qualification.setting import Setting
    from flexgen_ray.qualification.steps import choose_steps, make_steps, write_policies
    from flexgen_ray.reporting.progress import show_steps
    from flexgen_ray.runtime.worker import find_device

    kind = find_device(device).type
    if ":" in device:
        raise typer.BadParameter(
            f"{device!r} names one GPU; set CUDA_VISIBLE_DEVICES to it, and use cuda",
            param_hint="--device",
        )
    if kind == "cpu" and not tiny:
        raise typer.BadParameter(
            "the steps are for a GPU, and would take hours on a CPU; add --tiny to try the command",
            param_hint="--device",
        )
    if output.exists():
        raise FileExistsError(f"{output} exists; give the name of a new folder")
    setting = Setting(kind, output.resolve(), tiny)
    chosen = choose_steps(make_steps(setting), steps)
    output.mkdir(parents=True)
    write_policies(setting)
    lines: list[dict] = []
    try:
        with show_steps("qualifying", len(chosen)) as begin:
            for line in run_steps(chosen, setting.folder, seconds, begin):
                lines.append(line)
                say(describe(line))
    finally:
        path = save_result(setting, lines)
    display(f"wrote {path}")
    if failed := failures(lines):
        say(f"steps that failed: {', '.join(failed)}; their logs are in {output}")
        raise typer.Exit(1)
