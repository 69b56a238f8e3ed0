"""Jobs from file to file with a model in this process: whatever a line holds, and however often the
work was stopped, each line gets its one row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from job_files import comparable_rows
from openai.types import Completion
from openai.types.chat import ChatCompletion

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.batch.job import read_job, run_job
from flexgen_ray.batch.journal import Journal
from flexgen_ray.files.text_files import check_encoding
from flexgen_ray.runtime.events import Progress

DEFAULTS = SamplingParams(max_tokens=6, temperature=1.0)
LINES = [
    '{"prompt": "Hello there", "max_tokens": 9}',
    '{"custom_id": "chat", "messages": [{"role": "user", "content": "And you?"}]}',
    "no json",
    '{"custom_id": "seeded", "prompt": [5, 6, 7], "seed": 3, "temperature": 0.7}',
    '{"custom_id": "long", "prompt": "' + "x" * 500 + '"}',
    '{"custom_id": "empty", "prompt": ""}',
    '{"prompt": "short", "max_tokens": 1}',
    '{"custom_id": "chat", "prompt": "the same again"}',
    '{"prompt": "last"}',
    '{"custom_id": "several", "prompt": ["Hello there", [5, 6], "Hello there"], "n": 2}',
]
IDS = ["line-1", "chat", "line-3", "seeded", "long", "empty", "line-7", "line-8", "line-9"]
IDS.append("several")
REFUSED = {"line-3", "long", "empty", "line-8"}


@pytest.fixture(scope="module")
def llm(chat_model):
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, max_batch_tokens=64)
    with LLM(chat_model, policy=policy, dtype="float32", device="cpu", use_ray=False) as llm:
        yield llm


class Stopped(BaseException):
    """Ctrl-C, after so many rows."""


def work(llm: LLM, input: Path, output: Path, keep_order=False, stop_after=None) -> list[str]:
    """One run; returns the ids that it still had to answer."""
    with Journal(output, keep_order=keep_order) as journal:
        lines = read_job(input, journal, DEFAULTS, {})
        before = len(journal.answered)

        def stop(event: Progress) -> None:
            if (
                event.standing
                and stop_after is not None
                and len(journal.answered) - before >= stop_after
            ):
                raise Stopped

        llm.on_progress = stop
        if lines:
            run_job(llm, journal, lines)
    return [line.custom_id for line in lines]


def by_id(path: Path) -> dict[str, dict]:
    found = comparable_rows(path)
    assert len({row["custom_id"] for row in found}) == len(found)
    return {row["custom_id"]: row for row in found}


@pytest.fixture(scope="module")
def undisturbed(llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "in.jsonl").write_text("\n".join(LINES))
    work(llm, folder / "in.jsonl", folder / "out.jsonl", keep_order=True)
    return comparable_rows(folder / "out.jsonl")


def test_each_line_has_its_row_and_openai_s_types_read_it(undisturbed):
    assert [row["custom_id"] for row in undisturbed] == IDS
    for row in undisturbed:
        body, status = row["response"]["body"], row["response"]["status_code"]
        assert status == (400 if row["custom_id"] in REFUSED else 200)
        if status == 200:
            kind = ChatCompletion if row["custom_id"] == "chat" else Completion
            kind.model_validate({"id": "x", "created": 0} | body, strict=True)
    said = {row["custom_id"]: row["response"]["body"].get("error") for row in undisturbed}
    assert "line 5: the prompt has 500 tokens" in said["long"]["message"]
    assert "line 6: the prompt is empty" in said["empty"]["message"]
    assert "line 8: custom_id 'chat' is already used by line 2" in said["line-8"]["message"]


@pytest.mark.parametrize("keep_order", [False, True])
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@settings(max_examples=8)
@given(stops=st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_stopped_and_resumed_the_answers_are_those_of_one_run(
    llm, tmp_path_factory, undisturbed, keep_order, name, stops
):
    """Sampled ones too, for a line draws by its number."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "in.jsonl.gz").write_bytes(gzip.compress("\n".join(LINES).encode()))
    left = len(LINES)
    for stop_after in stops:
        try:
            asked = work(llm, folder / "in.jsonl.gz", folder / name, keep_order, stop_after)
        except Stopped:
            continue
        assert len(asked) <= left
        left = len(asked)
    work(llm, folder / "in.jsonl.gz", folder / name, keep_order)
    found = comparable_rows(folder / name)
    in_order = sorted(found, key=lambda row: IDS.index(row["custom_id"]))
    assert in_order == undisturbed and (found == undisturbed or not keep_order)
    assert work(llm, folder / "in.jsonl.gz", folder / name, keep_order) == []
    assert {it.name for it in folder.iterdir()} == {"in.jsonl.gz", name, f"{name}.job.json"}


def test_several_prompts_of_a_line_are_answered_in_one(llm, undisturbed, tmp_path):
    """As by lines of their own; drawn without a seed, equal prompts have answers of their own."""
    drawn = {"max_tokens": 5, "temperature": 1.0, "seed": 3, "n": 2, "echo": True}
    prompts = ["Hello there", [40, 41], "And you?"]
    lines = [drawn | {"prompt": prompt} for prompt in prompts]
    lines += [drawn | {"prompt": prompts}, {"prompt": ["Hello"]}, {"prompt": ["a", "b" * 500]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    work(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl", keep_order=True)
    *alone, several, one, failed = (
        it["response"]["body"] for it in comparable_rows(tmp_path / "out.jsonl")
    )
    choices = [choice for body in alone for choice in body["choices"]]
    assert several["choices"] == [it | {"index": place} for place, it in enumerate(choices)]
    for name, value in several["usage"].items():
        assert value == sum(body["usage"][name] for body in alone)
    assert len(one["choices"]) == 1
    assert "line 6: prompt[1]: the prompt has 500 tokens" in failed["error"]["message"]
    texts = [it["text"] for it in undisturbed[-1]["response"]["body"]["choices"]]
    assert len(texts) == 6 and len({*texts[:2], *texts[4:]}) == 4


def test_templates_of_a_resumed_job_see_the_time_at_which_it_began(llm, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(LINES))
    with pytest.raises(Stopped):
        work(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl", stop_after=6)
    began = llm.tokenizer.now
    work(llm, tmp_path / "in.jsonl", tmp_path / "another.jsonl")
    assert llm.tokenizer.now > began
    work(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert llm.tokenizer.now == began
    job = json.loads((tmp_path / "out.jsonl.job.json").read_text())
    assert job["begun_at"] == began.isoformat()


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_PARAMS = {
    "max_tokens": st.integers(-1, 20) | st.just(10**30),
    "temperature": st.floats(0, 2) | _ANY,
    "top_p": st.floats(0, 1) | _ANY,
    "seed": st.integers() | _ANY,
    "stop": st.text(min_size=1) | st.lists(st.text(min_size=1)) | _ANY,
    "ignore_eos": st.booleans() | _ANY,
    "custom_id": st.text() | _ANY,
    "n": st.integers(1, 3) | _ANY,
    "logprobs": st.integers(0, 3) | st.booleans() | _ANY,
    "echo": st.booleans() | _ANY,
    "top_k": st.integers(-1, 99) | st.just(10**30) | _ANY,
    "min_p": st.floats(0, 1) | _ANY,
    "min_tokens": st.integers(0, 9) | _ANY,
    "stop_token_ids": st.lists(st.integers(0, 96)) | st.just([*range(97)]) | _ANY,
    "presence_penalty": st.floats(-2, 2) | _ANY,
    "frequency_penalty": st.floats(-2, 2) | _ANY,
    "repetition_penalty": st.sampled_from([5e-324, 1e-9, 1.2, 1e9, 1e308]) | _ANY,
    "include_stop_str_in_output": st.booleans() | _ANY,
    "logit_bias": st.dictionaries(st.sampled_from(["0", "5", "96", "97"]), st.floats(-99, 99))
    | _ANY,
    "allowed_token_ids": st.lists(st.integers(0, 97)) | _ANY,
    "bad_words": st.lists(st.text() | st.lists(st.integers(0, 97))) | _ANY,
    "skip_special_tokens": st.booleans() | _ANY,
}
_PROMPT = st.text() | st.lists(st.integers(-1, 99)) | _ANY
_MESSAGES = st.lists(st.fixed_dictionaries({"role": st.text(), "content": st.text()})) | _ANY
_OBJECT = st.fixed_dictionaries({"prompt": _PROMPT}, optional=_PARAMS) | st.fixed_dictionaries(
    {"messages": _MESSAGES}, optional=_PARAMS
)
_LINE = st.binary(max_size=40) | (_OBJECT | _OBJECT.map(lambda it: {"body": it}) | _ANY).map(
    lambda it: json.dumps(it).encode()
)


@settings(max_examples=60)
@given(before=st.lists(_LINE, max_size=4), after=st.lists(_LINE, max_size=4), data=st.data())
def test_no_line_costs_another_its_answer(llm, tmp_path_factory, before, after, data):
    folder = tmp_path_factory.mktemp("fuzz")
    probe = b'{"custom_id": "the probe", "prompt": "Hello there", "temperature": 0}'
    lines = [line.replace(b"\n", b" ") for line in [*before, probe, *after]]
    content = b"\n".join(lines)
    try:
        check_encoding(content[:4], "the file")
    except ValueError:
        reject()  # it begins as no UTF-8 text does, and is refused as a whole
    (folder / "in.jsonl").write_bytes(content)
    work(llm, folder / "in.jsonl", folder / "out.jsonl", data.draw(st.booleans()))
    found = by_id(folder / "out.jsonl")
    assert len(found) == sum(bool(line.strip()) for line in lines)
    (alone,) = llm.generate("Hello there", SamplingParams(max_tokens=6, temperature=0.0))
    assert found["the probe"]["response"]["body"]["choices"][0]["text"] == alone.outputs[0].text


def test_an_input_that_is_also_the_output_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(LINES[0])
    with (
        pytest.raises(ValueError, match="--output .* would overwrite what --input reads"),
        Journal(path, overwrite=True) as journal,
    ):
        read_job(path, journal, DEFAULTS, {})
    assert path.read_text() == LINES[0]


@pytest.mark.parametrize("cut", [5, 30, -9])
def test_a_damaged_gzip_input_is_named_before_any_work(tmp_path, cut):
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(("\n".join(LINES)).encode())[:cut])
    with (
        pytest.raises(ValueError, match="in.jsonl.gz is truncated or damaged"),
        Journal(tmp_path / "out.jsonl") as journal,
    ):
        read_job(tmp_path / "in.jsonl.gz", journal, DEFAULTS, {})
    assert {it.name for it in tmp_path.iterdir()} == {"in.jsonl.gz"}
