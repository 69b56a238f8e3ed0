"""The words of the code: docstrings, comments and help that stand alone (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import flexgen_ray

ROOT = Path(flexgen_ray.__file__).parent.parent
FILES = sorted(
    path for folder in ("flexgen_ray", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
# A sentence that begins so continues something else, which a tooltip doesn't show.
FRAGMENT = re.compile(
    r"(Of|The same|Likewise|What|Whose|As many|Those|Its|Which|Whether|How|Where|When|Else|Also)\b"
)
UNUSUAL = re.compile(r"\b(told|heard|hears|foretold|nobody|whoever|likewise)\b", re.IGNORECASE)
NO_NAMES = {"it", "found", "given", "told", "kept"}


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings, comments and help texts, each with its line."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if (text := ast.get_docstring(node)) is not None:
                yield node.body[0].lineno, text
        elif isinstance(node, ast.keyword) and node.arg == "help":
            yield (
                node.value.lineno,
                "".join(
                    part.value
                    for part in ast.walk(node.value)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ),
            )
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            # The second line of a comment continues the first.
            yield token.start[0], text if token.start[0] != last + 1 else f"... {text}"
            last = token.start[0]


def names(source: str) -> Iterator[tuple[int, str]]:
    """Names that are bound, except within a comprehension of at most two lines."""
    tree = ast.parse(source)
    short: set[int] = set()
    for node in ast.walk(tree):
        is_comprehension = isinstance(
            node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.Lambda
        )
        if is_comprehension and node.end_lineno - node.lineno < 2:
            short |= {id(part) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in short:
            continue
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def faults(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8")
    wrong = []
    for line, text in texts(source):
        if any(FRAGMENT.match(part.strip()) for part in text.splitlines()):
            wrong.append(f"{path}:{line}: does not stand alone: {text[:90]!r}")
        if UNUSUAL.search(text):
            wrong.append(f"{path}:{line}: {UNUSUAL.search(text).group()!r} in: {text[:90]!r}")
    wrong += [f"{path}:{line}: a variable {name!r}" for line, name in names(source)
              if name in NO_NAMES]  # fmt: skip
    return sorted(set(wrong))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_stand_alone_and_are_those_of_the_field(path):
    assert not faults(path)


def test_a_fragment_and_a_vague_name_are_faults(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""Of an op."""\nit = 1  # nobody\n')
    assert len(faults(path)) == 3
