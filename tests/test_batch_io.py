"""OpenAI Batch lines: what is understood, and how a bad line costs only itself."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_ray.io.journal import Journal
from flexgen_ray.io.openai_batch import error_row, read_lines, response_row
from flexgen_ray.request import CompletionOutput, RequestOutput, SamplingParams

DEFAULTS = SamplingParams(max_tokens=7, temperature=0.0)


def batch(custom_id="a", **body) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(line).encode()


def parse(*lines: bytes):
    return list(read_lines(lines, DEFAULTS))


def test_a_batch_line_with_every_parameter():
    (line,) = parse(
        batch(
            model="m", prompt="Hi", max_tokens=3, temperature=0.5, top_p=0.9, seed=1,
            stop=["\n", "."], ignore_eos=True,
        )
    )  # fmt: skip
    assert line.prompt == "Hi"
    assert line.params == SamplingParams(3, 0.5, 0.9, 1, ("\n", "."), True)


def test_plain_lines_and_defaults():
    first, second, third = parse(
        b'{"prompt": "Hi"}\n', b"\n", b"  \r\n",
        b'{"prompt": [1, 2], "stop": "x"}', batch(prompt="Yo", max_tokens=None)
    )  # fmt: skip
    assert (first.custom_id, first.prompt, first.params) == ("line-1", "Hi", DEFAULTS)
    assert (second.custom_id, second.prompt) == ("line-4", [1, 2])
    assert second.params is not None and second.params.stop == ("x",)
    assert third.params == DEFAULTS


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b"{}", "prompt is missing"),
        (b'{"prompt": 5}', "prompt must be"),
        (b'{"prompt": [1, "x"]}', "prompt must be"),
        (b'{"prompt": [true]}', "prompt must be"),
        (b'{"prompt": "x", "n": 2}', "'n' is not supported"),
        (b'{"prompt": "x", "max_tokens": 0}', "max_tokens is 0"),
        (b'{"prompt": "x", "max_tokens": 1.5}', "max_tokens is 1.5"),
        (b'{"prompt": "x", "max_tokens": true}', "max_tokens is True"),
        (b'{"prompt": "x", "temperature": -1}', "temperature is -1"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature is nan"),
        (b'{"prompt": "x", "temperature": "hot"}', "temperature is 'hot'"),
        (b'{"prompt": "x", "top_p": 0}', "top_p is 0"),
        (b'{"prompt": "x", "seed": 1.5}', "seed is 1.5"),
        (b'{"prompt": "x", "stop": 3}', "stop is 3"),
        (b'{"prompt": "x", "stop": [3]}', "stop is (3,)"),
        (b'{"prompt": "x", "stop": [""]}', "stop is ('',)"),
        (b'{"prompt": "x", "ignore_eos": "yes"}', "ignore_eos is 'yes'"),
        (b'{"custom_id": 5, "prompt": "x"}', "custom_id is 5"),
        (b'{"custom_id": "a", "url": "/v1/chat", "body": {"prompt": "x"}}', "/v1/completions"),
        (b'{"custom_id": "a", "body": "x"}', "body must be"),
        (b'{"custom_id": "a", "body": {"prompt": "x"}, "extra": 1}', "'extra' is not supported"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_costs_only_itself(line, complaint):
    before, bad, after = parse(batch("first", prompt="x"), line, batch("last", prompt="y"))
    assert bad.error is not None and complaint in bad.error and "line 2" in bad.error
    assert before.error is None and after.error is None and after.prompt == "y"


def test_a_custom_id_answers_one_line_only():
    first, second = parse(batch("a", prompt="x"), batch("a", prompt="y"))
    assert first.error is None
    assert second.error is not None and "'a'" in second.error


@given(st.lists(st.binary(max_size=60)))
@settings(max_examples=200)
def test_no_bytes_crash_the_reader(lines):
    good = batch("good", prompt="x")
    parsed = parse(*[line.replace(b"\n", b"") for line in lines], good)
    assert parsed[-1].prompt == "x"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["prompt", "stop", "seed", "max_tokens", "temperature", "body", "custom_id"]
        ),
        _JSON,
    )
)
@settings(max_examples=200)
def test_no_json_crashes_the_reader(value):
    (line,) = parse(json.dumps(value).encode())
    assert (line.error is None) == (line.prompt is not None and line.params is not None)


def test_response_rows_have_the_fields_of_openai():
    answer = CompletionOutput(" Paris", [5, 6], "stop")
    row = response_row("a", "m", RequestOutput(0, None, [1, 2, 3], [answer]))
    assert row["custom_id"] == "a" and row["error"] is None and row["id"].startswith("batch_req_")
    assert row["response"]["status_code"] == 200 and row["response"]["request_id"]
    body = row["response"]["body"]
    assert body["object"] == "text_completion" and body["model"] == "m"
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["index"]) == (" Paris", "stop", 0)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    refused = error_row("b", "too long")
    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"]["error"]["message"] == "too long"


def test_the_journal_appends_whole_lines_and_spares_what_is_there(tmp_path):
    path = tmp_path / "out.jsonl"
    with Journal(path) as journal:
        journal.append({"text": "ü\n"})
        assert json.loads(path.read_text(encoding="utf-8")) == {"text": "ü\n"}
    with pytest.raises(FileExistsError, match="--overwrite"):
        Journal(path)
    with Journal(path, overwrite=True) as journal:
        journal.append({"text": "new"})
    assert path.read_text() == '{"text": "new"}\n'
