"""The text of tokens in their context: what a token adds to the text of the tokens before it.

A token has no text of its own: sentencepiece drops the space at the start of a text, a character
may take several tokens, and clean-up removes spaces between words. For example, with Llama 2's
tokenizer the tokens "▁a" and "▁b" decode to "a" and "b" alone, but to "a b" together. So the text
of token i is decode(tokens 0..i) without the prefix that it shares with decode(tokens 0..i-1). Only
a few tokens of context are decoded each time, so that the cost doesn't grow with the sequence.
Knows a transformers tokenizer; nothing of requests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from os.path import commonprefix
from typing import Any

# Number of non-special tokens of context. A character takes at most four tokens, one a byte.
CONTEXT = 8
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's name for a token that is one byte


class Detokenizer:
    """Decodes parts of token sequences with a transformers tokenizer."""

    def __init__(self, hf: Any) -> None:
        """hf: a transformers tokenizer."""
        self._hf = hf
        added = hf.added_tokens_decoder.items()
        self._special = {*hf.all_special_ids, *(token for token, it in added if it.special)}

    def text(
        self, token_ids: Sequence[int], first: int = 0, last: int | None = None, skip: bool = True
    ) -> str:
        """Return the text that token_ids[first:last] add to the text of the tokens before them.

        A character that begins before `first` belongs to the token that completes it. The time is
        proportional to the number of tokens from `first` to `last`, not to the sequence.
        skip: leave special tokens out.
        """
        # Decode the context alone, then context and tokens together; the result is what follows
        # the common prefix. An incomplete character at the context's end decodes to U+FFFD, which
        # is not part of the common prefix once later bytes complete it.
        start = self._context(token_ids, first)
        before = self._decode(token_ids[start:first], skip) if start < first else ""
        whole = self._decode(token_ids[start:last], skip)
        return whole[len(commonprefix([before, whole])) :]

    def pieces(self, token_ids: Sequence[int], first: int = 0, skip: bool = True) -> list[str]:
        """Return the text of each token from `first` on; joined, they are `text(token_ids, first)`.

        A character of several tokens is the text of the last of them; the others' is empty.
        """
        # For each token, find where the text up to it ends within the whole text. The text up to a
        # token is decoded from the last point at which it agreed with the whole text; where they
        # disagree (an incomplete character, a space that clean-up removes later), only the part
        # that agrees counts, and the rest belongs to later tokens.
        text = self.text(token_ids, first, None, skip)
        ends: list[int] = []
        settled, at = first, 0  # tokens, and characters of their text, that are final
        for last in range(first + 1, len(token_ids) + 1):
            known = self.text(token_ids, settled, last, skip)
            agreed = len(commonprefix([known, text[at : at + len(known)]]))
            ends.append(at + agreed)
            if agreed == len(known):
                settled, at = last, at + agreed
        # Ends never decrease, and the last token takes everything that is left.
        ends = [*accumulate(ends[:-1], max), len(text)] if ends else []
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def alternatives(self, token_ids: Sequence[int], last: int, others: Sequence[int]) -> list[str]:
        """Return the text that each of the other tokens would have in place of token `last`."""
        context = list(token_ids[self._context(token_ids, last) : last])
        return [
            self.special(other) or self.text([*context, other], len(context)) for other in others
        ]

    def special(self, token_id: int) -> str | None:
        """Return a special token's name, such as "</s>"; None for other tokens."""
        return self._decode([token_id], False) if token_id in self._special else None

    @cached_property
    def special_names(self) -> list[str]:
        """Names of all special tokens, such as "</s>"."""
        return [self._decode([token], False) for token in sorted(self._special)]

    def ending(
        self, token_ids: Sequence[int], count: int, skip: bool
    ) -> tuple[int, str, int | None]:
        """Return (start, text, most) of the end of a sequence, for a search within its text.

        start: first token of the text; at most len(token_ids) - count.
        text: text of the tokens from `start` on, whose first characters may lack their context.
        most: most characters that the newest token adds; None if it may change any number of
        characters, as a byte of a run of bytes does.
        Takes one decoding, where `text` takes two.
        """
        name = self._hf.convert_ids_to_tokens(token_ids[-1]) or ""
        start = self._run_start(token_ids, len(token_ids) - count)
        # One more, since a decoder may put a space before a word.
        most = None if _BYTE.fullmatch(name) else len(name) + 1
        return start, self._decode(token_ids[start:], skip), most

    def _context(self, token_ids: Sequence[int], first: int) -> int:
        """Return the token at which to begin decoding for the text from `first` on.

        That is CONTEXT non-special tokens earlier, since special ones may leave no text.
        """
        start, wanted = first, CONTEXT
        while start and wanted:
            start -= 1
            wanted -= token_ids[start] not in self._special
        return self._run_start(token_ids, start)

    def _run_start(self, token_ids: Sequence[int], start: int) -> int:
        """Return the start of the run of byte tokens that `start` lies in, or `start` itself.

        sentencepiece decodes a run of byte tokens as a whole: one invalid byte makes all of them
        unreadable, so a run must not be cut.
        """
        while start and _BYTE.fullmatch(self._hf.convert_ids_to_tokens(token_ids[start]) or ""):
            start -= 1
        return start

    def _decode(self, token_ids: Sequence[int], skip: bool) -> str:
        return self._hf.decode(list(token_ids), skip_special_tokens=skip)
