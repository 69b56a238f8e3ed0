"""Files that a Ray job would lose are refused, by the option that names them, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_ray.cli.app import refuse_deleted_folders

JOB = ("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
PACKAGE = "/tmp/ray/session_2026-01-01_00-00-00_1_2/runtime_resources/working_dir_files/_ray_pkg_1"


@pytest.mark.parametrize("option", ["--output", "--report", "--trace"])
def test_a_relative_path_in_a_job_is_refused_with_the_place_and_the_remedy(
    run_here, monkeypatch, tmp_path, text_model, option
):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(*JOB)
    paths = {"--output": str(tmp_path / "out.jsonl"), option: "lost.jsonl"}
    given = [part for pair in paths.items() for part in pair]
    done = run_here("generate", "--model", text_model, "--input", tmp_path / "in.jsonl", *given)
    assert done.returncode == 1
    assert f"{option} lost.jsonl would be {tmp_path}/lost.jsonl on node " in done.stderr
    assert "give an absolute path" in done.stderr
    assert sorted(it.name for it in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_packed_model_would_be_lost_as_well(run_here, monkeypatch, tmp_path, text_model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(*JOB)
    done = run_here("quantize", "--model", text_model, "--output", "packed")
    assert done.returncode == 1 and f"would be {tmp_path}/packed on node " in done.stderr


@pytest.mark.parametrize("environment", [{}, dict([JOB])])
def test_a_path_in_a_package_of_ray_is_refused_anywhere(environment, tmp_path):
    with pytest.raises(ValueError, match="Ray deletes after the job"):
        refuse_deleted_folders({"--output": Path(PACKAGE, "out.jsonl")}, environment)
    link = tmp_path / "out.jsonl"
    link.symlink_to(Path(PACKAGE, "out.jsonl"))
    with pytest.raises(ValueError, match="Ray deletes after the job"):
        refuse_deleted_folders({"--output": link}, environment)


@pytest.mark.parametrize("path", ["/data/out.jsonl", "-", "/dev/null"])
def test_what_stays_is_no_concern_in_a_job(path):
    refuse_deleted_folders({"--output": Path(path)}, dict([JOB]))


def test_a_relative_path_outside_of_jobs_is_no_concern():
    refuse_deleted_folders({"--output": Path("out.jsonl")}, {"RAY_ADDRESS": "auto"})
