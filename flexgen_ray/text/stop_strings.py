"""Stop strings: which of them ended an answer, and where its text is cut.

They are looked for in an answer's text and, where one of them has a special token in it, in the
text with special tokens as they are written. Knows tokenizers and sampling parameters; no engine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from flexgen_ray.request import SamplingParams, first_stop
from flexgen_ray.text.detokenizer import CONTEXT
from flexgen_ray.text.tokenizer import Tokenizer

# Characters before a token that its decoding may take away, as clean-up takes spaces.
_CHANGED = 4
_CACHED = 1024


class StopStrings:
    """Finds the stop strings of answers, which begin at token `begin` of their sequence."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Few are in use at a time, however many lines ask for them.
        self._written = lru_cache(_CACHED)(self._find_written)
        self._spelt = lru_cache(_CACHED)(self._spell)

    def check(self, stops: Sequence[str]) -> None:
        """ValueError for a string that no answer can contain."""
        for stop in stops:
            spelt = self._spelt(stop)
            if stop not in self._written(stops) and stop not in spelt:
                raise ValueError(
                    f"stop {stop!r} can't come up in an answer: the tokenizer makes {spelt!r} of "
                    "it; give that, or a token by stop_token_ids"
                )

    def newest(self, token_ids: list[int], begin: int, params: SamplingParams) -> str | None:
        """The stop string that the newest token completes, if the answer had none before."""
        least, skips = params.min_tokens, params.skip_special_tokens
        return self._newest(token_ids, begin, least, params.stop, skips) or self._newest(
            token_ids, begin, least, self._written(params.stop), False
        )

    def text(self, token_ids: list[int], begin: int, params: SamplingParams) -> str:
        """The answer's text up to its first stop string, and with it if the request says so."""
        skips = params.skip_special_tokens
        text = self._tokenizer.text(token_ids, begin, None, skips)
        if not params.stop:
            return text
        keeps, early = params.include_stop_str_in_output, begin + params.min_tokens
        searched_from = len(self._tokenizer.text(token_ids, begin, early, skips))
        place = first_stop(text, params.stop, searched_from)
        if place is not None:
            return text[: place[keeps]]
        cut = self._cut_written(token_ids, begin, early, self._written(params.stop), keeps)
        return text if cut is None else cut

    def _newest(
        self, token_ids: list[int], begin: int, min_tokens: int, stops: Sequence[str], skip: bool
    ) -> str | None:
        """Looks at as many last tokens as have the characters that a stop string can span.

        Those are characters before the newest token, which may have any number of its own.
        """
        if not stops:
            return None
        text, early = self._tokenizer.text, begin + min_tokens
        reach = max(map(len, stops)) + _CHANGED
        count = reach // 2 + CONTEXT
        while count < len(token_ids) - early:
            start, tail, most = self._tokenizer.detokenizer.ending(token_ids, count, skip)
            before = 0 if most is None else len(tail) - most - reach
            if start > early and (most is None or before >= _CHANGED):
                place = first_stop(tail[before:], stops)
                return tail[before:][slice(*place)] if place else None
            count *= 2
        tail = text(token_ids, begin, None, skip)
        searched_from = len(text(token_ids, begin, early, skip)) if min_tokens else 0
        place = first_stop(tail, stops, searched_from)
        return tail[slice(*place)] if place else None

    def _cut_written(
        self, token_ids: list[int], begin: int, early: int, stops: Sequence[str], keeps: bool
    ) -> str | None:
        """The text up to a stop string with special tokens in it; None if there is none."""
        if not stops:
            return None
        pieces = self._tokenizer.detokenizer.pieces(token_ids, begin, skip=False)
        written, ends = "".join(pieces), [*accumulate(map(len, pieces))]
        searched_from = len("".join(pieces[: early - begin]))
        place = first_stop(written, stops, searched_from)
        if place is None:
            return None
        # Without special tokens, those that remain may begin differently: with no space, say.
        shown = self._tokenizer.detokenizer.pieces(token_ids, begin)
        first = bisect_right(ends, place[0])
        kept = len(shown[first]) - (ends[first] - place[0])
        text = "".join(shown[:first]) + shown[first][: max(kept, 0)]
        return text + (written[slice(*place)] if keeps else "")

    def _find_written(self, stops: Sequence[str]) -> tuple[str, ...]:
        names = self._tokenizer.detokenizer.special_names
        return tuple(stop for stop in stops if any(name in stop for name in names))

    def _spell(self, stop: str) -> str:
        """A stop string as tokens spell it, alone or, if it is only then whole, between words."""
        alone, *others = (
            self._tokenizer.round_trip(text) for text in (stop, f"a{stop}a", f"a {stop} a")
        )
        return next((text for text in others if stop in text and stop not in alone), alone)
