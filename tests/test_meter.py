"""The meter counts every op that ran on a device, and each second of a worker once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from late_streams import LateCuda

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.engine.backend import spans as all_spans
from flexgen_ray.runtime.meter import Meter
from flexgen_ray.schedule.ops import Lane, Op, OpKind


@dataclass
class Event:
    """An event that the device has passed, at a time in whole seconds."""

    at: int

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


kinds = st.sampled_from([OpKind.PROJECT, OpKind.FINISH, OpKind.LOAD_CACHE])


@given(st.lists(st.tuples(kinds, st.integers(0, 60), st.integers(0, 12)), max_size=30))
def test_lanes_of_one_worker_count_a_second_once(ops):
    """Lanes of the device run side by side on their streams, in no order of each other."""
    meter = Meter()
    meter._origin = Event(0), 0.0
    for kind, start, seconds in ops:
        op = Op(kind, 0, 1, 0, 0, 0)
        meter.note_events(op, Event(start), Event(start + seconds))
    seconds_of = {Lane.DEVICE: set(), Lane.LOAD_CACHE: set()}
    for kind, start, seconds in ops:
        worker = Lane.LOAD_CACHE if kind is OpKind.LOAD_CACHE else Lane.DEVICE
        seconds_of[worker].update(range(start, start + seconds))
    for worker, seconds in seconds_of.items():
        assert meter.busy[worker] == pytest.approx(len(seconds))


def test_the_last_ops_of_a_run_are_measured_too(tiny_models, policy_of_all, monkeypatch):
    """A run ends when its last tokens are there, and not all of its ops have been looked at."""
    folder, references = tiny_models["llama"]
    with monkeypatch.context() as patch:
        LateCuda().install(patch)
        with LLM(folder, policy=policy_of_all, trace=True, use_ray=False, device="cpu") as llm:
            prompts = [reference.prompt for reference in references]
            llm.generate(prompts, SamplingParams(max_tokens=2, temperature=0.0))
            ran = [span.op for span in all_spans(llm.backend, 0)]
    for before, after in (
        (OpKind.SAMPLE, OpKind.ACCEPT),
        (OpKind.STORE_CACHE, OpKind.APPEND_CACHE),
    ):
        of_after = {(op.visit, op.batch, op.layer) for op in ran if op.kind is after}
        assert of_after <= {(op.visit, op.batch, op.layer) for op in ran if op.kind is before}
