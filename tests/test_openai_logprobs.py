"""`logprobs` and `echo` of a completion, from the input line to the output row."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.batch.job import read_job, run_job
from flexgen_ray.batch.journal import Journal
from flexgen_ray.batch.logprobs import Echo, logprobs_object
from flexgen_ray.batch.request_lines import read_lines
from flexgen_ray.request import CompletionOutput, Logprob, RequestOutput

BODIES = {
    "plain": {"max_tokens": 4},
    "scored": {"max_tokens": 4, "logprobs": 2},
    "echo": {"max_tokens": 4, "echo": True},
    "both": {"max_tokens": 4, "echo": True, "logprobs": 0},
    "prompt": {"max_tokens": 0, "echo": True, "logprobs": 3},
    "nothing": {"max_tokens": 0, "echo": True},
    "alone": {"prompt": "x", "max_tokens": 0, "echo": True, "logprobs": 3},
    "ids": {"prompt": [40, 41, 42], "max_tokens": 1, "echo": True, "logprobs": 1},
}
PROMPT = "Hello, you"


@pytest.fixture(scope="module")
def choices(text_model, tmp_path_factory) -> dict[str, dict]:
    """What the file of these requests was answered with: choices, or errors."""
    folder = tmp_path_factory.mktemp("job")
    lines = [
        json.dumps({"custom_id": name, "body": {"prompt": PROMPT, "temperature": 0} | body})
        for name, body in BODIES.items()
    ]
    (folder / "in.jsonl").write_text("\n".join(lines))
    with LLM(text_model, dtype="float32", device="cpu", use_ray=False) as llm:
        with Journal(folder / "out.jsonl") as journal:
            lines = read_job(folder / "in.jsonl", journal, SamplingParams(), {})
            run_job(llm, journal, lines)
    found = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    bodies = {row["custom_id"]: row["response"]["body"] for row in found}
    assert set(bodies) == set(BODIES)
    return {name: body | body.get("choices", [{}])[0] for name, body in bodies.items()}


def likely(folder, tokens: list[int]) -> torch.Tensor:
    """Log-softmax of transformers: row i is of what follows token i."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def test_log_probabilities_come_only_where_they_were_asked_for(choices):
    assert choices["plain"]["logprobs"] is None and choices["echo"]["logprobs"] is None
    answer = choices["plain"]["text"]
    assert choices["scored"]["text"] == answer
    assert choices["echo"]["text"] == choices["both"]["text"] == PROMPT + answer
    assert choices["prompt"]["text"] == PROMPT
    assert choices["prompt"]["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("name, first, top", [("scored", 10, 2), ("both", 0, 0), ("prompt", 0, 3)])
def test_log_probabilities_are_those_of_transformers(choices, text_model, name, first, top):
    """The tokenizer here makes one token of a character: its code less 30."""
    found = choices[name]["logprobs"]
    text = (PROMPT if not first else "") + "".join(found["tokens"])[0 if first else len(PROMPT) :]
    assert text == choices[name]["text"] and found["tokens"] == list(text)
    assert found["text_offset"] == list(range(len(text)))
    tokens = [ord(character) - 30 for character in (PROMPT if first else "") + text]
    rows = likely(text_model, tokens)
    for at, (own, tops) in enumerate(
        zip(found["token_logprobs"], found["top_logprobs"], strict=True), start=first
    ):
        if at == 0:
            assert own is None and tops is None
            continue
        wanted = rows[at - 1]
        assert own == pytest.approx(wanted[tokens[at]].item(), abs=1e-4)
        best = {chr(token + 30) for token in wanted.topk(top).indices.tolist()} if top else set()
        assert set(tops) == best | {chr(tokens[at] + 30)}
        for character, value in tops.items():
            assert value == pytest.approx(wanted[ord(character) - 30].item(), abs=1e-4)


def test_token_ids_echo_as_their_text(choices):
    found = choices["ids"]
    assert found["text"][:3] == "FGH" and found["logprobs"]["tokens"][:3] == ["F", "G", "H"]


def test_logprobs_of_nothing_are_an_error(choices):
    assert "max_tokens is 0" in choices["nothing"]["error"]["message"]
    assert "of 1" in choices["alone"]["error"]["message"]
    (line,) = read_lines([b'{"prompt": "x", "echo": "yes"}'], SamplingParams())
    assert "echo is 'yes'" in line.error
    (line,) = read_lines([b'{"prompt": "x", "logprobs": 21}'], SamplingParams())
    assert "logprobs is 21" in line.error


def test_an_echo_without_a_tokenizer_costs_only_itself(tiny_models, tmp_path):
    lines = [{"custom_id": str(echo), "prompt": [5, 6], "echo": echo} for echo in (True, False)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with LLM(tiny_models["opt"][0], use_ray=False) as llm, Journal(tmp_path / "out") as journal:
        run_job(llm, journal, read_job(tmp_path / "in.jsonl", journal, SamplingParams(), {}))
    rows = map(json.loads, (tmp_path / "out").read_text().splitlines())
    found = {row["custom_id"]: row["response"] for row in rows}
    assert found["False"]["status_code"] == 200
    assert "has no tokenizer" in found["True"]["body"]["error"]["message"]


@given(st.lists(st.sampled_from([" a", "b", "\ufffd", "<s>", "", "é"]), min_size=1))
def test_offsets_never_fall_and_point_at_the_token(tokens):
    """Special tokens and pieces of characters aren't in the text."""
    text = "".join({"<s>": "", "\ufffd": "ü"}.get(token, token) for token in tokens)
    told = [{i: Logprob(-math.inf, 1, token)} for i, token in enumerate(tokens)]
    answer = CompletionOutput(text, list(range(len(tokens))), "stop", told)
    echo = Echo("", "")
    output = RequestOutput(0, None, [], [answer], [])
    for asked in (echo, None):
        found = logprobs_object(output, answer, text, asked)
        offsets = found["text_offset"]
        assert offsets == sorted(offsets) and 0 <= offsets[0] and offsets[-1] <= len(text)
        assert json.dumps(found["token_logprobs"], allow_nan=False)
        assert set(found["token_logprobs"]) == {-9999.0}
    if not {"\ufffd", "<s>"} & set(tokens):
        places = zip(tokens, offsets, strict=True)
        assert all(text.startswith(token, place) for token, place in places)
