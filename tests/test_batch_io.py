"""OpenAI Batch lines and plain ones are understood, and a bad line costs only itself."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject

from flexgen_ray.batch import request_fields
from flexgen_ray.batch.request_lines import read_lines
from flexgen_ray.batch.response_lines import error_message, error_row, response_row, with_columns
from flexgen_ray.files.input_lines import MAX_LINE_BYTES, InputLines
from flexgen_ray.request import CompletionOutput, RequestOutput, SamplingParams

DEFAULTS = SamplingParams(max_tokens=7, temperature=0.0)
FIELDS = set().union(
    *request_fields._SUPPORTED.values(),
    *request_fields._MISSING_BY_URL.values(),
    request_fields._MISSING,
    request_fields._IGNORED,
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


def batch(custom_id="a", **body) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(line).encode()


def parse(*lines: bytes):
    return list(read_lines(lines, DEFAULTS))


def test_a_batch_line_s_parameters_are_all_read():
    (line,) = parse(
        batch(
            model="m", prompt="Hi", max_tokens=3, temperature=0.5, top_p=0.9, seed=1,
            stop=["\n", "."], ignore_eos=True, include_stop_str_in_output=True,
        )
    )  # fmt: skip
    assert line.prompt == "Hi"
    assert line.params == SamplingParams(
        3, 0.5, 0.9, 1, ("\n", "."), True, include_stop_str_in_output=True
    )


def test_plain_lines_have_the_job_s_defaults():
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
        (b'{"prompt": []}', "prompt must be"),
        (b'{"prompt": ["x", []]}', "prompt must be"),
        (b'{"prompt": [' + b"5," * 2048 + b'"x"]}', "prompt must be"),
        (b'{"prompt": [' + b'"x",' * 2048 + b'"x"]}', "the line has 2049 prompts, but"),
        (b'{"body": {"prompt": "x", "m": 2}}', "body field 'm' is not supported; supported are"),
        (b'{"body": {"prompt": "x", "Top-P": 1}}', "'Top-P' is not supported (is top_p meant?)"),
        (b'{"prompt": "x", "max_token": 2}', "'max_token' is a field that is misspelt or out of"),
        (b'{"body": {"prompt": "x"}, "seed": 2}', "out of its place (is seed meant?)"),
        (b'{"body": {"prompt": "x", "messages": [{}]}}', "give one of them"),
        (b'{"custom_id": "a", "url": "/v1/completions"}', "body is missing"),
        (b'{"url": "/v1/embeddings", "body": {"input": "x"}}', "'/v1/embeddings'; they must be"),
        (b'{"prompt": "x", "n": 2}', "n is 2, but with temperature 0.0"),
        (b'{"prompt": "x", "n": 129, "temperature": 1}', "n is 129; it must be an integer, 1 to"),
        (b'{"prompt": "x", "best_of": 2}', "best_of is 2; only 1 is supported"),
        (b'{"prompt": "x", "top_k": -2}', "top_k is -2"),
        (b'{"prompt": "x", "min_tokens": 8}', "0 to max_tokens (7)"),
        (b'{"prompt": "x", "stop_token_ids": "a"}', "stop_token_ids is ('a',)"),
        (b'{"prompt": "x", "presence_penalty": 3}', "presence_penalty is 3; it must be -2 to 2"),
        (b'{"prompt": "x", "top_logprobs": 3}', "top_logprobs is not supported: it is for chats"),
        (b'{"messages": [{}], "top_logprobs": 3}', "top_logprobs is 3, which needs logprobs true"),
        (b'{"messages": [{}], "logprobs": 3}', "logprobs is 3; for chats"),
        (b'{"messages": [{}], "logprobs": true, "top_logprobs": 21}', "top_logprobs is 21"),
        (b'{"messages": [{}], "echo": true}', "echo is True"),
        (b'{"prompt": "x", "stream": true}', "stream is True; only False is supported"),
        (b'{"prompt": "x", "max_tokens": 1, "max_completion_tokens": 2}', "give one of them"),
        (b'{"prompt": "x", "max_tokens": "5"}', "max_tokens is '5'"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "limit (4300 digits)"),
        (b"x" * (MAX_LINE_BYTES + 1), f"longer than {MAX_LINE_BYTES} bytes"),
        (b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}', "give one of them"),
        (b'{"messages": []}', "one at least"),
        (b'{"messages": "x"}', "messages must be"),
        (b'{"messages": ["x"]}', "messages[0] is 'x'"),
        (b'{"messages": [{"role": "user"}]}', "the content None"),
        (b'{"messages": [{"role": "user", "content": 5}]}', "the content 5"),
        (b'{"messages": [{"role": 5, "content": "x"}]}', "the role 5"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "type text"),
        (b'{"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}', "tool call 1;"),
        (
            b'{"messages": [{"role": "user", "content": "x", "tool_calls": 1}]}',
            "tool_calls 1;",
        ),
        (
            b'{"messages": [{"role": "user", "content": "x", "weight": 1}]}',
            "'weight', which",
        ),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "only functions are"),
        (b'{"messages": [{"role": "user", "content": "x"}], "reasoning_effort": 1}', "'low'"),
        (b'{"url": "/v1/completions", "body": {"messages": [{}]}}', "prompt is missing"),
        (b'{"url": "/v1/chat/completions", "body": {"prompt": "x"}}', "messages is missing"),
        (b'{"body": "{"}', "body must be a JSON object, or a string that holds one"),
        (b'{"body": 5}', "body must be"),
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
        (b'{"prompt": "x", "include_stop_str_in_output": 1}', "in_output is 1; it must be true"),
        (b'{"custom_id": 5.5, "prompt": "x"}', "custom_id is 5.5"),
        (
            b'{"custom_id": "' + b"x" * 1001 + b'", "prompt": "x"}',
            "1001 characters, but 1000 at most",
        ),
        (b'{"custom_id": "\\ud800", "prompt": "x"}', "surrogate"),
        (b'{"prompt": "x", "prompt": "y"}', "'prompt' is there twice"),
        (b'{"custom_id": "a", "url": "/v1/chat", "body": {"prompt": "x"}}', "/v1/completions"),
        (b'{"custom_id": "a", "body": "x"}', "body must be"),
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
    assert second.error is not None and "'a' is already used by line 1" in second.error
    assert second.custom_id == "line-2"


_FAULTS = [
    b'"prompt": "a\\ud800b"', b'"prompt": 5', b'"prompt": "x", "top_p": [{}]', b'"url": "/v1/x"',
    b'"url": "/v1/completions", "body": {}', b'"body": "{"', b'"method": "GET", "body": {}',
    b'"prompt": ' + b"[" * 5000 + b"]" * 5000, b'"prompt": NaN', b'"prompt": "x", "seed": NaN',
    b'"prompt": "x", "prompt": "y"', b'"prompt": "x", "seed": ' + b"9" * 5000, b'"prompt": \xff',
    b'"prompt": "x" "y"', b'"prompt": "unfinished', b'"prompt": {"custom_id": "inner"},,',
    b'"prompt": "' + b"x" * MAX_LINE_BYTES + b'"',
]  # fmt: skip


@pytest.mark.parametrize("fault", _FAULTS)
@pytest.mark.parametrize("name", ["my id", 'a"\\b]}', "ü", 7])
def test_a_bad_line_keeps_its_custom_id_whatever_is_wrong_with_it(name, fault):
    first = b'{"custom_id": %s, %s}' % (json.dumps(name).encode(), fault)
    second = b'{%s, "custom_id" : %s}' % (fault, json.dumps(name, ensure_ascii=False).encode())
    (line,) = parse(first)
    assert line.error is not None and line.custom_id == str(name)
    if not fault.endswith((b"unfinished", b"x" * 9 + b'"')):
        (line,) = parse(second)
        assert line.error is not None and line.custom_id == str(name)


def test_a_missing_integer_or_duplicate_custom_id_becomes_a_unique_string():
    lines = [b'{"custom_id": null, "prompt": "x"}', batch(7, prompt="x"), batch("7", prompt="x")]
    none, number, again = parse(*lines)
    assert (none.custom_id, none.error) == ("line-1", None)
    assert (number.custom_id, number.error) == ("7", None)
    assert again.custom_id == "line-3" and "'7' is already used by line 2" in again.error


@given(st.lists(st.sampled_from(["a", "line-1", "line-2", "line-3", "line-3+", None]), max_size=8))
def test_every_row_has_an_id_of_its_own_whatever_lines_are_called(ids):
    parsed = parse(*(json.dumps({"custom_id": it, "prompt": "x"}).encode() for it in ids))
    assert len({line.custom_id for line in parsed}) == len(ids)
    for name, line in zip(ids, parsed, strict=True):
        assert line.error is not None or name in (None, line.custom_id)


def test_chats_are_read_from_batch_lines_and_plain_ones():
    messages = [{"role": "user", "content": "Hi"}]
    url = {"url": "/v1/chat/completions", "body": {"messages": messages, "max_tokens": 4}}
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]
    by_url, plain, long = parse(
        json.dumps(url).encode(),
        json.dumps({"messages": messages, "max_completion_tokens": 4}).encode(),
        json.dumps({"messages": [{"role": "user", "content": parts, "name": "Bo"}]}).encode(),
    )
    assert by_url.messages == plain.messages == messages
    assert by_url.params == plain.params == SamplingParams(4, 0.0)
    assert long.messages == [{"role": "user", "content": "Hi\nyou", "name": "Bo"}]
    assert by_url.prompt is None and by_url.error is None


def test_tool_calls_and_their_results_are_passed_on_with_arguments_as_objects():
    function = {"name": "f", "arguments": '{"x": [1]}'}
    call = {"id": "c", "type": "function", "function": function}
    chat = [
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {"role": "assistant", "content": "So 42.", "annotations": [], "tool_calls": []},
    ]
    (line,) = parse(json.dumps({"messages": chat}).encode())
    called = call | {"function": {"name": "f", "arguments": {"x": [1]}}}
    assert line.messages == [
        {"role": "assistant", "content": "", "tool_calls": [called]},
        chat[1],
        {"role": "assistant", "content": "So 42."},
    ]
    for wrong in ("{", "[1]"):
        bad = call | {"function": function | {"arguments": wrong}}
        (line,) = parse(json.dumps({"messages": [chat[0] | {"tool_calls": [bad]}]}).encode())
        assert line.error is not None and "arguments of a tool call are" in line.error


def test_tool_choice_none_leaves_tools_out():
    tools = [{"type": "function", "function": {"name": "f"}}]
    lines = [json.dumps(CHAT | {"tools": tools, "tool_choice": it}) for it in ("auto", "none")]
    auto, none = parse(*(line.encode() for line in lines))
    assert auto.chat.tools == tools and none.chat.tools is None


def test_a_prompt_is_a_text_or_tokens_or_a_list_of_those():
    texts, ids, mixed = parse(*(batch(str(i), prompt=it) for i, it in enumerate(
        (["a", "b"], [[1], [2, 3]], ["a", [1]])
    )))  # fmt: skip
    assert texts.prompts == ("a", "b") and ids.prompts == ([1], [2, 3])
    assert mixed.prompts == ("a", [1])


def test_null_fields_count_for_nothing_and_a_body_may_be_a_string():
    body = {"prompt": "Hi", "n": 1, "stream": False, "presence_penalty": 0.0, "stop": None,
            "tools": None, "response_format": {"type": "text"}}  # fmt: skip
    as_object, as_string = parse(
        json.dumps({"body": body}).encode(), json.dumps({"body": json.dumps(body)}).encode()
    )
    assert as_object.error is None and as_object.params == DEFAULTS
    assert (as_string.prompt, as_string.params) == (as_object.prompt, as_object.params)


IGNORED = {
    "metadata": {"row": "7"}, "store": False, "service_tier": "auto", "safety_identifier": "x",
    "prompt_cache_key": "x", "parallel_tool_calls": False, "user": "me", "model": "m",
    "stream_options": {"include_usage": True}, "seed": None, "unheard_of": None,
}  # fmt: skip
NEUTRAL = {
    "frequency_penalty": 0, "presence_penalty": 0.0, "response_format": {"type": "text"},
    "stream": False, "best_of": 1, "n": 1, "use_beam_search": False, "length_penalty": 1.0,
    "stop": [], "top_p": 1.0, "min_p": 0.0,
}  # fmt: skip
PROMPT, CHAT = {"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}
OF_PROMPTS, OF_CHATS = {"suffix": None, "echo": False}, {"modalities": ["text"], "tools": []}


@pytest.mark.parametrize("asked", [PROMPT | OF_PROMPTS, CHAT | OF_CHATS])
def test_fields_and_values_that_change_nothing_are_accepted(asked):
    """Each alone, and all together, in a body and in a plain line."""
    plain = {name: it for name, it in asked.items() if name in ("prompt", "messages")}
    (wanted,) = parse(json.dumps(plain).encode())
    fields = IGNORED | NEUTRAL | asked
    bodies = [fields] + [plain | {name: it} for name, it in fields.items()]
    for body in bodies:
        for line in parse(json.dumps({"body": body}).encode(), json.dumps(body).encode()):
            assert line.error is None, line.error
            assert (line.prompt, line.messages) == (wanted.prompt, wanted.messages)
            assert line.params == DEFAULTS


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (
            {"response_format": {"type": "json_object"}},
            "{'type': 'text'} is supported: answers",
        ),
        ({"stream": True}, "stream is True; only False is supported: answers are written whole"),
        ({"stream": 0}, "stream is 0"),
        (
            {"guided_json": {}},
            "guided_json is not supported: answers can't be constrained to a format",
        ),
        ({"best_of": 3}, "best_of is 3; only 1 is supported: answers are not compared"),
        ({"use_beam_search": True}, "there is no beam search"),
        ({"audio": {"voice": "x"}}, "audio is not supported: only text"),
        ({"tool_choice": "required"}, "only 'auto' or 'none' is supported: a tool call can't"),
        ({"modalities": ["text", "audio"]}, "only text is read and written"),
        ({"temprature": 1}, "(is temperature meant?)"),
    ],
)
def test_a_field_that_is_not_implemented_is_refused_with_the_reason(field, said):
    (line,) = parse(json.dumps({"body": CHAT | field}).encode())
    assert line.error is not None and said in line.error


@given(st.dictionaries(st.sampled_from(["id", "label", "url", "response", "metadata"]), _JSON))
def test_the_user_s_columns_come_back_beside_the_answer(columns):
    plain, beside, bad = parse(
        json.dumps(PROMPT | columns).encode(),
        json.dumps({"body": PROMPT} | {k: it for k, it in columns.items() if k != "url"}).encode(),
        json.dumps({"prompt": 5} | columns).encode(),
    )
    assert plain.error is None and plain.prompt == "Hi"
    returned = json.loads(json.dumps(columns), parse_constant=lambda _: None)
    for line in (plain, bad):
        row = with_columns(error_row("a", "x"), line.columns)
        assert row.get("columns", {}) == returned and row["id"].startswith("batch_req_")
        json.dumps(row, allow_nan=False)
    assert beside.columns == {k: it for k, it in returned.items() if k != "url"}


@pytest.mark.parametrize("start", ["/v1", "", "/openai/v1", "/openai/deployments/my-model"])
@pytest.mark.parametrize("query", ["", "?api-version=2024-10-21"])
def test_azure_s_urls_mean_the_same_as_openai_s(start, query):
    chat = {"url": f"{start}/chat/completions{query}", "body": CHAT}
    text = {"url": f"{start}/completions{query}", "body": PROMPT}
    first, second = parse(json.dumps(chat).encode(), json.dumps(text).encode())
    assert first.messages == CHAT["messages"] and second.prompt == "Hi"
    assert first.error is second.error is None


class Endless:
    """A stream of one line that is longer than memory; it counts what is asked for."""

    def __init__(self, num_bytes: int) -> None:
        self.left, self.largest = num_bytes, 0

    def readline(self, size: int) -> bytes:
        self.largest = max(self.largest, size)
        count = min(size, self.left)
        self.left -= count
        return b"x" * count


def test_an_endless_line_is_read_in_bounded_memory():
    stream = Endless(10 * MAX_LINE_BYTES)
    (line,) = read_lines(InputLines(stream), DEFAULTS)
    assert line.error is not None and str(MAX_LINE_BYTES) in line.error and len(line.error) < 200
    assert stream.left == 0 and stream.largest <= MAX_LINE_BYTES + 1


def test_a_long_line_costs_only_itself():
    lines = b"x" * (2 * MAX_LINE_BYTES) + b"\n" + batch("after", prompt="y") + b"\n"
    long, after = read_lines(InputLines(io.BytesIO(lines)), DEFAULTS)
    assert long.error is not None and "line 1" in long.error
    assert (after.custom_id, after.prompt, after.number) == ("after", "y", 2)


def test_the_error_of_a_line_is_short_however_long_its_prompt():
    (line,) = parse(json.dumps({"prompt": "x", "temperature": "y" * 10**6}).encode())
    assert line.error is not None and len(line.error) < 2000


@given(st.lists(st.binary(max_size=60)))
@settings(max_examples=200)
def test_no_bytes_crash_the_reader(lines):
    good = batch("good", prompt="x")
    bad = [line.replace(b"\n", b"") for line in lines]
    parsed = parse(*bad, good)
    assert parsed[-1].prompt == "x"
    assert len(parsed) == sum(bool(line.strip()) for line in bad) + 1


@given(
    st.dictionaries(
        st.sampled_from(sorted({"body", "custom_id", "url", "method", "own"} | FIELDS)),
        _JSON,
    )
)
@settings(max_examples=200)
def test_no_json_crashes_the_reader(value):
    (line,) = parse(json.dumps(value).encode())
    asks = [line.prompt, line.messages]
    assert (line.error is None) == (line.params is not None)
    assert asks.count(None) == (1 if line.error is None else 2)


_MESSAGE = st.fixed_dictionaries(
    {"role": _JSON | st.just("user"), "content": _JSON | st.text()},
    optional={"name": _JSON, "tool_calls": _JSON},
)


@given(st.lists(_MESSAGE | _JSON, max_size=3))
@settings(max_examples=200)
def test_messages_are_text_or_refused(messages):
    (line,) = parse(json.dumps({"messages": messages}).encode())
    if line.error is None:
        assert line.messages
        for message in line.messages:
            assert all(isinstance(it, str) for key, it in message.items() if key != "tool_calls")


def answered(text: str, reason: str = "stop") -> RequestOutput:
    return RequestOutput(0, None, [1, 2, 3], [CompletionOutput(text, [5, 6], reason)])


@given(st.text(), st.sampled_from(["stop", "length"]), st.text(min_size=1))
def test_openai_s_own_types_read_every_answer(text, reason, custom_id):
    plain = response_row(custom_id, "m", answered(text, reason))
    chat = response_row(custom_id, "m", answered(text, reason), is_chat=True)
    for row in (plain, chat):
        assert row["custom_id"] == custom_id and row["error"] is None and error_message(row) is None
        assert row["id"].startswith("batch_req_")
        assert row["response"]["status_code"] == 200 and row["response"]["request_id"]
    completion = Completion.model_validate(plain["response"]["body"], strict=True)
    assert completion.choices[0].text == text and completion.choices[0].finish_reason == reason
    of_chat = ChatCompletion.model_validate(chat["response"]["body"], strict=True)
    message = of_chat.choices[0].message
    assert (message.role, message.content, message.refusal) == ("assistant", text, None)
    for usage in (completion.usage, of_chat.usage):
        assert usage is not None and completion.model == of_chat.model == "m"
        counts = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
        assert counts == (3, 2, 5)


@given(st.text())
def test_openai_s_own_types_read_every_error(message):
    row = error_row("b", message)
    error = ErrorObject.model_validate(row["response"]["body"]["error"], strict=True)
    assert row["response"]["status_code"] == 400
    assert error.message == message == error_message(row) and error.type == "invalid_request_error"


def test_error_rows_of_other_servers_are_understood():
    body = {"error": {"message": "too long"}}
    assert error_message({"response": {"status_code": 400, "body": json.dumps(body)}}) == "too long"
    assert (
        error_message({"response": None, "error": {"code": "x", "message": "expired"}}) == "expired"
    )
