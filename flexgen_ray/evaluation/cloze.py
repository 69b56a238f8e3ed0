"""Cloze accuracy: how often a model's greedy choice is a text's last word (LAMBADA).

The task is that of Paperno et al. 2016. Knows lines of JSON, words and tokens; tokens are scored
elsewhere.
"""

from __future__ import annotations

import json

from flexgen_ray.evaluation.run import run_requests
from flexgen_ray.llm import LLM
from flexgen_ray.request import Request


def describe(figures: dict[str, float]) -> str:
    """One line on what `measure` returned."""
    return (
        f"accuracy {figures['accuracy']:.2%}: share of {figures['texts']:,} texts whose last word "
        "greedy decoding gives"
    )


def measure(llm: LLM, text: str, scored_in: str, max_texts: int | None) -> dict[str, float]:
    """Measure cloze accuracy.

    text: lines of {"text": ...}. scored_in: "prefill" or "decode", the kind of pass that scores.
    max_texts: number of texts to use; None for all.
    Returns {"accuracy": share of texts whose last word's tokens are all the likeliest ones,
    "texts": number of texts, "tokens": number of tokens of their last words}.
    Raises ValueError, naming the line, for a line without a text of two words.
    """
    lines = [pair for pair in enumerate(text.split("\n"), start=1) if pair[1].strip()]
    requests: list[Request] = []
    for number, line in lines[:max_texts]:
        try:
            requests.append(_request(llm, len(requests), parse_text(line), scored_in == "decode"))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    if not requests:
        raise ValueError('there is no text; give lines of {"text": ...}')
    outputs = run_requests(llm, requests)
    right = sum(all(it.rank == 1 for it in output.scores) for output in outputs)
    tokens = sum(len(output.scores) for output in outputs)
    return {"accuracy": right / len(outputs), "texts": len(outputs), "tokens": tokens}


def parse_text(line: str) -> str:
    """Return the text of a line {"text": ...}. Raises ValueError if it has none."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError('no {"text": ...} with a string')
    return text.strip()


def _request(llm: LLM, index: int, text: str, in_decode: bool) -> Request:
    """Return a request that scores a text's last word, with the space before it.

    A text longer than the model's context loses its beginning.
    """
    context, _, word = text.rpartition(" ")
    if not context or not word:
        raise ValueError(f"the text is {text!r}; a last word needs another one before it")
    token_ids = llm.tokenizer.encode(text)
    first = len(llm.tokenizer.encode(context.rstrip()))
    cut = max(len(token_ids) - llm.max_model_len, 0)
    return llm.score_request(index, token_ids[cut:], first - cut, in_decode)
