"""Lines before a run: how long it will take, by rates that are calibrated or assumed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_ray.calibration import calibrate
from flexgen_ray.config import Placement, Policy, Workload
from flexgen_ray.hardware.known import ASSUMED, CALIBRATED, measure_disk
from flexgen_ray.hardware.rates import DiskRates, MemorySizes
from flexgen_ray.hardware.spec import Hardware, adapt_preset, find_preset
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.paths import hardware_file
from flexgen_ray.planner.budgets import settle_budgets
from flexgen_ray.planner.choose import Origin, PlanningProblem, PolicyChoice, choose_policy
from flexgen_ray.planner.forecast import Forecast
from flexgen_ray.planner.stage_policies import StagePolicies
from flexgen_ray.request import Request, SamplingParams
from flexgen_ray.runtime.worker import Machine, with_known_rates

GIB = 2**30
GEFORCE = "NVIDIA GeForce RTX 4090"


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("Tesla T4", "t4"),
        (GEFORCE, "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA RTX A5000", "a5000"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA L40S", None),
        ("NVIDIA A10", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GH200 480GB", None),
        ("CPU", None),
    ],
)
def test_a_preset_is_found_by_the_name_that_torch_gives_its_gpu(name, preset):
    found = find_preset(name)
    assert (found and found.name) == preset


def test_an_adapted_preset_has_the_machines_memory_cores_and_disk():
    preset = Hardware.preset("rtx4090")
    sizes, disk = MemorySizes(20 * GIB, 30 * GIB, 40 * GIB), DiskRates(1e8, 2e8)
    small = adapt_preset(preset, sizes, 2, disk)
    assert small.memory == sizes and small.disk == disk
    assert small.device == preset.device and small.link == preset.link
    for ours, whole in zip(small.host.attention, preset.host.attention, strict=True):
        assert ours.bytes_per_s == whole.bytes_per_s / 4
    large = adapt_preset(preset, sizes, 64, None)
    assert large.host.attention == preset.host.attention and large.disk == preset.disk


def test_a_disks_rate_is_measured_where_there_is_room(tmp_path):
    found = measure_disk(tmp_path, 2**40)
    assert found is None or min(found.read_bytes_per_s, found.write_bytes_per_s) > 1e6
    assert measure_disk(tmp_path, 2**20) is None
    assert list(tmp_path.iterdir()) == []


def test_a_machine_knows_the_rates_of_its_gpus_preset_unless_it_was_calibrated(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = with_known_rates(machine(None), tmp_path)
    assert found.hardware.name == "rtx4090" and found.rates_source == ASSUMED
    assert found.hardware.memory == MemorySizes(23 * GIB, 64 * GIB, 1000 * GIB)
    other = with_known_rates(replace(machine(None), device_name="NVIDIA A10"), tmp_path)
    assert other.hardware is None
    calibrate.save(Hardware.preset("h100"), hardware_file())
    measured = with_known_rates(replace(machine(None), rates_source=CALIBRATED), tmp_path)
    assert measured.hardware.name == "h100" and measured.rates_source == CALIBRATED


def test_without_rates_the_reason_is_given_and_a_bound_on_latency_is_refused():
    here = [machine(None)]
    budgets = settle_budgets(here, {"gpu": None, "cpu": None, "disk": None}, 0)
    requests = [Request(0, [1] * 10, SamplingParams(max_tokens=4))]
    config, workload = shape_config("opt-125m"), Workload(1, 10, 14)
    problem = PlanningProblem(
        config, "float32", workload, here, budgets, requests, stages_disk=True
    )
    choice = choose_policy(problem)
    (note,) = choice.notes
    assert choice.origin is Origin.FILLED
    assert "here isn't calibrated, so memory is filled in order of speed" in note
    choice = choose_policy(problem, StagePolicies((Policy(),)))
    (note,) = choice.notes
    assert choice.origin is Origin.GIVEN
    assert "isn't calibrated" in note and "filled" not in note
    with pytest.raises(ValueError, match="--max-latency needs a plan"):
        choose_policy(replace(problem, max_seconds=1.0))
    known = [replace(here[0], hardware=Hardware.preset("t4-paper"))]
    (note,) = choose_policy(replace(problem, machines=known)).notes
    assert "but none for float32" in note


def test_a_policy_that_is_slower_than_the_bound_is_refused():
    slow = StagePolicies((Policy(gpu_batch_size=2, weights=Placement(0, 0, 1)),))
    with pytest.raises(ValueError, match="more than --max-latency 0.01; leave --policy out"):
        settled("opt-1.3b", 2, 8, slow, max_seconds=0.01)


def machine(hardware: Hardware | None, gpu: float = 23, cpu: float = 64) -> Machine:
    sizes = int(gpu * GIB), int(cpu * GIB), 1000 * GIB
    return Machine("here", "cuda", GEFORCE, *sizes, 16, True, hardware, "0", ASSUMED)


def settled(
    model: str, count: int, max_tokens: int, policies=None, max_seconds=None, known=True, **sizes
) -> PolicyChoice:
    hardware = adapt_preset(find_preset(GEFORCE), MemorySizes(GIB, GIB, GIB), 16, None)
    here = [machine(hardware if known else None, **sizes)]
    budgets = settle_budgets(here, {"gpu": None, "cpu": None, "disk": None}, 0)
    requests = [
        Request(i, [1] * 100, SamplingParams(max_tokens=max_tokens - i % 2)) for i in range(count)
    ]
    problem = PlanningProblem(
        shape_config(model),
        "float16",
        Workload(count, 100, 100 + max_tokens),
        here,
        budgets,
        requests,
        max_seconds=max_seconds,
        stages_disk=True,
    )
    return choose_policy(problem, policies)


def test_an_uncalibrated_gpu_with_a_preset_is_planned_and_told_that_rates_are_assumed():
    found = settled("opt-6.7b", 8, 32, gpu=6, cpu=30)
    assert found.origin is Origin.PLANNED and found.forecast and found.rates
    (line,) = found.notes
    assert "8 answers with at most 252 new tokens take about" in line
    assert "the first arrive after" in line
    assert f"rates assumed, those of preset rtx4090 for {GEFORCE}" in line
    assert "flexgen-ray calibrate" in line

    choice = settled("opt-6.7b", 8, 32, known=False, gpu=6, cpu=30)
    assert choice.origin is Origin.FILLED
    filled = choice.stages[0].policy
    by_filling = settled("opt-6.7b", 8, 32, StagePolicies((filled,)), gpu=6, cpu=30)
    assert by_filling.stages[0].policy.block_size == filled.block_size
    assert by_filling.origin is Origin.GIVEN and "8 answers" in by_filling.notes[0]
    assert found.forecast.tokens_per_s >= by_filling.forecast.tokens_per_s


def test_four_bits_are_suggested_where_they_are_much_faster():
    slow = settled("opt-66b", 4, 300)
    assert "suggestion: --weight-bits 4 --cache-bits 4" in slow.notes[-1]
    assert "lossy" in slow.notes[-1] and len(slow.notes) == 2
    fits = settled("opt-1.3b", 4, 300)
    assert len(fits.notes) == 1


def test_a_forecast_counts_the_whole_job():
    found = settled("opt-1.3b", 5, 32, StagePolicies((Policy(gpu_batch_size=2),)))
    plan = found.forecast
    requests = [Request(i, [1] * 100, SamplingParams(max_tokens=32)) for i in range(5)]
    forecast = Forecast.of(plan, requests)
    assert 2.5 * plan.block_seconds < forecast.seconds < 3.1 * plan.block_seconds
    assert forecast.first_answer_seconds <= plan.block_seconds
    requests[0] = Request(0, [1] * 100, SamplingParams(max_tokens=1))
    assert Forecast.of(plan, requests).first_answer_seconds < forecast.first_answer_seconds
