"""What orders CUDA's work, without a GPU: no token depends on when streams run what they are given,
as long as events permit it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_runs import assert_same, greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from late_streams import LateCuda, StreamWatch
from strategies import pipelines, policies, sparse, with_sparsity

from flexgen_ray import Placement
from flexgen_ray.runtime.handlers import HANDLERS
from flexgen_ray.schedule.ops import ON_STREAMS, Lane, OpKind

cudas = st.builds(
    LateCuda,
    eager=st.sets(st.sampled_from(sorted(ON_STREAMS))),
    slow=st.sampled_from(sorted({lane.worker for lane in Lane} - ON_STREAMS)),
)
executors = st.sampled_from(["async", "async", "serial"])


def late(folder, references, policy, monkeypatch, cuda, **options):
    """Greedy tokens of the references' prompts, by streams that take their time."""
    prompts = [reference.prompt for reference in references]
    with monkeypatch.context() as patch:
        cuda.install(patch)
        return greedy(folder, prompts, policy, use_ray=False, **options)


@settings(max_examples=6)
@given(
    name=st.sampled_from(["opt", "llama", "gemma3"]),
    policy=policies,
    cuda=cudas,
    executor=executors,
)
def test_early_and_late_streams_give_the_tokens_of_transformers(
    tiny_models, name, policy, cuda, executor, monkeypatch
):
    folder, references = tiny_models[name]
    found = late(folder, references, policy, monkeypatch, cuda, executor=executor)
    assert_same(found, references)


@settings(max_examples=2)
@given(pipeline=pipelines(3), cuda=cudas, executor=executors)
def test_early_and_late_streams_of_several_stages_too(
    tiny_models, pipeline, cuda, executor, monkeypatch
):
    folder, references = tiny_models["llama"]
    options = {"pipeline_parallel_size": len(pipeline.layers), "executor": executor}
    found = late(folder, references, pipeline, monkeypatch, cuda, **options)
    assert_same(found, references)


@settings(max_examples=2)
@given(policy=sparse, cuda=cudas)
def test_early_and_late_streams_choose_the_same_values(tiny_models, policy, cuda, monkeypatch):
    folder, references = tiny_models["llama"]
    prompts = [reference.prompt for reference in references]
    wanted = greedy(folder, prompts, policy, use_ray=False, executor="serial")
    found = late(folder, references, policy, monkeypatch, cuda, executor="async")
    assert [it.token_ids for it in found] == [it.token_ids for it in wanted]


@pytest.mark.parametrize(
    "executor, ignored",
    [("async", "wait_event"), ("async", "synchronize"), ("serial", "synchronize")],
)
def test_a_wait_that_is_left_out_is_missed(
    tiny_models, policy_of_all, executor, ignored, monkeypatch
):
    """By wrong tokens, or by what an op expects and another has yet to do."""
    folder, references = tiny_models["llama"]
    cuda = LateCuda(ignores=[ignored])
    with pytest.raises((AssertionError, KeyError)):
        found = late(folder, references, policy_of_all, monkeypatch, cuda, executor=executor)
        assert_same(found, references)


def shared(folder, references, policy, monkeypatch, **options) -> set[str]:
    """Tensors that ops of one stream made and ops of another use."""
    watch = StreamWatch()
    late(folder, references, policy, monkeypatch, LateCuda(watch=watch), **options)
    return watch.faults


@pytest.mark.parametrize(
    "options",
    [{}, {"attention_sparsity": 0.3, "cache_bits": 4}, {"activations": Placement(0, 0, 1)}],
)
def test_no_op_uses_a_tensor_that_another_stream_made(
    tiny_models, policy_of_all, options, monkeypatch
):
    """The allocator would give its memory away in the order of the stream that made it alone."""
    folder, references = tiny_models["llama"]
    policy = with_sparsity(policy_of_all, options.get("attention_sparsity", 1.0))
    policy = replace(policy, max_batch_tokens=4, **options)
    executor = "serial" if "activations" in options else "async"
    assert not shared(folder, references[:3], policy, monkeypatch, executor=executor)


def test_a_tensor_that_two_streams_share_is_noticed(tiny_models, policy_of_all, monkeypatch):
    """The positions of a pass, which PROJECT makes, are used by FINISH too."""
    folder, references = tiny_models["llama"]
    finish = HANDLERS[OpKind.FINISH]

    def finish_with_positions(cells, op) -> None:
        cells._pass(op).positions.sum()
        finish(cells, op)

    monkeypatch.setitem(HANDLERS, OpKind.FINISH, finish_with_positions)
    (fault,) = shared(folder, references[:2], policy_of_all, monkeypatch)
    assert fault == "finish of device uses what device_ahead made"
