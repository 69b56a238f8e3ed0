"""The output file holds whole rows, wherever a run was killed, and the next run completes them."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_files import FACTS, IDS, file_names, fresh_folder, journal_row, read_rows

from flexgen_ray.batch.journal import Journal
from flexgen_ray.batch.response_lines import error_row


def write(
    path: Path, ids, keep_order: bool = False, overwrite: bool = False, facts=FACTS
) -> list[str]:
    """What a run does; returns the ids that it appended."""
    with Journal(path, overwrite, keep_order) as journal:
        journal.check(facts, IDS)
        journal.begin()
        missing = [it for it in ids if it not in journal.answered]
        for custom_id in missing:
            journal.append(journal_row(custom_id))
    return missing


class Killed(BaseException):
    """Nothing in the package catches it."""


def write_until_killed(path: Path, order: list[str], keep_order: bool, num_bytes: int) -> int:
    """A run that ends in the middle of a write, when so many bytes are written in all; returns how
    many rows had been taken by then."""
    left, taken = num_bytes, 0

    def dying_write(fd: int, content: memoryview) -> int:
        nonlocal left
        if len(content) > left:
            real_write(fd, content[:left])
            raise Killed
        left -= len(content)
        return real_write(fd, content)

    real_write = os.write
    journal = Journal(path, keep_order=keep_order)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(os, "write", dying_write)
        journal.check(FACTS, IDS)
        journal.begin()
        for custom_id in order:
            if custom_id not in journal.answered:
                journal.append(journal_row(custom_id))
                taken += 1
    journal._open_files.close()  # As a kill would: nothing is tidied.
    return taken


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@given(
    order=st.permutations(IDS),
    keep_order=st.booleans(),
    kills=st.lists(st.integers(0, 800), max_size=3),
)
@settings(max_examples=100)
def test_a_run_that_is_killed_anywhere_is_completed_by_the_next(
    tmp_path, name, order, keep_order, kills
):
    path = fresh_folder(tmp_path) / name
    taken = sum(write_until_killed(path, order, keep_order, num_bytes) for num_bytes in kills)
    added = write(path, order, keep_order)
    rows = read_rows(path)
    if keep_order:
        assert rows == [journal_row(it) for it in IDS]
    else:
        assert sorted(rows, key=lambda it: it["custom_id"]) == [journal_row(it) for it in IDS]
    # What was taken stays; a row that was being written may be there too.
    assert len(IDS) - taken - len(kills) <= len(added) <= len(IDS) - taken
    assert file_names(path.parent) == {name, f"{name}.job.json"}
    assert write(path, order, keep_order) == [] and read_rows(path) == rows


@given(order=st.permutations(IDS))
def test_keep_order_writes_each_row_as_soon_as_its_turn_has_come(tmp_path, order):
    path = fresh_folder(tmp_path) / "out.jsonl"
    with Journal(path, keep_order=True) as journal:
        journal.check(FACTS, IDS)
        journal.begin()
        for count, custom_id in enumerate(order, start=1):
            journal.append(journal_row(custom_id))
            there = set(order[:count])
            assert read_rows(path) == [
                journal_row(it) for it in itertools.takewhile(there.__contains__, IDS)
            ]


def test_each_row_can_be_read_immediately_and_by_any_gunzip(tmp_path):
    path = tmp_path / "out.jsonl.gz"
    with Journal(path) as journal:
        journal.check(FACTS, IDS)
        journal.begin()
        for count, custom_id in enumerate(IDS, start=1):
            journal.append(journal_row(custom_id))
            assert read_rows(path) == [journal_row(it) for it in IDS[:count]]
    shown = subprocess.run(["gzip", "-dc", path], capture_output=True, check=True).stdout
    assert shown.decode().count('"custom_id"') == len(IDS)


def test_a_file_that_was_compressed_anew_is_resumed(tmp_path):
    path = tmp_path / "out.jsonl.gz"
    write(path, IDS[:4])
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())))
    assert write(path, IDS) == IDS[4:] and len(read_rows(path)) == len(IDS)


@pytest.mark.parametrize("facts", [FACTS | {"seed": 1}, FACTS | {"dtype": "x"}, {"model": "m"}])
def test_the_output_of_another_job_is_refused_and_left_as_it_is(tmp_path, facts):
    path = tmp_path / "out.jsonl"
    write(path, IDS[:3])
    before = {it: it.read_bytes() for it in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="was begun with (seed|dtype) .* --overwrite"):
        write(path, IDS, facts=facts)
    assert before == {it: it.read_bytes() for it in tmp_path.iterdir()}
    assert write(path, IDS, overwrite=True, facts=facts) == IDS
    assert write(path, IDS, facts=facts) == []


@pytest.mark.parametrize("content", ["precious\n", '{"custom_id": "a"}\n', "[]\n"])
def test_a_file_that_no_job_wrote_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(FileExistsError, match="--overwrite"):
        Journal(path)
    assert path.read_text() == content and file_names(tmp_path) == {"out.jsonl"}


@pytest.mark.parametrize("damage", ["precious\n", "[]\n", "{}\n", "\x00\x00\n"])
def test_damage_before_the_end_is_named(tmp_path, damage):
    path = tmp_path / "out.jsonl"
    write(path, IDS[:2])
    path.write_text(damage + path.read_text())
    with pytest.raises(ValueError, match="out.jsonl has .* at byte 0.* --overwrite"):
        Journal(path)


def test_damage_in_a_compressed_file_is_named(tmp_path):
    path = tmp_path / "out.jsonl.gz"
    write(path, IDS[:2])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"no gzip")
    with pytest.raises(ValueError, match=f"out.jsonl.gz is not gzip after byte {size} .*overwrite"):
        Journal(path)


def test_overwriting_changes_nothing_before_it_begins(tmp_path):
    path = tmp_path / "out.jsonl"
    journal = Journal(path, keep_order=True)
    journal.check(FACTS, IDS)
    journal.begin()
    for custom_id in ("id-0", "id-3"):
        journal.append(journal_row(custom_id))
    journal.close()
    before = {it: it.read_bytes() for it in tmp_path.iterdir()}
    assert set(before) == {path, tmp_path / "out.jsonl.waiting", tmp_path / "out.jsonl.job.json"}
    with pytest.raises(RuntimeError, match="no model"), Journal(path, True, True) as journal:
        journal.check(FACTS, IDS)
        raise RuntimeError("no model")
    assert before == {it: it.read_bytes() for it in tmp_path.iterdir()}


@pytest.mark.parametrize("keep_order", [False, True])
def test_overwriting_leaves_nothing_of_the_earlier_job(tmp_path, keep_order):
    path = tmp_path / "out.jsonl"
    write_until_killed(path, IDS[::-1], True, 1000)
    assert (tmp_path / "out.jsonl.waiting").stat().st_size
    facts = FACTS | {"seed": 1}
    with Journal(path, True, keep_order) as journal:
        journal.check(facts, IDS)
        journal.begin()
        assert sum(it.stat().st_size for it in (path, *tmp_path.glob("*.waiting"))) == 0
    assert write(path, IDS, keep_order, facts=facts) == IDS
    assert file_names(tmp_path) == {"out.jsonl", "out.jsonl.job.json"}


def test_two_runs_on_one_file_are_refused_until_the_first_is_gone(tmp_path):
    path = tmp_path / "out.jsonl"
    script = f"""
import os, sys, time
from pathlib import Path
from flexgen_ray.batch.journal import Journal
journal = Journal(Path({str(path)!r}))
print("locked", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        for overwrite in (False, True):
            with pytest.raises(RuntimeError, match="another run is writing"):
                Journal(path, overwrite)
        other.kill()
    assert write(path, IDS) == IDS


def test_a_failed_run_leaves_no_empty_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="no model"), Journal(path, keep_order=True):
        raise RuntimeError("no model")
    assert file_names(tmp_path) == set()


def test_a_full_disk_leaves_whole_rows_and_is_named(tmp_path):
    """The largest file that this process may write stands in for the disk."""
    path = tmp_path / "out.jsonl"
    size = len(json.dumps(journal_row(IDS[0]), ensure_ascii=False).encode())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * size // 2, hard))
    try:
        with pytest.raises(OSError, match="out.jsonl"):
            write(path, IDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 0 < len(read_rows(path)) < len(IDS) and path.read_bytes().endswith(b"}\n")
    write(path, IDS)
    assert [it["custom_id"] for it in read_rows(path)] == IDS


def test_a_disk_without_room_for_the_rows_is_named_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**20, 2**20 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="6 rows need at least 2.3 KiB.* has 1000 B free"):
        write(tmp_path / "out.jsonl", IDS)
    assert file_names(tmp_path) == set()


def test_error_rows_are_counted_over_all_runs(tmp_path):
    path = tmp_path / "out.jsonl"
    for custom_id, count in (("id-0", 1), ("id-1", 2)):
        with Journal(path) as journal:
            journal.check(FACTS, IDS)
            journal.begin()
            journal.append(error_row(custom_id, f"{custom_id} is bad"))
            assert journal.num_errors == count
            assert journal.first_error == ("id-0", "id-0 is bad")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_row_is_written(tmp_path, monkeypatch, number):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def slow_write(fd: int, line: memoryview) -> int:
        signal.raise_signal(number)
        return real_write(fd, line[: len(line) // 2 + 1])

    real_write = os.write
    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "out.jsonl") as journal:
            journal.check(FACTS, IDS)
            journal.begin()
            monkeypatch.setattr(os, "write", slow_write)
            journal.append(journal_row(IDS[0]))
    finally:
        signal.signal(number, before)
    assert read_rows(tmp_path / "out.jsonl") == [journal_row(IDS[0])]


@pytest.mark.parametrize("keep_order", [False, True])
def test_standard_output_holds_rows_and_nothing_else(tmp_path, keep_order):
    script = f"""
from pathlib import Path
from flexgen_ray.batch.journal import Journal
with Journal(Path("-"), keep_order={keep_order}) as journal:
    journal.check({{}}, ["a", "b"])
    journal.begin()
    print("noise", flush=True)
    for name in ("b", "a"):
        journal.append({{"custom_id": name, "response": {{"status_code": 200}}}})
assert not journal.can_resume
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    found = [json.loads(line)["custom_id"] for line in done.stdout.splitlines()]
    assert found == (["a", "b"] if keep_order else ["b", "a"])
    assert "noise" in done.stderr and file_names(tmp_path) == set()
