"""An LLM as a guest on a cluster: takes what is free, gives it back, names who holds the rest."""

from __future__ import annotations

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.distributed.own_cluster import OwnCluster
from flexgen_ray.distributed.reservation import free_resources

GREEDY = SamplingParams(max_tokens=3, temperature=0.0)


def num_groups() -> int:
    return sum(it["state"] == "CREATED" for it in placement_group_table().values())


def test_a_second_llm_works_and_a_dropped_one_gives_back_its_room(tiny_models, local_ray):
    """As a notebook's cell that is run again, which binds the name to the new one."""
    folder, _ = tiny_models["llama"]
    before = num_groups()
    llm = LLM(folder, dtype="float32", device="cpu")
    first = llm.generate([[3, 4, 5]], GREEDY)[0].outputs[0].token_ids
    llm = LLM(folder, dtype="float32", device="cpu")
    assert num_groups() == before + 1
    assert llm.generate([[3, 4, 5]], GREEDY)[0].outputs[0].token_ids == first
    assert any(name.startswith("ray::StageWorker") for _, _, name in local_ray.sockets())
    local_ray.check_sockets()  # a run of one stage listens on the loopback interface alone
    del llm
    assert num_groups() == before
    assert ray.is_initialized()


def test_an_llm_in_a_task_takes_the_cores_that_are_free(tiny_models, local_ray):
    """Or fails at once, naming who holds them: here the task itself."""
    folder, _ = tiny_models["llama"]

    def try_it(model, **options) -> tuple:
        try:
            with LLM(model, dtype="float32", device="cpu", **options) as llm:
                return llm.generate([[3, 4, 5]], GREEDY)[0].outputs[0].token_ids, ""
        except RuntimeError as error:
            return None, str(error)

    task = ray.remote(try_it)
    tokens, error = ray.get(task.options(num_cpus=0).remote(folder, wait=0))
    assert (tokens, error) == try_it(folder, use_ray=False)
    tokens, error = ray.get(task.options(num_cpus=1).remote(folder, wait=0))
    assert tokens is None
    assert "0 of 1 cores free; held by the task or actor that makes this LLM (1 cores)" in error


def test_what_others_hold_is_named(local_ray):
    group = placement_group([{"CPU": 0.5}], name="somebody's")
    try:
        assert group.wait(60)
        assert "placement group somebody's (0.5 cores)" in free_resources().describe()
    finally:
        ray.util.remove_placement_group(group)


def test_ray_stops_with_its_last_user(local_ray):
    other = OwnCluster.running()
    assert other is local_ray
    other.close()
    assert ray.is_initialized() and local_ray.sockets()


@pytest.mark.parametrize("wait", [-1, float("nan")])
def test_a_wait_that_can_not_be_is_refused(tiny_models, wait):
    with pytest.raises(
        ValueError, match="wait is .*; it must be None or a number of seconds, from 0 up"
    ):
        LLM(tiny_models["llama"][0], wait=wait)
