"""A budget that is never exceeded: what was given out, and for what. Knows bytes only."""

from __future__ import annotations

from flexgen_ray.units import format_bytes


class BudgetError(ValueError):
    """A tier was asked for more than its budget."""


class Ledger:
    """What a tier has given out, by purpose, against its budget."""

    def __init__(self, name: str, budget: int) -> None:
        self.name = name
        self.budget = budget
        self.used: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.used.values())

    def book(self, what: str, nbytes: int) -> None:
        """BudgetError if the tier can't take it."""
        if self.total + nbytes > self.budget:
            raise BudgetError(
                f"{what} needs {format_bytes(nbytes)} on the {self.name} tier, where "
                f"{format_bytes(self.budget - self.total)} of {format_bytes(self.budget)} is free; "
                f"raise --{self.name}-memory"
            )
        self.used[what] = self.used.get(what, 0) + nbytes
