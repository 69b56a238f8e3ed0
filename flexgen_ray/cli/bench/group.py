"""`flexgen-ray bench`, whose commands are imported when one is asked for: they bring torch."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import typer
from typer.core import TyperGroup


class Benchmarks(TyperGroup):
    """Knows that there are benchmarks; which, and how they run, commands.py does."""

    def list_commands(self, ctx: Any) -> list[str]:
        return self._group.list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._group.get_command(ctx, cmd_name)

    @cached_property
    def _group(self) -> TyperGroup:
        from flexgen_ray.cli.bench.commands import app

        return typer.main.get_group(app)
