"""A CUDA run without a GPU: the device is asked for nothing that it refuses, stages or awaits."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from engine_runs import greedy
from pretend_cuda import (
    GPU,
    DeviceMix,
    DeviceTensor,
    Note,
    PretendCuda,
    decode_launches,
    pretend_cuda,
)
from strategies import with_sparsity

from flexgen_ray import LLM, Placement, Policy, RequestOutput, SamplingParams
from flexgen_ray.kernels.host_kernel import load_kernel
from flexgen_ray.layout import plan as stage_plan
from flexgen_ray.planner import choose
from flexgen_ray.planner.fill import place_prefixes
from flexgen_ray.runtime import stage
from flexgen_ray.runtime.handlers import HANDLERS
from flexgen_ray.runtime.worker import Worker
from flexgen_ray.schedule.ops import OpKind

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself is there")


@pytest.fixture
def device():
    with pretend_cuda() as pretend:
        yield pretend


def what(device) -> list[str]:
    """The words of all notes."""
    return sorted(note.what for note in device.notes.elements())


@pytest.mark.parametrize(
    "op",
    [
        lambda x, host: x + host,
        lambda x, host: host + x,
        lambda x, host: torch.mm(x, host),
        lambda x, host: x[host.long()],
        lambda x, host: torch.cat((x, host)),
        lambda x, host: x.index_copy_(0, torch.arange(4), x),
        lambda x, host: torch.mm(host, host, out=x),
        lambda x, host: torch.nn.functional.scaled_dot_product_attention(x, host, host),
    ],
)
def test_host_and_device_never_mix(device, op):
    x, host = torch.ones(4, 4, device=GPU), torch.ones(4, 4)
    with pytest.raises(DeviceMix, match="host tensor"):
        op(x, host)


def test_numbers_of_the_host_are_passed_by_value(device):
    x = torch.ones(3, device=GPU)
    assert (x * torch.tensor(2.0) + 1).tolist() == [3, 3, 3]
    with pytest.raises(DeviceMix):
        torch.stack((x.sum(), torch.tensor(1.0)))


def test_copies_across_the_link_are_seen_as_cuda_makes_them(device):
    x, pageable = torch.zeros(4, 4, device=GPU), torch.ones(4, 4)
    pinned = torch.ones(4, 4).copy_(torch.empty(4, 4, pin_memory=True).fill_(2))
    pinned = torch.empty(4, 4, pin_memory=True).copy_(pinned)
    for copy, notes in (
        (lambda: x.copy_(pinned, non_blocking=True), []),
        (lambda: pinned.copy_(x, non_blocking=True), []),
        (lambda: x[1:3].copy_(pinned[2:], non_blocking=True), []),
        (lambda: torch.tensor([1], pin_memory=True).to(GPU, non_blocking=True), []),
        (lambda: x.to("cpu", non_blocking=True), []),
        (lambda: x[:0].copy_(pageable[:0]), []),
        (lambda: x.copy_(pinned), ["blocking"]),
        (lambda: x.cpu(), ["blocking"]),
        (lambda: x.copy_(pageable, non_blocking=True), ["unpinned"]),
        (lambda: pageable.copy_(x, non_blocking=True), ["unpinned"]),
        (lambda: x[:, :2].copy_(pinned[:, :2], non_blocking=True), ["staged"]),
        (lambda: x.copy_(pinned.t(), non_blocking=True), ["staged"]),
        (lambda: x.copy_(pinned[0], non_blocking=True), ["staged"]),
        (lambda: x.half().copy_(pinned, non_blocking=True), ["staged"]),
        (lambda: x.copy_(pageable.t()), ["blocking", "staged"]),
    ):
        device.notes.clear()
        copy()
        assert what(device) == notes
    assert x.tolist() == torch.ones(4, 4).tolist()


def test_memory_is_pinned_as_long_as_any_of_it_is_used(device):
    x, part = torch.zeros(3, device=GPU), torch.empty(4, pin_memory=True)[1:]
    x.copy_(part, non_blocking=True)
    assert what(device) == []
    del part
    assert not device.num_pinned


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, torch.zeros(1, device=GPU)),
        lambda x: x.unique(),
        lambda x: torch.where(x > 0),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_a_wait_for_the_device_is_seen(device, wait):
    wait(torch.ones(3, device=GPU))
    assert "sync" in what(device)


def test_an_event_is_recorded_before_anything_waits_for_it(device):
    event, stream = torch.cuda.Event(), torch.cuda.Stream(GPU)
    for wait in (event.synchronize, lambda: stream.wait_event(event)):
        with pytest.raises(AssertionError, match="never recorded"):
            wait()
    event.record(stream)
    stream.wait_event(event)


def test_the_device_is_gone_afterwards():
    with pretend_cuda():
        assert torch.ones(2, device=GPU).is_cuda and torch.cuda.is_available()
    assert not torch.cuda.is_available()
    with torch.inference_mode():
        assert torch.ones(2).is_inference()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2, device=GPU)
    # A CUDA build of torch has a guard of its own, and the tensor itself says that it is stranded.
    with pytest.raises((AssertionError, RuntimeError)):
        DeviceTensor(torch.ones(2))[0]


def test_launches_are_those_of_the_ops_of_a_decoding_batch(tmp_path):
    """Ragged rows take a mask, which attention takes as numbers to add."""
    (tmp_path / "equal").mkdir()
    (tmp_path / "ragged").mkdir()
    equal = decode_launches("opt", tmp_path / "equal", is_ragged=False)
    ragged = decode_launches("opt", tmp_path / "ragged", is_ragged=True)
    assert equal.other_layers.keys() == {"project", "attend_device", "finish"}
    # At least each layer's six products, with a bias each, and attention.
    assert 7 <= sum(equal.other_layers.values()) <= sum(ragged.other_layers.values())
    assert sum(equal.other_layers.values()) <= sum(equal.first_layer.values())


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_cudnn_never_attends_on_cuda_and_is_left_alone_on_a_cpu(text_model, name, tmp_path):
    """Neither where rates are measured, after a probe, nor in a process that loads without one."""
    is_used, attends = name == "cpu", torch.backends.cuda.cudnn_sdp_enabled
    with pretend_cuda():
        torch.backends.cuda.enable_cudnn_sdp(True)
        Worker().probe(name, str(tmp_path))
        assert attends() is is_used
        with LLM(text_model, policy=Policy(4), device=name, dtype="float32", use_ray=False) as llm:
            torch.backends.cuda.enable_cudnn_sdp(True)
            llm.generate([[5, 6]], SamplingParams(1))
            assert attends() is is_used
    assert attends()


class Run(NamedTuple):
    """One way to run a model."""

    family: str
    policy: Policy
    dtype: str = "float32"
    executor: str = "async"
    num_stages: int = 1
    in_decode: bool = False  # how a known answer is scored

    @property
    def is_exact(self) -> bool:
        it = self.policy
        is_packed = it.weight_bits or it.cache_bits or it.embedding_bits
        return self.dtype == "float32" and not is_packed and it.attention_sparsity == 1


FAMILIES = ["opt", "llama", "qwen3", "gemma3", "phi3", "mistral", "opt-350m-like", "olmo2"]


def drawn(number: int) -> Run:
    """One of many runs; the families take turns."""
    rng, family = random.Random(number), FAMILIES[number % len(FAMILIES)]
    half = "bfloat16" if family == "gemma3" else "float16"  # in which it would overflow

    def placement() -> Placement:
        first, second = sorted(rng.choices(range(11), k=2))
        return Placement(first / 10, (second - first) / 10, (10 - second) / 10)

    return Run(
        family,
        with_sparsity(
            Policy(
                rng.randint(2, 5),
                rng.randint(1, 3),
                rng.choice([3, 7, 64]),
                placement(),
                placement(),
                placement(),
                cpu_attention=rng.choice([0.0, 0.3, 0.5, 1.0]),
                weight_bits=rng.choice([None, None, 4, 8]),
                cache_bits=rng.choice([None, None, 4, 8]),
                embedding_bits=rng.choice([None, None, 4, 8]),
            ),
            rng.choice([1.0, 1.0, 0.3]),
        ),
        rng.choice(["float32", "float32", half, "bfloat16"]),
        rng.choice(["async", "async", "serial"]),
        rng.choice([1, 1, 1, 2]),
        rng.random() < 0.5,
    )


# Waits for the device that are meant, with the reason of each.
NAMED = {
    # A table that is made once a process.
    ("blocking", OpKind.PROJECT, "models/rotation.py _frequencies"),
    # Its thread issues nothing, and the scores are its result.
    ("sync", OpKind.ACCEPT, "kernels/sampling.py Scores.tolist"),
}
NEW_TOKENS = 4
HOW = [
    SamplingParams(NEW_TOKENS, temperature=0.0),
    SamplingParams(NEW_TOKENS, temperature=0.0),
    SamplingParams(NEW_TOKENS, temperature=0.0, logprobs=2),
    SamplingParams(NEW_TOKENS, temperature=0.8, top_p=0.9, seed=1, repetition_penalty=1.3),
    SamplingParams(NEW_TOKENS, temperature=1.0, top_k=5, min_p=0.01, seed=2, min_tokens=2),
]


@pytest.fixture
def plain_host_attention(monkeypatch):
    """Attention on the host without numba, which has many kernels to measure and compile."""
    plain = load_kernel("sdpa", 1)
    monkeypatch.setattr(stage, "choose_host_kernel", lambda plan, threads, nbytes: plain)
    monkeypatch.setattr(stage, "choose_device_kernel", lambda *of: plain)


def outputs_of(run: Run, folder, prompts, device: str, executor: str) -> list[RequestOutput]:
    """Outputs of HOW, and of a request whose answer is known."""
    options = {"gpu_memory": "1GiB", "cpu_memory": "1GiB", "disk_memory": "1GiB"}
    with LLM(
        folder, policy=run.policy, dtype=run.dtype, device=device, executor=executor,
        pipeline_parallel_size=run.num_stages, use_ray=False, **options,
    ) as llm:  # fmt: skip
        pairs = zip(prompts, HOW, strict=True)
        requests = [llm.request(i, prompt, how) for i, (prompt, how) in enumerate(pairs)]
        requests.append(llm.score_request(len(HOW), prompts[2], 1, run.in_decode))
        llm.prepare(requests)
        return sorted(llm.stream(requests), key=lambda output: output.index)


def faults(device: PretendCuda) -> set[Note]:
    """Notes in ops that are not named, all of which would keep the device or its thread waiting."""
    return {note for note in device.notes if note.kind is not None and note not in NAMED}


def check(run: Run, folder, references) -> None:
    """The laws of a CUDA run (an op that mixes devices raises by itself)."""
    references = sorted(references, key=lambda it: len(it.prompt))[: len(HOW)]
    prompts = [reference.prompt for reference in references]
    with pretend_cuda() as device:
        found = outputs_of(run, folder, prompts, "cuda", run.executor)
    assert not faults(device)
    assert device.launches
    wanted = outputs_of(run, folder, prompts, "cpu", "serial")
    for own, other in zip(found[:-1], wanted[:-1], strict=True):
        assert own.outputs[0].token_ids == other.outputs[0].token_ids
    scores = ([it.logprob for it in each[-1].scores] for each in (found, wanted))
    assert next(scores) == pytest.approx(next(scores), abs=1e-4 if run.dtype == "float32" else 0.1)
    if run.is_exact:
        for output, reference, how in zip(found, references, HOW, strict=False):
            if not how.temperature:
                certain = min(reference.certain_len(), NEW_TOKENS)
                assert output.outputs[0].token_ids[:certain] == reference.tokens[:certain]


# Six families, every dtype, packed weights and caches, sparse rows, an exact run.
ALWAYS = range(168, 174)


@pytest.mark.parametrize(
    "number",
    [i if i in ALWAYS else pytest.param(i, marks=pytest.mark.slow) for i in range(200)],
)
def test_a_cuda_run_keeps_its_laws(tiny_models, plain_host_attention, number):
    run = drawn(number)
    check(run, *tiny_models[run.family])


@pytest.mark.parametrize("executor", ["async", "serial"])
def test_a_cuda_run_of_two_stages_keeps_its_laws(tiny_models, policy_of_all, executor):
    check(Run("llama", policy_of_all, executor=executor, num_stages=2), *tiny_models["llama"])


HOST = Placement(0, 1, 0)
SHARING = [
    (Policy(3, 2, cache=HOST), "cpu"),
    (Policy(3, 2, 16, HOST, Placement(0.3, 0.7, 0), cpu_attention=0.5, cache_bits=8), "gpu"),
    (Policy(3, 2, 64, HOST, Placement(0, 0.5, 0.5), HOST, cpu_attention=0.0), "cpu"),
]


@pytest.mark.parametrize("policy, tier", SHARING)
def test_a_cuda_run_shares_prefixes(tiny_models, plain_host_attention, monkeypatch, policy, tier):
    """Decoding rows beside prompts, and alone; prefixes on the device or in host memory."""

    def place(plans, budgets, tiers):
        return place_prefixes(plans, budgets, (tier,))

    monkeypatch.setattr(choose, "place_prefixes", place)
    monkeypatch.setattr(stage_plan, "FOLDED_ROWS", 9 if policy is SHARING[0][0] else 2)
    rng = random.Random(0)
    shared = [[rng.randrange(4, 90) for _ in range(72)] for _ in range(2)]
    prompts = [shared[i % 2] + [rng.randrange(4, 90) for _ in range(i + 1)] for i in range(8)]
    folder, _ = tiny_models["llama"]
    with pretend_cuda() as device:
        found = greedy(folder, prompts, policy, "cuda", use_ray=False, gpu_memory="1GiB")
    assert not faults(device)
    wanted = greedy(folder, prompts, policy, "cpu", use_ray=False, executor="serial")
    assert [it.token_ids for it in found] == [it.token_ids for it in wanted]


@pytest.mark.parametrize(
    "fault, note",
    [
        (lambda x: x.sum().item(), "sync"),
        (lambda x: x.copy_(torch.ones(x.shape), non_blocking=True), "unpinned"),
        (lambda x: x.copy_(torch.ones(x.shape)), "blocking"),
        (lambda x: x + torch.ones(x.shape), None),
    ],
)
def test_a_fault_in_an_op_breaks_a_law(tiny_models, monkeypatch, fault, note):
    finish = HANDLERS[OpKind.FINISH]

    def broken(handlers, op) -> None:
        fault(handlers.hidden.of_cell(op))
        finish(handlers, op)

    monkeypatch.setitem(HANDLERS, OpKind.FINISH, broken)
    folder, _ = tiny_models["opt"]
    with pretend_cuda() as device:
        with nullcontext() if note else pytest.raises(DeviceMix):
            greedy(folder, [[5, 6]], Policy(1), "cuda", use_ray=False, executor="serial")
    assert {it.what for it in faults(device)} == ({note} if note else set())
