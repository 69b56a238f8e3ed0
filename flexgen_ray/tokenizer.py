"""Text to tokens and back, by the model folder's own tokenizer. transformers does the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from flexgen_ray.messages import Messages

_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


class Tokenizer:
    """Loaded on first use; `exists` is false for a folder without tokenizer files.

    vocab_size: the model's, if the tokenizer is to be refused that has more.
    """

    def __init__(self, folder: str | Path, vocab_size: int | None = None) -> None:
        self.folder = Path(folder)
        self._vocab_size = vocab_size

    def load(self) -> None:
        """Takes the seconds that loading takes now."""
        _ = self.hf

    def check(self) -> None:
        """Loads it if there is one, for answers will need it; ValueError as `hf`."""
        if self.exists:
            self.load()

    @property
    def exists(self) -> bool:
        return any((self.folder / name).is_file() for name in _FILES)

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer puts around a text by itself."""
        with _panics_named(self.folder):
            return self.hf.encode(text, verbose=False)

    def chat(self, messages: Messages) -> list[int]:
        """A chat up to where the model's answer begins, as its template words it.

        Raises ValueError if there is no template, or if it refuses these messages.
        """
        if not self.hf.chat_template:
            raise ValueError(
                f"{self.folder} has no chat template; give a prompt instead of messages, or add "
                "the model's chat_template.jinja"
            )
        try:
            return self.hf.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:
            # A template is a program: what it raises of messages it doesn't expect is anything.
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Without special tokens."""
        with _panics_named(self.folder):
            return self.hf.decode(list(token_ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """The text of one token, special or not; of part of a character, a replacement for it."""
        return self.hf.decode([token_id])

    @cached_property
    def hf(self):
        """The transformers tokenizer; ValueError if the folder has none, or one that can't be
        loaded or is another model's."""
        if not self.exists:
            raise ValueError(
                f"{self.folder} has no tokenizer ({', '.join(_FILES)}); give prompts as token ids, "
                "or add the tokenizer's files"
            )
        from transformers import AutoTokenizer

        try:
            with _panics_named(self.folder):
                found = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:
            # Of damaged files libraries raise anything.
            raise ValueError(
                f"{self.folder}: the tokenizer can't be loaded ({error}); download its files again"
            ) from error
        # Tokens that were added may be more than the model has: those hardly ever occur.
        if self._vocab_size is not None and found.vocab_size > self._vocab_size:
            raise ValueError(
                f"{self.folder}: the tokenizer has {found.vocab_size} tokens, but the model "
                f"{self._vocab_size} (vocab_size in config.json): it is another model's; put the "
                "model's own tokenizer files there"
            )
        return found


@contextmanager
def _panics_named(folder: Path) -> Iterator[None]:
    """Turns a panic of the tokenizers library, which is no Exception, into a RuntimeError.

    A panic comes of the tokenizer's files, not of one text, so it ends the job.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise RuntimeError(
            f"{folder}: the tokenizers library failed on the tokenizer's files ({panic}); download "
            "them again, or give prompts as token ids"
        ) from panic
