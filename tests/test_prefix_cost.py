"""Cost of prefixes: the model's bytes, products and copies are those of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from copies import Copies
from hypothesis import given
from hypothesis import strategies as st
from played_jobs import play
from strategies import UNIT, opt

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.config import PAGE_TOKENS, Placement, Policy, Sharing, Workload
from flexgen_ray.cost.bound import decoding_rows
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.prefixes import attended_prefixes, prefilled_prefixes
from flexgen_ray.cost.resources import Resource
from flexgen_ray.layout import plan as stage_plan
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.planned_rows import compose
from flexgen_ray.planner import choose
from flexgen_ray.runtime import device_attention
from flexgen_ray.runtime.handlers import OpHandlers, host_tables
from flexgen_ray.schedule.ops import Op, OpKind
from flexgen_ray.schedule.zigzag import StageLayers

OPT = opt(2, 64, 4)
HEADER, MIDDLE = [7] * 3 * PAGE_TOKENS, [9] * 2 * PAGE_TOKENS
# Two levels, and a prompt that shares nothing.
PROMPTS = [
    *(HEADER + MIDDLE + [20 + i] * (3 + i) for i in range(4)),
    *(HEADER + [30 + i] * (5 + i) for i in range(3)),
    [40] * 20,
]
CACHES = {"device": Placement(1, 0, 0), "host": Placement(0, 1, 0), "both": Placement(0.5, 0.5, 0)}


@pytest.fixture
def counted(monkeypatch) -> Counter[str]:
    """Products and tokens that are read by all ops that attend, as they ran and as modelled.

    Decoding rows read their own tokens, after those of prefixes that are folded into them.
    """
    sums: Counter[str] = Counter()
    run, attend = OpHandlers.run, device_attention.attend_shared
    gather = device_attention.DeviceAttention._prefix_tokens
    decode = device_attention.DeviceAttention._decode

    def noted(handlers: OpHandlers, op, ready_at: float = 0.0) -> None:
        if op.kind is OpKind.ATTEND_DEVICE and not handlers.is_idle(op):
            plan, placed = handlers.plan, handlers.placed(op)
            decoding = attended_prefixes(plan, placed, op.layer)
            prompts = [
                prefilled_prefixes(plan, placed, rows, op.layer)
                for rows in (placed.resident, placed.streamed)
            ]
            sums["modelled products"] += decoding[Resource.FLOPS]
            parts = [decoding, *prompts]
            sums["modelled bytes"] += sum(part[Resource.DEVICE_ATTENTION] for part in parts)
        if op.kind in (OpKind.ATTEND_DEVICE, OpKind.ATTEND_HOST) and not handlers.is_idle(op):
            note_rows(handlers, op)
        run(handlers, op, ready_at)

    def note_rows(handlers: OpHandlers, op) -> None:
        plan, placed, model = handlers.plan, handlers.placed(op), CostModel(handlers.plan)
        if op.kind is OpKind.ATTEND_HOST:
            amounts = model.amounts(op, handlers.composition(op))
            sums["modelled rows"] += amounts[Resource.HOST_ATTENTION]
            lens = host_tables(placed)[1] if placed.attended else []
            tokens = sum(plan.config.attended_tokens(op.layer, count) for count in lens)
            sums["rows"] += 2 * tokens * plan.config.kv_size * plan.element_bytes
        else:
            rows = [it for it in (*placed.resident, *placed.streamed) if not it.is_prefill]
            keys = model._scored(placed, rows, op.layer)[Resource.DEVICE_ATTENTION]
            sums["modelled rows"] += 2 * keys

    def decoded(self, op, q, pool, run, *others):
        tokens = sum(self._config.attended_tokens(op.layer, count) for count in run.lens)
        sums["rows"] += tokens * pool[0, 0, :, 0].nbytes * 2
        return decode(self, op, q, pool, run, *others)

    def attended(q, k, v, starts=None):
        sums["products"] += 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
        return attend(q, k, v, starts)

    def gathered(self, op, placed, shared, first, last):
        tokens = gather(self, op, placed, shared, first, last)
        sums["bytes"] += sum(each.nbytes for each in tokens)
        return tokens

    monkeypatch.setattr(OpHandlers, "run", noted)
    monkeypatch.setattr(device_attention, "attend_shared", attended)
    monkeypatch.setattr(device_attention.DeviceAttention, "_prefix_tokens", gathered)
    monkeypatch.setattr(device_attention.DeviceAttention, "_decode", decoded)
    return sums


@pytest.mark.parametrize(
    ("name", "cache", "tier", "folded"),
    [
        ("opt", "device", "gpu", 3),
        ("qwen2", "host", "cpu", 2),
        ("qwen2", "both", "gpu", 3),
        ("qwen2", "both", "cpu", 9),
    ],
)
def test_prefixes_are_read_and_multiplied_as_modelled(
    tiny_models, counted, name, cache, tier, folded, monkeypatch
):
    """In layers with and without windows, of rows on the device, streamed and on the host."""
    folder, _ = tiny_models[name]
    placed = choose.place_prefixes
    monkeypatch.setattr(
        choose,
        "place_prefixes",
        lambda *given: [replace(plan, prefix_tier=tier) for plan in placed(*given)],
    )
    monkeypatch.setattr(stage_plan, "FOLDED_ROWS", folded)
    copies = Copies(monkeypatch)
    policy = Policy(3, 2, cache=CACHES[cache], cpu_attention=0.5 * (cache == "both"))
    options = {"dtype": "float32", "use_ray": False, "executor": "serial", "hardware": UNIT}
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with LLM(folder, policy=policy, **options) as llm:
        requests = [llm.request(index, prompt, params) for index, prompt in enumerate(PROMPTS)]
        llm.prepare(requests)
        list(llm.stream(requests))
        (plan,) = llm._plans
        measured = llm.report.stages[0].measured
    modelled, played = measured.modelled_resources, play(plan, UNIT, requests)
    assert {lane: played.busy[lane] for lane in measured.modelled_lanes} == pytest.approx(
        measured.modelled_lanes
    )
    assert plan.prefix_pages and plan.prefix_tier == tier
    assert counted["modelled products"] == counted["products"] > 0
    assert counted["modelled bytes"] == counted["bytes"] > 0
    assert counted["modelled rows"] == counted["rows"] > 0
    moved = Counter()
    for (kind, _), nbytes in copies.moved.items():
        moved[kind] += nbytes
    # Without sparse attention and weights in flight, nothing else crosses the link.
    crossing = moved[OpKind.LOAD_CACHE] + moved[OpKind.LOAD_ATTENTION]
    assert modelled.get("h2d", 0) == crossing


@given(
    rows=st.integers(1, 40), groups=st.integers(1, 30), each=st.integers(2, 20),
    pages=st.integers(1, 12), own=st.integers(1, 40), tier=st.sampled_from(("gpu", "cpu")),
    is_sparse=st.booleans(),
)  # fmt: skip
def test_rows_of_a_plan_read_as_many_pages_as_groups_in_turn_do(
    rows, groups, each, pages, own, tier, is_sparse
):
    """On average over where the first row stands in its group.

    Sparse rows read theirs once for each row.
    """
    count, tokens = groups * each, pages * PAGE_TOKENS
    sharing = Sharing(count, groups * tokens, tokens, tokens, 1.0)
    workload = Workload(rows, tokens + own, tokens + own + 9, mean_seq_len=own, sharing=sharing)
    policy = Policy(rows, attention_sparsity=0.5 if is_sparse else 1.0)
    plan = StagePlan(OPT, StageLayers.whole(2), policy, workload, "float32", prefix_tier=tier)
    composition = compose(plan, decoding_rows(plan, own))
    placed = composition.placed(0, plan.kinds[0])
    read = attended_prefixes(plan, placed, 1)
    places = range(each)
    mean = sum(len({(at + row) // each for row in range(rows)}) for at in places) / each
    nbytes = min(mean, groups) * pages * plan.page_bytes
    streamed = sum(copied for _, _, copied, *_ in placed.prefix_copies)
    if is_sparse:
        amounts = CostModel(plan).amounts(Op(OpKind.ATTEND_DEVICE, 0, 1, 0, 0, 0), composition)
        lens = [row.seq_len + tokens for row in composition.rows.rows]
        assert read[Resource.FLOPS] == read[Resource.DEVICE_ATTENTION] == streamed == 0
        assert amounts[Resource.DEVICE_ATTENTION] == sum(lens) * plan.kv_bytes * 0.75
        assert amounts[Resource.FLOPS] == 3 * OPT.q_size * sum(lens)
        return
    assert read[Resource.DEVICE_ATTENTION] == pytest.approx(nbytes, abs=plan.page_bytes / 2)
    assert read[Resource.FLOPS] == 4 * OPT.q_size * rows * tokens
    assert streamed * plan.page_bytes == (tier == "cpu") * read[Resource.DEVICE_ATTENTION]
