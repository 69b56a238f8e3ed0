"""The asynchronous executor equals the serial one bit for bit, and fails at once and cleanly."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch
from engine_runs import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import policies

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.runtime.executor import AsyncExecutor, SerialExecutor
from flexgen_ray.runtime.lanes import Cores, LaneWorker, make_lane_workers
from flexgen_ray.schedule.ops import OPS, Lane, OpKind
from flexgen_ray.schedule.zigzag import Mixtures, StageLayers, zigzag


@pytest.mark.parametrize("name", ["opt", "llama", "opt-350m-like", "gemma3"])
@settings(max_examples=4)
@given(policy=policies)
def test_async_equals_serial_bit_for_bit(tiny_models, name, policy, monkeypatch):
    folder, references = tiny_models[name]
    prompts = [reference.prompt for reference in references]
    tokens, logits = generate(folder, prompts, policy, "serial", monkeypatch)
    async_tokens, async_logits = generate(folder, prompts, policy, "async", monkeypatch)
    assert async_tokens == tokens
    assert all(torch.equal(a, b) for a, b in zip(async_logits, logits, strict=True))


WORKERS = [LaneWorker((lane,)) for lane in Lane]


class Recorder:
    """Stands for the cells: records when ops ran, after a sleep; can be told to fail."""

    def __init__(self, sleep: float = 0.0, fails: OpKind | None = None) -> None:
        self.times: list[tuple[OpKind, float, float]] = []
        self.sleep = sleep
        self.fails = fails

    def __call__(self, op, ready_at) -> None:
        start = time.perf_counter()
        time.sleep(self.sleep)
        if op.kind is self.fails:
            raise OSError(f"{op.kind} broke")
        self.times.append((op.kind, start, time.perf_counter()))


def test_lanes_run_at_once():
    """Sixteen visits of eight layers: much less than the sum, at least the busiest lane."""
    stage = StageLayers.whole(8)
    counts = {lane: 0 for lane in Lane}
    for op in zigzag(stage, 4, range(2)):
        counts[op.lane] += 1
    recorder = Recorder(sleep=0.002)
    started = time.perf_counter()
    executor = AsyncExecutor(recorder, lambda op: True, WORKERS)
    visits = list(executor.run(zigzag(stage, 4, range(2))))
    wall = time.perf_counter() - started
    assert len(visits) == 2 and len(recorder.times) == sum(counts.values())
    busy = sum(end - start for _, start, end in recorder.times)
    assert wall < 0.6 * busy


@given(st.sampled_from(list(OpKind)), st.integers(1, 3))
@settings(max_examples=25)
def test_an_exception_in_any_lane_ends_the_run_with_it(kind, num_batches):
    before = threading.active_count()
    recorder = Recorder(fails=kind)
    executor = AsyncExecutor(recorder, lambda op: True, WORKERS)
    with pytest.raises(OSError, match=f"{kind} broke"):
        for stage in StageLayers.split(3, [1, 1, 1]):
            mixtures = Mixtures(frozenset({2}), 3, {2: (1, 2)}, 2)
            list(executor.run(zigzag(stage, num_batches, range(50), 3, mixtures)))
    assert threading.active_count() == before


@pytest.mark.parametrize("executor", ["serial", "async"])
def test_an_abandoned_run_stops_and_joins_its_threads(executor):
    before = threading.active_count()
    recorder = Recorder()
    made = {
        "serial": SerialExecutor(recorder, lambda op: True),
        "async": AsyncExecutor(recorder, lambda op: True, WORKERS),
    }[executor]
    running = made.run(zigzag(StageLayers.whole(3), 2, range(1000)))
    next(running)
    running.close()
    assert threading.active_count() == before
    done = len(recorder.times)
    time.sleep(0.05)
    assert len(recorder.times) == done


def test_a_failing_disk_ends_generation_with_its_error(tiny_models, monkeypatch):
    folder, references = tiny_models["llama"]
    from flexgen_ray.store.disk import Region

    read, calls = Region.read_into, []

    def broken(self, *arguments):
        calls.append(1)
        if len(calls) > 40:
            raise OSError(5, "Input/output error", "/data/offload")
        return read(self, *arguments)

    monkeypatch.setattr(Region, "read_into", broken)
    from flexgen_ray import Placement

    policy = Policy(2, 2, weights=Placement(0, 0, 1))
    before = threading.active_count()
    with LLM(folder, policy=policy, executor="async", use_ray=False) as llm:
        with pytest.raises(OSError, match="/data/offload"):
            llm.generate([r.prompt for r in references], SamplingParams(max_tokens=50))
    assert threading.active_count() == before


@pytest.mark.parametrize("num_requests", [1, 2, 9])
def test_a_slow_reader_misses_nothing(tiny_models, num_requests):
    """While it reads of one visit the lanes may end the next, and the job."""
    folder, references = tiny_models["llama"]
    prompts = [reference.prompt for reference in references] * 2
    told = []

    def read_slowly(event) -> None:
        told.append(event)
        time.sleep(0.1)

    with LLM(folder, policy=Policy(2, 2), use_ray=False, dtype="float32") as llm:
        for max_tokens in (5, 3):  # the second run has fewer visits
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
            requests = [llm.request(i, prompts[i], params) for i in range(num_requests)]
            llm.prepare(requests)
            outputs = list(llm.stream(requests, read_slowly))
            assert sorted(output.index for output in outputs) == list(range(num_requests))
            assert sum(event.new_tokens for event in told) == max_tokens * num_requests
            start, *passes = told
            assert start.standing is not None and start.standing.tokens == 0
            assert all(event.new_tokens for event in passes)
            told.clear()


def test_torchs_own_host_attention_has_the_hosts_cores():
    """Another has threads of its own, and torch's would only be in their way."""
    threads = {}
    for by_torch in (False, True):
        workers = make_lane_workers(torch.device("cpu"), Cores(8, 6, 2), by_torch)
        threads[by_torch] = {lane: it.num_threads for it in workers for lane in it.lanes}
    assert threads[True] == threads[False] | {Lane.HOST: 2}
    assert {lane for lane, count in threads[False].items() if count > 1} == {
        lane for lane in Lane if lane.worker is Lane.DEVICE
    }


def test_every_kind_has_a_lane():
    assert set(OPS) == set(OpKind) and {spec.lane for spec in OPS.values()} == set(Lane)


COUNT_THREADS = """
import os
import torch
from flexgen_ray.hardware.host import release_openmp_team

torch.set_num_threads(4)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
x = torch.ones(1 << 20)
x.add_(1)
with_team = count()
release_openmp_team()
released = count()
x.add_(1)
print(before, with_team, released, count(), x.sum().item())
"""


def test_a_team_of_openmp_is_released_and_made_anew():
    """Else the device's team, of another thread, would have to wait asleep between products."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS], capture_output=True, text=True, check=True
    )
    before, with_team, released, anew, total = map(float, done.stdout.split())
    assert before < with_team == anew
    assert released == before
    assert total == 3 * 2**20
