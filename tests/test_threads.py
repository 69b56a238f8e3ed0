"""Threads of a stage: how many there are, who counts them, and what they share."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_ray import LLM
from flexgen_ray.hardware.host import default_threads, threads_set_by_user, usable_cores
from flexgen_ray.runtime.lanes import Cores, divide_cores

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
CORES = usable_cores()


def of_job(**env_vars: str) -> str:
    return json.dumps({"runtime_env": {"working_dir": "gcs://x.zip", "env_vars": env_vars}})


@pytest.mark.parametrize(
    ("environment", "users", "own"),
    [
        ({}, None, CORES),
        ({"OMP_NUM_THREADS": "3"}, 3, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4, 4),
        ({"OMP_NUM_THREADS": "many"}, None, CORES),
        ({"OMP_NUM_THREADS": "0"}, None, CORES),
        # `ray job submit` and RayJob; a job that asks for cores of its own
        ({"OMP_NUM_THREADS": "1", "RAY_JOB_ID": "02", JOB: of_job()}, None, CORES),
        ({"OMP_NUM_THREADS": "5", "RAY_JOB_ID": "02", JOB: of_job()}, None, CORES),
        ({"OMP_NUM_THREADS": "1", JOB: json.dumps({"runtime_env": None})}, None, CORES),
        # its user's own runtime_env
        ({"OMP_NUM_THREADS": "6", JOB: of_job(OMP_NUM_THREADS="6")}, 6, 6),
        # `ray submit`, `ray exec`, and a user who set the same number
        ({"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}, None, CORES),
        ({"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}, 1, 1),
        # a task of three cores, in which the work is done
        ({"OMP_NUM_THREADS": "3", "RAY_JOB_ID": "01"}, None, 3),
    ],
)
def test_a_number_counts_if_a_user_set_it(environment, users, own):
    assert threads_set_by_user(environment) == users
    assert default_threads(environment) == own


@pytest.mark.parametrize("num_stages", [1, 2])
def test_every_stage_has_the_threads_that_were_asked_for(tiny_models, num_stages):
    folder, _ = tiny_models["llama"]
    with LLM(folder, use_ray=False, pipeline_parallel_size=num_stages, threads=2) as llm:
        assert [machine.num_threads for machine in llm.machines] == [2] * num_stages


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_a_number_of_threads_that_can_not_be_is_refused(tiny_models, threads):
    with pytest.raises(ValueError, match="threads is .*; it must be None or a number from 1 up"):
        LLM(tiny_models["llama"][0], use_ray=False, threads=threads)


@given(st.integers(1, 256), st.booleans())
def test_cores_are_left_for_launching_and_copying_beside_a_gpu(num_threads, attends):
    """And without one, all are used, and by no more threads than there are cores, from four on."""
    cores = divide_cores(num_threads, on_cuda=True, attends_on_host=attends)
    assert cores.host == max(1, num_threads - 2)
    cores = divide_cores(num_threads, on_cuda=False, attends_on_host=attends)
    if num_threads >= 4:
        assert cores.device + attends * cores.host == num_threads
    assert cores == Cores(num_threads, cores.device, cores.host)
