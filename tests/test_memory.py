"""Budgets hold in real memory: the process's peak, not only what was booked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

MIB = 2**20
NOISE = 40 * MIB  # the largest tensor twice, allocator arenas, imports
# Imports once, and then runs each job that it reads in a process forked before there are any
# threads: so all have the same baseline.
SERVER = """
import json, os, sys
from flexgen_ray import LLM, SamplingParams

import torch, transformers.models.auto  # what a run imports, before the baseline
torch.nn.functional.linear(torch.zeros(64, 64), torch.zeros(64, 64))
from flexgen_ray.kernels import host_kernel  # and compiles: numba and LLVM are libraries too
host_kernel.measure(host_kernel.AttentionShape("float32", 8, 8, 64), 1, 1 << 20)

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def answer(folder, prompts, options):
    asked = options.pop("asked", {})
    params = SamplingParams(max_tokens=4, temperature=0.0, **asked)
    with LLM(folder, use_ray=False, dtype="float32", device="cpu", **options) as llm:
        before = peak()
        outputs = llm.generate(prompts, params)
        used = {tier: sum(parts.values()) for tier, parts in llm.report.stages[0].used.items()}
        weights = llm.report.stages[0].weights
        return {"grown": peak() - before, "used": used, "weights": weights,
                "tokens": [output.outputs[0].token_ids for output in outputs]}

for line in sys.stdin:
    process = os.fork()
    if process == 0:
        print(json.dumps(answer(*json.loads(line))), flush=True)
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        print(json.dumps(None), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """A process that has imported all that runs need."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """205 MiB of weights in tensors of 8 MiB at most: large beside an interpreter's noise."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, num_hidden_layers=12, num_attention_heads=8,
        intermediate_size=2048, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def run(server, folder, prompts: list[list[int]], **options: object) -> dict:
    server.stdin.write(json.dumps([str(folder), prompts, options]) + "\n")
    server.stdin.flush()
    result = json.loads(server.stdout.readline())
    assert result is not None, "the run failed, with a traceback on standard error"
    return result


def held(result: dict) -> int:
    return result["used"]["gpu"] + result["used"]["cpu"]


def test_resident_memory_falls_with_the_budgets_and_the_rest_runs_from_disk(server, large_model):
    budgets = [("300MiB", "60MiB"), ("90MiB", "50MiB"), ("50MiB", "40MiB")]
    prompts = [list(range(5, 40)), list(range(7, 20))]
    results = [
        run(server, large_model, prompts, gpu_memory=gpu, cpu_memory=cpu, disk_memory="1GiB")
        for gpu, cpu in budgets
    ]
    for result in results:
        assert result["grown"] <= held(result) + NOISE
        assert sum(result["weights"].values()) > 200 * MIB
        assert result["tokens"] == results[0]["tokens"]
    assert results[0]["weights"]["disk"] == 0
    assert results[1]["weights"]["disk"] > 20 * MIB
    assert results[2]["weights"]["disk"] > 90 * MIB
    for large, small in pairwise(results):
        fewer = held(large) - held(small)
        assert fewer > 40 * MIB
        assert large["grown"] - small["grown"] >= 0.75 * fewer


@pytest.fixture(scope="module")
def two_layers(large_model, tmp_path_factory):
    """The same without its other layers, which need no other temporaries."""
    folder = shutil.copytree(large_model, tmp_path_factory.mktemp("two") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    return folder


LONG = [(7 * i * i + 3 * i) % 4000 for i in range(3000)]


@pytest.fixture(scope="module")
def in_small_tiles(server, two_layers, tmp_path_factory) -> tuple[str, dict]:
    """A policy whose tiles are of 64 tokens, and a long prompt's run with it."""
    policy = tmp_path_factory.mktemp("tiles") / "64.yaml"
    policy.write_text("gpu_batch_size: 1\nmax_batch_tokens: 64\n")
    return str(policy), run(server, two_layers, [LONG], policy=str(policy))


def test_a_long_prompt_needs_no_more_than_a_few_tiles_at_once(
    server, two_layers, in_small_tiles, tmp_path
):
    """3,000 tokens: tiles of 64 take several passes of 512 tokens, one tile takes it whole."""
    policy = tmp_path / "4096.yaml"
    policy.write_text("gpu_batch_size: 1\nmax_batch_tokens: 4096\n")
    whole, tiled = run(server, two_layers, [LONG], policy=str(policy)), in_small_tiles[1]
    for result in (whole, tiled):
        assert result["grown"] <= held(result) + NOISE
    assert tiled["tokens"] == whole["tokens"]
    fewer = held(whole) - held(tiled)
    assert fewer > 90 * MIB
    assert whole["grown"] - tiled["grown"] >= 0.75 * fewer


def test_scoring_a_long_prompt_needs_no_more_than_not_scoring_it(
    server, two_layers, in_small_tiles
):
    """Its logits, all at once, would take 49 MB, and their softmax as much again."""
    policy, plain = in_small_tiles
    result = run(server, two_layers, [LONG], policy=policy, asked={"prompt_logprobs": 1})
    assert result["grown"] <= held(result) + NOISE
    assert result["used"] == plain["used"] and result["tokens"] == plain["tokens"]
