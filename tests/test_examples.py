"""The examples run as they stand, and stay short enough to read at a glance."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*command: object) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PATH": path},
    )  # fmt: skip


def test_every_example_has_less_than_40_lines():
    files = [path for path in EXAMPLES.iterdir() if path.is_file()]
    assert len(files) >= 2
    assert all(len(path.read_text().splitlines()) < 40 for path in files)


@pytest.mark.slow
def test_offline_generate(text_model):
    done = run(sys.executable, EXAMPLES / "offline_generate.py", text_model)
    assert done.returncode == 0, done.stderr
    assert "'The capital of France is' -> " in done.stdout and "tokens/s" in done.stdout


@pytest.mark.slow
def test_two_stages(text_model):
    done = run(sys.executable, EXAMPLES / "two_stages.py", text_model)
    assert done.returncode == 0, done.stderr
    assert "'The capital of France is' -> " in done.stdout and "tokens/s" in done.stdout
    assert all(f"stage {number}: layers " in done.stdout for number in (0, 1))


def test_batch_jsonl(text_model, tmp_path):
    done = run("bash", EXAMPLES / "batch_jsonl.sh", text_model, tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["custom_id"] for row in rows} == {"france", "story", "line-3"}
    assert all(row["response"]["status_code"] == 200 for row in rows)
