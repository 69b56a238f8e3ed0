"""Commands, the files of a job, and the rows that a job or a journal leaves in its output."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import typer

POLICY = {
    "gpu_batch_size": 2,
    "num_gpu_batches": 2,
    "max_batch_tokens": 16,
    "weights": {"gpu": 0.3, "cpu": 0.3, "disk": 0.4},
    "cache": {"gpu": 0.3, "cpu": 0.3, "disk": 0.4},
    "activations": {"gpu": 0.5, "disk": 0.5},
    "cpu_attention": 0.5,
}


def command(*arguments: object) -> list[str]:
    """The command line of `flexgen-ray` with these arguments."""
    return [sys.executable, "-m", "flexgen_ray", *map(str, arguments)]


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run `flexgen-ray` in a process of its own. options: those of subprocess.run."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, check=False, **options
    )


def rows_by_id(path: Path) -> dict[str, dict]:
    """The rows of an output by custom_id, each of which is answered once."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_id = {row["custom_id"]: row for row in rows}
    assert len(by_id) == len(rows), "an id was answered twice"
    return by_id


def arguments(files: Path, model: Path, *more: object) -> list[object]:
    """Arguments of `generate` for the fixture `files`, followed by more."""
    return [
        "generate", "--model", model, "--input", files / "in.jsonl",
        "--output", files / "out.jsonl", "--policy", files / "policy.yaml",
        "--offload-dir", files / "offload", "--device", "cpu", "--dtype", "float32",
        "--max-tokens", 3, "--temperature", 0, *more,
    ]  # fmt: skip


def comparable_rows(path: Path) -> list[dict]:
    """The rows of an output without the ids and times that differ from run to run."""
    rows = read_rows(path)
    for row in rows:
        del row["id"], row["response"]["request_id"]
        row["response"]["body"].pop("id", None)
        row["response"]["body"].pop("created", None)
    return rows


FACTS = {"model": "m", "seed": 0}
IDS = [f"id-{number}" for number in range(6)]


def journal_row(custom_id: str) -> dict:
    """A row of a length of its own for each of IDS."""
    text = "ü\n" * (1 + 5 * int(custom_id[-1]) % 11)
    response = {"status_code": 200, "body": {"text": text}}
    return {"custom_id": custom_id, "response": response, "error": None}


def read_rows(path: Path) -> list[dict]:
    """The rows of an output that ends with a newline, compressed or not."""
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.decode("utf-8").split("\n")[:-1]]


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fresh_folder(tmp_path: Path) -> Path:
    """An empty folder, for each example of a property anew."""
    folder = tmp_path / "job"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def commands(group: typer.core.TyperGroup, path: str):
    """Yield (name, command) of every command that can be run, in all subgroups."""
    context = typer.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command
