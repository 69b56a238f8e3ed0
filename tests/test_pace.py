"""Emulated hardware: the same tokens, never faster than the model says, shared where scarce."""

from __future__ import annotations

import threading
import time
from math import inf

import pytest
from engine_runs import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import policies

from benchmarks.emulation import PacedOp, Pacer, emulated
from benchmarks.spare import Spare
from flexgen_ray import LLM, HardwareSpec, Placement, Policy, SamplingParams
from flexgen_ray.config import RATE_NAMES
from flexgen_ray.cost.resources import Resource, SharedResources, demand_of
from flexgen_ray.layout.placement import COPY_PIECE
from flexgen_ray.runtime.modelled import RunWrapper
from flexgen_ray.store.weights import WeightStore

FAST = dict.fromkeys(RATE_NAMES, 1e12)


@pytest.mark.parametrize("name", ["opt", "llama"])
@settings(max_examples=4)
@given(policy=policies, slow=st.sampled_from(RATE_NAMES))
def test_an_emulated_run_has_the_same_tokens_and_takes_its_time(tiny_models, name, policy, slow):
    folder, references = tiny_models[name]
    hardware = HardwareSpec(**FAST | {slow: 2e8})
    prompts = [reference.prompt for reference in references]
    params = [SamplingParams(len(r.tokens), temperature=0.0) for r in references]
    with LLM(folder, policy=policy, dtype="float32", use_ray=False, **emulated(hardware)) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
        measured = llm.report.stages[0].measured
    assert_same(outputs, references)
    assert measured.is_emulated
    assert measured.wall >= max(measured.bound.values())
    for lane, seconds in measured.modelled_lanes.items():
        # What was fetched for a visit that never came is busy time too.
        assert measured.busy[lane] >= seconds * (1 - 1e-9)


def hold(pacer: Pacer, jobs: list[dict[Resource, float]]) -> list[tuple[float, float]]:
    """When each job began and ended, all let go at once (though the system may hold one back)."""
    spans = [(0.0, 0.0)] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(index: int) -> None:
        start.wait()
        began = time.perf_counter()
        pacer.end(pacer.begin(jobs[index], 0.0))
        spans[index] = began, time.perf_counter()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return spans


@given(st.lists(st.floats(0.001, 0.02), min_size=1, max_size=5), st.floats(0.5, 2.0))
@settings(max_examples=10)
def test_ops_that_share_a_resource_take_the_sum_of_their_times(seconds, scale):
    pacer = Pacer(HardwareSpec(**FAST), scale)
    jobs = [{Resource.H2D: 1e12 * it, Resource.HOST_MEMORY: 1e11 * it} for it in seconds]
    spans = hold(pacer, jobs)
    assert max(end for _, end in spans) - min(began for began, _ in spans) >= (
        scale * sum(seconds) * (1 - 1e-9)
    )
    assert all(
        end - began >= scale * it * (1 - 1e-9)
        for (began, end), it in zip(spans, seconds, strict=True)
    )


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_paced_copies_end_when_simulated_ones_do(scale):
    """A large copy, and behind it another and a small one, which pass between its pieces."""
    spec = HardwareSpec(**FAST | {"h2d_bytes_per_s": COPY_PIECE / 4e-3}, has_copy_engines=True)
    jobs = [{Resource.H2D: pieces * COPY_PIECE} for pieces in (8, 5, 0.1)]
    pacer, simulated = Pacer(spec, scale), SharedResources[PacedOp]()
    paced = [pacer.begin(amounts, 0.0) for amounts in jobs]
    threads = [threading.Thread(target=pacer.end, args=(job,)) for job in paced]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = [PacedOp(demand_of(amounts, spec)) for amounts in jobs]
    for job, other in zip(alone, paced, strict=True):
        simulated.begin(job, (other.started - paced[0].started) / scale)
    while (event := simulated.next_event()) < inf:
        simulated.pop_ended(event)
    ended = [(job.ended - paced[0].started) / scale for job in paced]
    assert ended == pytest.approx([job.ends for job in alone], abs=1e-6)
    assert time.perf_counter() >= max(job.ended for job in paced)
    assert ended == pytest.approx([52.4e-3, 40.4e-3, 8.4e-3], abs=1e-3)


def test_an_error_ends_a_paced_run_at_once(tiny_models, monkeypatch):
    """Host attention of half a day doesn't hold it up."""
    folder, _ = tiny_models["llama"]
    load_part = WeightStore.load_part

    def broken(self, op):
        if (op.visit, op.layer) == (1, 2):
            raise OSError(5, "Input/output error", "/data/offload")
        load_part(self, op)

    monkeypatch.setattr(WeightStore, "load_part", broken)
    hardware = HardwareSpec(**FAST | {"host_attention_bytes_per_s": 0.1})
    host = Placement(0, 1, 0)
    before = threading.active_count()
    with LLM(
        folder, policy=Policy(2, 2, 64, host, host), use_ray=False, **emulated(hardware)
    ) as llm:
        with pytest.raises(OSError, match="/data/offload"):
            llm.generate([[4 + i for i in range(20)]] * 4, SamplingParams(max_tokens=8))
    assert threading.active_count() <= before


def test_what_is_late_catches_up():
    """Ten ops of 10 ms, ready when the one before has ended, though each is begun 4 ms late."""
    pacer = Pacer(HardwareSpec(**FAST), 1.0)
    began = ready_at = time.perf_counter()
    for number in range(1, 11):
        time.sleep(0.004)
        job = pacer.begin({Resource.H2D: 1e10}, ready_at)
        pacer.end(job)
        ready_at = job.ended
        assert ready_at == pytest.approx(began + 0.01 * number, abs=1e-6)
        assert time.perf_counter() >= ready_at


@given(
    st.lists(st.tuples(st.floats(0.0, 0.01), st.floats(0.001, 0.01)), min_size=2, max_size=4),
    st.sampled_from([Resource.H2D, Resource.HOST_MEMORY]),
    st.booleans(),
)
@settings(max_examples=8)
def test_what_is_late_takes_no_more_than_there_was(jobs, resource, has_copy_engines):
    """Ops that need one resource for some seconds, all ready at once, though begun later."""
    pacer = Pacer(HardwareSpec(**FAST, has_copy_engines=has_copy_engines), 1.0)
    ready_at = time.perf_counter()
    paced: list[PacedOp] = []

    def work(delay: float, seconds: float) -> None:
        time.sleep(delay)
        job = pacer.begin({resource: 1e12 * seconds}, ready_at)
        pacer.end(job)
        paced.append(job)

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    needed = sum(seconds for _, seconds in jobs)
    assert max(job.ended for job in paced) - ready_at >= needed * (1 - 1e-6)
    assert all(job.ended - ready_at >= job.seconds * (1 - 1e-6) for job in paced)


amounts = st.dictionaries(st.sampled_from("ab"), st.floats(0.1, 1.0), min_size=1)


@given(
    st.lists(st.tuples(amounts, st.floats(0.0, 4.0), st.floats(0.0, 9.0)), max_size=6),
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6),
)
def test_what_was_left_is_given_once(late, loads):
    """Ten seconds in which resource `a` had these loads in turn, and `b` half of them."""
    spare = Spare()
    for number, load in enumerate(loads):
        spare.note(10 * number / len(loads), {"a": load, "b": load / 2})
    used = {name: sum(10 / len(loads) * load * part for load in loads)
            for name, part in (("a", 1.0), ("b", 0.5))}  # fmt: skip
    for shares, seconds, since in late:
        left, until = spare.use(shares, seconds, since, 10.0)
        done = seconds - left
        assert 0 <= left <= seconds and done <= until - since + 1e-9
        assert since <= until <= 10 and (left == 0 or until == 10)
        for name, share in shares.items():
            used[name] += share * done
    assert all(each <= 10 + 1e-6 for each in used.values())


def test_an_op_alone_has_all_the_time_since_it_was_ready():
    spare = Spare()
    spare.note(0.0, {"a": 0.0})
    assert spare.use({"a": 1.0}, 2.0, 5.0, 10.0) == (0.0, 7.0)
    assert spare.use({"a": 1.0}, 9.0, 5.0, 10.0) == (6.0, 10.0)  # 5 to 7 are taken
    assert spare.use({"a": 0.5}, 1.0, 4.0, 10.0) == (0.0, 5.0)
    assert spare.use({}, 0.0, 4.0, 10.0) == (0.0, 4.0)


@pytest.mark.parametrize("value", [0, -1.0, "fast", None])
def test_a_rate_must_be_a_positive_number(value):
    with pytest.raises(ValueError, match="h2d_bytes_per_s"):
        HardwareSpec(**FAST | {"h2d_bytes_per_s": value})


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1", True])
def test_a_time_scale_must_be_a_positive_number(value):
    with pytest.raises(ValueError, match="time_scale"):
        emulated(HardwareSpec(**FAST), value)


def test_a_wrapper_that_is_not_there_is_refused_before_weights_are_loaded(tiny_models):
    folder, _ = tiny_models["llama"]
    wrapped = emulated(HardwareSpec(**FAST)) | {
        "run_wrapper": RunWrapper("benchmarks.emulation:no")
    }
    with LLM(folder, policy=Policy(2, 2), use_ray=False, **wrapped) as llm:
        with pytest.raises(ValueError, match="benchmarks.emulation:no.*must be module:name"):
            llm.generate([[5, 6]], SamplingParams(max_tokens=2))
