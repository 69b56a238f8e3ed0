"""`flexgen-ray --show-completion SHELL`: typer's scripts, for whichever shell is named."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from typer.completion import completion_init, get_completion_script

from flexgen_ray.terminal import display

_PROGRAM = "flexgen-ray"


class Shell(StrEnum):
    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def _show(shell: Shell | None) -> None:
    if shell is not None:
        variable = f"_{_PROGRAM}_COMPLETE".replace("-", "_").upper()
        display(get_completion_script(prog_name=_PROGRAM, complete_var=variable, shell=shell.value))
        raise typer.Exit


CompletionOption = Annotated[
    Shell | None,
    typer.Option(
        "--show-completion",
        callback=_show,
        is_eager=True,
        help="Print a completion script; for bash, in ~/.bashrc: "
        'eval "$(flexgen-ray --show-completion bash)"',
    ),
]

# What the scripts ask, typer answers; by itself it would only know the shell that it runs in.
completion_init()
