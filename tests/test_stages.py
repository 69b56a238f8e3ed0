"""Several stages generate what one does: the contract of docs/design.md, whatever the split."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import tiny
import torch
from engine_runs import assert_same, greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import pipelines

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.config import Budget, Workload
from flexgen_ray.models.config_files import load_config
from flexgen_ray.planner.choose import PlanningProblem, choose_policy
from flexgen_ray.planner.stage_policies import StagePolicies
from flexgen_ray.request import Request
from flexgen_ray.runtime.lanes import timed
from flexgen_ray.runtime.ring import ChannelClosed, LocalChannel
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.schedule.ops import OPS, Op, OpKind


@pytest.mark.parametrize("name", tiny.CONFIGS)
@settings(max_examples=3)
@given(executor=st.sampled_from(["serial", "async"]), data=st.data())
def test_every_split_generates_the_same_tokens_as_transformers(tiny_models, name, executor, data):
    folder, references = tiny_models[name]
    pipeline = data.draw(pipelines(tiny.CONFIGS[name].num_hidden_layers))
    count = data.draw(st.integers(1, len(references)))
    prompts = [reference.prompt for reference in references[:count]]
    options = {"pipeline_parallel_size": len(pipeline.layers), "executor": executor}
    found = greedy(folder, prompts, pipeline, use_ray=False, **options)
    assert_same(found, references[:count])


def test_sampled_tokens_do_not_depend_on_the_stages(tiny_models):
    folder, references = tiny_models["llama"]
    prompts = [reference.prompt for reference in references]
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9)

    def sampled(stages):
        with LLM(folder, dtype="float32", use_ray=False, pipeline_parallel_size=stages) as llm:
            return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    assert sampled(1) == sampled(2) == sampled(3)


@pytest.mark.parametrize("executor", ["serial", "async"])
@pytest.mark.parametrize("blocks", [None, 3, 5])
def test_fewer_requests_than_stages_stall_no_ring(tiny_models, executor, blocks):
    """Blocks without rows go round like any other."""
    folder, references = tiny_models["llama"]
    policy = Policy(1, 2, blocks_in_flight=blocks)
    options = {"use_ray": False, "pipeline_parallel_size": 3, "executor": executor}
    for count in (1, 2):
        prompts = [reference.prompt for reference in references[:count]]
        assert_same(greedy(folder, prompts, policy, **options), references[:count])


def test_one_loaded_pipeline_serves_run_after_run(tiny_models):
    """More requests, none, fewer than stages: what a run leaves behind disturbs no other."""
    folder, references = tiny_models["opt"]
    params = SamplingParams(max_tokens=12, temperature=0.0)
    with LLM(folder, dtype="float32", use_ray=False, pipeline_parallel_size=3) as llm:
        for count in (7, 0, 1, 2):
            some = references[:count]
            outputs = llm.generate([it.prompt for it in some], params) if some else []
            assert_same([output.outputs[0] for output in outputs], some)


YAML = """
gpu_batch_size: 2
num_gpu_batches: 2
cache: {cpu: 1.0}
stages:
  - {layers: 2, weights: {gpu: 1.0}}
  - {layers: 1, weights: {disk: 1.0}, cache: {gpu: 0.5, cpu: 0.5}, cpu_attention: 0.0}
"""


def test_a_file_gives_each_stage_its_layers_and_placement(tiny_models, tmp_path):
    folder, references = tiny_models["llama"]
    (tmp_path / "policy.yaml").write_text(YAML)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    options = {"policy": tmp_path / "policy.yaml", "pipeline_parallel_size": 2, "use_ray": False}
    with LLM(folder, dtype="float32", device="cpu", **options) as llm:
        outputs = llm.generate([reference.prompt for reference in references], params)
        plans = [stage.plan for stage in llm.report.stages]
        weights = [stage.weights for stage in llm.report.stages]
    assert_same([output.outputs[0] for output in outputs], references)
    assert [(it.stage.first, it.stage.last) for it in plans] == [(0, 2), (3, 4)]
    # What a stage doesn't say is said for all; its own word comes first.
    assert [it.policy.cache for it in plans] == [Placement(0, 1, 0), Placement(0.5, 0.5, 0)]
    assert [it.policy.cpu_attention for it in plans] == [1.0, 0.0]
    assert {it.policy.blocks_in_flight for it in plans} == {2}
    assert weights[0]["cpu"] == weights[0]["disk"] == 0 < weights[0]["gpu"]
    assert weights[1]["gpu"] == weights[1]["cpu"] == 0 < weights[1]["disk"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1", "the file must hold keys and values"),
        ("stages: 3", "stages must be a list of keys and values, one entry for a stage"),
        ("stages: [1, 2]", "stages must be a list of keys and values, one entry for a stage"),
        ("stages: []", "stages must be a list of keys and values, one entry for a stage"),
        ("layers: 3", "unknown key 'layers'"),
        ("stages: [{layer: 3}]", "unknown key 'layer'"),
        ("stages: [{layers: 1}, {}]", r"layers are \[1, None\]; give every stage a number"),
        ("stages: [{layers: 1.5}]", r"layers are \[1.5\]; give every stage a number"),
        ("stages: [{gpu_batch_size: 1}, {}]", "gpu_batch_size differs between stages"),
        ("stages: [{blocks_in_flight: 2}, {}]", "blocks_in_flight differs between stages"),
        ("stages: [{weights: {gpu: 2}}]", "policy: weights: "),
        ("stages: [", "while parsing a flow node"),
    ],
)
def test_a_bad_file_of_stages_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"policy.yaml: .*{message}"):
        StagePolicies.from_yaml(path)


ONE = Policy()


@pytest.mark.parametrize(
    "policies, num_stages, message",
    [
        (None, 4, "4 stages are more than the model's 3 layers; use fewer"),
        (StagePolicies((ONE,)), 4, "4 stages are more than the model's 3 layers; use fewer"),
        (StagePolicies((ONE, ONE)), 3, "2 stages, but there are 3; use --pipeline-parallel-size 2"),
        (StagePolicies((ONE,), (1, 2)), 3, "the policy's layers are for 2 stages, but there are 3"),
        (StagePolicies((ONE,), (1, 1)), 2, "stages of 1, 1 layers: .* must be the model's 3"),
        (StagePolicies((ONE,), (3, 0)), 2, "stages of 3, 0 layers: each needs one at least"),
        (
            StagePolicies((replace(ONE, blocks_in_flight=2),)), 3,
            "blocks_in_flight is 2; 3 stages need at least 3",
        ),
        (
            StagePolicies((ONE, replace(ONE, weights=Placement(0.0, 1.0, 0.0)))), 2,
            "stage 1: ",
        ),
    ],
)  # fmt: skip
def test_what_no_pipeline_can_be_is_refused_before_any_work(
    tiny_models, policies, num_stages, message
):
    config = load_config(tiny_models["llama"][0])
    budgets = [Budget(2**30, 2**30, 2**30), *[Budget(2**30, 0, 2**30)] * (num_stages - 1)]
    here = Machine("here", "cpu", "CPU", 2**31, 2**31, 2**31, 1, False)
    requests = [Request(0, [1] * 4, SamplingParams(max_tokens=4))]
    problem = PlanningProblem(
        config, "float32", Workload(1, 4, 8), [here] * num_stages, budgets, requests
    )
    with pytest.raises(ValueError, match=message):
        choose_policy(problem, policies)


def test_policies_and_layers_of_different_counts_are_refused():
    with pytest.raises(ValueError, match="3 stages have policies, 2 have layers"):
        StagePolicies((ONE, ONE, ONE), (1, 2))


def test_an_llm_of_more_stages_than_layers_is_refused(tiny_models):
    folder, references = tiny_models["llama"]
    with pytest.raises(ValueError, match="4 stages are more than the model's 3 layers"):
        greedy(folder, [references[0].prompt], None, use_ray=False, pipeline_parallel_size=4)


@pytest.mark.parametrize("kind", OpKind)
def test_only_exchanges_may_take_time_that_is_no_work(kind):
    op = Op(kind, 0, 0, 0, 0, 0)
    busy = timed(lambda op, ready_at: time.sleep(1e-3), op, 0.0).busy
    assert (busy == 0) == OPS[kind].is_exchange


@pytest.mark.parametrize("executor", ["serial", "async"])
def test_waiting_for_a_neighbour_is_no_work(tiny_models, executor):
    """Or the lane that waits longest would seem to be the one that binds."""
    folder, references = tiny_models["llama"]
    options = {"use_ray": False, "pipeline_parallel_size": 2, "executor": executor}
    with LLM(folder, dtype="float32", device="cpu", **options) as llm:
        llm.generate([reference.prompt for reference in references])
        stages = llm.report.stages
    first, last = (stage.measured.busy for stage in stages)
    assert "send" not in first and "recv" not in last
    for stage in stages:
        assert "device" in stage.measured.busy
        assert stage.bubbles == pytest.approx(1 - stage.lanes()["device"]["fraction"], abs=1e-3)


def break_stage(llm, number: int, kind: OpKind, visit: int, error: BaseException) -> None:
    """The stage's next run raises the error at the first op of a kind in a visit."""
    stage = llm.backend.workers[number].stage
    run = stage.handlers.run

    def broken(op: Op, ready_at: float = 0.0) -> None:
        if op.kind is kind and op.visit >= visit:
            raise error
        run(op, ready_at)

    stage.handlers.run = broken


def threads_of_stages() -> list[str]:
    return [it.name for it in threading.enumerate() if it.name.startswith(("stage", "lane"))]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("visit, error", [(0, OSError("no disk")), (3, KeyboardInterrupt())])
@pytest.mark.parametrize("broken", [(0, OpKind.COMPOSE), (1, OpKind.FINISH), (2, OpKind.SAMPLE)])
@pytest.mark.parametrize("executor", ["serial", "async"])
def test_an_error_of_any_stage_ends_the_run_with_it(tiny_models, executor, broken, visit, error):
    """Every thread joined, and the next run is whole."""
    folder, references = tiny_models["llama"]
    prompts = [reference.prompt for reference in references]
    params = SamplingParams(max_tokens=12, temperature=0.0)
    options = {"pipeline_parallel_size": 3, "executor": executor, "use_ray": False}
    with LLM(folder, policy=Policy(2, 1), dtype="float32", **options) as llm:
        requests = [llm.request(i, prompt, params) for i, prompt in enumerate(prompts)]
        llm.prepare(requests)
        break_stage(llm, *broken, visit, error)
        with pytest.raises(type(error)) as raised:
            list(llm.stream(requests))
        assert raised.value is error
        assert threads_of_stages() == []
        if visit and broken[0] == 1:
            assert_same([it.outputs[0] for it in llm.generate(prompts, params)], references)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("executor", ["serial", "async"])
def test_stages_end_when_their_stream_is_left(tiny_models, executor):
    folder, references = tiny_models["llama"]
    params = SamplingParams(max_tokens=12, temperature=0.0)
    options = {"pipeline_parallel_size": 2, "executor": executor, "use_ray": False}
    with LLM(folder, policy=Policy(2, 1), dtype="float32", **options) as llm:
        requests = [llm.request(i, it.prompt, params) for i, it in enumerate(references)]
        llm.prepare(requests)
        stream = llm.stream(requests)
        next(stream)
        stream.close()
        assert threads_of_stages() == []
        llm.prepare(requests)
        stream = llm.stream(requests)
        next(stream)
        llm.close()
        assert threads_of_stages() == []


@pytest.mark.timeout(10)
def test_a_closed_link_is_never_waited_for():
    first, second = LocalChannel.ring(2)
    second.close()
    for wait in (
        first.next_message,
        first.next_message,
        lambda: first.send(torch.zeros(1)),
        second.next_message,
    ):
        with pytest.raises(ChannelClosed):
            wait()
