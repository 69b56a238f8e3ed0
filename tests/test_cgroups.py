"""Memory and cores are those that the nearest limit leaves, the machine's or a container's."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from flexgen_ray.cli.bench.memory_cgroup import MemoryCgroup
from flexgen_ray.hardware.host import free_memory, usable_cores

MIB = 2**20


def version_2(folder, limit: int | str, usage: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)


def version_1(folder, limit: int, usage: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)


def free(tmp_path, *lines: str) -> int:
    (tmp_path / "membership").write_text("".join(f"{line}\n" for line in lines))
    return free_memory(tmp_path / "root", tmp_path / "membership")


STAT = f"anon {5 * MIB}\ninactive_file {20 * MIB}\nactive_file {10 * MIB}\nshmem {7 * MIB}\n"


def test_version_2_leaves_its_limit_less_what_is_no_page_cache(tmp_path):
    version_2(tmp_path / "root/job", 100 * MIB, 50 * MIB, STAT)
    assert free(tmp_path, "0::/job") == 80 * MIB


def test_version_1_leaves_its_limit_less_what_is_no_page_cache(tmp_path):
    stat = f"inactive_file 1\ntotal_inactive_file {20 * MIB}\ntotal_active_file {10 * MIB}\n"
    version_1(tmp_path / "root/memory/job", 100 * MIB, 50 * MIB, stat)
    assert free(tmp_path, "4:memory:/job", "2:cpu:/job") == 80 * MIB


def test_an_enclosing_limit_counts(tmp_path):
    version_2(tmp_path / "root/pod", 60 * MIB, 50 * MIB, STAT)
    version_2(tmp_path / "root/pod/job", "max", 10 * MIB, STAT)
    assert free(tmp_path, "0::/pod/job") == 40 * MIB


def test_the_nearer_of_both_versions_counts(tmp_path):
    version_1(tmp_path / "root/memory", 70 * MIB, 10 * MIB, "total_inactive_file 0\n")
    version_2(tmp_path / "root/unified", 50 * MIB, 10 * MIB, "inactive_file 0\n")
    assert free(tmp_path, "3:cpu,memory:/", "0::/") == 40 * MIB


def test_a_path_of_the_host_is_the_container_s_root(tmp_path):
    """Docker with version 1 mounts a container's own cgroup, but names it by the host's path."""
    version_1(tmp_path / "root/memory", 70 * MIB, 10 * MIB, "")
    assert free(tmp_path, "4:memory:/docker/0123") == 60 * MIB


def test_a_cgroup_beyond_its_limit_leaves_nothing(tmp_path):
    version_2(tmp_path / "root", 10 * MIB, 50 * MIB, "")
    assert free(tmp_path, "0::/") == 0


@pytest.mark.parametrize("most", ["max", str(2**63 - 4096)])
def test_without_a_limit_the_machine_s_memory_counts(tmp_path, most):
    version_2(tmp_path / "root", most, 0, "")
    assert abs(free(tmp_path, "0::/") - psutil.virtual_memory().available) < 2**30


def test_a_process_in_a_cgroup_finds_its_limit():
    code = "from flexgen_ray.hardware.host import free_memory; print(free_memory())"
    try:
        with MemoryCgroup(900 * MIB) as cgroup:
            command = cgroup.wrap([sys.executable, "-c", code])
            done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    assert 500 * MIB < int(done.stdout) <= 900 * MIB


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "lines", "cores"),
    [
        ({"pod/cpu.max": "100000 100000\n"}, ["0::/pod/job"], 1),
        ({"pod/job/cpu.max": "20000 100000\n"}, ["0::/pod/job"], 1),
        ({"pod/cpu.max": "100000 100000", "pod/job/cpu.max": "max 100000"}, ["0::/pod/job"], 1),
        ({"cpu.max": "max 100000\n"}, ["0::/"], CORES),
        ({"cpu.max": f"{CORES * 100000 + 1} 100000\n"}, ["0::/"], CORES),
        (
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "50000"},
            ["5:cpu,cpuacct:/a"],
            1,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1"}, ["5:cpu:/docker/1"], CORES),
        ({}, ["0::/", "1:cpuset:/"], CORES),
    ],
)
def test_cores_are_those_of_the_nearest_quota(tmp_path, files, lines, cores):
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    (tmp_path / "membership").write_text("".join(f"{line}\n" for line in lines))
    assert usable_cores(tmp_path / "root", tmp_path / "membership") == cores
