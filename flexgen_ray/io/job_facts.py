"""Comparison of a job with the one that an output was begun with: what answers depend on.

Knows names and values; not how they come about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_FILES = "model_files"  # of each file of the model, what tells it from a changed one


def compare(
    output: str, old: Mapping, new: Mapping, defaults: Mapping, may_add_files: bool
) -> list[str]:
    """Notes for the user on what can't be compared.

    old: facts that the output was begun with; defaults: of those that an earlier version didn't
    write. may_add_files: the model may have files that it lacked.
    Raises ValueError, naming the first fact that differs.
    """
    notes = []
    for name in sorted(new.keys() | old.keys()):
        if name == MODEL_FILES:
            if name in old:
                _compare_files(output, old[name], new.get(name, {}), may_add_files)
            else:
                notes.append(
                    f"{output} was begun by an earlier version, which didn't note the model's "
                    "files; they are taken to be the same"
                )
        elif new.get(name, defaults.get(name)) != old.get(name, defaults.get(name)):
            raise ValueError(
                f"{output} was begun with {name} {old.get(name)!r}, which now is "
                f"{new.get(name)!r}; go back to that, choose another --output, or give "
                "--overwrite"
            )
    return notes


def _compare_files(output: str, old: Any, new: Any, may_add_files: bool) -> None:
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name) and not (may_add_files and name not in old):
            how = "was removed" if name not in new else "was added"
            how = "has changed" if name in new and name in old else how
            raise ValueError(
                f"the model's {name} {how} since {output} was begun, so its other answers would "
                "be another model's; put the old file back, choose another --output, or give "
                "--overwrite"
            )
