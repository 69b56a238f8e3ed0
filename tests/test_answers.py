"""Lengths of answers are learned from those that ended, and admission goes by them."""

from __future__ import annotations

import math
import random
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import opt

from flexgen_ray.config import Placement, Policy, Workload
from flexgen_ray.layout.admission import Admission
from flexgen_ray.layout.answers import AnswerLengths
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.request import Request, SamplingParams
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.schedule.zigzag import StageLayers

END = 7


@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=20),
    st.lists(st.integers(0, 40), max_size=5),
    st.integers(0, 40),
    st.integers(0, 60),
)
def test_expected_length_is_the_sum_of_the_chances_of_each_token(whole, under_way, tokens, more):
    answers = AnswerLengths()
    for count, was_cut in whole:
        answers.add(count, was_cut)
    answers.update(under_way)
    lengths = [*(count for count, _ in whole), *under_way]
    risks = []  # of ending with so many tokens
    for count in range(tokens + more + 1):
        had = sum(length >= count for length in lengths)
        ended = sum(length == count and not was_cut for length, was_cut in whole)
        risks.append(ended / had if had else 0.0)
    if 1.0 in risks[: tokens + 1]:
        expected = tokens + more  # no answer was as long, so nothing is known
    else:
        following = risks[tokens + 1 : tokens + more]
        expected = tokens + sum(accumulate(following, lambda it, risk: it * (1 - risk), initial=1))
    assert answers.expected(tokens, tokens + more) == pytest.approx(expected if more else tokens)


def played(count: int, knows: bool, accepts_late: bool = False) -> tuple[float, float, list]:
    """Run requests with max_tokens 512, of which most end far earlier.

    knows: each has its own length as max_tokens. accepts_late: tokens arrive just before their
    batch's next pass. Returns mean rows of a pass while requests wait, share of tokens that were
    computed again, and the rows of all passes.
    """
    prompt_len, most, batches, size = 100, 512, 2, 30
    rng = random.Random(1)
    lengths = [min(most, 1 + round(math.exp(rng.gauss(4.3, 0.7)))) for _ in range(count)]
    policy = Policy(size, batches, 512, cache=Placement(0, 1, 0))
    mean = 16 * (prompt_len + most) / (size * batches)
    workload = Workload(count, prompt_len, prompt_len + most, mean_seq_len=mean)
    layers = StageLayers.whole(2)
    plan = StagePlan(opt(2, 32, 2), layers, policy, workload, "float32")
    scheduler = Scheduler(
        size, batches, plan.cell_tokens, frozenset({END}), admission=Admission([plan.space])
    )
    scheduler.add(
        Request(index, [5] * prompt_len,
                SamplingParams(length if knows else most, 0.0, ignore_eos=knows))
        for index, length in enumerate(lengths)
    )  # fmt: skip
    passes, num_rows, taken, late = 0, 0, [], {}

    def accept(batch: int, slots: list[int]) -> None:
        sequences = [scheduler._slots[batch][slot] for slot in slots]
        ends = [it.num_generated + 1 >= lengths[it.request.index] for it in sequences]
        scheduler.accept(batch, slots, [END if end else 5 for end in ends])

    while not scheduler.is_done:
        for batch in range(batches):
            accept(batch, late.pop(batch, []))
            rows = scheduler.compose(batch)
            taken.append(rows)
            num_rows += len(rows.rows) * bool(scheduler._waiting)
            late[batch] = [row.slot for row in rows.sampled]
            if not accepts_late:
                accept(batch, late.pop(batch))
        passes += bool(scheduler._waiting)
    return (
        num_rows / passes,
        scheduler.recomputed_tokens / (sum(lengths) + count * prompt_len),
        taken,
    )


def test_answers_that_end_early_make_room_for_others():
    rows, again, _ = played(300, knows=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerLengths, "are_known", False)
        assert rows > 1.7 * played(300, knows=False)[0]
    assert again <= 0.05 and rows > 0.75 * played(300, knows=True)[0]


def test_decisions_do_not_depend_on_when_tokens_of_other_batches_arrive():
    early, late = played(120, knows=False)[2], played(120, knows=False, accepts_late=True)[2]
    assert early == late[: len(early)] and not any(rows.rows for rows in late[len(early) :])
