"""The trace tells what happened: each op once, lanes in order, none before what it waits for."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from strategies import policies

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.engine.backend import spans as all_spans
from flexgen_ray.schedule.dependencies import Dependencies
from flexgen_ray.schedule.ops import Lane
from flexgen_ray.schedule.zigzag import StageLayers, zigzag

PARAMS = SamplingParams(max_tokens=4, temperature=0.0)


def spans_of(folder, prompts, policy, tmp_path, executor="async") -> tuple[LLM, list, dict]:
    with LLM(folder, policy=policy, trace=True, executor=executor, use_ray=False) as llm:
        llm.generate(prompts, PARAMS)
        spans = list(all_spans(llm.backend, 0))
        llm.write_trace(tmp_path / "trace.json")
    return llm, spans, json.loads((tmp_path / "trace.json").read_text())


@settings(max_examples=10)
@given(policy=policies)
def test_no_op_starts_before_its_lane_is_free_and_what_it_waits_for_is_done(
    tiny_models, policy, tmp_path_factory
):
    folder, references = tiny_models["llama"]
    prompts = [reference.prompt for reference in references]
    tmp_path = tmp_path_factory.mktemp("trace")
    llm, spans, _ = spans_of(folder, prompts, policy, tmp_path)
    ran = {span.op: span for span in spans}
    assert len(ran) == len(spans)
    visits = max(span.op.visit for span in spans) + 1
    stage = StageLayers.whole(llm.config.num_layers)
    dependencies, issued, lane_free = Dependencies(), [], defaultdict(float)
    for op in zigzag(stage, policy.num_gpu_batches, range(visits)):
        if op not in ran:
            continue
        waits = dependencies.add(len(issued), op)
        issued.append(op)
        span = ran[op]
        assert lane_free[op.lane] <= span.start <= span.end
        assert all(ran[issued[index]].end <= span.start for index in waits)
        lane_free[op.lane] = span.end
    assert len(issued) == len(spans)


@pytest.mark.parametrize("executor", ["serial", "async"])
def test_the_file_has_one_row_a_lane_and_every_op(tiny_models, policy_of_all, tmp_path, executor):
    folder, references = tiny_models["opt"]
    prompts = [reference.prompt for reference in references]
    llm, spans, trace = spans_of(folder, prompts, policy_of_all, tmp_path, executor)
    events = trace["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    ops = [event for event in events if event["ph"] == "X"]
    assert len(ops) == len(spans)
    busy = defaultdict(float)
    for event in ops:
        busy[Lane(rows[event["tid"]]).worker] += event["dur"] / 1e6
    measured = llm.report.stages[0].measured.busy
    assert set(measured) <= set(busy)
    for lane, seconds in measured.items():
        assert busy[lane] == pytest.approx(seconds, rel=0.01, abs=1e-4)
    assert llm.report.stages[0].measured.binding_lane == max(measured, key=measured.__getitem__)
    assert any(line.startswith("bottleneck: ") for line in llm.report.lines())


def test_a_trace_that_was_not_asked_for_is_an_error(tiny_models, tmp_path):
    folder, references = tiny_models["opt"]
    with LLM(folder, use_ray=False) as llm:
        llm.generate([references[0].prompt], PARAMS)
        with pytest.raises(ValueError, match="trace=True"):
            llm.write_trace(tmp_path / "trace.json")
