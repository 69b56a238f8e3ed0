"""Laws of modelled time: lanes in order, resources never short, no faster than what there is."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import REAL, llama, opt, policies

from benchmarks.paper_machines import MACHINE
from flexgen_ray.config import RATE_NAMES, HardwareSpec, Placement, Policy, Workload
from flexgen_ray.cost.bound import decoding_rows, prefilling_rows, visit_seconds
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.resources import CORES, Demand, Resource, SharedResources, demand_of
from flexgen_ray.cost.simulate import OpStream, SimulatedRun, simulate, simulate_ring
from flexgen_ray.cost.steady import op_stream, pipeline_visit_seconds, steady_visit_seconds
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.layout.placement import COPY_PIECE
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import NO_ROWS, Composition, Rows
from flexgen_ray.reporting.trace import write_trace
from flexgen_ray.schedule.dependencies import Dependencies
from flexgen_ray.schedule.ops import ON_STREAMS, Lane, Op, OpKind
from flexgen_ray.schedule.zigzag import StageLayers

ALMOST = 1 + 1e-9
WORKLOAD = Workload(20, 24, 40)
MODELS = {"opt": opt(2, 32, 4), "llama": llama(3, 32, 4, 2, 48, 97, tied=True)}

rates_alone = st.builds(
    HardwareSpec, **dict.fromkeys(RATE_NAMES, st.sampled_from([1e6, 3e6, 1e7, 1e9]))
)
# A GPU's: with copy engines, and a thread that issues ops.
hardware = st.builds(
    replace,
    rates_alone,
    launch_seconds=st.sampled_from([0.0, 1e-5, 1e-2]),
    issue_seconds=st.sampled_from([0.0, 1e-4]),
    has_copy_engines=st.booleans(),
)
windows = st.sampled_from([1, 3, 16, 128, sys.maxsize])


@st.composite
def plans(draw) -> StagePlan:
    config = MODELS[draw(st.sampled_from(list(MODELS)))]
    stage = StageLayers.whole(config.num_layers)
    return StagePlan(config, stage, draw(policies), WORKLOAD, "float32", draw(st.booleans()))


@st.composite
def rings(draw) -> list[StagePlan]:
    """Two stages at least, each with a policy of its own for the same batches."""
    counts = draw(st.lists(st.integers(1, 2), min_size=2, max_size=3))
    shape, num_blocks = draw(policies), len(counts) + draw(st.integers(0, 1))
    config = replace(MODELS["opt"], num_layers=sum(counts))
    found = []
    for stage in StageLayers.split(sum(counts), counts):
        its = draw(policies)
        policy = replace(shape, weights=its.weights, cache=its.cache, activations=its.activations)
        found.append(StagePlan(config, stage, policy, WORKLOAD, "float32", True, num_blocks))
    return found


def rows_of(plan: StagePlan, is_prefill: bool) -> Rows:
    return prefilling_rows(plan)[0] if is_prefill else decoding_rows(plan, 30)


def alike(plan: StagePlan, rates: HardwareSpec, rows: Rows, visits: int) -> OpStream:
    """Visits all of whose batches bring the same rows."""
    return op_stream(plan, rates, lambda op: rows, visits)


def played(its: OpStream) -> tuple[list[Op], dict[Op, Demand], SimulatedRun]:
    """What was issued, what each op took, and when it ran."""
    ops = list(its.ops)
    demands = {op: its.demand(op) for op in ops}
    return ops, demands, simulate(replace(its, ops=ops))


def assert_in_order(ops: list[Op], found: SimulatedRun) -> None:
    """Each op once, when its lane is free and all that it waits for has ended."""
    ran = {span.op: span for span in found.spans}
    assert set(ran) == set(ops) and len(found.spans) == len(ops)
    dependencies: Dependencies[int] = Dependencies()
    lane_free: dict = defaultdict(float)
    for index, op in enumerate(ops):
        span = ran[op]
        assert lane_free[op.lane] <= span.start <= span.end
        assert all(ran[ops[it]].end <= span.start for it in dependencies.add(index, op))
        lane_free[op.lane] = span.end


def assert_one_at_a_time(found: SimulatedRun) -> None:
    free: dict = defaultdict(float)
    for span in sorted(found.spans, key=lambda span: (span.start, span.end)):
        assert free[span.op.lane.worker] <= span.start
        free[span.op.lane.worker] = span.end


@settings(max_examples=60)
@given(plans(), hardware, windows, st.integers(1, 3), st.booleans())
def test_lanes_run_in_order_and_no_op_before_what_it_waits_for(plan, rates, window, visits, first):
    its = replace(alike(plan, rates, rows_of(plan, first), visits), window=window)
    ops, _, found = played(its)
    assert_in_order(ops, found)
    assert_one_at_a_time(found)
    assert len(found.visit_ends) == visits
    assert found.visit_ends == sorted(found.visit_ends)


@settings(max_examples=60)
@given(plans(), hardware, st.integers(1, 3), st.booleans())
def test_time_lies_between_every_bound_and_the_serial_sum(plan, rates, visits, is_prefill):
    rows = rows_of(plan, is_prefill)
    _, demands, found = played(alike(plan, rates, rows, visits))
    for seconds in visit_seconds(plan, rates, rows).values():
        assert found.seconds * ALMOST >= visits * seconds
    serial = sum(demand.seconds for demand in demands.values())
    assert found.seconds <= serial * ALMOST
    assert sum(found.busy.values()) == pytest.approx(serial)
    assert max(found.busy.values()) <= found.seconds * ALMOST


@settings(max_examples=40)
@given(plans(), hardware, st.booleans())
def test_no_resource_gives_more_than_it_has(plan, rates, is_prefill):
    """In no stretch of time; and no op is faster than alone."""
    _, demands, found = played(alike(plan, rates, rows_of(plan, is_prefill), 1))
    taken: dict = defaultdict(list)
    for span in found.spans:
        demand = demands[span.op]
        assert span.end - span.start >= demand.seconds / ALMOST - found.seconds * 1e-9
        for resource, share in demand.shares.items():
            taken[resource].append((span.start, span.end, share * demand.seconds))
    for spans in taken.values():
        spans.sort(key=lambda it: it[1])
        for begin in {start for start, _, _ in spans}:
            within = 0.0
            for start, end, seconds in spans:
                if start >= begin:
                    within += seconds
                    assert within <= (end - begin) * ALMOST + found.seconds * 1e-9


@given(plans(), hardware)
@settings(max_examples=20)
def test_a_pass_without_rows_takes_no_time_but_its_weights(plan, rates):
    ops, demands, _ = played(alike(plan, rates, NO_ROWS, 2))
    of_weights = (OpKind.READ_WEIGHTS, OpKind.LOAD_WEIGHTS)
    assert all(not demands[op].seconds for op in ops if op.kind not in of_weights)


@settings(max_examples=40)
@given(rings(), hardware, hardware, st.booleans())
def test_stages_wait_for_their_neighbours_and_keep_the_laws_of_one(ring, rates, other, is_prefill):
    rows = rows_of(ring[0], is_prefill)
    num_blocks, visits = ring[0].num_blocks, 2 * ring[0].num_blocks
    streams = [
        alike(plan, other if number else rates, rows, visits) for number, plan in enumerate(ring)
    ]
    ops = [list(it.ops) for it in streams]
    found = simulate_ring(
        [replace(it, ops=own) for it, own in zip(streams, ops, strict=True)], num_blocks
    )
    spans = {
        (number, it.op.kind, it.op.visit, it.op.batch): it
        for number, stage in enumerate(found)
        for it in stage.spans
    }
    for number, (plan, own, simulated) in enumerate(zip(ring, ops, found, strict=True)):
        assert_in_order(own, simulated)
        lanes: dict = defaultdict(float)
        for op in own:
            lanes[op.lane.worker] += streams[number].demand(op).seconds
        assert simulated.seconds * ALMOST >= max(lanes.values())
        if len(set(plan.splits)) == 1:  # the bound is that of the first block's visit
            bound = visit_seconds(plan, other if number else rates, rows)
            assert simulated.seconds * ALMOST >= visits * max(bound.values())
    for (number, kind, visit, batch), span in spans.items():
        if kind is OpKind.RECV:
            assert spans[number - 1, OpKind.SEND, visit, batch].end <= span.start
        elif kind is OpKind.RECV_ROWS:
            told = OpKind.COMPOSE if number == 1 else kind
            assert spans[number - 1, told, visit, batch].end <= span.start
        elif kind is OpKind.RECV_TOKENS and visit >= num_blocks:
            chosen = spans[len(ring) - 1, OpKind.ACCEPT, visit - num_blocks, batch]
            assert chosen.end <= span.start


def test_a_ring_that_waits_for_itself_is_told():
    """Fewer blocks than stages, and each stage runs its ops one after the other."""
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2)
    ring = [
        StagePlan(MODELS["opt"], stage, policy, WORKLOAD, "float32")
        for stage in StageLayers.split(2, [1, 1])
    ]
    streams = [alike(plan, MACHINE, decoding_rows(plan, 30), 3) for plan in ring]
    with pytest.raises(RuntimeError, match="wait for each other"):
        simulate_ring([replace(it, window=1) for it in streams], 1)


def opt_30b(num_gpu_batches: int) -> StagePlan:
    """The original's policy for a T4, with host attention; streamed weights bind."""
    policy = Policy(
        gpu_batch_size=24,
        num_gpu_batches=num_gpu_batches,
        weights=Placement(0.2, 0.8, 0.0),
        cache=Placement(0.0, 1.0, 0.0),
    )
    workload = Workload(policy.block_size, 512, 544)
    return StagePlan(REAL["opt-30b"], StageLayers.whole(48), policy, workload, "float16")


def test_opt_30b_on_a_t4_comes_close_to_its_busiest_lane():
    plan = opt_30b(4)
    rows = decoding_rows(plan, 528)
    bound = max(visit_seconds(plan, MACHINE, rows).values())
    assert steady_visit_seconds(plan, MACHINE, rows) <= 1.1 * bound


@given(plan=plans(), rates=rates_alone, is_prefill=st.booleans(), taken=st.floats(0.1, 1))
def test_a_cpu_that_is_the_device_too_does_one_thing_at_a_time(plan, rates, is_prefill, taken):
    """Its cores are busy as long as their work takes, whatever overlaps; a lane at a time at best
    as if they were not shared."""
    rows, visits = rows_of(plan, is_prefill), 3
    shares = (("device", 1.0), ("h2d", taken), ("disk_read", taken / 2))
    freely, shared = (op_stream(plan, rates, lambda op: rows, visits, it) for it in ((), shares))
    ops, demands, run = played(shared)
    work = sum(demands[op].seconds * demands[op].shares.get(CORES, 0) for op in ops)
    on_device = sum(demands[op].seconds for op in ops if op.lane.worker is Lane.DEVICE)
    assert on_device <= work * ALMOST
    assert run.seconds * ALMOST >= max(work, simulate(freely).seconds)


ENGINE = HardwareSpec(**dict.fromkeys(RATE_NAMES, 1e15), has_copy_engines=True)
PIECE = COPY_PIECE / 1e15  # seconds


class Copy:
    """A copy to the device of so many pieces."""

    def __init__(self, pieces: float) -> None:
        self.demand = demand_of({Resource.H2D: pieces * COPY_PIECE}, ENGINE)
        self.speed, self.ends, self.left = 1.0, 0.0, 0.0


def ends_of(copies: list[tuple[float, float]]) -> list[float]:
    """Ends of copies, given as (begin, pieces), in pieces of time."""
    resources: SharedResources[Copy] = SharedResources()
    begun, ends = [Copy(pieces) for _, pieces in copies], {}
    coming = sorted(range(len(copies)), key=lambda it: copies[it][0])
    while coming or len(ends) < len(copies):
        event = resources.next_event()
        if coming and copies[coming[0]][0] * PIECE <= event:
            number = coming.pop(0)
            resources.begin(begun[number], copies[number][0] * PIECE)
            continue
        for copy in resources.pop_ended(event):
            ends[begun.index(copy)] = event / PIECE
    return [ends[number] for number in range(len(copies))]


def piece_by_piece(copies: list[tuple[float, float]]) -> list[float]:
    """Ends if an engine serves pieces, and a copy whose piece has crossed queues again."""
    coming, queue, now = (
        sorted((begin, number) for number, (begin, _) in enumerate(copies)),
        [],
        0.0,
    )
    left, ends = [pieces for _, pieces in copies], [0.0] * len(copies)
    while coming or queue:
        if not queue:
            now, number = coming.pop(0)
            queue.append(number)
        number = queue.pop(0)
        now += min(left[number], 1.0)
        left[number] -= min(left[number], 1.0)
        while coming and coming[0][0] < now:
            queue.append(coming.pop(0)[1])
        if left[number] > 0:
            queue.append(number)
        else:
            ends[number] = now
    return ends


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0.01, 0.5, 1, 2.5, 3, 9])), max_size=6)
)
def test_a_copy_engine_serves_pieces_in_the_order_in_which_their_copies_queue(copies):
    copies = [(begin * 2**0.5, pieces) for begin, pieces in copies]
    assert ends_of(copies) == pytest.approx(piece_by_piece(copies), rel=1e-9)


def test_a_small_copy_passes_between_the_pieces_of_large_ones():
    """A copy of 40 pieces, beside which others come after three and a half."""
    assert ends_of([(0, 40), (3.5, 0.1)]) == pytest.approx([40.1, 4.1])
    assert ends_of([(0, 40), (3.5, 40), (10.5, 0.1)]) == pytest.approx([76.1, 80.1, 12.1])


def test_copies_each_way_have_an_engine_and_those_of_a_cpu_share_the_link():
    spec = HardwareSpec(**dict.fromkeys(RATE_NAMES, 1e9), has_copy_engines=True)
    both = [{Resource.H2D: 1e9}, {Resource.D2H: 1e9}]
    assert [demand_of(it, spec).engine for it in both] == [Resource.H2D, Resource.D2H]
    assert demand_of({Resource.H2D: 1e9, Resource.FLOPS: 1e9}, spec).engine is None
    assert demand_of(both[0], replace(spec, has_copy_engines=False)).engine is None
    assert Hardware.preset("h100").rates("float16", 1, 8, 512).has_copy_engines
    assert not Hardware.preset("cpu").rates("float32", 1, 8, 512).has_copy_engines


@settings(max_examples=30)
@given(plans(), hardware, st.booleans())
def test_no_run_is_faster_than_the_thread_that_issues_its_ops(plan, rates, is_prefill):
    rows = rows_of(plan, is_prefill)
    launches, issued = 1e-3, 5e-4
    slow = replace(rates, launch_seconds=launches, issue_seconds=issued)
    ops, _, found = played(alike(plan, slow, rows, 1))
    model, composition = CostModel(plan), Composition(rows, plan.splits)
    amounts = [model.amounts(op, composition) for op in ops]
    of_streams = [it for op, it in zip(ops, amounts, strict=True) if op.lane in ON_STREAMS]
    assert [it for it in amounts if Resource.ISSUE in it] == of_streams
    seconds = sum(launches * it[Resource.LAUNCHES] + issued for it in of_streams)
    assert seconds >= issued * len(of_streams)
    assert found.seconds * ALMOST >= seconds


def test_two_stages_on_two_machines_take_half_as_long():
    """A block a stage, each stage half of the layers: the slower half counts."""
    whole = opt_30b(4)
    halves = [
        replace(whole, stage=it, num_blocks=2) for it in StageLayers.split(48, [24, 24])
    ]  # fmt: skip
    rows = decoding_rows(whole, 528)
    both = pipeline_visit_seconds(halves, [MACHINE] * 2, rows)
    assert both == pytest.approx(steady_visit_seconds(whole, MACHINE, rows) / 2, rel=0.1)


def ring_of_t4s(shape: str, policy: Policy) -> list[StagePlan]:
    """Four stages with a block each."""
    config = REAL[shape]
    workload = Workload(policy.block_size, 512, 544)
    stages = StageLayers.split(config.num_layers, [config.num_layers // 4] * 4)
    return [StagePlan(config, it, policy, workload, "float16", num_blocks=4) for it in stages]


@pytest.mark.parametrize(
    "shape, policy",
    [
        # Host attention binds; the next pass has to begin before this one ends.
        (
            "opt-6.7b",
            Policy(32, 2, 512, Placement(1, 0, 0), Placement(0.65, 0.35, 0), blocks_in_flight=4),
        ),
        # The disk and the link; some layers only read weights from disk.
        (
            "opt-175b",
            Policy(
                24, 3, 512, Placement(0.07, 0.914, 0.016), Placement(0, 0.727, 0.273),
                blocks_in_flight=4,
            ),
        ),
    ],
)  # fmt: skip
def test_the_busiest_lane_of_a_ring_hardly_waits(shape, policy):
    ring = ring_of_t4s(shape, policy)
    rows = decoding_rows(ring[0], 528)
    bound = max(max(visit_seconds(plan, MACHINE, rows).values()) for plan in ring)
    assert pipeline_visit_seconds(ring, [MACHINE] * 4, rows) <= bound / 0.92


def test_a_simulation_is_drawn_as_a_run_is(tmp_path):
    plan = StagePlan(
        MODELS["llama"], StageLayers.whole(3), Policy(2, 2), WORKLOAD, "float32"
    )  # fmt: skip
    ops, _, found = played(alike(plan, MACHINE, decoding_rows(plan, 30), 2))
    write_trace(tmp_path / "trace.json", [found.spans])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    drawn = [event["cat"] for event in events if event["ph"] == "X"]
    assert sorted(drawn) == sorted(op.kind.value for op in ops)
    assert max(e["ts"] + e["dur"] for e in events if e["ph"] == "X") == pytest.approx(
        found.seconds * 1e6, abs=0.01
    )
    assert {op.lane.worker.value for op in ops} == set(found.busy)
