"""Stop strings: finds the one that ends an answer, and cuts the answer's text there.

An answer's text leaves special tokens out, but a stop string may name one, such as "</s>" or
"end</s>". So stop strings are searched for in two texts: the answer's, and, for those that name a
special token, the answer's with special tokens by name. Knows tokenizers and sampling parameters;
nothing of the engine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from flexgen_ray.request import SamplingParams, first_stop
from flexgen_ray.text.detokenizer import CONTEXT
from flexgen_ray.text.tokenizer import Tokenizer

# Most characters before a token that decoding the token may take away, as clean-up takes spaces.
_CHANGED = 4
_CACHED = 1024


class StopStrings:
    """Finds stop strings in answers. An answer is the tokens of a sequence from `begin` on."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A job has few different stop strings, however many of its lines have some.
        self._with_special = lru_cache(_CACHED)(self._find_with_special)
        self._spelling = lru_cache(_CACHED)(self._find_spelling)

    def check(self, stops: Sequence[str]) -> None:
        """Raise ValueError for a stop string that no answer can contain."""
        for stop in stops:
            spelling = self._spelling(stop)
            if stop not in self._with_special(stops) and stop not in spelling:
                raise ValueError(
                    f"stop {stop!r} can't occur in an answer: the tokenizer turns it into "
                    f"{spelling!r}; use that, or a token in stop_token_ids"
                )

    def newest(self, token_ids: list[int], begin: int, params: SamplingParams) -> str | None:
        """Return the stop string that the newest token completes; None if it completes none.

        Called for every token, so no earlier token of the answer has completed one.
        """
        least, skips = params.min_tokens, params.skip_special_tokens
        return self._newest(token_ids, begin, least, params.stop, skips) or self._newest(
            token_ids, begin, least, self._with_special(params.stop), False
        )

    def text(self, token_ids: list[int], begin: int, params: SamplingParams) -> str:
        """Return the answer's text up to its first stop string, or the whole text.

        The stop string itself is included if the request sets include_stop_str_in_output.
        """
        skips = params.skip_special_tokens
        text = self._tokenizer.text(token_ids, begin, None, skips)
        if not params.stop:
            return text
        # A stop string within the first min_tokens tokens doesn't count.
        keeps, early = params.include_stop_str_in_output, begin + params.min_tokens
        searched_from = len(self._tokenizer.text(token_ids, begin, early, skips))
        place = first_stop(text, params.stop, searched_from)
        if place is not None:
            return text[: place[keeps]]
        cut = self._cut_special(token_ids, begin, early, self._with_special(params.stop), keeps)
        return text if cut is None else cut

    def _newest(
        self, token_ids: list[int], begin: int, min_tokens: int, stops: Sequence[str], skip: bool
    ) -> str | None:
        """Return the stop string that ends in the newest token's text; None if there is none.

        Only the last characters are searched: those that the newest token adds, and as many before
        as the longest stop string can span. They are decoded from the last `count` tokens, twice as
        many each time until they suffice. An answer that is too short for that is searched whole.
        """
        if not stops:
            return None
        text, early = self._tokenizer.text, begin + min_tokens
        reach = max(map(len, stops)) + _CHANGED
        count = reach // 2 + CONTEXT
        while count < len(token_ids) - early:
            start, tail, most = self._tokenizer.detokenizer.ending(token_ids, count, skip)
            # tail = [context that may be decoded wrongly][reach][newest token's characters]
            before = 0 if most is None else len(tail) - most - reach
            if start > early and (most is None or before >= _CHANGED):
                place = first_stop(tail[before:], stops)
                return tail[before:][slice(*place)] if place else None
            count *= 2
        tail = text(token_ids, begin, None, skip)
        searched_from = len(text(token_ids, begin, early, skip)) if min_tokens else 0
        place = first_stop(tail, stops, searched_from)
        return tail[slice(*place)] if place else None

    def _cut_special(
        self, token_ids: list[int], begin: int, early: int, stops: Sequence[str], keeps: bool
    ) -> str | None:
        """Return the answer's text up to a stop string that names special tokens; None without one.

        The stop string is found in the text with special tokens by name, and the place is carried
        over, token by token, to the text without them. Example: the tokens "a", " b", "</s>" and
        the stop string "b</s>" give "a " (" b" is the token in which the stop string begins, and
        one of its two characters comes before that).
        """
        if not stops:
            return None
        pieces = self._tokenizer.detokenizer.pieces(token_ids, begin, skip=False)
        with_names, ends = "".join(pieces), [*accumulate(map(len, pieces))]
        searched_from = len("".join(pieces[: early - begin]))
        place = first_stop(with_names, stops, searched_from)
        if place is None:
            return None
        # A token's text may differ between the two texts: at the start of a text it has no space.
        # So characters are counted from the token's end.
        shown = self._tokenizer.detokenizer.pieces(token_ids, begin)
        first = bisect_right(ends, place[0])
        num_before = len(shown[first]) - (ends[first] - place[0])
        text = "".join(shown[:first]) + shown[first][: max(num_before, 0)]
        return text + (with_names[slice(*place)] if keeps else "")

    def _find_with_special(self, stops: Sequence[str]) -> tuple[str, ...]:
        """Return the stop strings that name a special token."""
        names = self._tokenizer.detokenizer.special_names
        return tuple(stop for stop in stops if any(name in stop for name in names))

    def _find_spelling(self, stop: str) -> str:
        """Return a stop string as it is after encoding and decoding.

        That is the string alone or, if it is whole only there, between letters or words: some
        tokenizers drop a space at the start of a text.
        """
        alone, *others = (
            self._tokenizer.round_trip(text) for text in (stop, f"a{stop}a", f"a {stop} a")
        )
        return next((text for text in others if stop in text and stop not in alone), alone)
