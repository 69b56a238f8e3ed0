"""Chats: worded by the model's own template, or refused with the reason."""

from __future__ import annotations

import shutil

import pytest

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.messages import parse_messages
from flexgen_ray.tokenizer import Tokenizer

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
def test_what_is_no_chat_is_refused_or_nothing(chat_model, messages):
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
        Tokenizer(folder).chat(ASK)
