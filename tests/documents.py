"""Reads README.md and docs/*.md: fenced blocks, commands in them, links and paths. Runs nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flexgen_ray"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "cluster/README.md",
]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`]+)`")
_PATH = re.compile(r"[\w.-]+(/[\w.-]+)*\.(py|md|yaml|json|sh|txt|toml|jsonl)|[\w-]+(/[\w-]+)*/")
_BETWEEN = {"&&", "|", ";", "&"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document. line: the number of its first line."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """The file that a block's first line names in a comment, such as `# policy.yaml`."""
        first = self.text.splitlines()[0]
        match = re.fullmatch(r"# (\S+\.\w+)", first)
        return match[1] if match else None

    def commands(self) -> Iterator[list[str]]:
        """Words of each command of a bash block, without comments and what joins commands."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), ";"]:
                if word not in _BETWEEN:
                    words.append(word)
                elif words:
                    yield words
                    words = []


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(document, text.count("\n", 0, match.start()) + 2, match[1], match[2])
        for match in _BLOCK.finditer(text)
    ]


def prose(document: Path) -> str:
    """The document's text without its fenced blocks."""
    return _BLOCK.sub("", document.read_text(encoding="utf-8"))


def links(document: Path) -> list[str]:
    """Targets of a document's links that lead to files or headings of this repository."""
    return [link for link in _LINK.findall(prose(document)) if not link.startswith("http")]


def anchors(document: Path) -> set[str]:
    """Names by which GitHub knows a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline_code(document: Path) -> list[str]:
    """Pieces of code within a document's sentences, unwrapped."""
    return [" ".join(code.split()) for code in _CODE.findall(prose(document))]


def paths(document: Path) -> list[str]:
    """Names of files and folders within sentences: those with a slash in them or ending in .py."""
    codes = [code for code in inline_code(document) if _PATH.fullmatch(code)]
    return [it for it in codes if ("/" in it or it.endswith(".py")) and "NAME" not in it]


def exists(path: str, document: Path) -> bool:
    """True if a path leads somewhere from the document, the root, the package, its models or the
    tests."""
    folders = (document.parent, ROOT, PACKAGE, PACKAGE / "models", ROOT / "tests")
    return any((folder / path).exists() for folder in folders)
