"""Lengths of requests: those of a file or of a built-in mixture, some of them, and scaled.

Built in are three mixtures:

- 48 synthetic requests: 24 chats, 12 summaries and 12 extractions, whose lengths were drawn from
  log-normal distributions around a typical prompt and answer of each (90 and 110 tokens, 520 and
  90, 260 and 14), at most 900 and 300;
- `conversations`: 2,000 requests of the conversations in the Azure LLM inference trace 2023, the
  longest 10.3 times the mean (conversations_2000.csv; source and licence lie beside it);
- `long-answers`: 2,000 synthetic requests with prompts of 50 to 400 tokens and log-normal answers.

Knows lengths; runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from math import exp, log
from pathlib import Path
from random import Random
from statistics import NormalDist

from flexgen_ray.batch.request_lines import BatchLine, read_lines
from flexgen_ray.files.input_lines import open_input
from flexgen_ray.files.json_text import parse_object
from flexgen_ray.llm import LLM
from flexgen_ray.request import SamplingParams

BUILT_IN = "mixed_lengths_48.jsonl"
LONG_ANSWERS = 2000  # requests of the mixture
PROMPTS = 50, 400  # fewest and most tokens, uniform between
MEAN_ANSWER, MOST_ANSWER = 1450, 8000  # tokens; longer answers are cut to the most
SIGMA = 0.7  # of the logarithm of an answer's tokens
Lengths = list[tuple[int, int]]  # (tokens of the prompt, tokens of the answer) of each request


@dataclass(frozen=True)
class Mixture:
    """A built-in mixture. fills: the longest request is scaled up to a longer context too."""

    make: Callable[[], Lengths]
    fills: bool


def conversations() -> Lengths:
    """Lengths of 2,000 conversations of the Azure LLM inference trace 2023."""
    text = resources.files("flexgen_ray.cli.bench").joinpath("conversations_2000.csv").read_text()
    rows = [line.split(",") for line in text.splitlines()[1:]]
    return [(int(prompt), int(answer)) for prompt, answer in rows]


def long_answers() -> Lengths:
    """Lengths drawn with a fixed seed: uniform prompts, log-normal answers.

    An answer is drawn from each of LONG_ANSWERS equal parts of the distribution, so that the mean
    is near MEAN_ANSWER.
    """
    rng, logarithm = Random(0), NormalDist(log(MEAN_ANSWER) - SIGMA**2 / 2, SIGMA)
    parts = [(part + rng.random()) / LONG_ANSWERS for part in range(LONG_ANSWERS)]
    answers = [max(1, min(MOST_ANSWER, round(exp(logarithm.inv_cdf(it))))) for it in parts]
    rng.shuffle(answers)
    return [(rng.randint(*PROMPTS), answer) for answer in answers]


MIXTURES = {
    "conversations": Mixture(conversations, fills=True),
    "long-answers": Mixture(long_answers, fills=False),
}


def mixture_of(path: Path | None) -> Mixture | None:
    """The built-in mixture of this name; None for a file, which may have the name of one."""
    return None if path is None or path.exists() else MIXTURES.get(str(path))


def lengths_to_run(
    path: Path | None, llm: LLM, max_tokens: int, count: int | None, longest: int | None
) -> Lengths:
    """Lengths of the requests of a benchmark, in the order of the file.

    path: a file, the name of a built-in mixture, or None for the built-in 48 requests. max_tokens:
    of a file's requests that don't set it. count: number of requests to draw; None is all. longest:
    tokens of the longest request, prompt and answer together, to which all lengths are scaled; None
    is the model's context for a mixture that doesn't fit it or is to fill it, and leaves others.
    Raises ValueError for a count or a longest that can't be had, and as read_lengths does.
    """
    mixture, context = mixture_of(path), llm.config.max_seq_len
    lengths = read_lengths(path, llm, max_tokens) if mixture is None else mixture.make()
    lengths = lengths if count is None else draw(lengths, count)
    if longest is not None and longest > context:
        raise ValueError(
            f"--longest is {longest}, but the model's context is {context} tokens; lower it"
        )
    if longest is None and mixture is not None:
        longest = context if mixture.fills or _longest(lengths) > context else None
    return lengths if longest is None else scale(lengths, longest)


def draw(lengths: Lengths, count: int) -> Lengths:
    """Lengths of `count` requests, the longest among them, in their order.

    The others are the first of a shuffle with a fixed seed, so a smaller draw is part of a larger.
    Raises ValueError if there are fewer.
    """
    if count > len(lengths):
        raise ValueError(
            f"--num-requests is {count}, but --lengths has {len(lengths)} requests; lower it"
        )
    order = sorted(range(len(lengths)), key=lambda index: -sum(lengths[index]))
    longest, others = order[0], sorted(order[1:])
    Random(0).shuffle(others)
    return [lengths[index] for index in sorted([longest, *others[: count - 1]])]


def scale(lengths: Lengths, longest: int) -> Lengths:
    """Lengths multiplied by one factor and rounded, so that the longest request has `longest`
    tokens, prompt and answer together.

    No request is dropped: each keeps a token of the prompt and one of the answer.
    Raises ValueError if longest is less than these two.
    """
    if longest < 2:
        raise ValueError(
            f"--longest is {longest}; a request has a token of the prompt and one of the answer, "
            "so give 2 or more"
        )
    most = _longest(lengths)
    scaled = []
    for prompt_len, answer_len in lengths:
        total = max(2, _rounded((prompt_len + answer_len) * longest, most))
        prompt_len = min(max(1, _rounded(prompt_len * longest, most)), total - 1)
        scaled.append((prompt_len, total - prompt_len))
    return scaled


def _longest(lengths: Lengths) -> int:
    """Tokens of the longest request, prompt and answer together."""
    return max(map(sum, lengths))


def _rounded(numerator: int, denominator: int) -> int:
    """The quotient, to the nearest integer."""
    return (2 * numerator + denominator) // (2 * denominator)


def read_lengths(path: Path | None, llm: LLM, max_tokens: int) -> Lengths:
    """Lengths of the requests of a file, or of the built-in 48.

    max_tokens: of requests that don't set it. Raises ValueError, with the line, for a line that is
    neither lengths nor a request, and for a file without any.
    """
    if path is None:
        shipped = resources.files("flexgen_ray.cli.bench").joinpath(BUILT_IN)
        with resources.as_file(shipped) as built_in:
            return read_lengths(built_in, llm, max_tokens)
    lengths: Lengths = []
    with open_input(path) as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            try:
                lengths += _lengths_of_line(raw, llm, max_tokens)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not lengths:
        raise ValueError(f"{path} has no requests")
    return lengths


def _lengths_of_line(raw: bytes, llm: LLM, max_tokens: int) -> Lengths:
    value = parse_object(raw)
    if "prompt_len" not in value:
        return list(_lengths_of_request(raw, llm, max_tokens))
    prompt_len, answer_len = value["prompt_len"], value.get("max_tokens", max_tokens)
    for name, count in (("prompt_len", prompt_len), ("max_tokens", answer_len)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} is {count!r}; it must be a number of tokens, from 1 up")
    return [(prompt_len, answer_len)]


def _lengths_of_request(raw: bytes, llm: LLM, max_tokens: int) -> Iterator[tuple[int, int]]:
    """One pair for each prompt of a request line, or for its chat."""
    line: BatchLine
    (line,) = read_lines([raw], SamplingParams(max_tokens=max_tokens))
    if line.error is not None or line.params is None:
        raise ValueError((line.error or "not a request").removeprefix("line 1: "))
    answer_len = line.params.max_tokens or max_tokens
    if line.messages is not None:
        yield len(llm.tokenizer.encode_chat(line.messages, line.chat)), answer_len
    for prompt in line.prompts:
        tokens = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        yield len(tokens), answer_len
