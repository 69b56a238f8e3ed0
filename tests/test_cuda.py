"""The same laws with a CUDA device as the gpu tier. Skipped without one."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import pytest
import torch
from engine_runs import MAX_TOKENS, assert_same, generate, greedy
from hypothesis import given, settings
from strategies import policies, sparse, with_sparsity

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.calibration.calibrate import calibrate
from flexgen_ray.engine.backend import spans as all_spans
from flexgen_ray.kernels import attention
from flexgen_ray.kernels.sampling import Penalties, SamplingRow, sample
from flexgen_ray.planner.budgets import CUDA_RESERVE
from flexgen_ray.runtime.worker import Worker
from flexgen_ray.store import memory
from flexgen_ray.store.memory import MemoryTier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ("cuda", "cpu")
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)


@pytest.mark.parametrize("name", ["opt", "llama", "gemma3"])
@settings(max_examples=30)
@given(policy=policies)
def test_every_policy_generates_the_same_tokens_as_transformers(tiny_models, name, policy):
    folder, references = tiny_models[name]
    prompts = [reference.prompt for reference in references]
    with LLM(folder, policy=policy, dtype="float32", device="cuda", use_ray=False) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts, GREEDY)]
    assert_same(outputs, references)


@pytest.mark.parametrize("name", ["opt", "llama"])
@settings(max_examples=20)
@given(policy=policies)
def test_async_equals_serial_bit_for_bit(tiny_models, name, policy, monkeypatch):
    """Streams and events order what one thread issues."""
    folder, references = tiny_models[name]
    prompts = [reference.prompt for reference in references]
    runs = [
        generate(folder, prompts, policy, executor, monkeypatch, device="cuda")
        for executor in ("serial", "async")
    ]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@settings(max_examples=20)
@given(policy=policies)
def test_shared_prefixes_change_no_token(tiny_models, policy):
    folder, references = tiny_models["llama"]
    longest = max((reference.prompt for reference in references), key=len)
    shared = (longest * (72 // len(longest) + 1))[:72]
    prompts = [shared + reference.prompt for reference in references]
    found, wanted = (greedy(folder, prompts, policy, device, use_ray=False) for device in DEVICES)
    assert [it.token_ids for it in found] == [it.token_ids for it in wanted]


@settings(max_examples=10)
@given(policy=sparse)
def test_sparse_attention_keeps_the_tokens_that_it_keeps_on_the_cpu(tiny_models, policy):
    """But for a sequence in which two tokens weigh alike; packed, a code may turn in any."""
    folder, references = tiny_models["llama"]
    prompts = [reference.prompt for reference in references]
    policy = replace(policy, cache_bits=None)
    found, wanted = (greedy(folder, prompts, policy, device, use_ray=False) for device in DEVICES)
    same = [a.token_ids == b.token_ids for a, b in zip(found, wanted, strict=True)]
    assert sum(same) >= len(prompts) - 1


@pytest.mark.parametrize("in_decode", [False, True])
def test_given_tokens_score_as_on_the_cpu(tiny_models, policy_of_all, in_decode):
    folder, references = tiny_models["llama"]
    found = {}
    for device in DEVICES:
        options = {"policy": policy_of_all, "dtype": "float32", "use_ray": False}
        with LLM(folder, device=device, **options) as llm:
            requests = [
                llm.score_request(index, it.prompt + it.tokens, 1, in_decode)
                for index, it in enumerate(references)
            ]
            llm.prepare(requests)
            outputs = sorted(llm.stream(requests), key=lambda output: output.index)
        found[device] = [it.logprob for output in outputs for it in output.scores]
    assert found["cuda"] == pytest.approx(found["cpu"], abs=1e-4)


def test_choosing_tokens_never_waits_for_the_device():
    """The thread that does has other lanes' ops to issue."""
    logits = torch.randn(6, 50, device="cuda")
    penalties = Penalties(0.5, 0.5, 1.5, (1, 2), ((2, 1), (3, 4)))
    draws = [
        SamplingRow(0.0, 1.0, 0.0),
        SamplingRow(0.0, 1.0, 0.0, forced_token=7),
        SamplingRow(0.7, 0.9, 0.3, top_k=5, min_p=0.01),
        SamplingRow(1.0, 1.0, 0.8, banned=(3, 4)),
        SamplingRow(0.0, 1.0, 0.0, penalties=penalties),
        SamplingRow(1.0, 0.5, 0.5, banned=(3,), penalties=penalties),
    ]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = sample(logits, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.tolist() == sample(logits.cpu(), draws).tolist()


@pytest.mark.parametrize("sparsity", [1.0, 0.5])
def test_no_op_of_a_whole_generation_waits_for_the_device(tiny_models, policy_of_all, sparsity):
    """One thread issues the ops of all streams, so whatever waits in one holds up the others."""
    folder, references = tiny_models["llama"]
    policy = with_sparsity(policy_of_all, sparsity)
    prompts = [reference.prompt for reference in references]
    with LLM(folder, policy=policy, dtype="float16", device="cuda", use_ray=False) as llm:
        expected = llm.generate(prompts, GREEDY)  # also makes tables that are made once a process
        requests = [llm.request(index, prompt, GREEDY) for index, prompt in enumerate(prompts)]
        llm.prepare(requests)
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = sorted(llm.stream(requests), key=lambda output: output.index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found, wanted = ([it.outputs[0].token_ids for it in each] for each in (outputs, expected))
    assert found == wanted


@pytest.mark.parametrize("is_ragged", [False, True])
def test_a_new_length_of_a_cache_takes_no_longer_than_a_known_one(tmp_path, is_ragged):
    """In half precision, where cuDNN would make a plan of tens of milliseconds for each length."""
    Worker().probe("cuda", str(tmp_path))
    rows, heads, longest = 8, 32, 256
    q = torch.randn(rows, heads, 128, dtype=torch.float16, device="cuda")
    k, v = torch.randn(2, rows, heads, longest, 128, dtype=torch.float16, device="cuda")

    def seconds(length: int) -> float:
        lens = [length - is_ragged * (row % 2) for row in range(rows)]
        torch.cuda.synchronize()
        started = time.perf_counter()
        attention.decode(q, k, v, lens)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    for length in range(100, 108):
        seconds(length)
    lengths = range(108, 128)
    new, known = (median(map(seconds, lengths)) for _ in range(2))
    assert new < 4 * known


def test_every_lane_of_a_cuda_run_is_timed_on_its_stream(tiny_models, policy_of_all, tmp_path):
    folder, references = tiny_models["llama"]
    options = {"dtype": "float32", "device": "cuda", "use_ray": False, "trace": True}
    with LLM(folder, policy=policy_of_all, **options) as llm:
        llm.generate([reference.prompt for reference in references], GREEDY)
        spans = list(all_spans(llm.backend, 0))
        measured = llm.report.stages[0].measured
    lanes = {span.op.lane.worker.value for span in spans}
    assert {"device", "load_weights", "load_cache", "store", "host", "disk_read"} <= lanes
    assert all(0 <= span.start <= span.end for span in spans)
    assert all(seconds <= measured.wall * 1.05 for seconds in measured.busy.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@settings(max_examples=10)
@given(policy=policies)
def test_half_precision_runs_under_every_policy(tiny_models, dtype, policy):
    folder, references = tiny_models["llama"]
    prompts = [reference.prompt for reference in references]
    with LLM(folder, policy=policy, dtype=dtype, device="cuda", use_ray=False) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts, GREEDY)]
    agree = sum(o.token_ids[:1] == r.tokens[:1] for o, r in zip(outputs, references, strict=True))
    assert agree >= len(references) - 2


def test_the_allocator_never_holds_more_than_the_budget(tiny_models):
    folder, references = tiny_models["llama"]
    budget = 256 * 2**20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    options = {"dtype": "float32", "device": "cuda", "use_ray": False, "gpu_memory": budget}
    with LLM(folder, policy=Policy(4, 2), **options) as llm:
        for _ in range(12):  # each run multiplies on the streams of the one before
            llm.generate([reference.prompt for reference in references], GREEDY)
        booked = sum(llm.report.stages[0].used["gpu"].values())
    assert booked <= budget - CUDA_RESERVE
    assert torch.cuda.max_memory_reserved() <= budget


MIB = 2**20


def host_memory(budget: int = 64 * MIB) -> MemoryTier:
    return MemoryTier("cpu", budget, torch.device("cpu"), pinned=True)


def test_copies_from_host_memory_leave_the_thread_at_once():
    tier = host_memory(600 * MIB)
    source = tier.allocate("weights", 512 * MIB)
    source[::MIB].fill_(3)
    assert source.is_pinned() and source[MIB : 2 * MIB].is_pinned()
    target = torch.empty_like(source, device="cuda")
    torch.cuda.synchronize()
    target.copy_(source, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    done.synchronize()
    assert int(target[::MIB].sum()) == 3 * 512
    tier.close()


def test_closed_host_memory_is_no_longer_registered():
    tier = host_memory()
    tensors = [tier.allocate("weights", MIB), tier.allocate("cache", 3 * MIB + 5)]
    tier.close()
    tier.close()
    assert not any(tensor.is_pinned() for tensor in tensors)
    assert all(memory._register(tensor) for tensor in tensors)
    memory._unregister(tensors)


def test_a_tier_that_nobody_closed_is_unregistered_when_it_goes():
    tier = host_memory()
    tensor = tier.allocate("weights", MIB)
    del tier
    assert not tensor.is_pinned()


def test_refused_memory_is_used_unpinned_with_a_warning(caplog):
    """Registering twice is refused; the kernels after it must not hear of that."""
    tier = host_memory()
    tensor = tier.allocate("weights", MIB)
    assert not memory._register(tensor)
    assert "lower --cpu-memory" in caplog.text
    assert int(torch.ones(4, device="cuda").sum()) == 4
    tier.close()


def test_a_quick_calibration_measures_the_gpu(tmp_path):
    hardware = calibrate("cuda", tmp_path, is_quick=True, uses_ray=False)
    assert not hardware.device.is_cpu and hardware.memory.gpu > 2**30
    assert hardware.rates("float16", 1, 16, 1024).device_bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []
    assert torch.ones(1, device="cuda").item() == 1  # no error was left behind


def test_the_gpu_of_a_number_is_the_one_that_is_used(text_model):
    last = f"cuda:{torch.cuda.device_count() - 1}"
    with LLM(text_model, device=last, use_ray=False, dtype="float32") as llm:
        assert llm.machines[0].device == last
        assert llm.generate("x", SamplingParams(2)) and torch.cuda.memory_allocated(last)
