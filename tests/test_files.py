"""A command never writes a file that it reads or writes already, and replaces files as a whole."""

from __future__ import annotations

import os
import stat
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest
import typer
from job_files import arguments, commands

from flexgen_ray.cli.app import writes_file
from flexgen_ray.cli.main import app
from flexgen_ray.files.output_files import atomic_write, check_distinct, write_text

READ = {"input", "policy", "data", "lengths", "workload", "nodes", "prompts", "model"}
PLACES = {"offload_dir"}


def test_each_option_that_is_a_path_is_known_to_be_read_or_written():
    """One that is written without being declared so would not be checked."""
    for name, command in dict(commands(typer.main.get_command(app), "flexgen-ray")).items():
        for parameter in signature(command.callback, eval_str=True).parameters.values():
            if parameter.annotation is Path or Path in get_args(get_args(parameter.annotation)[0]):
                is_new_folder = name == "flexgen-ray quantize" and parameter.name == "output"
                is_read = parameter.name in READ | PLACES or is_new_folder
                assert writes_file(parameter) != is_read, f"{name} {parameter.name}"


def leads_to(target: Path, how: str, link: Path) -> Path:
    """Another way to the same file."""
    if how == "itself":
        return target
    if how == "relative":
        return Path(os.path.relpath(target))
    if how == "symlink":
        link.symlink_to(target)
    elif how == "hard link":
        link.hardlink_to(target)
    return link


HOW = ("itself", "relative", "symlink", "hard link")


@pytest.mark.parametrize(
    ("option", "victim", "how"),
    [("--report", "out.jsonl", how) for how in HOW]
    + [("--trace", "in.jsonl", "symlink"), ("--trace", "policy.yaml", "hard link")]
    + [
        ("--report", f"out.jsonl.{kind}", "relative") for kind in ("job.json", "job.tmp", "waiting")
    ],
)
def test_no_output_may_be_another_file_of_the_job(
    run_here,
    files,
    text_model,
    option,
    victim,
    how,
):
    target = files / victim
    if not target.exists():
        target.write_text("precious\n")
    before = target.read_bytes()
    path = leads_to(target, how, files / "link")
    done = run_here(*arguments(files, text_model, "--no-use-ray", "--overwrite", option, path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert option in done.stderr and ("both write" in done.stderr or "overwrite" in done.stderr)
    assert target.read_bytes() == before


@pytest.mark.parametrize("how", HOW[:3])
def test_files_that_do_not_exist_yet_are_distinguished_too(tmp_path, how):
    target = tmp_path / "new"
    other = leads_to(target, how, tmp_path / "link")
    with pytest.raises(ValueError, match="--report and --trace both write"):
        check_distinct({"--report": target, "--trace": other}, {})
    check_distinct({"--report": target, "--trace": tmp_path / "third"}, {})
    check_distinct({"--report": Path("/dev/null"), "--trace": Path("/dev/null")}, {})


def test_no_output_may_replace_a_file_of_the_model(text_model, tmp_path):
    with pytest.raises(ValueError, match="would overwrite what --model reads"):
        check_distinct({"--json": text_model / "config.json"}, {"--model": text_model})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["plan", "--model", "opt-30b", "--policy-out", "a", "--frontier", "a"], "both write"),
        (["plan", "--model", "m", "--workload", "w", "--json", "w"], "would overwrite"),
        (["plan", "--model", "m", "--hardware", "w", "--policy-out", "w"], "would overwrite"),
        (["eval", "perplexity", "--model", "m", "--data", "w", "--json", "w"], "would overwrite"),
        (["eval", "cloze", "--model", "m", "--data", "w", "--policy", "w"], "no folder m"),
        (["bench", "throughput", "--model", "m", "--trace", "a", "--json", "a"], "both write"),
        (["bench", "throughput", "--model", "m", "--json", "no/a"], "no does not exist"),
        (["quantize", "--model", "m", "--output", "w", "--json", "w"], "would overwrite"),
        (["calibrate", "--output", "."], "Is a directory"),
    ],
)
def test_every_command_refuses_bad_outputs_before_any_work(
    run_here, tmp_path, monkeypatch, options, complaint
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").write_text("precious")
    done = run_here(*options)
    assert done.returncode == 1 and complaint in done.stderr, done.stderr
    assert [it.name for it in tmp_path.iterdir()] == ["w"]
    assert (tmp_path / "w").read_text() == "precious"


def test_a_standard_stream_is_compared_as_the_file_behind_it(
    run_here, files, text_model, monkeypatch
):
    """As where a shell sent standard output into the report's file."""
    (files / "both").write_text("")
    kept = os.dup(1)
    with (files / "both").open("a") as file:
        os.dup2(file.fileno(), 1)
        try:
            with pytest.raises(ValueError, match="both write"):
                check_distinct({"--output": Path("-"), "--report": files / "both"}, {})
        finally:
            os.dup2(kept, 1)
            os.close(kept)


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, before):
    path = tmp_path / "report.json"
    if before is not None:
        path.write_text(before)
        path.chmod(0o640)
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        file.flush()
        raise RuntimeError
    assert (path.read_text() if path.exists() else None) == before
    link = tmp_path / "link"
    link.symlink_to(path)
    write_text(link, "whole")
    assert path.read_text() == "whole" and link.is_symlink()
    assert {it.name for it in tmp_path.iterdir()} == {"report.json", "link"}
    mask = os.umask(0)
    os.umask(mask)
    wanted = 0o666 & ~mask if before is None else 0o640
    assert stat.S_IMODE(path.stat().st_mode) == wanted
