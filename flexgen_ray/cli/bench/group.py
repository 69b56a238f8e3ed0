"""The group `flexgen-ray bench`. Its commands bring torch, so they are imported when needed.

Knows which benchmarks have left the command line; not what the others do.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import typer
from typer.core import TyperGroup

# Benchmarks that prove this project's claims; they are run in a checkout.
IN_A_CHECKOUT = (
    "accuracy", "attention", "choice", "issue", "lanes", "loading", "paper", "prediction", "ring",
    "simulate", "unequal",
)  # fmt: skip


class Benchmarks(TyperGroup):
    """Group of benchmarks whose commands are imported when one is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the benchmarks."""
        return self._group.list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name; a usage error says where one that left is now."""
        if cmd_name in IN_A_CHECKOUT:
            ctx.fail(f"`bench {cmd_name}` is now `python -m benchmarks.{cmd_name}`, in a checkout")
        return self._group.get_command(ctx, cmd_name)

    @cached_property
    def _group(self) -> TyperGroup:
        from flexgen_ray.cli.bench.commands import app

        return typer.main.get_group(app)
