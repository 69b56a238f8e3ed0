"""Chats are formatted by the model's own template, or refused with the reason."""

from __future__ import annotations

import json
import shutil
import threading
import time
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.batch.request_lines import read_lines
from flexgen_ray.text.chat_template import ChatTemplate
from flexgen_ray.text.messages import ChatOptions, parse_messages
from flexgen_ray.text.tokenizer import Tokenizer

GREEDY = SamplingParams(max_tokens=5, temperature=0.0)
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
ASK = [{"role": "user", "content": "And you?"}]


def engine(folder) -> LLM:
    return LLM(folder, dtype="float32", device="cpu", use_ray=False)


def test_a_chat_is_answered_as_the_text_that_its_template_makes(chat_model):
    with engine(chat_model) as llm:
        hello, ask = llm.chat([HELLO, ASK], GREEDY)
        texts = ["<system>Be brief.\n<user>Hi\n<assistant>", "<user>And you?\n<assistant>"]
        assert [hello.prompt_token_ids, ask.prompt_token_ids] == [*map(llm.tokenizer.encode, texts)]
        from_texts = llm.generate(texts, GREEDY)
        assert [hello.outputs, ask.outputs] == [it.outputs for it in from_texts]
        assert [it.outputs for it in llm.chat(HELLO, GREEDY)] == [hello.outputs]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat = parse_messages([{"role": "user", "content": parts}])
    assert chat == [{"role": "user", "content": "one\ntwo"}]


@pytest.mark.parametrize("messages", [[], [[]], [5], [{"role": "user"}], [[{"content": "x"}]]])
def test_messages_that_are_no_chat_are_refused_and_an_empty_list_is_nothing(chat_model, messages):
    with engine(chat_model) as llm:
        if not messages:
            assert llm.chat(messages) == []
            return
        with pytest.raises(ValueError, match="messages"):
            llm.chat(messages)


def test_a_model_without_a_template_says_so(text_model):
    with engine(text_model) as llm, pytest.raises(ValueError, match="no chat template"):
        llm.chat(ASK)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ 1 + messages }}", "{{ x.y.z }}"],
)
def test_whatever_a_template_raises_refuses_the_messages(chat_model, tmp_path, template):
    folder = shutil.copytree(chat_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="chat template refuses the messages: ."):
        Tokenizer(folder).encode_chat(ASK)


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<assistant>{% endif %}"
QWEN3_LIKE = """{%- set ns = namespace(last=-1) %}
{%- if tools %}
    {{- '<tools>\\n' }}{% for tool in tools %}{{- tool | tojson }}{% endfor %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
    {%- if m.role == 'tool' %}{{- '<result>' + m.content }}{% continue %}{% endif %}
    {{- '<' + m.role + '>' + m.content.strip() + '\\n' }}
    {%- if m.reasoning_content %}{{- '<think>' + m.reasoning_content }}{% endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '<call>' }}{{ call.function.name }} {{ call.function.arguments | tojson(indent=2) }}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant>\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think></think>' }}
    {%- endif %}
{%- endif %}"""
TEMPLATES = [
    TURNS + BEGIN,
    QWEN3_LIKE,
    "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}"
    "{% endfor %}{# tools #}",
    "{{ bos_token }}{{ dict(a=1)['a'] }}{{ tools | tojson }}" + TURNS + "{{ reasoning_effort }}",
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é<"}'}}
TEXT = st.text(st.sampled_from("ab \n<é\u200b"), max_size=6)
TURN = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXT}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXT},
        optional={"tool_calls": st.just([CALL]), "reasoning_content": TEXT},
    ),
    st.fixed_dictionaries(
        {"role": st.just("tool"), "tool_call_id": st.just("c1"), "content": TEXT}
    ),
)


def with_template(folder, template, chat_model) -> Tokenizer:
    shutil.copytree(chat_model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizers(chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    found = [with_template(folder / str(i), it, chat_model) for i, it in enumerate(TEMPLATES)]
    yield found
    for tokenizer in found:
        tokenizer.close()


@given(
    which=st.integers(0, len(TEMPLATES) - 1),
    chat=st.lists(TURN, min_size=1, max_size=5),
    tools=st.sampled_from([None, [TOOL]]),
    begins=st.booleans(),
    thinking=st.sampled_from([{}, {"enable_thinking": False}, {"reasoning_effort": "low"}]),
)
@settings(max_examples=60)
def test_chats_are_formatted_as_by_transformers(tokenizers, which, chat, tools, begins, thinking):
    tokenizer, messages = tokenizers[which], parse_messages(chat)
    if which == 0:
        tools = None  # it describes none
    options = ChatOptions(tools, begins, chat_template_kwargs=thinking)
    wanted = tokenizer.hf.apply_chat_template(
        messages, tools=tools, add_generation_prompt=begins, tokenize=False, **thinking
    )
    assert tokenizer.format_chat(messages, options) == wanted


@given(chat=st.lists(TURN, max_size=2), final=TEXT.filter(str.strip), which=st.integers(0, 2))
def test_a_final_message_is_continued_as_by_transformers(tokenizers, chat, final, which):
    messages = parse_messages([*chat, {"role": "assistant", "content": final}])
    tokenizer = tokenizers[which]
    wanted = tokenizer.hf.apply_chat_template(
        messages, continue_final_message=True, add_generation_prompt=False, tokenize=False
    )
    options = ChatOptions(continue_final_message=True)
    found = tokenizer.format_chat(messages, options)
    assert found == wanted and found.rstrip().endswith(final.strip())


def test_a_model_s_thinking_is_switched_off_from_python_and_from_lines(chat_model, tmp_path):
    tokenizer = with_template(tmp_path / "model", QWEN3_LIKE, chat_model)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    wanted = tokenizer.encode("<user>And you?\n<assistant>\n<think></think>")
    with engine(tokenizer.folder) as llm:
        assert llm.chat(ASK, GREEDY, **off)[0].prompt_token_ids == wanted
        assert llm.chat(ASK, GREEDY)[0].prompt_token_ids == wanted[: -len("<think></think>")]
    bodies = [off, {"reasoning_effort": "none"}, off | {"reasoning_effort": "high"}]
    lines = [json.dumps({"body": {"messages": ASK} | body}).encode() for body in bodies]
    for line in read_lines(lines, GREEDY):
        assert tokenizer.encode_chat(line.messages, line.chat) == wanted


def test_an_answer_continues_the_final_message(chat_model):
    chat = [*ASK, {"role": "assistant", "content": "I am"}]
    with engine(chat_model) as llm:
        (told,) = llm.chat(chat, GREEDY, continue_final_message=True)
        (text,) = llm.generate("<user>And you?\n<assistant>I am", GREEDY)
    assert told.prompt_token_ids == text.prompt_token_ids and told.outputs == text.outputs


def test_the_role_developer_becomes_system_for_templates_without_it(chat_model, tmp_path):
    chat = parse_messages([{"role": "developer", "content": "Be brief."}, *ASK])
    with engine(chat_model) as llm:
        assert llm.tokenizer.format_chat(chat).startswith("<system>Be brief.\n<user>")
    knows = with_template(tmp_path / "model", TURNS + "{# developer #}", chat_model)
    assert knows.format_chat(chat).startswith("<developer>Be brief.\n")


def test_a_chat_with_tools_takes_the_template_for_tools(chat_model, tmp_path):
    folder = shutil.copytree(chat_model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    named = [
        {"name": "default", "template": TURNS},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    tokenizer = Tokenizer(folder)
    assert tokenizer.format_chat(ASK) == "<user>And you?\n"
    assert tokenizer.format_chat(ASK, ChatOptions([TOOL])) == str([TOOL])
    del tokenizer.hf.chat_template["default"]
    with pytest.raises(ValueError, match=r"several chat templates \(tool_use\), none of them"):
        tokenizer.format_chat(ASK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": [{"type": "web_search"}]}, "only functions are supported"),
        ({"tools": "f"}, "tools is 'f'; it must be a list"),
        ({"add_generation_prompt": 1}, "add_generation_prompt is 1; it must be true or false"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "give one of them"),
        ({"chat_template_kwargs": ["x"]}, "it must be an object"),
        ({"chat_template_kwargs": {"messages": []}}, "has 'messages', which it can't set"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        ChatOptions(**options)


def test_tools_that_a_template_would_leave_out_are_refused(chat_model):
    with engine(chat_model) as llm, pytest.raises(ValueError, match="describes no tools"):
        llm.chat(ASK, GREEDY, tools=[TOOL])


NOW = datetime(2026, 1, 2, 3, 4, 5, 678)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set s = namespace(t='a') %}{% for i in range(99) %}{% set s.t = s.t ~ s.t %}"
        "{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 'a'.center(10**12) }}",
        "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{{ " + "(" * 9999 + " }}",
        "{{ " + "-" * 99999 + "1 }}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for %}",
    ],
)  # fmt: skip
def test_no_template_stalls_or_crashes_the_run_or_leaves_its_sandbox(tokenizers, template):
    """In any thread; and the next chat, of another template, is formatted as ever."""
    errors: list[str] = []
    damaged = ChatTemplate(template, {}, max_seconds=0.5)

    def ask() -> None:
        with pytest.raises(ValueError, match="the model's chat template") as refused:
            damaged.render(ASK, ChatOptions(), NOW)
        errors.append(str(refused.value))

    started = time.monotonic()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert len(errors) == 1 and time.monotonic() - started < 60
    assert tokenizers[0].format_chat(ASK) == "<user>And you?\n<assistant>"
    damaged.close()


def test_all_chats_of_a_run_see_the_same_time(chat_model, tmp_path):
    template = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}"
    tokenizer = with_template(tmp_path / "model", template, chat_model)
    first, again = tokenizer.format_chat(ASK), tokenizer.format_chat(ASK)
    assert first == again == tokenizer.now.strftime("%Y-%m-%d %H:%M:%S.%f")
    tokenizer.now = NOW
    assert tokenizer.format_chat(ASK) == "2026-01-02 03:04:05.000678"


def test_a_closed_template_leaves_no_process_and_starts_again(chat_model):
    with engine(chat_model) as llm:
        text = llm.tokenizer.format_chat(ASK)
        (template,) = llm.tokenizer._templates.values()
        process = template._process
        assert process.poll() is None
    assert process.poll() is not None
    assert template.render(ASK, ChatOptions(), NOW) == text
    template.close()
