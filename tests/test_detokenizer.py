"""Text of tokens: parts add up to the whole, as transformers decodes it, for each kind of
tokenizer."""

from __future__ import annotations

import json
from functools import cache
from os.path import commonprefix

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.batch.job import read_job, run_job
from flexgen_ray.batch.journal import Journal
from flexgen_ray.processor import request_output
from flexgen_ray.request import Request, first_stop
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.text.detokenizer import Detokenizer
from flexgen_ray.text.stop_strings import StopStrings
from flexgen_ray.text.tokenizer import Tokenizer as OurTokenizer

TEXTS = ["In the year of our stars I don't know who's there.", "He said: 'it is , isn't it ?'",
         "naïve café über", "你好 世界 😀 €5", "  two  spaces\n\nand lines "] * 4  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BAD = "\ufffd"


def byte_level() -> Tokenizer:
    """As GPT-2's, OPT's, Llama 3's, Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def llama() -> Tokenizer:
    """As Llama 2's: words begin with ▁, rare characters are bytes, a text's first space goes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=[*SPECIAL, *BYTES])
    tokenizer.train_from_iterator(TEXTS[:2], trainer)
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = made["added_tokens"][: len(SPECIAL)]  # bytes are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT's, with transformers' clean-up of spaces before punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@cache
def hf(kind) -> PreTrainedTokenizerFast:
    tokenizer = kind()
    tokenizer.add_tokens([AddedToken("<|plain|>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=kind is word_piece,
    )  # fmt: skip


KINDS = pytest.mark.parametrize("kind", [byte_level, llama, unigram, word_piece])
texts = st.lists(
    st.sampled_from([*TEXTS[0].split(), "你", "😀", "é", " ", ".", "n't", "'", "</s>"])
)
places = st.lists(st.integers(0, 10**6), min_size=3, max_size=40)
long_places = st.lists(st.integers(0, 10**6), min_size=3, max_size=120)


def sequence(kind, words: list[str], random: list[int]) -> list[int]:
    """Tokens of a text, then any tokens: pieces of characters, special ones."""
    tokenizer = hf(kind)
    return tokenizer.encode(" ".join(words)) + [place % len(tokenizer) for place in random]


@KINDS
@given(texts, places, places, st.booleans())
def test_parts_add_up_to_the_whole_text(kind, words, random, cuts, skip):
    """A part begins with what the part before left unfinished."""
    token_ids, whole = sequence(kind, words, random), hf(kind).decode
    text = Detokenizer(hf(kind)).text
    for cut in (cut % (len(token_ids) + 1) for cut in cuts):
        before = whole(token_ids[:cut], skip_special_tokens=skip)
        both = whole(token_ids, skip_special_tokens=skip)
        added = text(token_ids, cut, None, skip)
        # A character that both have a part of changes the end of the text before.
        assert added == both[len(commonprefix([before, both])) :]


@KINDS
@given(texts, places, places)
def test_token_texts_join_to_the_text(kind, words, random, cuts):
    token_ids, detokenizer = sequence(kind, words, random), Detokenizer(hf(kind))
    for first in {0, *(cut % (len(token_ids) + 1) for cut in cuts[:4])}:
        pieces = detokenizer.pieces(token_ids, first)
        assert len(pieces) == len(token_ids) - first
        assert "".join(pieces) == detokenizer.text(token_ids, first)


def ours(kind, tmp_path_factory) -> OurTokenizer:
    folder = tmp_path_factory.getbasetemp() / kind.__name__
    if not folder.exists():
        hf(kind).save_pretrained(folder)
    return OurTokenizer(folder)


@KINDS
@given(texts, long_places, st.data())
def test_the_first_stop_string_ends_an_answer_where_the_whole_text_has_it(
    kind, tmp_path_factory, words, random, data
):
    tokenizer = ours(kind, tmp_path_factory)
    token_ids = sequence(kind, words, random)
    begin = data.draw(st.integers(1, len(token_ids) - 1))
    prompt, answer = token_ids[:begin], token_ids[begin:]
    whole = tokenizer.text(token_ids, begin)
    written = tokenizer.text(token_ids, begin, skip=False)
    places = st.tuples(st.booleans(), st.integers(0, len(whole)), st.integers(1, 12))
    drawn = data.draw(st.lists(places, min_size=1, max_size=3))
    stops = tuple((written if it else whole)[at : at + size] or "zzz" for it, at, size in drawn)
    # Stop strings with special tokens in them are looked for in the text as it is written.
    special = tuple(stop for stop in stops if any(name in stop for name in SPECIAL))
    params = SamplingParams(
        len(answer), stop=stops, ignore_eos=True, min_tokens=data.draw(st.integers(0, len(answer)))
    )
    batcher = Scheduler(1, 1, len(token_ids), frozenset(), StopStrings(tokenizer).newest)
    request = Request(0, prompt, params)
    batcher.add([request])
    for token in answer:
        batcher.compose(0)
        batcher.accept(0, [0], [token])
        if batcher.is_done:
            break
    (finished,) = batcher.take_finished()
    output = request_output(request, finished, tokenizer).outputs[0]
    early = begin + params.min_tokens

    def found(last: int, some: tuple[str, ...], skip: bool) -> tuple[int, int] | None:
        searched_from = len(tokenizer.text(token_ids, begin, early, skip))
        return first_stop(tokenizer.text(token_ids, begin, last, skip), some, searched_from)

    for last in range(early + 1, len(token_ids) + 1):
        place = found(last, stops, True)
        if place or found(last, special, False):
            assert (finished.finish_reason, finished.token_ids) == ("stop", token_ids[begin:last])
            assert finished.stop_reason in stops
            text = tokenizer.text(token_ids, begin, last)
            assert output.text == text[: place[0]] if place else text.startswith(output.text)
            return
    assert (finished.finish_reason, finished.token_ids) == ("length", answer)
    assert output.text == whole


@pytest.mark.parametrize(("stop", "left"), [(" In", "In"), ("In<unk>", ""), ("n<unk>", "I")])
def test_a_cut_before_a_special_token_is_one_of_the_text_without_it(tmp_path_factory, stop, left):
    """The space before "In" is there only where the prompt's special token is, too."""
    tokenizer = ours(unigram, tmp_path_factory)
    token_ids = sequence(unigram, ["</s>", "In"], [0])
    params = SamplingParams(3, stop=stop)
    assert StopStrings(tokenizer).text(token_ids, 1, params) == left


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory):
    sizes = {"vocab_size": len(hf(llama)), "tie_word_embeddings": False}
    folder = tiny.save("llama", tmp_path_factory.mktemp("words"), **sizes)
    hf(llama).save_pretrained(folder)
    return folder


def test_answers_keep_the_space_that_divides_them_from_the_prompt(llama_model, tmp_path):
    """In files and in Python, for prompts as text and as token ids."""
    prompt = "In the year of"
    ids = hf(llama).encode(prompt)
    with LLM(llama_model, use_ray=False, dtype="float32") as llm, Journal(tmp_path / "out") as out:
        seeds = [SamplingParams(6, 2.0, seed=seed) for seed in range(40)]
        for output in llm.generate([ids] * len(seeds), seeds):
            whole = hf(llama).decode(ids + output.outputs[0].token_ids, skip_special_tokens=True)
            assert output.outputs[0].text == whole[len(prompt) :]
            if whole.startswith(f"{prompt} "):
                seed = output.index
        asked = {"max_tokens": 6, "temperature": 2, "echo": True, "logprobs": 2, "seed": seed}
        prompts = {"text": prompt, "ids": ids, "cut": hf(llama).encode("€")[:-1]}
        lines = [{"custom_id": key, "prompt": it, **asked} for key, it in prompts.items()]
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
        run_job(llm, out, read_job(tmp_path / "in.jsonl", out, SamplingParams(), {}))
    rows = map(json.loads, (tmp_path / "out").read_text().splitlines())
    choices = {it["custom_id"]: it["response"]["body"]["choices"][0] for it in rows}
    assert choices["text"]["text"] == choices["ids"]["text"]
    assert choices["text"]["text"].startswith(f"{prompt} ")
    for choice in choices.values():
        told, text = choice["logprobs"], choice["text"]
        assert "".join(told["tokens"]) == text
        ends = [*told["text_offset"][1:], len(text)]
        spans = zip(told["text_offset"], ends, strict=True)
        assert [text[start:end] for start, end in spans] == told["tokens"]
