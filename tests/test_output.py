"""An output that others touch is noticed, error rows are answered again, another model is refused:
whatever happens to a job's files, no answer is lost in silence."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from job_files import (
    FACTS,
    IDS,
    arguments,
    file_names,
    fresh_folder,
    journal_row,
    read_rows,
    rows_by_id,
)
from safetensors.torch import load_file, save_file

from flexgen_ray.batch.job import fingerprint
from flexgen_ray.batch.journal import MODEL_FILES, Journal
from flexgen_ray.batch.response_lines import error_message, error_row
from flexgen_ray.files.jsonl_file import OutputLost

DAMAGES = {
    "was removed": lambda path: path.unlink(),
    "was moved to": lambda path: path.rename(path.with_name("elsewhere")),
    "has 0 bytes": lambda path: os.truncate(path, 0),
    "truncated or wrote it": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "removed or replaced": lambda path: (path.unlink(), path.write_text("")),
}


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize("words", DAMAGES)
def test_an_output_that_others_touch_is_noticed(tmp_path, words, name, at_the_end):
    path = tmp_path / name
    with pytest.raises(OutputLost, match=f"{name}.* {words}"), Journal(path) as journal:
        journal.check(FACTS, IDS)
        journal.begin()
        journal.append(journal_row(IDS[0]))
        DAMAGES[words](path)
        if at_the_end:
            journal.confirm()
        else:
            journal.append(journal_row(IDS[1]))


@pytest.mark.parametrize("words", DAMAGES)
def test_an_output_that_others_touch_while_the_model_loads_is_noticed(tmp_path, words):
    path = tmp_path / "out.jsonl"
    with pytest.raises(OutputLost), Journal(path) as journal:
        journal.check(FACTS, IDS)
        DAMAGES["removed or replaced"](path)
        journal.begin()
    assert path.exists()  # another's file is left alone


def test_a_file_of_waiting_rows_that_others_touch_is_noticed(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(OutputLost, match="waiting"), Journal(path, keep_order=True) as journal:
        journal.check(FACTS, IDS)
        journal.begin()
        journal.append(journal_row(IDS[3]))
        (tmp_path / "out.jsonl.waiting").unlink()
        journal.append(journal_row(IDS[2]))


def test_a_command_whose_output_others_touch_ends_with_an_error_and_no_false_promise(
    run_here,
    files,
    text_model,
    monkeypatch,
):
    append = Journal.append

    def removing(journal: Journal, written: dict) -> None:
        append(journal, written)
        journal.path.unlink(missing_ok=True)

    monkeypatch.setattr(Journal, "append", removing)
    done = run_here(*arguments(files, text_model, "--no-use-ray"))
    assert done.returncode == 1 and "out.jsonl was removed" in done.stderr, done.stderr
    assert "the same command" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder"])
@pytest.mark.parametrize("beside", ["job.json", "job.tmp", "waiting"])
def test_a_special_file_in_the_place_of_a_job_s_file_is_refused(tmp_path, beside, kind):
    place, victim = tmp_path / f"out.jsonl.{beside}", tmp_path / "victim"
    victim.write_text("precious")
    if kind == "symlink":
        place.symlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(ValueError, match=f"{beside} is a symlink or not a regular file"):
        Journal(tmp_path / "out.jsonl", keep_order=True)
    assert victim.read_text() == "precious" and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("keep_order", [False, True])
def test_a_file_system_without_locks_is_named_and_nothing_is_left(
    tmp_path, monkeypatch, keep_order
):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match=r"out.jsonl can't be locked .* local disk"):
        Journal(tmp_path / "out.jsonl", keep_order=keep_order)
    assert file_names(tmp_path) == set()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"begun_at": 5}', '{"begun_at": "noon"}'])
def test_a_damaged_job_file_is_named(tmp_path, content):
    job(tmp_path, FACTS)
    before = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl.job.json").write_text(content)
    with pytest.raises(ValueError, match="out.jsonl.job.json is damaged .*--overwrite"):
        job(tmp_path, FACTS)
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", [{"response": "x"}, {"response": []}, {"error": "y"}])
def test_a_row_that_is_no_response_is_named(tmp_path, damage):
    job(tmp_path, FACTS)
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write(json.dumps({"custom_id": "a"} | damage) + "\n")
    with pytest.raises(ValueError, match="something other than a response at byte"):
        job(tmp_path, FACTS)


def run(path, is_bad, keep_order=False, retry=False) -> list[str]:
    """A run in which some lines get an error row; returns those that it had to answer."""
    with Journal(path, keep_order=keep_order, retry_errors=retry) as journal:
        journal.check(FACTS, IDS)
        missing = [it for it in IDS if it not in journal.answered]
        journal.begin()
        for custom_id in missing[::-1]:
            bad = error_row(custom_id, "no luck")
            journal.append(bad if custom_id in is_bad else journal_row(custom_id))
    return missing


def killed_at(step: int, *arguments) -> None:
    """A run whose process is gone before this step of all that change a file."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return
    left = step

    def dying(real):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(0)
            return real(*arguments, **options)

        return call

    for name in ("write", "ftruncate", "replace", "rename", "unlink", "fsync"):
        setattr(os, name, dying(getattr(os, name)))
    try:
        run(*arguments)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@settings(max_examples=20)
@given(
    bad=st.sets(st.sampled_from(IDS), min_size=1),
    still_bad=st.sets(st.sampled_from(IDS), max_size=2),
    keep_order=st.booleans(),
    kills=st.lists(st.tuples(st.integers(0, 14), st.booleans()), max_size=3),
)
def test_error_rows_are_replaced_however_often_the_retry_is_killed(
    tmp_path, name, bad, still_bad, keep_order, kills
):
    path = fresh_folder(tmp_path) / name
    run(path, bad, keep_order)
    good = {it["custom_id"]: it for it in read_rows(path) if error_message(it) is None}
    for step, retry in kills:
        killed_at(step, path, still_bad, keep_order, retry)
        left = {it["custom_id"]: it for it in read_whole(path)}
        assert len(left) == len(read_whole(path))
        for beside in path.parent.glob("*.waiting"):
            text = beside.read_text().split("\n")[:-1]
            left |= {it["custom_id"]: it for it in map(json.loads, text)}
        assert good.items() <= left.items(), "an answer was lost"
    run(path, still_bad, keep_order, retry=True)
    found = read_rows(path)
    in_order = sorted(found, key=lambda it: it["custom_id"])
    assert [it["custom_id"] for it in in_order] == IDS
    assert in_order == found or not keep_order
    for it in found:
        custom_id = it["custom_id"]
        is_bad = error_message(it) is not None
        assert is_bad == (custom_id in still_bad and custom_id in bad)
        assert is_bad or it == journal_row(custom_id)
    assert file_names(path.parent) == {name, f"{name}.job.json"}
    again = run(path, still_bad, keep_order)
    assert again == [] and read_rows(path) == found


def read_whole(path) -> list[dict]:
    """The rows that have their end."""
    with Journal(path) as journal:
        return [it for _, _, it in journal._file.rows()]


def test_error_rows_stay_without_retry_errors(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, {"id-2"})
    assert run(path, set()) == []
    assert run(path, set(), retry=True) == ["id-2"]


def job(folder, facts: dict, retry: bool = False) -> Journal:
    with Journal(folder / "out.jsonl", retry_errors=retry) as journal:
        journal.check(facts, IDS, {"top_k": -1})
        journal.begin()
        journal.append(journal_row(next(it for it in IDS if it not in journal.answered)))
    return journal


def test_facts_that_an_earlier_version_did_not_write_have_their_default(tmp_path):
    job(tmp_path, FACTS)
    assert job(tmp_path, FACTS | {"top_k": -1}).notes == []
    with pytest.raises(ValueError, match="begun with top_k"):
        job(tmp_path, FACTS | {"top_k": 5})


def test_a_job_of_an_earlier_version_is_resumed_with_a_note_and_then_knows_its_model(tmp_path):
    job(tmp_path, FACTS)
    (note,) = job(tmp_path, FACTS | {MODEL_FILES: {"config.json": "1"}}).notes
    assert "begun by an earlier version" in note
    with pytest.raises(ValueError, match=r"model's config.json has changed since .*out.jsonl"):
        job(tmp_path, FACTS | {MODEL_FILES: {"config.json": "2"}})


def test_a_retry_may_add_files_that_the_model_lacked(tmp_path):
    one, both = {"a": "1"}, {"a": "1", "b": "1"}
    job(tmp_path, FACTS | {MODEL_FILES: one})
    with pytest.raises(ValueError, match="model's b was added"):
        job(tmp_path, FACTS | {MODEL_FILES: both})
    job(tmp_path, FACTS | {MODEL_FILES: both}, retry=True)
    with pytest.raises(ValueError, match="model's b was removed"):
        job(tmp_path, FACTS | {MODEL_FILES: one}, retry=True)


def test_any_change_of_a_model_changes_its_fingerprint(text_model, tmp_path):
    folder = shutil.copytree(text_model, tmp_path / "model")
    before = fingerprint(folder)
    assert before == fingerprint(text_model)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= before.keys()
    path = folder / "model.safetensors"
    tensors, kept = load_file(path), path.read_bytes()
    changes = [
        {name: it * 1.001 for name, it in tensors.items()},  # trained further
        {name: it.to(torch.float16) for name, it in tensors.items()},
        {f"model.{name}": it for name, it in tensors.items()},
    ]
    for changed in changes:
        save_file(changed, path, {"format": "pt"})
        assert fingerprint(folder) == before | {path.name: fingerprint(folder)[path.name]}
        assert fingerprint(folder) != before
    path.write_bytes(kept)
    assert fingerprint(folder) == before
    path.write_bytes(b"\xff" * 9)  # damaged: loading names it
    assert fingerprint(folder) != before
    (folder / "chat_template.jinja").write_text("x")
    assert "chat_template.jinja" in fingerprint(folder)


def test_a_job_is_resumed_with_its_own_model_only(run_here, files, text_model):
    model = shutil.copytree(text_model, files / "model")
    job = arguments(files, model, "--no-use-ray")
    assert run_here(*job).returncode == 2
    before = (files / "out.jsonl").read_bytes()
    path = model / "model.safetensors"
    save_file({name: it * 1.001 for name, it in load_file(path).items()}, path, {"format": "pt"})
    done = run_here(*job)
    assert done.returncode == 1 and "model.safetensors has changed since" in done.stderr
    assert (files / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("id,prompt\n1,Hello\n2,Hi\n", "none of the 3 lines can be answered.* not valid JSON"),
        ("no json\n{}\n", "none of the 2 lines .*line 1: not valid JSON"),
        ('{"prompt": ""}\n', "none of the 1 lines .*the prompt is empty"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}\n', "has no chat template"),
    ],
)
def test_a_fault_of_the_whole_job_leaves_the_output_alone(
    run_here,
    files,
    text_model,
    content,
    complaint,
):
    (files / "in.jsonl").write_text(content)
    (files / "out.jsonl").write_text("precious")
    done = run_here(*arguments(files, text_model, "--no-use-ray", "--overwrite"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert re.search(complaint, done.stderr), done.stderr
    assert (files / "out.jsonl").read_text() == "precious"


def test_lines_of_text_that_failed_without_a_tokenizer_are_retried_with_one(
    run_here,
    files,
    text_model,
):
    """Token ids are answered without one."""
    model = shutil.copytree(text_model, files / "model")
    hidden = files / "hidden"
    hidden.mkdir()
    for path in model.glob("tokenizer*"):
        path.rename(hidden / path.name)
    job = arguments(files, model, "--no-use-ray")
    (files / "in.jsonl").write_text('{"prompt": "Hi"}\n')
    done = run_here(*job)
    assert done.returncode == 1 and "has no tokenizer" in done.stderr
    assert not (files / "out.jsonl").exists()
    (files / "in.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": [5, 6]}\n')
    assert run_here(*job).returncode == 2
    for path in hidden.iterdir():
        path.rename(model / path.name)
    done = run_here(*job, "--retry-errors")
    assert done.returncode == 0, done.stderr
    assert {
        name for name, it in rows_by_id(files / "out.jsonl").items() if not error_message(it)
    } == {
        "line-1",
        "line-2",
    }


@pytest.mark.parametrize("options", [["--overwrite"], ["--output", "-"]])
def test_retry_errors_needs_an_output_with_rows(run_here, files, text_model, options):
    done = run_here(*arguments(files, text_model, "--no-use-ray", "--retry-errors", *options))
    assert done.returncode == 64 and "--retry-errors" in done.stderr
