"""Sampling parameters, requests and their outputs, under vLLM's names. No tensors here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from sys import float_info
from typing import Any, NamedTuple

from flexgen_ray.checks import (
    Check,
    explains_unknown,
    instance,
    integer,
    number,
    optional,
    wrong_value,
)

# Parameters of vLLM, OpenAI and transformers that have another name here, or none.
_ELSEWHERE = {
    "best_of": "use n, and choose among the answers by cumulative_logprob",
    "num_return_sequences": "use n",
    "max_new_tokens": "use max_tokens",
    "max_length": "use max_tokens, which counts new tokens alone",
    "min_new_tokens": "use min_tokens",
    "do_sample": "use temperature=0 for greedy answers",
    "stop_strings": "use stop",
    "eos_token_id": "use stop_token_ids",
    "top_logprobs": "use logprobs",
    **dict.fromkeys(
        ("use_beam_search", "num_beams", "beam_width", "length_penalty", "early_stopping"),
        "there is no beam search here; leave it out",
    ),
    **dict.fromkeys(
        ("guided_decoding", "structured_outputs", "response_format", "guided_json"),
        "answers can't be held to a grammar here; say the form in the prompt",
    ),
    "logits_processors": "code of yours can't run between tokens here; leave it out",
    "truncate_prompt_tokens": "cut the prompt's token ids yourself",
    "detokenize": "answers always have their text; leave it out",
}
# Types that are Python's own, so no conversion is tried: a job has many requests.
_PLAIN = {int, float, bool, str, tuple, list, dict, type(None)}
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
DEFAULT_MAX_TOKENS = 16  # default of vLLM, and of OpenAI's completions
# Tokens that a plan expects of an answer that may fill the context. Recorded chats have answers of
# 211 on average (cli/bench/conversations_2000.csv), answers with reasoning some 1,450
# (cli/bench/lengths.py); this is about the geometric mean of the two.
EXPECTED_TOKENS = 512


@explains_unknown(_ELSEWHERE)
@dataclass(frozen=True)
class SamplingParams:
    """Parameters of an answer: choice of its tokens, its end, and what is returned with it.

    Names and meanings are vLLM's.

    Length and end

    max_tokens: maximum tokens of the answer; 16 by default. None is the rest of the model's
        context. 0 generates nothing, and is allowed with prompt_logprobs.
    min_tokens: tokens before which the answer can't end; 0 by default. Until then, end tokens and
        stop_token_ids can't be chosen, and stop strings are not looked for.
    stop: text, or list of texts, that end the answer. Empty by default.
    stop_token_ids: tokens that end the answer, as the model's own end tokens do. Empty by default.
    ignore_eos: don't end at the model's end tokens; False by default.
    include_stop_str_in_output: keep the stop string or stop token in the text; False by default.

    Choice of tokens

    temperature: divisor of the logits, 0 to 2; 1.0 by default. 0 is greedy.
    top_k: choose only among the k likeliest tokens; 0 (the default) or -1 is all.
    top_p: choose only among the likeliest tokens whose probabilities together reach this, above 0
        up to 1.0, the default.
    min_p: choose only among tokens at least this share as likely as the likeliest, 0 to 1; 0.0 by
        default.
    presence_penalty: taken once from the logits of tokens that the answer has, -2 to 2; 0.0 by
        default.
    frequency_penalty: taken from those logits as often as the answer has the token, -2 to 2; 0.0 by
        default.
    repetition_penalty: divides positive and multiplies negative logits of tokens that the prompt or
        the answer has, above 0; 1.0 (the default) is none.
    logit_bias: {token id: -100 to 100}, added to the tokens' logits before penalties. None by
        default.
    allowed_token_ids: the only tokens that may be chosen; None (the default) is all.
    bad_words: texts, or lists of token ids, that the answer never has. A text counts with and
        without a space before it, if both have the same number of tokens. Empty by default.
    seed: seed of the random numbers. The same prompt with the same seed gets the same answer in any
        call. None (the default) uses the run's seed and the request's place.
    n: number of answers, 1 to 128, each drawn by itself; 1 by default.

    Returned with the text

    logprobs: for each token of the answer, its log-probability before temperature and those of the
        so many likeliest tokens, 0 to 20. None (the default) returns none.
    prompt_logprobs: the same for the tokens of the prompt.
    skip_special_tokens: leave special tokens out of the text; True by default.

    Numbers and arrays of numpy are accepted. Raises ValueError for a wrong value, TypeError for an
    unknown name.
    """

    max_tokens: int | None = DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    n: int = 1
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        # Defaults are right, so only other values are checked: a job has many requests.
        changed = [(name, value) for name, value in vars(self).items()
                   if value is not _DEFAULTS[name]]  # fmt: skip
        for name, value in changed:
            parsed = _PARSERS.get(name, _plain)(value)
            if parsed is not value:
                object.__setattr__(self, name, parsed)
            is_right, wanted = _CHECKS[name]
            if not is_right(parsed):
                raise ValueError(wrong_value(name, parsed, wanted))
        if changed:
            self._check_combinations()

    @property
    def has_penalties(self) -> bool:
        """True if any of the three penalties changes the logits."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return penalties != (0, 0, 1)

    def _check_combinations(self) -> None:
        """Raise ValueError for values that only are wrong together."""
        most = self.max_tokens
        if most == 0 and self.prompt_logprobs is None:
            raise ValueError(wrong_value("max_tokens", most, _CHECKS["max_tokens"][1]))
        if most is not None and self.min_tokens > most:
            wanted = f"an integer, 0 to max_tokens ({most})"
            raise ValueError(wrong_value("min_tokens", self.min_tokens, wanted))
        if self.n > 1 and (not self.temperature or most == 0):
            raise ValueError(
                f"n is {self.n}, but with temperature {self.temperature} and max_tokens "
                f"{most} all answers would be alike; give n=1, or both above 0"
            )


def first_stop(text: str, stops: Sequence[str], after: int = 0) -> tuple[int, int] | None:
    """Begin and end of the first stop string in `text`; None without one.

    after: only stop strings that end beyond this many characters count.
    """
    begins = [text.find(stop, max(0, after - len(stop) + 1)) for stop in stops]
    places = [(at, at + len(stop)) for at, stop in zip(begins, stops, strict=True) if at >= 0]
    return min(places, default=None)


def _parse_bias(bias: object) -> object:
    """Bias by token id; ids may be strings, as in JSON. None for an empty one."""
    if not isinstance(bias, dict):
        return bias
    for token, value in bias.items():
        is_id = token.isdecimal() if isinstance(token, str) else _is_token(token)
        if not is_id or not _is_bias(value):
            raise ValueError(
                f"logit_bias has {token!r}: {value!r}; it must map token ids, integers from 0 up, "
                "to -100 to 100"
            )
    return {int(token): float(value) for token, value in bias.items()} or None


def _parse_words(words: object) -> object:
    several = _as_tuple(words)
    if not isinstance(several, tuple):
        return words
    return tuple(tuple(word) if isinstance(word, list) else word for word in several)


def _parse_allowed(ids: object) -> object:
    several: Any = None if ids is None else _as_tuple(ids)
    return tuple(sorted(set(several))) if several and _are_tokens(several) else several


def _are_tokens(value: object) -> bool:
    return isinstance(value, tuple) and all(map(_is_token, value))


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)


def _are_words(value: object) -> bool:
    return isinstance(value, tuple) and all(
        word and (isinstance(word, str) or _are_tokens(word)) for word in value
    )


def _as_tuple(value: object) -> object:
    """Items of any collection, or a text as the only item; other values unchanged."""
    if value is None or isinstance(value, str):
        return () if value is None else (str(value),)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        return value
    return tuple(item if type(item) in _PLAIN else _plain(item) for item in value)


def _plain(value: Any) -> object:
    """Python's number for another library's, such as numpy's; other values unchanged."""
    if type(value) in _PLAIN or isinstance(value, int | float) or not isinstance(value, Real):
        return value
    return value.item() if hasattr(value, "item") else float(value)


_DEFAULTS = {parameter.name: parameter.default for parameter in fields(SamplingParams)}
_PARSERS: dict[str, Callable[[Any], object]] = {
    "stop": _as_tuple,
    "stop_token_ids": _as_tuple,
    "logit_bias": _parse_bias,
    "allowed_token_ids": _parse_allowed,
    "bad_words": _parse_words,
}
_is_token = integer(0)
_is_bias = number(-100, 100)
_flag: Check = instance(bool), "true or false"
_top: Check = optional(integer(0, MAX_LOGPROBS)), f"an integer, 0 to {MAX_LOGPROBS}"
_penalty: Check = number(-2, 2), "-2 to 2"
_CHECKS: dict[str, Check] = {
    "max_tokens": (optional(integer(0)),
                   "an integer from 1 up, None for the rest of the model's context, or 0 if the "
                   "prompt's log-probabilities are asked for"),
    "min_tokens": (integer(0), "an integer, 0 to max_tokens"),
    "stop": (_are_texts, "non-empty strings"),
    "stop_token_ids": (_are_tokens, "a list of token ids, integers from 0 up"),
    "ignore_eos": _flag,
    "include_stop_str_in_output": _flag,
    "temperature": (number(0, 2), "0 (greedy) to 2"),
    "top_k": (integer(-1), "an integer from 1 up, or 0 or -1 for all"),
    "top_p": (number(0, 1, above=True), "above 0 and at most 1"),
    "min_p": (number(0, 1), "0 to 1"),
    "presence_penalty": _penalty,
    "frequency_penalty": _penalty,
    "repetition_penalty": (number(0, float_info.max, above=True), "above 0, and 1 for none"),
    "logit_bias": (optional(instance(dict)), "an object, token ids to -100 to 100"),
    "allowed_token_ids": (lambda ids: ids is None or (bool(ids) and _are_tokens(ids)),
                          "a list of token ids, integers from 0 up, one at least"),
    "bad_words": (_are_words, "a list of non-empty strings, or of lists of token ids"),
    "seed": (optional(integer()), "an integer"),
    "n": (integer(1, MAX_SAMPLES), f"an integer, 1 to {MAX_SAMPLES}"),
    "logprobs": _top,
    "prompt_logprobs": _top,
    "skip_special_tokens": _flag,
}  # fmt: skip


class Score(NamedTuple):
    """Score of a token, before temperature.

    logprob: logarithm of its probability. rank: its place among all tokens, from 1, the likeliest.
    top: (token, logprob) of the likeliest tokens, as many as the request asks for.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


SlotScores = list[tuple[int, list[Score]]]  # (slot, scores in the order of its row's tokens)


@dataclass(frozen=True)
class Request:
    """One prompt with its parameters, as the engine takes it; it gets a single answer.

    index: place in the input, unique in a run.
    prompt_token_ids, params: the prompt, and its parameters; max_tokens is never None here.
    forced_token_ids: tokens that the answer begins with, however unlikely they are.
    scored_from: place, in prompt and answer together, of the first token that is scored, with all
        tokens after it. The very first token never is: it has no probability without a context.
    top: number of likeliest tokens that each score names.
    generated, scores: tokens of the answer, and scores from scored_from on, that are known already;
        the request goes on after them.
    sample, first: number of this answer among several to one request, and that request's index.
    limit: name of what sets the answer's length: "max_tokens" or "context", in files also "line",
        "job" or "default".
    bad_words: token ids of each sequence that the answer never has.
    is_open: True if max_tokens was not set, so that only the context limits the answer.
    """

    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    forced_token_ids: list[int] = field(default_factory=list)
    scored_from: int | None = None
    top: int = 0
    generated: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    sample: int = 0
    first: int | None = None
    limit: str = "max_tokens"
    bad_words: tuple[tuple[int, ...], ...] = ()
    is_open: bool = False

    def __post_init__(self) -> None:
        assert self.scored_from is None or self.scored_from > 0

    @property
    def max_seq_len(self) -> int:
        """Maximum tokens of prompt and answer together."""
        return len(self.prompt_token_ids) + self.max_tokens

    @property
    def max_tokens(self) -> int:
        """Maximum tokens of the answer, within the model's context."""
        assert self.params.max_tokens is not None
        return self.params.max_tokens

    @property
    def expected_tokens(self) -> int:
        """Tokens of the answer that a plan expects: max_tokens, or a guess where it was not set."""
        return min(self.max_tokens, EXPECTED_TOKENS) if self.is_open else self.max_tokens

    @property
    def expected_lengths(self) -> tuple[int, int]:
        """Tokens of the prompt, and of the answer that a plan expects."""
        return len(self.prompt_token_ids), self.expected_tokens


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token, its rank from 1, and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]  # by token id; the token that stands in the text comes first


@dataclass(frozen=True)
class CompletionOutput:
    """One answer.

    finish_reason: "stop" (end token, stop token or stop string) or "length". logprobs: one dict a
    token, if asked for. index: place among several answers to one request. stop_reason: stop string
    or token of stop_token_ids that ended the answer; None for the model's end token and "length".
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[Logprobs | None] | None = None
    index: int = 0
    stop_reason: int | str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Log-probability of the whole answer; None if log-probabilities were not asked for."""
        if self.logprobs is None:
            return None
        pairs = zip(self.token_ids, self.logprobs, strict=True)
        return sum(logprobs[token].logprob for token, logprobs in pairs if logprobs)


@dataclass(frozen=True)
class RequestMetrics:
    """Times at which a request reached the engine, had its first token, and was finished.

    Seconds since 1970 as this process saw them; a stage on Ray reports tokens up to 0.05 s late.
    first_token_time: None if no token was generated.
    """

    arrival_time: float
    first_token_time: float | None
    finished_time: float


@dataclass(frozen=True)
class RequestOutput:
    """Prompt and answers of a request, under vLLM's names.

    index: place of the request in its call. prompt: the prompt's text; None for token ids.
    outputs: answers, `n` of them. prompt_logprobs: one dict a token of the prompt, if asked for.
    scores: score of each token from the first that was to be scored. error: sentence on why the
    request failed, with `outputs` empty; None if it was answered. metrics: times; None if it never
    ran.
    """

    index: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] | None = None
    scores: list[Score] = field(default_factory=list)
    error: str | None = None
    metrics: RequestMetrics | None = field(default=None, compare=False)

    @property
    def request_id(self) -> str:
        """Place of the request in its call, from 0, as text."""
        return str(self.index)

    @property
    def finished(self) -> bool:
        """Always True: an output is returned only when its request is answered or has failed."""
        return True


@dataclass(frozen=True)
class Finished:
    """A finished request as a stage reports it: tokens, not text.

    stop_reason: stop string or token of stop_token_ids that ended it; None for the model's end
    token. error: sentence on why the request failed, whose tokens are then void; None if it was
    answered.
    """

    index: int
    token_ids: list[int]
    finish_reason: str
    scores: list[Score] = field(default_factory=list)
    stop_reason: int | str | None = None
    error: str | None = None
