"""Budgets hold in real memory: the process's peak, not only what was booked."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

MIB = 2**20
SCRIPT = """
import json, sys
from flexgen_ray import LLM, SamplingParams

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

folder, gpu, cpu = sys.argv[1], sys.argv[2], sys.argv[3]
params = SamplingParams(max_tokens=4, temperature=0.0)
with LLM(folder, use_ray=False, dtype="float32", device="cpu",
         gpu_memory=gpu, cpu_memory=cpu, disk_memory="1GiB") as llm:
    import torch, transformers.models.auto  # what a run imports, before the baseline
    torch.nn.functional.linear(torch.zeros(64, 64), torch.zeros(64, 64))
    before = peak()
    outputs = llm.generate([list(range(5, 40)), list(range(7, 20))], params)
    used = {tier: sum(parts.values()) for tier, parts in llm.report.used.items()}
    weights = llm.report.weights
print(json.dumps({"grown": peak() - before, "used": used, "weights": weights,
                  "tokens": [output.outputs[0].token_ids for output in outputs]}))
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """205 MiB of weights in tensors of 8 MiB at most: large beside an interpreter's noise."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, num_hidden_layers=12, num_attention_heads=8,
        intermediate_size=2048, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def run(folder, gpu: str, cpu: str) -> dict:
    command = [sys.executable, "-c", SCRIPT, str(folder), gpu, cpu]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_resident_memory_falls_with_the_budgets_and_the_rest_runs_from_disk(large_model):
    budgets = [("300MiB", "60MiB"), ("90MiB", "50MiB"), ("50MiB", "40MiB")]
    results = [run(large_model, *budget) for budget in budgets]
    noise = 40 * MIB  # the largest tensor twice, allocator arenas, imports
    for result in results:
        held = result["used"]["gpu"] + result["used"]["cpu"]
        assert result["grown"] <= held + noise
        assert sum(result["weights"].values()) > 200 * MIB
        assert result["tokens"] == results[0]["tokens"]
    assert results[0]["weights"]["disk"] == 0
    assert results[1]["weights"]["disk"] > 20 * MIB
    assert results[2]["weights"]["disk"] > 90 * MIB
    for large, small in pairwise(results):
        fewer = sum(large["used"][tier] - small["used"][tier] for tier in ("gpu", "cpu"))
        assert fewer > 40 * MIB
        assert large["grown"] - small["grown"] >= 0.75 * fewer
