"""`python -m benchmarks` lists the benchmarks with the question that each answers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("*.py")):
    source = path.read_text(encoding="utf-8")
    if re.search(r"^    run_as_command\(", source, re.MULTILINE):
        about = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
        print(f"python -m benchmarks.{path.stem:<10} {about}")
