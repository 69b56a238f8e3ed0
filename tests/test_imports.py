"""Who may import whom (docs/design.md): the lower a unit, the less it knows."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import flexgen_ray

ROOT = Path(flexgen_ray.__file__).parent
# A unit is a folder of the package or a module beside them; __init__ and __main__ import freely.
MAY_IMPORT = {
    "checks": "",
    "paths": "",
    "signals": "",
    "units": "",
    "schedule": "",
    "request": "checks",
    "files": "checks signals units",
    "config": "checks files",
    "text": "request",
    "quant": "config schedule",
    "kernels": "config quant request",
    "models": "config kernels quant request",
    "layout": "config models quant schedule units",
    "cost": "config layout models quant schedule",
    "store": "kernels layout quant schedule units",
    "hardware": "config files kernels layout models paths quant store",
    "runtime": "config cost hardware kernels layout models paths request schedule store text",
    "distributed": "config hardware request runtime schedule signals",
    "planner": "config cost files hardware layout models request runtime schedule units",
    "processor": "models request text",
    "reporting": "config files hardware layout planner request runtime schedule units",
    "engine": "checks config distributed hardware layout models planner processor reporting request"
    " runtime schedule text units",
    "llm": "checks config engine hardware models paths planner processor quant reporting request"
    " runtime text units",
    "calibration": "config distributed files hardware kernels reporting runtime schedule store"
    " units",
    "evaluation": "files llm reporting request",
    "integrations": "evaluation llm request text",
    "batch": "config files llm models planner reporting request runtime text units",
    "qualification": "calibration config distributed files hardware kernels llm models planner"
    " quant reporting request runtime store units",
    "cli": "batch calibration checks config evaluation files hardware layout llm models paths"
    " planner qualification quant reporting request runtime signals text units",
}
WITHOUT_TORCH = {
    "checks", "paths", "signals", "units", "schedule", "request", "files", "config", "text",
    "quant", "layout", "cost", "planner", "processor", "reporting", "batch",
}  # fmt: skip
WITH_RAY = {"distributed"}
FREE = {"__init__", "__main__"}


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "flexgen_ray":
                names |= {f"flexgen_ray.{alias.name}" for alias in node.names}
    return names


MODULES = sorted(ROOT.rglob("*.py"))
UNITS = {unit_of(path) for path in MODULES} - FREE
PUBLIC = {f"flexgen_ray.{name}" for name in flexgen_ray.__all__} | {
    "flexgen_ray.__version__",
    "flexgen_ray.package_versions",
}


def test_every_unit_is_named_and_none_that_is_not_there():
    assert set(MAY_IMPORT) == UNITS


def test_no_units_may_import_each_other_in_a_circle():
    graph = {unit: set(below.split()) for unit, below in MAY_IMPORT.items()}
    assert set(TopologicalSorter(graph).static_order()) == UNITS


def test_the_top_level_has_at_most_ten_modules():
    assert len(list(ROOT.glob("*.py"))) <= 10


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path):
    unit = unit_of(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "ray":
            assert unit in WITH_RAY, f"{path} imports {name}"
        if top in ("torch", "ray"):
            assert unit not in WITHOUT_TORCH, f"{path} imports {name}"
        assert top not in ("benchmarks", "tests"), f"{path} imports {name}"
        if top == "flexgen_ray" and rest and unit not in FREE and name not in PUBLIC:
            below = rest.split(".")[0]
            assert below == unit or below in MAY_IMPORT[unit].split(), f"{path} imports {name}"


def test_what_a_planner_computes_with_loads_neither_torch_nor_ray_nor_the_solver():
    modules = [f"flexgen_ray.{path.parent.name}.{path.stem}" for path in MODULES
               if path.parent.name in ("cost", "schedule", "layout", "quant")]  # fmt: skip
    modules += [f"flexgen_ray.planner.{name}" for name in ("search", "lp", "corners", "fill")]
    modules += ["flexgen_ray.hardware.spec", "flexgen_ray.models.config_files"]
    modules = [name.removesuffix(".__init__") for name in modules]
    script = "import sys\n" + "".join(f"import {name}\n" for name in modules)
    script += "assert not {'torch', 'ray', 'highspy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_versions_are_asked_for_where_packages_without_metadata_are_expected():
    """A checkout on the path alone, as on a borrowed machine, has no metadata."""
    asking = {unit_of(path) for path in MODULES if "importlib.metadata" in imports(path)}
    assert asking == {"__init__"}
    assert flexgen_ray.package_versions("no-such-package") == {"no-such-package": "unknown"}


def test_every_folder_says_which_question_it_answers():
    for path in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*.py")), ids=lambda it: it.name)
def test_no_test_module_is_imported_by_another(path):
    """Shared code of tests is in conftest.py, strategies.py and modules that hold no tests."""
    assert not [name for name in imports(path) if name.split(".")[0].startswith("test_")]
