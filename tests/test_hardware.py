"""What is known of machines: files that people write and read, presets, rates between figures."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flexgen_ray.config import DTYPE_BYTES
from flexgen_ray.hardware.rates import AttentionRates, GemmRates, interpolate
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.paths import hardware_file

GIB = 2**30
PRESETS = Hardware.preset_names()

rates = st.floats(1e-6, 1e18)
tables = st.dictionaries(st.integers(1, 10**6), rates, min_size=1, max_size=8).map(
    lambda table: tuple(sorted(table.items()))
)
numbers = st.integers(1, 2 * 10**6)


def rewritten(tmp_path, **changes):
    """The H100's file with other values at top-level keys, or without those that are None."""
    values = yaml.safe_load(Hardware.preset("h100").to_yaml()) | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: it for key, it in values.items() if it is not None}))
    return path


def test_presets_are_those_that_the_readme_can_promise():
    documented = (Path(__file__).parents[1] / "docs" / "planning.md").read_text()
    (names,) = re.findall(r"with its source: (.*?)They are in", documented, re.DOTALL)
    assert set(re.findall(r"`(.+?)`", names)) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_complete(name):
    hardware = Hardware.preset(name)
    assert hardware.name == name and hardware.source and hardware.date
    assert hardware.network is not None
    assert hardware.host.joint_bytes_per_s <= hardware.host.read_bytes_per_s
    for entry in hardware.host.attention:
        assert entry.busy_bytes_per_s <= entry.bytes_per_s <= hardware.host.read_bytes_per_s
    # One row takes the time of reading the weights, or more.
    for gemm in hardware.device.gemm:
        weights = DTYPE_BYTES[gemm.dtype] / 2 * gemm.flops_per_s[0][1]
        assert gemm.flops_per_s[0][0] > 1 or weights <= hardware.device.memory_bytes_per_s
    dtypes = {gemm.dtype for gemm in hardware.device.gemm}
    assert "float16" in dtypes
    for dtype in dtypes:
        for group in (1, 3, 8, 16):
            spec = hardware.rates(dtype, group, 24, 2048)
            assert spec.device_decode_flops_per_s <= spec.device_flops_per_s


@pytest.mark.parametrize("name", PRESETS)
def test_a_machine_written_and_read_is_the_same(name, tmp_path):
    hardware = Hardware.preset(name)
    path = tmp_path / "copy.yaml"
    path.write_text(hardware.to_yaml())
    assert Hardware.load(path) == hardware


@given(table=tables, alone=rates, size=st.integers(1, 2**60))
def test_any_figure_survives_its_file(table, alone, size, tmp_path):
    hardware = Hardware.preset("t4")
    gemm = GemmRates("float32", table)
    entry = AttentionRates("numba", "float32", 1, alone, alone)
    hardware = dataclasses.replace(
        hardware,
        memory=dataclasses.replace(hardware.memory, disk=size),
        host=dataclasses.replace(hardware.host, attention=(entry,)),
        device=dataclasses.replace(hardware.device, gemm=(gemm,), launch_seconds=alone),
        notes="line: one\nline # two",
        versions={"torch": "2.10"},
    )
    path = tmp_path / "any.yaml"
    path.write_text(hardware.to_yaml())
    assert Hardware.from_yaml(path) == hardware


@given(table=tables, number=numbers)
def test_a_rate_lies_between_its_neighbours(table, number):
    rate = interpolate(table, number)
    below = [it for at, it in table if at <= number][-1:] or [table[0][1]]
    above = [it for at, it in table if at >= number][:1] or [table[-1][1]]
    assert min(below + above) <= rate <= max(below + above)
    assert dict(table).get(number, rate) == rate


@given(table=tables, first=numbers, second=numbers)
def test_more_rows_never_lower_the_rate_of_a_monotone_table(table, first, second):
    numbers, values = zip(*table, strict=True)
    rising = tuple(zip(numbers, sorted(values), strict=True))
    low, high = sorted((first, second))
    assert interpolate(rising, low) <= interpolate(rising, high) * (1 + 1e-9)


def test_a_power_law_is_met_between_its_points():
    assert interpolate([(1, 2.0), (64, 128.0)], 16) == pytest.approx(32.0)


def test_the_paper_s_machine_has_the_original_s_own_constants():
    hardware = Hardware.preset("t4-paper")
    spec = hardware.rates("float16", 1, 48, 1024)
    assert spec.h2d_bytes_per_s == pytest.approx(12.89 * GIB)
    assert spec.d2h_bytes_per_s == pytest.approx(0.97 * GIB)
    assert spec.disk_read_bytes_per_s == pytest.approx(0.473 * GIB)
    assert spec.disk_write_bytes_per_s == pytest.approx(0.746 * GIB)
    assert spec.device_flops_per_s == 21.24e12
    assert spec.device_decode_flops_per_s == 4.3e12
    assert spec.host_attention_bytes_per_s == 0.0123e12  # a flop a byte in float16
    assert hardware.device.attention_bytes_per_s == 0.079e12
    memory = hardware.memory
    assert (memory.gpu, memory.cpu, memory.disk) == (15 * GIB, 204 * GIB, 1500 * GIB)
    assert hardware.budget.gpu == 12 * GIB  # used to 80 %


def test_the_best_kernel_is_chosen_for_each_shape():
    hardware = Hardware.preset("h100")
    assert hardware.attention("float16", 1).kernel == "numba"
    assert hardware.attention("float16", 8).kernel == "sdpa"
    busy = hardware.attention("float16", 3)
    assert busy.busy_bytes_per_s < busy.bytes_per_s


def test_people_write_rates_as_they_like(tmp_path):
    disk = {"read_bytes_per_s": "2.5GB", "write_bytes_per_s": 1_000_000_000}
    hardware = Hardware.load(rewritten(tmp_path, disk=disk))
    assert hardware.disk.read_bytes_per_s == 2.5e9 and hardware.disk.write_bytes_per_s == 1e9


BAD = [
    ({"colour": "green"}, "unknown key 'colour'; known are name"),
    ({"disk": None}, "disk is missing"),
    ({"disk": "fast"}, "disk is 'fast'; it must hold keys and values"),
    ({"disk": {"read_bytes_per_s": 1}}, "disk: write_bytes_per_s is missing"),
    ({"disk": {"read_bytes_per_s": "quick", "write_bytes_per_s": 1}}, "read_bytes_per_s: 'quick'"),
    ({"disk": {"read_bytes_per_s": -1.0, "write_bytes_per_s": 1}}, "disk: read_bytes_per_s is -1"),
    ({"disk": {"read_bytes_per_s": True, "write_bytes_per_s": 1}}, "read_bytes_per_s is True"),
    ({"memory": {"gpu": "16GiB", "cpu": 0, "disk": 1}}, "memory: cpu is 0"),
    ({"memory": {"gpu": "16GiB", "cpu": 1.5, "disk": 1}}, "memory: cpu is 1.5; it must be an int"),
    ({"memory": {"gpu": 1, "cpu": 1, "disk": 1, "share": 2}}, "share is 2"),
    ({"host": {"read_bytes_per_s": 1, "joint_bytes_per_s": 1, "attention": {}}}, "must be a list"),
    ({"host": {"read_bytes_per_s": 1, "joint_bytes_per_s": 1, "attention": []}}, "is empty"),
    ({"name": 4}, "name is 4; it must be of type str"),
    ({"versions": ["torch"]}, "versions is ['torch']"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_a_bad_value_is_refused_by_its_file_and_name(tmp_path, changes, message):
    path = rewritten(tmp_path, **changes)
    with pytest.raises(ValueError) as refused:
        Hardware.load(path)
    assert str(path) in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize(
    "gemm, message",
    [
        ({"dtype": "int3", "flops_per_s": {1: 1.0}}, "gemm: 1: dtype is 'int3'"),
        ({"dtype": "float16", "flops_per_s": {0: 1.0, 2: 1.0}}, "from 1 up"),
        ({"dtype": "float16", "flops_per_s": {}}, "rising"),
        ({"dtype": "float16", "flops_per_s": {"few": 1.0}}, "write e.g. {16: 40e12"),
        ({"dtype": "float16", "flops_per_s": {1: 0.0}}, "flops_per_s: 1 is 0.0"),
        ({"dtype": "float16", "flops_per_s": {1: "fast"}}, "flops_per_s: 1 is 'fast'"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, gemm, message):
    device = yaml.safe_load(Hardware.preset("h100").to_yaml())["device"] | {"gemm": [gemm]}
    with pytest.raises(ValueError) as refused:
        Hardware.load(rewritten(tmp_path, device=device))
    assert message in str(refused.value)


def test_a_case_that_is_there_twice_is_refused(tmp_path):
    host = yaml.safe_load(Hardware.preset("h100").to_yaml())["host"]
    host["attention"].append(host["attention"][0])
    with pytest.raises(ValueError, match="twice"):
        Hardware.load(rewritten(tmp_path, host=host))


def test_unknown_names_are_answered_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="t4-paper"):
        Hardware.preset("p100")
    with pytest.raises(FileNotFoundError, match="presets are a100-80, a10g"):
        Hardware.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="bfloat16, only for float16"):
        Hardware.preset("t4-paper").rates("bfloat16", 1, 1, 1)
    with pytest.raises(ValueError, match="products in bfloat16"):
        Hardware.preset("t4").gemm_flops_per_s("bfloat16", 1)


def test_what_is_no_yaml_is_refused_with_its_path(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("name: [")
    with pytest.raises(ValueError, match="broken.yaml"):
        Hardware.load(path)


def test_the_local_machine_is_the_one_that_was_calibrated(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Hardware.local() is None
    with pytest.raises(FileNotFoundError, match="flexgen-ray calibrate"):
        Hardware.load("local")
    hardware_file().parent.mkdir(parents=True)
    hardware_file().write_text(Hardware.preset("cpu").to_yaml())
    assert Hardware.local() == Hardware.load("local") == Hardware.preset("cpu")
