"""Laws of the queues alone: any ops on any lanes, that wait for any earlier ones and for more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexgen_ray.schedule.ops import OPS, Lane, Op
from flexgen_ray.schedule.queueing import LaneQueues, QueuedOp

LANES = [Lane.DEVICE, Lane.DEVICE_AHEAD, Lane.HOST, Lane.STORE, Lane.STORE_AHEAD]
KIND_ON = {spec.lane: kind for kind, spec in OPS.items()}
SERVED = {worker: [lane for lane in LANES if lane.worker is worker] for worker in LANES}


@st.composite
def graphs(draw) -> list[tuple[Lane, set[int], bool]]:
    """Ops in program order: the lane, the earlier ops waited for, and whether a message is too."""
    lanes = draw(st.lists(st.sampled_from(LANES), min_size=1, max_size=24))
    graph = []
    for number, lane in enumerate(lanes):
        waits_for = draw(st.sets(st.integers(0, number - 1), max_size=4)) if number else set()
        graph.append((lane, waits_for, draw(st.booleans())))
    return graph


class Run:
    """Workers that start and end ops in any order that the queues allow."""

    def __init__(self, graph: list[tuple[Lane, set[int], bool]], window: int) -> None:
        self.graph = graph
        self.window = window
        self.queues: LaneQueues[QueuedOp] = LaneQueues(window)
        self.issued: list[QueuedOp] = []
        self.running: dict[Lane, QueuedOp] = {}
        self.awake: set[Lane] = set()  # a worker that sleeps starts nothing until it is woken
        self.messages: set[int] = set()  # ops whose message has not arrived
        self.started: list[int] = []
        self.done: set[int] = set()

    def choices(self) -> list[tuple[str, object]]:
        """Everything that may happen next."""
        may_issue = len(self.issued) < len(self.graph) and not self.queues.is_full
        return [
            *[("issue", None)] * may_issue,
            *(("start", worker) for worker in sorted(self.awake - set(self.running))),
            *(("end", worker) for worker in sorted(self.running)),
            *(("arrive", number) for number in sorted(self.messages)),
        ]

    def issue(self, _: None) -> None:
        number = len(self.issued)
        lane, waits_for, has_message = self.graph[number]
        op = Op(KIND_ON[lane], 0, 1, 0, 0, 0)
        queued = QueuedOp(number, op)
        assert queued.lane is lane
        if has_message:
            queued.num_pending += 1
            self.messages.add(number)
        if self.queues.add(queued, [self.issued[each] for each in waits_for]):
            self.awake.add(lane.worker)
        self.issued.append(queued)
        assert len(self.issued) - len(self.done) == self.queues.num_in_flight <= self.window

    def arrive(self, number: int) -> None:
        self.messages.remove(number)
        if self.queues.release(self.issued[number]):
            self.awake.add(self.issued[number].lane.worker)

    def start(self, worker: Lane) -> None:
        queued = self.queues.next(SERVED[worker])
        if queued is None:
            self.awake.remove(worker)
            return
        assert self.may_start(queued.index)
        # The worker takes its oldest op that may start.
        assert not [
            other.index
            for other in self.issued[: queued.index]
            if other.lane.worker is worker and self.may_start(other.index)
        ]
        self.started.append(queued.index)
        self.running[worker] = queued

    def may_start(self, number: int) -> bool:
        """An op's lane has started all before it, and what it waits for is done."""
        lane, waits_for, _ = self.graph[number]
        before = {each for each in range(number) if self.graph[each][0] is lane}
        return (
            number not in self.started
            and before <= set(self.started)
            and waits_for <= self.done
            and number not in self.messages
        )

    def end(self, worker: Lane) -> None:
        queued = self.running.pop(worker)
        self.done.add(queued.index)
        ready = self.queues.done(queued)
        assert all(other.lane is not queued.lane for other in ready)  # a lane is in order anyway
        self.awake |= {other.lane.worker for other in ready}


@given(graphs(), st.integers(1, 30), st.data())
def test_every_op_runs_once_in_the_order_of_its_lane_after_all_it_waits_for(graph, window, data):
    run = Run(graph, window)
    while choices := run.choices():
        action, argument = choices[data.draw(st.integers(0, len(choices) - 1))]
        getattr(run, action)(argument)
    assert sorted(run.started) == list(range(len(graph)))
    assert run.done == set(run.started) and not run.queues.num_in_flight
    assert not any(queued.dependents for queued in run.issued)


@given(st.integers(1, 40))
def test_a_window_that_has_filled_up_is_open_again_when_half_of_it_is_done(window):
    queues: LaneQueues[QueuedOp] = LaneQueues(window)
    number = 0
    while not queues.is_full:
        queues.add(QueuedOp(number, Op(KIND_ON[Lane.HOST], 0, 1, 0, 0, 0)), ())
        number += 1
    assert number == window
    while queues.is_full:
        queued = queues.next([Lane.HOST])
        assert queued is not None and not queues.done(queued)
    assert queues.num_in_flight == window // 2
