"""Prompt tokens that are computed, saved and left in a run, and notes on prompts that share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from operator import attrgetter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_ray import LLM
from flexgen_ray.config import PAGE_TOKENS, Placement, Policy, Workload
from flexgen_ray.engine.sharing import JobSharing
from flexgen_ray.layout.admission import Admission
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.choose import planned_job
from flexgen_ray.planner.pipeline_plan import PipelinePlan
from flexgen_ray.reporting.report import Report
from flexgen_ray.reporting.tally import ProgressTracker
from flexgen_ray.request import Finished, Request, SamplingParams
from flexgen_ray.runtime.events import Progress, RunCounts
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.schedule.zigzag import StageLayers

END = 9  # the token that ends an answer
CONFIG = shape_config("opt-125m")
# Of each group: pages of its header, those of two documents after it, and lengths of its ends.
GROUPS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 5), st.lists(st.integers(1, 40), max_size=9)),
    min_size=1,
    max_size=4,
)


def requests_of(groups, max_tokens: int) -> list[Request]:
    """Prompts of headers, documents and ends of their own, those of the groups in turn."""
    prompts = []
    for group, (header, document, ends) in enumerate(groups):
        for number, end in enumerate(ends):
            tokens = [1000 * group] * (header * PAGE_TOKENS)
            tokens += [1000 * group + 1 + number % 2] * (document * PAGE_TOKENS)
            prompts.append((number, [*tokens, *[50_000 + len(prompts)] * end]))
    prompts.sort(key=lambda pair: pair[0])
    params = SamplingParams(max_tokens, 0.0)
    return [Request(index, tokens, params) for index, (_, tokens) in enumerate(prompts)]


def plan_for(job: JobSharing, policy: Policy, mean_seq_len: float | None = None) -> StagePlan:
    longest = max(answer.max_seq_len for answer in job.answers)
    prompt_len = max(len(answer.prompt_token_ids) for answer in job.answers)
    workload = Workload(
        len(job.answers), prompt_len, longest, mean_seq_len=mean_seq_len, sharing=job.amount
    )
    return StagePlan(CONFIG, StageLayers.whole(CONFIG.num_layers), policy, workload, "float32")


def run(scheduler: Scheduler, early: int = 0) -> Iterator[Finished | Progress]:
    """Events of a run in which a computed prompt token, or else a new token, takes a second.

    early: requests of lower indices end with their first token.
    """
    for batch in cycle(range(scheduler.num_batches)):
        rows = scheduler.compose(batch)
        slots = [row.slot for row in rows.sampled]
        is_early = [index < early for index in scheduler.request_indices(batch, slots)]
        scheduler.accept(batch, slots, [END if ends else 7 for ends in is_early])
        yield from scheduler.take_finished()
        new, prefill = len(slots), rows.prefill_tokens
        yield Progress(new, prefill, prefill or new, prefill > 0, saved_tokens=rows.saved_tokens)
        if scheduler.is_done:
            return


@settings(max_examples=60)
@given(
    GROUPS.filter(lambda groups: any(ends for *_, ends in groups)),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([16, 100, 2048]),
    st.booleans(),
)
def test_prompt_tokens_come_out_whole_and_only_those_to_be_computed_are_left(
    groups, size, batches, tokens, is_short
):
    """Without spare memory a prefix may be computed again, and then less is saved."""
    requests = requests_of(groups, max_tokens=24 if is_short else 3)
    job = JobSharing.of(requests)
    policy = Policy(size, batches, max_batch_tokens=tokens)
    plan = plan_for(job, policy, mean_seq_len=20.0 if is_short else None)
    scheduler = Scheduler(
        size, batches, plan.cell_tokens, frozenset({END}), admission=Admission([plan.space])
    )
    scheduler.add(requests)
    report, seen, events = Report(), list[RunCounts](), list[Progress]()
    report.prompt_tokens, report.possible_tokens = job.prompt_tokens, job.shared.possible_tokens
    tally = ProgressTracker(requests, saved=job.saved_tokens([plan]))

    def listen(event: Progress) -> None:
        events.append(event)
        seen.append(event.standing)

    finished = list(tally.follow(run(scheduler), report.add, listen))
    assert len(finished) == len(requests)
    assert seen[-1].prompt_tokens == job.prompt_tokens and seen[-1].seconds_left == 0
    assert all(a.tokens <= b.tokens for a, b in zip(seen, seen[1:], strict=False))
    assert report.saved_tokens == sum(event.saved_tokens for event in events)
    assert report.saved_tokens <= job.shared.possible_tokens
    if not is_short:
        assert report.saved_tokens == job.saved_tokens([plan])
        left = report.computed_tokens + sum(len(each.token_ids) for each in finished)
        has_decoded = False
        for event, counts in zip(events, seen, strict=True):
            left -= event.prefill_tokens + event.new_tokens
            has_decoded |= bool(event.new_tokens) and not event.is_prefill
            # Until then the speed of decoding is unknown.
            assert not has_decoded or counts.seconds_left == pytest.approx(left)


def test_prompt_tokens_come_out_whole_where_rows_are_set_back():
    """Answers are much longer than those before let expect, so rows lack pages."""
    requests = requests_of([(6, 0, [5] * 60)], max_tokens=100)
    job = JobSharing.of(requests)
    plan = plan_for(job, Policy(8, 2), mean_seq_len=20.0)
    scheduler = Scheduler(
        8, 2, plan.cell_tokens, frozenset({END}), admission=Admission([plan.space])
    )
    scheduler.add(requests)
    events = [event for event in run(scheduler, early=40) if isinstance(event, Progress)]
    prefill, saved = (sum(map(attrgetter(it), events)) for it in ("prefill_tokens", "saved_tokens"))
    assert scheduler.recomputed_tokens
    assert saved == job.saved_tokens([plan]) and prefill + saved == job.prompt_tokens


def few_shot(count: int = 20, header: int = 10) -> list[Request]:
    return requests_of([(header, 0, [5] * count)], max_tokens=4)


def test_the_report_says_how_much_was_saved_only_if_something_was():
    report = Report(prompt_tokens=1000, computed_tokens=400, possible_tokens=800)
    (line,) = [line for line in report.lines() if "share" in line]
    assert "600 of their tokens" in line and "75% of what sharing can save" in line
    figures = report.as_dict()
    assert (figures["saved_prompt_tokens"], figures["saved_of_possible"]) == (600, 0.75)
    for plain in (
        Report(prompt_tokens=1000, computed_tokens=1000, possible_tokens=0),
        Report(prompt_tokens=1000, computed_tokens=1200, possible_tokens=800),
    ):
        assert not [line for line in plain.lines() if "share" in line]
        assert plain.as_dict().get("saved_prompt_tokens", 0) == 0


def test_a_job_says_what_its_prompts_share_and_where_that_lies():
    job = JobSharing.of(few_shot())
    plan = plan_for(job, Policy(4, 2))
    line = job.line([plan])
    saved = 19 * 10 * PAGE_TOKENS
    assert f"{saved:,} of their {job.prompt_tokens:,} tokens" in line and "GPU memory" in line
    assert "host memory" in job.line([replace(plan, prefix_tier="cpu")])
    sparse = Policy(4, 2, cache=Placement(0.5, 0.5, 0), attention_sparsity=0.5)
    assert "of GPU memory and " in job.line([plan_for(job, sparse)])
    assert job.whole().line([plan]) is None and job.saved_tokens([plan]) == saved
    assert JobSharing.of(few_shot(), is_wanted=False).amount is None


def test_answers_to_one_prompt_share_it():
    (request, *_) = few_shot(1)
    four = JobSharing.of([replace(request, params=replace(request.params, n=4, temperature=1.0))])
    assert four.amount.saved_tokens == 3 * 10 * PAGE_TOKENS
    assert four.is_of([four.answers[0]]) and not four.is_of([request])


def test_a_note_says_why_prompts_that_share_are_computed_whole():
    job = JobSharing.of(few_shot())
    plan = plan_for(job, Policy(4, 2))
    dropped = replace(plan, workload=replace(plan.workload, sharing=None))
    assert job.saved_tokens([dropped]) == 0
    no_room = job.note_no_room([dropped])
    assert "MiB of GPU memory" in no_room and "raise --gpu-memory" in no_room


@pytest.mark.parametrize("header, is_said", [(10, False), (15, False), (40, True)])
def test_a_note_says_that_stages_were_loaded_for_prompts_that_share_less(header, is_said):
    first = JobSharing.of(few_shot())
    later = JobSharing.of(few_shot(header=header))
    note = later.note_lack([plan_for(first, Policy(4, 2))])
    assert (note is not None) == is_said
    assert note is None or "640" in note


@pytest.mark.parametrize("shares", [True, False])
def test_a_run_shares_unless_told_not_to_and_answers_the_same(text_model, shares):
    notes: list[str] = []
    header = [5] * (6 * PAGE_TOKENS)
    prompts = [[*header, 7 + number] for number in range(6)]
    params = SamplingParams(3, 0.0, ignore_eos=True)
    options = {"use_ray": False, "dtype": "float32", "device": "cpu", "max_model_len": 128}
    with LLM(
        text_model, policy=Policy(4), enable_prefix_caching=shares, **options,
        on_progress=lambda event: notes.append(event.note),
    ) as llm:  # fmt: skip
        whole = [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
        loading = llm.report.load_seconds
        together = llm.generate(prompts, params)
        assert [output.outputs[0].token_ids for output in together] == whole
        # With max_model_len weights stay as they were loaded, for a prompt that shares nothing.
        assert llm.report.load_seconds == loading and not llm.report.saved_tokens
        assert sum("make another LLM" in note for note in notes) == shares
    with LLM(text_model, policy=Policy(4), enable_prefix_caching=shares, **options) as llm:
        together = llm.generate(prompts, params)
        assert [output.outputs[0].token_ids for output in together] == whole
        saved = 5 * len(header) if shares else 0
        assert llm.report.saved_tokens == saved and llm.report.prompt_tokens == 6 * 97
        assert llm.report.computed_tokens == 6 * 97 - saved


def test_time_left_is_the_plans_before_a_token_is_there_also_if_prompts_share():
    requests = few_shot(8)
    job = JobSharing.of(requests)
    plan = plan_for(job, Policy(4, 2))
    seconds = {"prefill": {"device": 20.0}, "decode": {"device": 100.0}}
    planned = PipelinePlan(planned_job(requests, job.shared), [plan], [seconds], 1.0)
    tally = ProgressTracker(requests, planned, job.saved_tokens([plan]))
    assert tally.standing().seconds_left == pytest.approx(planned.job_seconds, rel=0.02)
