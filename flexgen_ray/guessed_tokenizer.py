"""A stand-in for a missing tokenizer where only the number of tokens matters, as in a dry run."""

from __future__ import annotations

import json
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from flexgen_ray.messages import ChatOptions, Messages
from flexgen_ray.tokenizer import Tokenizer

_BYTES_A_TOKEN = 4  # of English text, about


class GuessedTokenizer(Tokenizer):
    """Token ids that mean nothing, one for every 4 bytes."""

    is_guess = True

    @property
    def exists(self) -> bool:
        return True

    @property
    def eos_token_id(self) -> int | None:
        return None

    @cached_property
    def detokenizer(self) -> Any:
        """No token is special."""
        return SimpleNamespace(special_names=())

    def check(self) -> None:
        """Nothing can be wrong with it."""

    def load(self) -> None:
        """There is nothing to load."""

    def encode(self, text: str) -> list[int]:
        """Zeros, as many as the text may have tokens."""
        return [0] * -(-len(text.encode()) // _BYTES_A_TOKEN)

    def chat(self, messages: Messages, options: ChatOptions | None = None) -> list[int]:
        """Zeros for the messages as JSON, which takes about as much as a template adds."""
        return self.encode(json.dumps(messages, ensure_ascii=False))

    def spelt(self, text: str) -> str:
        """Every text can come up."""
        return text
