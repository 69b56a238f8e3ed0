"""Who may import whom (docs/design.md): the lower a module, the less it knows."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flexgen_ray

ROOT = Path(flexgen_ray.__file__).parent
FOUNDATION = {
    "units", "config", "model_config", "events", "request", "messages", "prompts", "rows",
    "names", "text_files",
}  # fmt: skip
MAY_IMPORT = {
    "names": set(),
    "text_files": set(),
    "units": set(),
    "config": {"names", "text_files"},
    "model_config": set(),
    "request": {"names"},
    "events": {"request"},
    "messages": set(),
    "prompts": {"request"},
    "rows": set(),
    "schedule": set(),
    "cost": {
        "text_files",
        "config",
        "names",
        "model_config",
        "units",
        "rows",
        "schedule",
        "paths",
        "quant",
    },
    "quant": FOUNDATION,
    "models": FOUNDATION | {"quant"},
    "store": FOUNDATION | {"schedule", "cost", "models", "quant"},
    "detokenizer": set(),
    "template_process": set(),
    "chat_template": {"messages"},
    "tokenizer_files": set(),
    "tokenizer": {"chat_template", "detokenizer", "messages", "tokenizer_files"},
    "stops": {"detokenizer", "request", "tokenizer"},
    "io": FOUNDATION | {"signals"},
    "paths": set(),
    "runtime": FOUNDATION
    | {"paths", "quant", "schedule", "cost", "models", "store", "tokenizer", "stops"},
    "distributed": FOUNDATION | {"schedule", "runtime", "signals"},
    "resources": {"config", "runtime", "units"},
    "calibrate": {"units", "cost", "io", "progress", "models", "runtime", "distributed"},
    "report": FOUNDATION | {"cost", "runtime"},
    "progress": {"events", "units", "terminal"},
    "trace": {"schedule", "io"},
}
WITHOUT_TORCH = FOUNDATION | {"schedule", "cost", "io", "trace", "paths"}
WITH_RAY = {"distributed", "integrations"}


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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "ray":
            assert part in WITH_RAY, f"{path} imports {name}"
        if top in ("torch", "ray"):
            assert part not in WITHOUT_TORCH, f"{path} imports {name}"
        if top == "flexgen_ray" and part in MAY_IMPORT and rest:
            below = rest.split(".")[0]
            assert below == part or below in MAY_IMPORT[part], f"{path} imports {name}"


def test_cost_schedule_and_packings_sizes_load_neither_torch_nor_ray():
    modules = [f"flexgen_ray.{path.parent.name}.{path.stem}" for path in MODULES
               if path.parent.name in ("cost", "schedule") and path.stem != "__init__"]  # fmt: skip
    modules.append("flexgen_ray.quant.packing")
    script = "import sys\n" + "".join(f"import {name}\n" for name in modules)
    script += "assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_files_stay_small_enough_to_hold_in_the_head():
    long = {p.name: n for p in MODULES if (n := len(p.read_text().splitlines())) > 500}
    assert not long
