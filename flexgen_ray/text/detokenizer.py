"""Text of tokens in their context: what tokens of a sequence add to the text before them.

Tokens have no text of their own: sentencepiece drops the space that a text begins with, a
character may take several tokens, and clean-up removes spaces between words. So tokens are decoded
with those that precede them. Knows a transformers tokenizer; no requests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from os.path import commonprefix
from typing import Any

# Tokens with text that are decoded with those asked for; a character takes four at most.
CONTEXT = 8
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's name for a token of one byte


class Detokenizer:
    """Decodes parts of token sequences with a transformers tokenizer."""

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        added = hf.added_tokens_decoder.items()
        self._special = {*hf.all_special_ids, *(token for token, it in added if it.special)}

    def text(
        self, token_ids: Sequence[int], first: int = 0, last: int | None = None, skip: bool = True
    ) -> str:
        """Text that the tokens from `first` to before `last` add to that of the tokens before.

        A character that begins before `first` belongs to the token that completes it. skip: leave
        special tokens out. Takes time in proportion to the number of tokens asked for.
        """
        start = self._context(token_ids, first)
        before = self._decode(token_ids[start:first], skip) if start < first else ""
        whole = self._decode(token_ids[start:last], skip)
        return whole[len(commonprefix([before, whole])) :]

    def pieces(self, token_ids: Sequence[int], first: int = 0, skip: bool = True) -> list[str]:
        """Text of each token from `first` on; joined they are `text(token_ids, first)`.

        A character is given to the last of its tokens, the others are empty.
        """
        text = self.text(token_ids, first, None, skip)
        ends: list[int] = []
        settled, at = first, 0  # tokens and characters that later tokens won't change
        for last in range(first + 1, len(token_ids) + 1):
            known = self.text(token_ids, settled, last, skip)
            agreed = len(commonprefix([known, text[at : at + len(known)]]))
            ends.append(at + agreed)
            if agreed == len(known):
                settled, at = last, at + agreed
        ends = [*accumulate(ends[:-1], max), len(text)] if ends else []
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def alternatives(self, token_ids: Sequence[int], last: int, others: Sequence[int]) -> list[str]:
        """Text that each of the other tokens would have after the tokens before `last`."""
        context = list(token_ids[self._context(token_ids, last) : last])
        return [
            self.special(other) or self.text([*context, other], len(context)) for other in others
        ]

    def special(self, token_id: int) -> str | None:
        """A special token as it is written; None for other tokens."""
        return self._decode([token_id], False) if token_id in self._special else None

    @cached_property
    def special_names(self) -> list[str]:
        """Special tokens as they are written."""
        return [self._decode([token], False) for token in sorted(self._special)]

    def ending(
        self, token_ids: Sequence[int], count: int, skip: bool
    ) -> tuple[int, str, int | None]:
        """Text of the last `count` tokens or more: their first token, their text, and the most
        characters that the very last adds, None if it may change all that it shares bytes with.

        One decoding, where `text` takes two; but the first characters may be without their context.
        """
        name = self._hf.convert_ids_to_tokens(token_ids[-1]) or ""
        start = self._run_start(token_ids, len(token_ids) - count)
        # A word's decoder may put a space before it.
        most = None if _BYTE.fullmatch(name) else len(name) + 1
        return start, self._decode(token_ids[start:], skip), most

    def _context(self, token_ids: Sequence[int], first: int) -> int:
        """Where decoding must begin for the text from `first` on."""
        start, wanted = first, CONTEXT
        while start and wanted:
            start -= 1
            wanted -= token_ids[start] not in self._special
        return self._run_start(token_ids, start)

    def _run_start(self, token_ids: Sequence[int], start: int) -> int:
        """A run of byte tokens is decoded as a whole: one bad byte makes all of them unreadable."""
        while start and _BYTE.fullmatch(self._hf.convert_ids_to_tokens(token_ids[start]) or ""):
            start -= 1
        return start

    def _decode(self, token_ids: Sequence[int], skip: bool) -> str:
        return self._hf.decode(list(token_ids), skip_special_tokens=skip)
