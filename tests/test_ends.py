"""An answer ends where the model or the user says, and at no other place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_ray import LLM, SamplingParams

SPECIAL = "~"
LONG = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Diverse answers of one character a token, of which ~ is a special one."""
    folder = tmp_path_factory.mktemp("ends") / "model"
    tiny.save("llama", folder, tie_word_embeddings=False)
    tiny.add_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(SPECIAL, special=True)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, use_ray=False, dtype="float32") as llm:
        yield llm


def token(character: str) -> int:
    return ord(character) - 30


def test_end_tokens_are_those_of_config_generation_config_and_tokenizer(llm, model, tmp_path):
    """As transformers' generate ends with all of them."""
    folder = shutil.copytree(model, tmp_path / "model")
    greedy = SamplingParams(LONG, 0.0)
    prompts = tiny.prompts(6, 10, seed=5)
    whole = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
    ends = list(dict.fromkeys(answer[at] for at, answer in zip((9, 7, 5), whole, strict=False)))
    assert len(ends) == 3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[2])
    tokenizer.save_pretrained(folder)
    for name, end in zip(("config.json", "generation_config.json"), ends, strict=False):
        values = json.loads((folder / name).read_text()) | {"eos_token_id": [end, 10**6, -1]}
        (folder / name).write_text(json.dumps(values))
    with LLM(folder, use_ray=False, dtype="float32") as ended:
        assert set(ended.config.eos_token_ids) == set(ends)
        outputs = ended.generate(prompts, greedy)
        (free,) = ended.generate(prompts[:1], SamplingParams(LONG, 0.0, ignore_eos=True))
        ended.generate(prompts[:1], SamplingParams(LONG, min_tokens=20))
    assert free.outputs[0].token_ids == whole[0]
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for output, prompt in zip(outputs, prompts, strict=True):
        made = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=LONG, do_sample=False, eos_token_id=ends, pad_token_id=0,
        )  # fmt: skip
        (answer,) = output.outputs
        assert answer.token_ids == made[0, len(prompt) :].tolist()
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] in ends else "length")
        shown = answer.token_ids[: -(answer.finish_reason == "stop") or None]
        assert answer.text == ended.tokenizer.text(shown)
    assert {output.outputs[0].finish_reason for output in outputs} >= {"stop"}


@pytest.mark.parametrize("keeps", [False, True])
def test_a_special_token_is_a_stop_string_alone_and_with_others(llm, keeps):
    """Texts leave special tokens out, so a stop string with one is looked for beside them."""
    seeds = [SamplingParams(LONG, 2.0, seed=seed) for seed in range(8)]
    whole = {it.index: it.outputs[0].token_ids for it in llm.generate(["Hello"] * 8, seeds)}
    index = next(i for i, it in whole.items() if token(SPECIAL) in it[3:-1])
    at = whole[index].index(token(SPECIAL), 3)
    written = llm.tokenizer.text(whole[index], skip=False)
    assert written[at] == SPECIAL and whole[index].index(token(SPECIAL)) == at
    for start, end in ((at, at + 1), (at, at + 2), (at - 2, at + 1), (at - 1, at + 2)):
        stop = written[start:end]
        params = SamplingParams(
            LONG, 2.0, seed=index, stop=["zzzz", stop], include_stop_str_in_output=keeps
        )
        (output,) = llm.generate(["Hello"], params)
        (answer,) = output.outputs
        assert answer.token_ids == whole[index][:end] and answer.finish_reason == "stop"
        assert answer.text == written[:start] + (stop if keeps else "")


def test_a_stop_string_that_the_tokenizer_cannot_make_is_refused_with_the_reason(llm):
    with pytest.raises(ValueError, match="stop 'Stöp' can't come up in an answer.*makes 'St.p'"):
        llm.generate(["Hello"], SamplingParams(stop=["ok", "Stöp"]))
    llm.generate(["Hello"], SamplingParams(stop=["ok", f"o{SPECIAL}k", " ", "  x "]))
