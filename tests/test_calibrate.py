"""A calibration measures everything, writes what the planner reads, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import time
from importlib.metadata import PackageNotFoundError
from math import inf, isfinite

import pytest
import torch
from typer.testing import CliRunner

import flexgen_ray
from flexgen_ray.calibration import calibrate
from flexgen_ray.calibration import rates as calibration
from flexgen_ray.calibration.issuing import issue_seconds
from flexgen_ray.calibration.steady import Measurer, Unsteady
from flexgen_ray.cli.main import app
from flexgen_ray.config import HardwareSpec
from flexgen_ray.hardware.measure import Bench
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.paths import hardware_file
from flexgen_ray.runtime.lanes import Cores
from flexgen_ray.runtime.worker import Machine

CPU = torch.device("cpu")
ONE = Cores(1, 1, 1)


def all_numbers(value):
    if dataclasses.is_dataclass(value):
        value = dataclasses.astuple(value)
    if isinstance(value, tuple):
        return [number for it in value for number in all_numbers(it)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_a_quick_calibration_writes_a_file_that_the_planner_can_load(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hardware_file().parent.mkdir(parents=True)
    hardware_file().write_text("what another version: wrote\n")
    offload = tmp_path / "offload"
    command = [
        "calibrate",
        "--quick",
        "--no-use-ray",
        "--device",
        "cpu",
        "--offload-dir",
        str(offload),
    ]
    done = CliRunner().invoke(app, [*command, "--gpu-memory", "64MiB"], catch_exceptions=False)
    assert done.exit_code == 0
    assert list(offload.iterdir()) == []
    hardware = Hardware.load("local")
    assert hardware == Hardware.from_yaml(hardware_file())
    numbers = all_numbers(hardware)
    assert numbers and all(isfinite(number) and number > 0 for number in numbers)
    assert hardware.device.is_cpu and hardware.memory.gpu == 64 * 2**20
    assert hardware.network is None and "--no-use-ray" in hardware.notes
    assert dict(hardware.core_shares)["device"] == 1
    assert not Hardware.preset("t4").core_shares
    for dtype in ("float32", "float16", "bfloat16"):
        for group in calibration.EVERYTHING.queries_per_kv_head:
            assert isinstance(hardware.rates(dtype, group, 8, 512), HardwareSpec)
    kernels = {it.kernel for it in hardware.host.attention}
    assert kernels == {"sdpa", "numba"} and len(hardware.host.attention) == 30


def test_only_the_dtypes_that_are_asked_for_are_measured(tmp_path, monkeypatch):
    """In a checkout that was never installed, too."""

    def no_metadata(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("flexgen_ray.version", no_metadata)
    path = tmp_path / "some.yaml"
    command = (
        f"calibrate --quick --no-use-ray --device cpu --dtypes float16,int4 --max-seconds 60 "
        f"--gpu-memory 64MiB --offload-dir {tmp_path / 'offload'} --output {path}"
    )
    done = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert done.exit_code == 0
    hardware = Hardware.load(path)
    assert {it.dtype for it in hardware.host.attention} == {"float16", "int4"}
    assert [it.dtype for it in hardware.device.gemm] == ["float16"]
    assert hardware.has_rates_for("float16") and not hardware.has_rates_for("float32")
    assert isinstance(hardware.rates("float16", 4, 8, 512, cache_bits=4), HardwareSpec)
    assert dict(hardware.versions)["flexgen-ray"] == flexgen_ray.__version__
    assert dict(hardware.versions)["torch"] == "unknown"


@pytest.mark.parametrize(
    "dtypes, said", [("float16,int5", "'int5'; each must be"), ("int4", "add the dtype")]
)
def test_dtypes_that_make_no_plan_are_refused(dtypes, said):
    with pytest.raises(ValueError, match=said):
        calibrate.parse_dtypes(dtypes)


def test_the_output_goes_where_it_is_asked_to(tmp_path, monkeypatch):
    known = Hardware.preset("cpu")
    monkeypatch.setattr(calibrate, "calibrate", lambda *_: known)
    path = tmp_path / "machines" / "mine.yaml"
    done = CliRunner().invoke(app, ["calibrate", "--output", str(path)], catch_exceptions=False)
    assert done.exit_code == 0 and Hardware.load(path) == known
    assert "matrix products" in done.stdout and "numba" in done.stdout


def test_each_measurement_is_announced_once(tmp_path):
    announced: list[str] = []
    take = Measurer(announced.append, 1)
    found = calibration.measure_machine(CPU, ONE, tmp_path, calibration.QUICK, take)
    link, host = found.link, found.host
    assert link.h2d_busy_bytes_per_s <= link.h2d_bytes_per_s
    assert link.d2h_busy_bytes_per_s <= link.d2h_bytes_per_s
    assert host.joint_bytes_per_s <= host.read_bytes_per_s
    assert all(it.busy_bytes_per_s <= it.bytes_per_s for it in host.attention)
    assert len(announced) == len(set(announced)) == calibration.count_measurements(CPU)


def test_a_calibration_that_fails_leaves_no_file_and_torch_as_it_was(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk has gone")

    threads = torch.get_num_threads()
    monkeypatch.setattr("flexgen_ray.store.disk.Region.read_into", fail)
    with pytest.raises(OSError, match="gone"):
        calibration.measure_machine(CPU, ONE, tmp_path, calibration.QUICK, Measurer(str, 1))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(calibration, "_host", fail)
    with pytest.raises(OSError, match="gone"):
        calibration.measure_machine(CPU, ONE, tmp_path, calibration.QUICK, Measurer(str, 1))
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads


def test_what_runs_together_is_counted_each_for_itself():
    counts = [0, 0]

    def count(index):
        counts[index] += 1

    with Bench(CPU, 2**20, 0.01) as bench:
        rates = bench.measure_together((1, lambda: count(0)), (10, lambda: count(1)))
        assert all(rate > 0 for rate in rates) and min(counts) >= 2
        with pytest.raises(ZeroDivisionError):
            bench.measure_together((1, lambda: count(0)), (1, lambda: 1 // 0))


@pytest.mark.parametrize("device, least", [("cpu", 1), ("cuda", 2)])
def test_first_runs_count_for_nothing(monkeypatch, device, least):
    """A device loads code when it is first asked, and a GPU's clock rises only under load."""
    monkeypatch.setattr("flexgen_ray.hardware.measure._wait", lambda device: None)
    calls = []

    def slow_at_first():
        calls.append(time.perf_counter())
        time.sleep(0.03 if len(calls) == 1 else 0.001)

    with Bench(CPU, 2**20, 0.04) as bench:
        bench._warm_up(slow_at_first, torch.device(device))
        assert len(calls) >= least
        calls.clear()
        assert bench.rate(1, slow_at_first, torch.device(device)) > 1 / 0.03


def test_a_copy_moves_every_piece_of_the_buffer():
    with Bench(CPU, 3 * 2**20, 0.001) as bench:
        bench.host.copy_(torch.arange(bench.nbytes) % 251)
        nbytes, copy = bench.copier(to_device=True)
        for _ in range(-(-bench.nbytes // nbytes)):
            copy()
        assert torch.equal(bench.on_device, bench.host)


def test_memory_sizes_are_what_is_free_or_what_is_asked_for():
    def machine(device, gpu):
        return Machine("here", device, "X", gpu * 2**30, 64 * 2**30, 2**40, 4, True)

    on_gpu = calibrate.memory_sizes(machine("cuda", 16), None)
    assert (on_gpu.gpu, on_gpu.cpu) == (16 * 2**30, 64 * 2**30)
    on_cpu = calibrate.memory_sizes(machine("cpu", 64), 24 * 2**30)
    assert (on_cpu.gpu, on_cpu.cpu) == (24 * 2**30, 40 * 2**30)
    with pytest.raises(ValueError, match="more than the 16.0 GiB free on here"):
        calibrate.memory_sizes(machine("cuda", 16), 17 * 2**30)


def test_hops_are_measured_between_two_actors(local_ray, monkeypatch):
    trips = {calibrate._SMALL_HOP: 3, calibrate._LARGE_HOP: 1}
    monkeypatch.setattr(calibrate, "_TRIPS", trips)
    announced: list[str] = []
    network = calibrate._network(announced.append)
    assert network.hop_seconds > 0 and network.bytes_per_s > 0 and len(announced) == 1


@dataclasses.dataclass
class Load:
    """Stands for what other processes do."""

    cores: float


def measurer(*loads: float) -> Measurer:
    """Five measurements of a thing at most, on four cores. loads: of others, in turn."""
    left = list(loads) or [0.0]
    return Measurer(str, 5, lambda: Load(left.pop(0) if len(left) > 1 else left[0]), 4)


def one_by_one(*figures: float):
    left = list(figures)
    return lambda: [left.pop(0)]


def test_a_measurement_is_repeated_until_two_differ_by_a_tenth_at_most():
    take = measurer()
    assert take("read", one_by_one(1.05, 37.0, 39.0, 99.0)) == (38.0,)
    assert take("pairs", one_by_one(1.0, 1.05)) == (1.025,)
    assert take("shares", one_by_one(0.02, 0.09), slack=0.1) == (0.055,)
    assert take.notes == []


def test_what_never_settles_is_the_median_and_noted():
    take = measurer()
    assert take("read", one_by_one(1.0, 2.0, 8.0, 4.0, 16.0)) == (4.0,)
    assert take.notes == ["read: 5 measurements differed by more than a tenth."]


def test_once_the_time_is_up_each_thing_is_measured_once():
    """Also the one under way, however its figures differ; a single note says so."""
    take, left = measurer(), [1.0, 2.0, 4.0]

    def slow():
        take.deadline = 0.0 if len(left) == 2 else inf
        return [left.pop(0)]

    assert take("read", slow) == (2.0,) and left == [4.0]
    take.deadline = 0.0
    assert take("write", one_by_one(9.0, 5.0)) == (9.0,)
    assert take.check_part(2.0, 1.0, "{} of {}") == 1.0
    assert take.notes == ["From read on, each was measured once, because the time was up."]
    effort = calibration.THOROUGH.within(30, 60)
    assert effort.seconds * 60 * 2 < 30 and effort.cache == calibration.THOROUGH.cache


def test_a_measurement_beside_which_others_worked_does_not_count():
    take = measurer(3.0, 0.1, 2.0, 0.0)
    assert take("read", one_by_one(1.0, 10.0, 1.0, 10.0)) == (10.0,)
    with pytest.raises(Unsteady, match="other processes kept 1.5 of 4 cores busy .* of read; end"):
        measurer(1.5)("read", one_by_one(*[1.0] * 10))


def test_a_part_that_exceeds_its_whole_is_refused_with_the_figures():
    take, what = measurer(), "host memory gave {} GB/s together, and {} to a plain read"
    with pytest.raises(Unsteady, match="gave 37.9 GB/s together, and 1.05 .* calibrate again"):
        take.check_part(37.9e9, 1.05e9, what)
    assert take.check_part(1.05e9, 1e9, what) == 1e9 and take.check_part(5e8, 1e9, what) == 5e8
    assert Measurer(str, 1).check_part(37.9e9, 1e9, what) == 1e9


def test_issuing_an_op_takes_microseconds():
    """On a CPU, whose lanes have threads of their own; a GPU's have one, and events."""
    assert 1e-7 < issue_seconds(torch.device("cpu")) < 1e-2
