"""Requests and their outputs, in the words vLLM's users know. No tensors here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, NamedTuple

from flexgen_ray.names import explains_unknown

# Names of vLLM, OpenAI and transformers that have another one here, or none.
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
# Types of values that need no look: this happens for every request of a job.
_PLAIN = {int, float, bool, str, tuple, list, dict, type(None)}
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
DEFAULT_MAX_TOKENS = 16  # vLLM's and OpenAI's, of completions
MAX_TOKENS_UNSET = 2048  # most tokens of an answer that nobody limits


@explains_unknown(_ELSEWHERE)
@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    temperature 0 is greedy. With a `seed` the same prompt gives the same answer wherever it stands;
    without one the run's seed and the request's index decide. logprobs, prompt_logprobs: of each
    token of the answer and the prompt, its logarithm of the probability before temperature, and
    those of as many likeliest ones; None asks for nothing. max_tokens: most tokens of the
    answer; None for the rest of the model's context, 2,048 at most; 0 if only the prompt's
    log-probabilities are asked for.

    top_k: only so many of the likeliest tokens may be chosen; 0 or -1 for all. min_p: only those
    at least this share as likely as the likeliest. presence_penalty, frequency_penalty: taken from
    the logits of tokens that the answer has, once or as often as it has them; repetition_penalty
    divides the positive logits, and multiplies the negative ones, of tokens of prompt and answer.
    stop_token_ids end an answer as an end token does, even with ignore_eos; before min_tokens
    neither these nor end tokens can be chosen, and stop strings are not looked for. n: how many
    answers, each drawn by itself. include_stop_str_in_output: the text keeps what ended it.

    logit_bias: by token id, -100 to 100, added to its logit before penalties. allowed_token_ids:
    only these may be chosen. bad_words: texts, or sequences of token ids, that the answer never
    has; a text counts with and without a space before it, where both take as many tokens.
    skip_special_tokens: leave special tokens out of the text.
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
        for name, value in vars(self).items():
            if type(value) not in _PLAIN and isinstance(value, Number):
                object.__setattr__(self, name, _plain(value))
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        least, most = 1 if self.prompt_logprobs is None else 0, self.max_tokens
        if most is not None and (not _is_number(most, int) or most < least):
            raise ValueError(
                f"max_tokens is {most!r}; it must be an integer from 1 up, None for the rest of "
                "the model's context, or 0 if the prompt's log-probabilities are asked for"
            )
        if not _is_number(self.temperature, int | float) or not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature is {self.temperature!r}; it must be 0 (greedy) to 2")
        if not _is_number(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1")
        if self.seed is not None and not _is_number(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}; it must be an integer")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        for name in ("logprobs", "prompt_logprobs"):
            top = getattr(self, name)
            if top is not None and (not _is_number(top, int) or not 0 <= top <= MAX_LOGPROBS):
                raise ValueError(f"{name} is {top!r}; it must be an integer, 0 to {MAX_LOGPROBS}")
        is_tuple = isinstance(self.stop, tuple)
        if not is_tuple or any(not isinstance(text, str) or not text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; it must be non-empty strings")
        self._check_ranges()
        self._check_ends()
        object.__setattr__(self, "logit_bias", _parse_bias(self.logit_bias))
        object.__setattr__(self, "allowed_token_ids", _parse_allowed(self.allowed_token_ids))
        object.__setattr__(self, "bad_words", _parse_words(self.bad_words))
        if not _is_number(self.n, int) or not 1 <= self.n <= MAX_SAMPLES:
            raise ValueError(f"n is {self.n!r}; it must be an integer, 1 to {MAX_SAMPLES}")
        if self.n > 1 and (not self.temperature or self.max_tokens == 0):
            raise ValueError(
                f"n is {self.n}, but with temperature {self.temperature} and max_tokens "
                f"{self.max_tokens} all answers would be alike; give n=1, or both above 0"
            )

    @property
    def has_penalties(self) -> bool:
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return penalties != (0, 0, 1)

    def _check_ranges(self) -> None:
        if not _is_number(self.top_k, int) or self.top_k < -1:
            raise ValueError(
                f"top_k is {self.top_k!r}; it must be an integer from 1 up, or 0 or -1 for all"
            )
        if not _is_number(self.min_p, int | float) or not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p!r}; it must be 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not _is_number(value, int | float) or not -2 <= value <= 2:
                raise ValueError(f"{name} is {value!r}; it must be -2 to 2")
        value = self.repetition_penalty
        if not _is_number(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"repetition_penalty is {value!r}; it must be above 0, and 1 for none")

    def _check_ends(self) -> None:
        ids = self.stop_token_ids
        if not isinstance(self.stop_token_ids, tuple) or any(
            not _is_number(token, int) or token < 0 for token in self.stop_token_ids
        ):
            raise ValueError(
                f"stop_token_ids is {ids!r}; it must be a list of token ids, integers from 0 up"
            )
        most = self.min_tokens if self.max_tokens is None else self.max_tokens
        if not _is_number(self.min_tokens, int) or not 0 <= self.min_tokens <= most:
            raise ValueError(
                f"min_tokens is {self.min_tokens!r}; it must be an integer, 0 to max_tokens "
                f"({self.max_tokens})"
            )


def first_stop(text: str, stops: Sequence[str], after: int = 0) -> tuple[int, int] | None:
    """Begin and end of the first stop string that ends beyond the first `after` characters."""
    begins = [text.find(stop, max(0, after - len(stop) + 1)) for stop in stops]
    found = [(at, at + len(stop)) for at, stop in zip(begins, stops, strict=True) if at >= 0]
    return min(found, default=None)


def _parse_bias(bias: object) -> dict[int, float] | None:
    """Token ids may be strings, as in JSON."""
    if bias is None:
        return None
    if not isinstance(bias, dict):
        raise ValueError(f"logit_bias is {bias!r}; it must be an object, token ids to -100 to 100")
    parsed = {}
    for token, value in bias.items():
        known = token.isdecimal() if isinstance(token, str) else _is_token(token)
        if not known or not _is_number(value, int | float) or not -100 <= value <= 100:
            raise ValueError(
                f"logit_bias has {token!r}: {value!r}; it must map token ids, integers from 0 up, "
                "to -100 to 100"
            )
        parsed[int(token)] = float(value)
    return parsed or None


def _parse_allowed(ids: object) -> tuple[int, ...] | None:
    if ids is None:
        return None
    ids = _as_tuple(ids)
    if not isinstance(ids, tuple) or not ids or not all(map(_is_token, ids)):
        raise ValueError(
            f"allowed_token_ids is {ids!r}; it must be a list of token ids, integers from 0 up, "
            "one at least"
        )
    return tuple(sorted(set(ids)))


def _parse_words(words: object) -> tuple[str | tuple[int, ...], ...]:
    several = _as_tuple(words)
    if isinstance(several, tuple):
        parsed = [tuple(it) if isinstance(it, list) else it for it in several]
        if all(it and (isinstance(it, str) or _are_tokens(it)) for it in parsed):
            return tuple(parsed)
    raise ValueError(
        f"bad_words is {words!r}; it must be a list of non-empty strings, or of lists of token ids"
    )


def _are_tokens(value: object) -> bool:
    return isinstance(value, tuple) and all(map(_is_token, value))


def _is_token(value: object) -> bool:
    return _is_number(value, int) and value >= 0  # type: ignore[operator]


def _as_tuple(value: object) -> object:
    """The items of any collection, a text as one item; what is no collection as it is."""
    if type(value) is tuple and not value:
        return value
    if value is None or isinstance(value, str):
        return () if value is None else (str(value),)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        return value
    return tuple(it if type(it) in _PLAIN else _plain(it) for it in value)


def _plain(value: Any) -> object:
    """Python's number for one of numpy's; other values as they are."""
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


def _is_number(value: object, kind) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class Score(NamedTuple):
    """How likely a token was, before temperature: the logarithm of its probability, its place
    among all, from 1, and the likeliest (token, logprob), as many as were asked for."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()

    @staticmethod
    def of(values: Sequence) -> Score:
        """From the lists that JSON makes of one."""
        logprob, rank, top = values
        return Score(logprob, rank, tuple(map(tuple, top)))


SlotScores = list[tuple[int, list[Score]]]  # by slot, in the order of each row's tokens


@dataclass(frozen=True)
class Request:
    """One prompt on its way through the engine; `index` is its place in the input.

    forced_token_ids: tokens that its answer begins with, whatever is likely. scored_from: the
    first token, of prompt and answer together, that is scored, with all after it; the very first
    never is, for nothing precedes it. top: the likeliest tokens told with each score. generated,
    scores: of its answer, and of tokens from scored_from on, what is there already; it goes on from
    them.
    sample: which of several answers to the request of index `first` this is. limit: what sets its
    longest answer: max_tokens, default or context; in files also line or job. bad_words: token ids
    of each sequence that the answer never has.
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

    def __post_init__(self) -> None:
        assert self.scored_from is None or self.scored_from > 0

    @property
    def max_seq_len(self) -> int:
        return len(self.prompt_token_ids) + self.max_tokens

    @property
    def max_tokens(self) -> int:
        """Most tokens of its answer, which its fit to the model has settled."""
        assert self.params.max_tokens is not None
        return self.params.max_tokens


@dataclass(frozen=True)
class Logprob:
    """A token's score, as vLLM names it."""

    logprob: float
    rank: int
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]  # by token id, the token that stands there first


@dataclass(frozen=True)
class CompletionOutput:
    """One answer; finish_reason is "stop" (end token, stop token or stop string) or "length".

    index: its place among several answers to one request. stop_reason: the stop string, or the
    token of stop_token_ids, that ended it; None for an end token of the model, and for "length".
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[Logprobs | None] | None = None
    index: int = 0
    stop_reason: int | str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Of the whole answer, if its log-probabilities were asked for."""
        if self.logprobs is None:
            return None
        pairs = zip(self.token_ids, self.logprobs, strict=True)
        return sum(found[token].logprob for token, found in pairs if found)


@dataclass(frozen=True)
class RequestMetrics:
    """When a request was passed to the engine, had its first token and was finished.

    Seconds since 1970, as this process saw it; on Ray news of a token takes up to 0.05 s.
    first_token_time is None if no token was made.
    """

    arrival_time: float
    first_token_time: float | None
    finished_time: float


@dataclass(frozen=True)
class RequestOutput:
    """A request's prompt and answers, as vLLM names them.

    scores: the score of each token, from the first that was to be scored on. error: why the request
    failed, in a sentence; it then has no `outputs`. None if it was answered. metrics: when it came
    and was finished; None if it never ran.
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
        """The request's place in its call, from 0, as text."""
        return str(self.index)

    @property
    def finished(self) -> bool:
        """True, for an output comes once its request is answered or has failed."""
        return True


@dataclass(frozen=True)
class Finished:
    """A finished request as a stage reports it: tokens, not text.

    stop_reason: the stop string or the token of stop_token_ids that ended it; None for an end token
    of the model's. error: why the request failed, in a sentence; its tokens are then void. None if
    it was answered.
    """

    index: int
    token_ids: list[int]
    finish_reason: str
    scores: list[Score] = field(default_factory=list)
    stop_reason: int | str | None = None
    error: str | None = None
