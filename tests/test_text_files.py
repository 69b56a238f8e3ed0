"""Text files of users are read alike by every command, whatever editor wrote them, and bounded."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from job_files import arguments, rows_by_id

from flexgen_ray.config import Policy
from flexgen_ray.evaluation.cloze import parse_text
from flexgen_ray.files.input_lines import open_input
from flexgen_ray.files.text_files import MAX_YAML_BYTES, read_lines, read_text, read_yaml
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.planner.comparison import read_job, read_nodes
from flexgen_ray.planner.stage_policies import StagePolicies

# Characters at which str.splitlines ends a line, and files don't.
ODD_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"


@given(
    st.lists(st.text(st.sampled_from("a é" + ODD_ENDS), min_size=1), min_size=1),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_lines_end_at_newlines_only(tmp_path, lines, end, has_mark):
    lines = [line.rstrip("\r") + "." for line in lines]
    path = tmp_path / "text"
    text = end.join([*lines, ""])
    path.write_bytes(text.encode("utf-8-sig" if has_mark else "utf-8"))
    assert read_lines(path) == lines
    assert read_text(path) == "\n".join([*lines, ""])
    with open_input(path) as found:
        assert [line.decode().removesuffix(end) for line in found] == lines


def read_input(path) -> list[bytes]:
    with open_input(path) as lines:
        return [*lines]


READERS = {
    "input": read_input,
    "text": read_text,
    "lines": read_lines,
    "workload": read_job,
    "policy": Policy.from_yaml,
    "policies": StagePolicies.from_yaml,
    "nodes": read_nodes,
    "hardware": Hardware.from_yaml,
}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("reader", READERS)
def test_another_encoding_is_named_with_the_remedy(tmp_path, reader, encoding):
    path = tmp_path / "file"
    path.write_text("a: 1\nb: 2\n", encoding=encoding)
    name = "UTF-32" if encoding == "utf-32" else "UTF-16"
    with pytest.raises(ValueError, match=f"file is in {name}.*iconv") as raised:
        READERS[reader](path)
    assert str(raised.value).count(str(path)) == 1


def test_a_byte_order_mark_costs_no_line(run_here, files, text_model):
    lines = '{"custom_id": "first", "prompt": "Hello"}\n{"custom_id": "second", "prompt": "Hi"}\n'
    (files / "in.jsonl").write_text(lines, encoding="utf-8-sig")
    assert run_here(*arguments(files, text_model, "--no-use-ray")).returncode == 0
    assert rows_by_id(files / "out.jsonl").keys() == {"first", "second"}
    (files / "lengths.csv").write_text("512,32\n100,10\n", encoding="utf-8-sig")
    assert read_job(files / "lengths.csv").num_requests == 2


def test_an_input_in_utf_16_is_refused_as_a_whole(run_here, files, text_model):
    (files / "in.jsonl").write_text('{"prompt": "Hello"}\n' * 9, encoding="utf-16")
    done = run_here(*arguments(files, text_model, "--no-use-ray"))
    assert done.returncode == 1 and "in.jsonl is in UTF-16" in done.stderr
    assert not (files / "out.jsonl").exists()


def test_an_unnamed_gzip_is_named(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(ValueError, match="compressed by gzip; give it a name that ends in .gz"):
        READERS["input"](tmp_path / "in.jsonl")


def test_cloze_texts_may_hold_any_character(run_here, tmp_path, text_model):
    """Some of these characters end a line for str.splitlines, but not in JSON."""
    text = json.dumps({"text": "one\u2028two three"}, ensure_ascii=False)
    assert parse_text(text) == "one\u2028two three"
    (tmp_path / "data.jsonl").write_text(f"{text}\n{text}\n", encoding="utf-8")
    done = run_here(
        "eval", "cloze", "--model", text_model, "--data", tmp_path / "data.jsonl", "--no-use-ray",
        "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"] == 2


BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefgh")),
    "itself": "a: &a [*a]\n",
    "depth": "a: " + "[" * 5000 + "]" * 5000 + "\n",
    "block depth": "".join(f"{' ' * depth}a:\n" for depth in range(200)),
    "size": "a: " + "x" * MAX_YAML_BYTES + "\n",
    "values": "a: [" + "1," * 12_000 + "]\n",
    "digits": "a: " + "9" * 5000 + "\n",
}


@pytest.mark.parametrize("reader", ["policy", "policies", "nodes", "hardware"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_that_would_exhaust_its_reader_is_refused_immediately(tmp_path, bomb, reader):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[bomb])
    started = time.process_time()
    with pytest.raises(ValueError, match="bomb.yaml") as raised:
        READERS[reader](path)
    assert len(str(raised.value)) < 1000 and time.process_time() - started < 5


def test_anchors_and_merges_in_yaml_are_followed(tmp_path):
    path = tmp_path / "ok.yaml"
    path.write_text("a: &a {x: 1}\nb: {<<: *a, y: [*a, *a]}\n")
    assert read_yaml(path)["b"] == {"x": 1, "y": [{"x": 1}, {"x": 1}]}


@pytest.mark.parametrize("name", ["num_gpu_batches", "blocks_in_flight", "gpu_batch_size"])
def test_numbers_of_a_policy_are_bounded(tmp_path, name):
    (tmp_path / "p.yaml").write_text(f"{name}: {10**18}\n")
    with pytest.raises(
        ValueError, match=rf"p.yaml: policy: {name} is {10**18}; it must .* 1 to \d+$"
    ):
        StagePolicies.from_yaml(tmp_path / "p.yaml")


@pytest.mark.parametrize("key", ["count", "gpus"])
def test_numbers_of_machines_and_lengths_are_bounded(tmp_path, key):
    (tmp_path / "nodes.yaml").write_text(f"- {{hardware: t4, {key}: {10**18}}}\n")
    with pytest.raises(ValueError, match=f"{key} is {10**18}; it must be an integer, 1 to 1024"):
        read_nodes(tmp_path / "nodes.yaml")
    (tmp_path / "w.csv").write_text(f"1,1\n{'9' * 5000},1\n")
    with pytest.raises(ValueError, match="line 2.* 12 digits at most"):
        read_job(tmp_path / "w.csv")
