"""Stages on several nodes: they spread, they outlive a node that is lost, and say if none is left.

One computer emulates the nodes, each with a raylet of its own (tests/emulated_nodes.py).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

MAX_TOKENS = 12
SCRIPT = Path(__file__).parent / "emulated_nodes.py"


def run(folder: Path, references, tmp: Path, **job) -> dict:
    """What the script finds; its Ray asks for a token, which nobody else has."""
    tmp.mkdir()
    made = {
        "model": str(folder),
        "prompts": [reference.prompt for reference in references],
        "max_tokens": MAX_TOKENS,
        "lose": None,
        "faults": {},
        "output": str(tmp / "result.json"),
    }
    environment = os.environ | {
        "RAY_TMPDIR": str(tmp),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, json.dumps(made | job)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp / "result.json").read_text())
    result["answers"] = {int(index): tokens for index, tokens in result["answers"].items()}
    for index, tokens in result["answers"].items():
        certain = references[index].certain_len()
        assert tokens[:certain] == references[index].tokens[:certain]
        assert len(tokens) == MAX_TOKENS
    return result


@pytest.fixture
def short_folder(private_folders, request) -> Path:
    """Ray's sockets need a short path."""
    return Path(os.environ["RAY_TMPDIR"]).parent / f"n{abs(hash(request.node.name)) % 10**6}"


@pytest.mark.parametrize("name", ["opt", pytest.param("llama", marks=pytest.mark.slow)])
def test_stages_spread_and_a_lost_node_costs_no_token(tiny_models, short_folder, name):
    """The node of one is lost in mid-run; the stage comes back on a third that was free."""
    folder, references = tiny_models[name]
    found = run(folder, references, short_folder, num_stages=2, nodes=[1, 1, 1], lose=1)
    assert sorted(found["answers"]) == list(range(len(references)))
    before, after = found["before"], found["after"]
    assert len({*before}) == 2
    assert after[0] == before[0] and after[1] not in before
    assert [it["stages"] for it in found["recoveries"]] == [[1]]
    # A GPU that Ray has and torch doesn't is named by its node, never replaced by the CPU.
    assert f"a stage on node {socket.gethostname()} (" in found["without_cuda"]
    assert "install a CUDA build of torch" in found["without_cuda"]


@pytest.mark.slow
def test_without_a_spare_node_the_run_ends_and_says_so(tiny_models, short_folder):
    folder, references = tiny_models["llama"]
    found = run(
        folder, references, short_folder, num_stages=2, nodes=[1, 1], lose=1,
        faults={"restart_seconds": 20},
    )  # fmt: skip
    assert "stage 1 " in found["error"] and "no node has room for stage 1, " in found["error"]
    assert 0 < len(found["answers"]) < len(references)
    assert found["seconds"] < 90


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_four_stages_on_four_nodes(short_folder, tmp_path, name):
    folder = tiny.save(name, tmp_path, num_hidden_layers=5)
    references = tiny.references(folder, tiny.prompts(9, 40), MAX_TOKENS)
    found = run(folder, references, short_folder, num_stages=4, nodes=[1, 1, 1, 1])
    assert sorted(found["answers"]) == list(range(len(references)))
    assert len({*found["before"]}) == 4
