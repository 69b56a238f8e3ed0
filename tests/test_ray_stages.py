"""Stages as Ray actors: the same tokens as transformers, whatever happens to the processes."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
import signal
import time
from socket import gethostname

import pytest
import ray
import tiny
from engine_runs import assert_same
from stage_killer import SLOW, Killer

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.config import Faults
from flexgen_ray.distributed.attempt import get_results
from flexgen_ray.request import Request
from flexgen_ray.runtime.events import Progress
from flexgen_ray.runtime.prefixes import find_prefixes

THIRD = Placement(0.3, 0.3, 0.4)
POLICY = Policy(2, 2, 16, THIRD, THIRD, THIRD, 0.5)


@pytest.fixture
def unsaid():
    """Ray logs no error: stages that only lost a neighbour say nothing."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("ray").addHandler(handler)
    yield
    gc.collect()
    time.sleep(0.5)
    logging.getLogger("ray").removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def assert_raises_with_type_and_traceback(llm: LLM, num_stages: int) -> None:
    """An error of the last stage is raised here as itself, before anything is loaded.

    With several stages its sentence names the stage and the node, too.
    """
    last = num_stages - 1
    with pytest.raises(AssertionError) as raised:
        get_results([llm.backend.actors[last].connect.remote(None)], llm.backend.nodes, last)
    where = f"stage {last} on {gethostname()}"
    text, (note,) = str(raised.value), raised.value.__notes__
    assert text == (f"{where}: load comes first" if num_stages > 1 else "load comes first")
    assert note.startswith(f"raised by {where if num_stages > 1 else 'stage 0'}:\nray::StageWorker")
    assert "worker.py" in note and "in connect" in note and "\x1b" not in note


@pytest.mark.parametrize("name", [pytest.param("opt", marks=pytest.mark.slow), "llama"])
def test_stages_as_actors_raise_their_errors_and_generate_the_same_tokens(
    tiny_models, local_ray, name
):
    folder, references = tiny_models[name]
    prompts = [reference.prompt for reference in references]
    params = SamplingParams(max_tokens=12, temperature=0.0)
    seen: list[Progress] = []
    options = {"pipeline_parallel_size": 3, "on_progress": seen.append}
    with LLM(folder, policy=POLICY, dtype="float32", **options) as llm:
        assert_raises_with_type_and_traceback(llm, 3)
        for _ in range(2):
            outputs = llm.generate(prompts, params)
            assert_same([output.outputs[0] for output in outputs], references)
        phases = list(dict.fromkeys(event.current_phase for event in seen if not event.note))
        assert phases[0] == "starting Ray" and "waiting for room on the Ray cluster" in phases
        assert phases[-4:] == ["planning", "loading weights", "prefill", "decode"]
        last = seen[-1].standing
        assert last and (last.requests_done, last.seconds_left) == (len(prompts), 0)
        pids = ray.get([actor.pid.remote() for actor in llm.backend.actors])
        assert len(set(pids)) == 3
        assert llm.report.new_tokens == 12 * len(prompts)
        assert len(llm.report.stages) == 3


def disturbed(folder, references, moments, num_stages=3, how=signal.SIGKILL, **faults):
    """How the driver mended what a killer did to a run, whose tokens are as if nothing had been."""
    params = SamplingParams(max_tokens=12, temperature=0.0)
    options = {"pipeline_parallel_size": num_stages, "faults": Faults(**faults)} | SLOW
    with LLM(folder, policy=POLICY, dtype="float32", **options) as llm:
        made = [llm.request(i, reference.prompt, params) for i, reference in enumerate(references)]
        llm.prepare(made)
        killer = Killer(llm, moments, how)
        killer.start()
        try:
            outputs = list(llm.stream(made))
        finally:
            killer.is_over.set()
            killer.join()
        recoveries = llm.backend.recoveries
    assert sorted(output.index for output in outputs) == list(range(len(references)))
    in_order = sorted(outputs, key=lambda output: output.index)
    assert_same([output.outputs[0] for output in in_order], references)
    return recoveries, killer.killed_at


@pytest.mark.parametrize(
    "num_stages",
    [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)],
)
def test_killed_stages_cost_no_token(tiny_models, local_ray, num_stages, unsaid):
    """Prompts share prefixes, which new processes compute again."""
    folder, known = tiny_models["llama"]
    shared = [[4 + (place * turn) % 90 for place in range(64)] for turn in (7, 11)]
    prompts = [shared[index % 2] + it.prompt for index, it in enumerate(known)]
    params = SamplingParams(max_tokens=12)
    made = [Request(index, prompt, params) for index, prompt in enumerate(prompts)]
    assert len(find_prefixes(made).prefixes) == 2
    references = tiny.references(folder, prompts, 12)
    recoveries, killed_at = disturbed(folder, references, [(0.3, 0)], num_stages)
    ((recovery,), (moment,)) = recoveries, killed_at
    assert recovery.stages == [0] and "process" in recovery.reason
    assert recovery.detected_at - moment < 5 and recovery.prefill_seconds > 0


@pytest.mark.slow
def test_a_stage_that_stands_still_is_replaced(tiny_models, local_ray):
    folder, references = tiny_models["opt"]
    stop = [(0.3, 1)]
    recoveries, _ = disturbed(folder, references, stop, 2, signal.SIGSTOP, stall_seconds=2)
    assert [it.stages for it in recoveries] == [[1]]


def test_too_many_faults_end_the_run_and_say_so(tiny_models, local_ray, unsaid):
    folder, references = tiny_models["opt"]
    with pytest.raises(
        RuntimeError, match=f"stage 1 on {gethostname()} lost its process; 0 restarts"
    ):
        disturbed(folder, references, [(0.3, 1)], 2, max_restarts=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_no_kill_at_any_moment_costs_a_token(tiny_models, local_ray, seed):
    """In prefill, in decode, and again before the first is mended."""
    rng = random.Random(seed)
    folder, references = tiny_models[rng.choice(["opt", "llama"])]
    num_stages = rng.randint(1, 3)
    moments = [(rng.uniform(0, 3), rng.randrange(num_stages)) for _ in range(rng.randint(1, 3))]
    disturbed(folder, references, moments, num_stages, max_restarts=2 * len(moments))


@pytest.mark.slow
def test_what_one_stage_raises_keeps_its_type_and_its_traceback(tiny_models, local_ray):
    with LLM(tiny_models["llama"][0], dtype="float32", device="cpu") as llm:
        assert_raises_with_type_and_traceback(llm, 1)


@pytest.mark.slow
def test_a_stage_that_raises_is_replaced_and_its_reason_told(tiny_models, local_ray):
    folder, references = tiny_models["llama"]
    params = SamplingParams(max_tokens=12, temperature=0.0)

    def break_in_the_middle(worker) -> None:
        """The sixtieth op fails, as a full disk would make it."""
        handlers, count = worker.stage.handlers, itertools.count()
        run = handlers.run

        def broken(op, ready_at=0.0):
            if next(count) == 60:
                raise OSError("No space left on device")
            run(op, ready_at)

        handlers.run = broken

    with LLM(folder, policy=POLICY, dtype="float32", pipeline_parallel_size=2) as llm:
        prompts = [reference.prompt for reference in references]
        made = [llm.request(index, prompt, params) for index, prompt in enumerate(prompts)]
        llm.prepare(made)
        ray.get(llm.backend.actors[1].__ray_call__.remote(break_in_the_middle))
        outputs = sorted(llm.stream(made), key=lambda output: output.index)
        assert_same([output.outputs[0] for output in outputs], references)
        (recovery,) = llm.backend.recoveries
    assert recovery.stages == [1] and "No space left on device" in recovery.reason
    assert f"stage 1 on {gethostname()} failed: OSError" in recovery.reason


@pytest.mark.slow
def test_a_partition_is_noticed_and_costs_no_token(tiny_models, local_ray):
    """What a stage tells the next is lost from some pass on, and no socket says so."""
    folder, references = tiny_models["llama"]
    params = SamplingParams(max_tokens=12, temperature=0.0)

    def cut_off(_) -> None:
        """Of this process; another in its place is none the worse."""
        from flexgen_ray.distributed.transport import GlooChannel

        post, count = GlooChannel.post_message, itertools.count()

        def post_or_lose(link, message):
            if next(count) < 8:
                post(link, message)

        GlooChannel.post_message = post_or_lose

    options = {"pipeline_parallel_size": 2, "faults": Faults(stall_seconds=2)}
    with LLM(folder, policy=POLICY, dtype="float32", **options) as llm:
        made = [llm.request(i, reference.prompt, params) for i, reference in enumerate(references)]
        llm.prepare(made)
        ray.get(llm.backend.actors[1].__ray_call__.remote(cut_off))
        outputs = sorted(llm.stream(made), key=lambda output: output.index)
        assert_same([output.outputs[0] for output in outputs], references)
        (recovery,) = llm.backend.recoveries
    # Every stage waits for a neighbour: which of them is cut off nobody can tell.
    assert recovery.stages == [0, 1] and "stood still" in recovery.reason


@pytest.mark.slow
def test_a_stage_lost_while_nothing_runs_costs_no_more_than_a_new_one(tiny_models, local_ray):
    """Before its weights are there that is an error, after which all is as new; later it heals."""
    folder, references = tiny_models["opt"]
    prompts = [reference.prompt for reference in references]
    params = SamplingParams(max_tokens=12, temperature=0.0)

    def kill(llm, stage):
        actor = llm.backend.actors[stage]
        os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actor.pid.remote())

    with LLM(folder, policy=POLICY, dtype="float32", pipeline_parallel_size=2) as llm:
        kill(llm, 1)
        with pytest.raises(RuntimeError, match="a stage's process died"):
            llm.generate(prompts, params)
        for _ in range(2):
            outputs = llm.generate(prompts, params)
            assert_same([output.outputs[0] for output in outputs], references)
            kill(llm, 1)
        outputs = llm.generate(prompts, params)
        assert_same([output.outputs[0] for output in outputs], references)
        assert [it.stages for it in llm.report.recoveries] == [[1]]
