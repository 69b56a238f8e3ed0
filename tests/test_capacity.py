"""How stages fit into a cluster: never more than is free, and what does not fit is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_ray.distributed import reservation
from flexgen_ray.distributed.capacity import (
    ClusterNode,
    FreeResources,
    InsufficientResources,
    NodeType,
    place_stages,
)

NODES = st.builds(
    lambda cpus, gpus, taken, taken_gpus: ClusterNode(
        cpus, gpus, cpus - min(taken, cpus), gpus - min(taken_gpus, gpus)
    ),
    *(st.integers(0, 8), st.integers(0, 4), st.integers(0, 8), st.integers(0, 4)),
)
STAGES = st.one_of(st.none(), st.integers(1, 6))
THREADS = st.one_of(st.none(), st.integers(1, 8))


def idle(cpus: float, gpus: float = 0) -> ClusterNode:
    return ClusterNode(cpus, gpus, cpus, gpus)


@given(st.lists(NODES, min_size=1, max_size=4), STAGES, THREADS, st.sampled_from(["auto", "cpu"]))
def test_stages_take_no_more_than_is_free(nodes, num_stages, threads, device):
    room = FreeResources(tuple(nodes))
    try:
        bundles = place_stages(room, device, num_stages, threads).bundles
    except (ValueError, InsufficientResources):
        return
    assert len(bundles) == (num_stages or len(bundles))
    # Each in turn goes to a node that has its cores and its GPU.
    free = [[node.free_cpus, node.free_gpus] for node in nodes]
    for bundle in bundles:
        where = next(
            it for it in free if it[0] >= bundle.num_cpus - 1e-6 and it[1] >= bundle.num_gpus
        )
        where[0] -= bundle.num_cpus
        where[1] -= bundle.num_gpus
        assert bundle.threads == (threads or max(1, int(bundle.num_cpus)))
    has_gpus = any(node.gpus for node in nodes)
    assert all(bundle.num_gpus == (device == "auto" and has_gpus) for bundle in bundles)


@given(st.integers(1, 64), st.integers(1, 8))
def test_on_idle_nodes_every_stage_has_its_whole_share(cpus, num_stages):
    (bundle, *_) = place_stages(FreeResources((idle(cpus),)), "auto", num_stages, None).bundles
    share = cpus / num_stages
    assert bundle.num_cpus == (cpus // num_stages if share >= 1 else share)


def test_a_stage_takes_the_cores_that_others_leave():
    """A task of one core, in which an LLM is made, leaves three of four."""
    room = FreeResources((ClusterNode(4, 0, 3, 0),), holders=("this task (1 core)",))
    assert [it.num_cpus for it in place_stages(room, "auto", 1, None).bundles] == [3]
    with pytest.raises(
        InsufficientResources, match=r"needs 4 cores: 3 of 4 cores free; held by this task"
    ):
        place_stages(room, "auto", 1, None, may_shrink=False)
    with pytest.raises(InsufficientResources, match="needs 4 cores"):
        place_stages(room, "auto", 1, 4)
    full = FreeResources((ClusterNode(4, 0, 0, 0),), holders=("LLM of process 7 on vm (4 cores)",))
    with pytest.raises(
        InsufficientResources, match=r"0 of 4 cores free; held by LLM of process 7 on vm"
    ):
        place_stages(full, "auto", 1, None)


def test_stages_never_get_cpus_in_silence_where_gpus_are_asked_for():
    taken = FreeResources((ClusterNode(8, 2, 8, 0),), holders=("LLM of process 7 on vm (2 GPUs)",))
    for device in ("auto", "cuda", "cuda:0"):
        with pytest.raises(
            InsufficientResources, match="0 of 2 GPUs free; held by LLM of process 7"
        ):
            place_stages(taken, device, 1, None)
        with pytest.raises(ValueError, match="3 stages need a GPU each, but the cluster has 2"):
            place_stages(taken, device, 3, None)
    assert place_stages(taken, "cpu", 1, None).bundles[0].num_gpus == 0
    for device in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match="no node of the Ray cluster has a GPU"):
            place_stages(FreeResources((idle(8),)), device, 1, None)


def test_auto_takes_the_gpus_that_are_free_and_says_so():
    placed = place_stages(FreeResources((ClusterNode(8, 4, 8, 2),)), "auto", None, None)
    assert [it.num_gpus for it in placed.bundles] == [1, 1]
    assert placed.note.startswith("2 of 4 GPUs are taken")
    assert place_stages(FreeResources((idle(8, 4),)), "auto", None, None).note == ""


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(("num_stages", "count"), [(None, 1), (3, 3)])
def test_gpus_that_an_autoscaler_may_start_are_asked_for(device, num_stages, count):
    room = FreeResources((idle(2),), node_types=(NodeType(16, 1, 4), NodeType(2, 0, 1)))
    placed = place_stages(room, device, num_stages, None)
    assert [(it.num_cpus, it.num_gpus) for it in placed.bundles] == [(16, 1)] * count
    assert "GPUs are up" in placed.note
    with pytest.raises(ValueError, match="the cluster has 4"):
        place_stages(room, device, 5, None)


def test_a_wait_says_once_a_minute_what_is_waited_for(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(reservation.time, "monotonic", lambda: now[0])
    notes: list[str] = []
    waiting = reservation.ResourceWait(300, lambda event: notes.append(event.note))
    for _ in range(600):
        waiting.note("2 GPUs")
        now[0] += 0.5
    assert notes == [
        f"waiting since {waited} s, for {300 - waited} s more: 2 GPUs"
        for waited in (60, 120, 180, 240)
    ]
    assert waiting.left == 0
