"""Streams that are left, closed or crossed, and stages that are replaced: nothing leaks over."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import tiny
import torch
from engine_runs import MAX_TOKENS, assert_same

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.store.disk import DiskTier

GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
THIRD = Placement(0.3, 0.3, 0.4)
POLICY = Policy(2, 2, 16, THIRD, THIRD, THIRD, 0.5)


@pytest.fixture
def model(tiny_models):
    return tiny_models["llama"]


def engine(folder, **options) -> LLM:
    return LLM(folder, policy=POLICY, dtype="float32", device="cpu", **options)


def requests(llm: LLM, prompts: list[list[int]]):
    made = [llm.request(index, prompt, GREEDY) for index, prompt in enumerate(prompts)]
    llm.prepare(made)
    return made


def assert_serves(llm: LLM, references) -> None:
    outputs = llm.generate([reference.prompt for reference in references], GREEDY)
    assert_same([output.outputs[0] for output in outputs], references)


@pytest.mark.parametrize("executor", ["serial", "async"])
def test_a_stream_that_is_left_changes_nothing_for_the_next(model, executor):
    folder, references = model
    before = {*threading.enumerate()}
    with engine(folder, use_ray=False, executor=executor) as llm:
        for _ in llm.stream(requests(llm, tiny.prompts(9, 30, seed=5))):
            break
        assert not {*threading.enumerate()} - before
        assert_serves(llm, references)


def test_a_closed_llm_says_so(model):
    folder, references = model
    with engine(folder, use_ray=False, trace=True) as llm:
        made = requests(llm, [references[0].prompt])
        assert_serves(llm, references[:1])
    llm.close()  # again, which does nothing
    for use in (
        lambda: llm.generate([[5, 6]], GREEDY),
        lambda: llm.chat([{"role": "user", "content": "Hi"}], GREEDY),
        lambda: llm.prepare(made),
        lambda: next(llm.stream(made)),
        lambda: llm.write_trace("trace.json"),
    ):
        with pytest.raises(RuntimeError, match="this LLM is closed; make another one"):
            use()
    assert llm.report.num_requests == 1


def test_a_ray_stream_that_is_left_changes_nothing_for_the_next(model, local_ray):
    folder, references = model
    with engine(folder) as llm:
        for _ in llm.stream(requests(llm, tiny.prompts(9, 30, seed=5))):
            break
        assert_serves(llm, references)


def test_an_error_in_the_middle_changes_nothing_for_the_next(model):
    folder, references = model

    def complain(_) -> None:
        raise KeyboardInterrupt

    with engine(folder, use_ray=False) as llm:
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream(requests(llm, tiny.prompts(9, 30, seed=5)), complain))
        assert_serves(llm, references)


def test_one_stream_at_a_time(model):
    folder, references = model
    with engine(folder, use_ray=False) as llm:
        made = requests(llm, tiny.prompts(9, 30, seed=5))
        first = llm.stream(made)
        next(first)
        with pytest.raises(RuntimeError, match="is generating"):
            next(llm.stream(made))
        with pytest.raises(RuntimeError, match="is generating"):
            llm.prepare(made)
        assert len(list(first)) == 8
        assert_serves(llm, references)


def test_closing_in_the_middle_of_a_stream_ends_it(model):
    folder, _ = model
    with engine(folder, use_ray=False) as llm:
        stream = llm.stream(requests(llm, tiny.prompts(9, 30, seed=5)))
        next(stream)
        llm.close()
        with pytest.raises(RuntimeError, match="unanswered"):
            list(stream)


def test_a_closed_offload_file_is_never_written_through(tmp_path):
    """Its number may belong to somebody else's file by then."""
    tier = DiskTier(4096, tmp_path)
    region = tier.allocate("test", 4096)
    region.write(torch.zeros(4096, dtype=torch.uint8))
    tier.close()
    with pytest.raises(ValueError, match="closed"):
        region.write(torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="closed"):
        region.read_into(torch.zeros(8, dtype=torch.uint8))


def test_a_replaced_stage_is_freed_at_once(model):
    """Without waiting for the garbage collector: two stages in memory would break the budget."""
    folder, references = model
    gc.disable()
    try:
        with engine(folder, use_ray=False) as llm:
            llm.generate([references[0].prompt], GREEDY)
            old = weakref.ref(llm.backend.workers[0].stage.tiers)
            cells = weakref.ref(llm.backend.workers[0].stage.handlers)
            longer = SamplingParams(max_tokens=3 * MAX_TOKENS, temperature=0.0)
            llm.generate([[5] * 90], longer)
            assert old() is None and cells() is None
    finally:
        gc.enable()


def test_more_requests_do_not_reload_the_weights(model):
    folder, references = model
    with engine(folder, use_ray=False) as llm:
        llm.generate([max((r.prompt for r in references), key=len)], GREEDY)
        stage = llm.backend.workers[0].stage
        assert_serves(llm, references)
        assert llm.backend.workers[0].stage is stage


def test_budgets_that_share_one_memory_are_added_up(model):
    folder, _ = model
    with engine(folder, use_ray=False) as llm:
        free = llm.machines[0].cpu_bytes
        assert llm.budgets[0].gpu + llm.budgets[0].cpu <= free
    with pytest.raises(ValueError, match="plain memory"):
        engine(folder, use_ray=False, gpu_memory=int(0.6 * free), cpu_memory=int(0.6 * free))
    with engine(folder, use_ray=False, cpu_memory=int(0.7 * free)) as llm:
        assert llm.budgets[0].gpu + llm.budgets[0].cpu <= free


def test_a_start_that_fails_leaves_nothing_behind(model, tmp_path):
    """Neither Ray nor its token nor a changed environment."""
    script = f"""
import os, ray, tempfile
from flexgen_ray import LLM, SamplingParams
before = dict(os.environ)
try:
    LLM({str(model[0])!r}, device="cuda")
except ValueError as error:
    assert "no node of the Ray cluster has a GPU" in str(error)
    assert not ray.is_initialized()
    assert dict(os.environ) == before
    assert os.listdir(tempfile.gettempdir()) == os.listdir(os.environ["HOME"]) == []
    print("as it should be")
"""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    folders = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
        env=os.environ | folders | {"RAY_AUTH_MODE": "disabled"}, check=False,
    )  # fmt: skip
    assert "as it should be" in done.stdout, done.stderr
