"""Text to tokens and back, with the tokenizer of the model folder; transformers does the work.

`Tokenizer` loads the folder's tokenizer on first use. `GuessedTokenizer` stands in for a missing
one where only the number of tokens matters, as in a dry run. Errors of the libraries are meant for
programmers; they are replaced here by sentences whose remedy a user can apply.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flexgen_ray.text.chat_template import ChatTemplate
from flexgen_ray.text.detokenizer import Detokenizer
from flexgen_ray.text.messages import ChatOptions, Messages

# Files that may hold a vocabulary. The first are named in errors.
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_OTHERS = ("vocab.txt", "tekken.json", "*.model", "*.tiktoken", "*.spm")
_READY = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")  # need no extra package
_BYTES_A_TOKEN = 4  # roughly, for English text


class Tokenizer:
    """The tokenizer of a model folder, loaded on first use.

    `exists` is false for a folder without a vocabulary.
    now: the time that chat templates see, the same for all chats of a run.
    Methods that need the tokenizer raise ValueError as `hf` does.
    """

    is_guess = False  # True if only the number of tokens is meaningful

    def __init__(self, folder: str | Path, vocab_size: int | None = None) -> None:
        """vocab_size: the model's; a tokenizer with more tokens is refused as another model's."""
        self.folder = Path(folder)
        self._vocab_size = vocab_size
        self._templates: dict[str, ChatTemplate] = {}  # by source
        self._bad_words: dict[str, list[tuple[int, ...]]] = {}
        self.now = datetime.now()

    def load(self) -> None:
        """Load the tokenizer now, which takes seconds, instead of on first use."""
        _ = self.hf

    def check(self) -> None:
        """Load the tokenizer if the folder has one. Raises ValueError as `hf` does."""
        if self.exists:
            self.load()

    @property
    def exists(self) -> bool:
        """True if the folder has a vocabulary."""
        return has_vocabulary(self.folder)

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids, with the special tokens that the tokenizer adds by default."""
        with _panics_as_errors(self.folder):
            return self.hf.encode(text, verbose=False)

    def encode_chat(self, messages: Messages, options: ChatOptions | None = None) -> list[int]:
        """Return the token ids of a chat, formatted by the model's chat template.

        They end where the model's answer begins. Raises ValueError if the model has no chat
        template, or if the template refuses these messages.
        """
        text = self.format_chat(messages, options)
        with _panics_as_errors(self.folder):
            return self.hf.encode(text, add_special_tokens=False, verbose=False)

    def format_chat(self, messages: Messages, options: ChatOptions | None = None) -> str:
        """Return a chat as text, formatted by the model's template.

        Raises as `encode_chat` does.
        """
        options = options or ChatOptions()
        return self._template(options.tools).render(messages, options, self.now)

    def _template(self, tools: list[dict[str, Any]] | None) -> ChatTemplate:
        """Return the model's chat template; if it has several, the one for chats with tools or not.

        Raises ValueError if the model has no template, or several and no default.
        """
        if not self.hf.chat_template:
            raise ValueError(
                f"{self.folder} has no chat template; give a prompt instead of messages, or add "
                "the model's chat_template.jinja"
            )
        by_name = self.hf.chat_template
        usable = {"default", "tool_use" if tools else ""}
        if isinstance(by_name, dict) and not by_name.keys() & usable:
            raise ValueError(
                f"{self.folder} has several chat templates ({', '.join(sorted(by_name))}), none of "
                "them the default; put the one to use there as chat_template.jinja"
            )
        source = self.hf.get_chat_template(tools=tools)
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source, self.hf.special_tokens_map)
        return self._templates[source]

    def bad_word(self, word: str | Sequence[int]) -> list[tuple[int, ...]]:
        """Return the token sequences that spell a bad word, at a text's start and within a text.

        As in vLLM, the spelling with a space before the word counts only if it has the same number
        of tokens and another first one. word: a text, or its token ids.
        Raises ValueError for a text without tokens.
        """
        if not isinstance(word, str):
            return [tuple(word)]
        if word not in self._bad_words:
            plain, spaced = (
                tuple(self.hf.encode(f"{space}{word.lstrip()}", add_special_tokens=False))
                for space in ("", " ")
            )
            if not plain:
                raise ValueError(f"bad_words has {word!r}, which has no tokens; remove it")
            differs = len(spaced) == len(plain) and spaced[0] != plain[0]
            self._bad_words[word] = [plain, spaced] if differs else [plain]
        return self._bad_words[word]

    def close(self) -> None:
        """End the processes that render chat templates; the next chat starts one again."""
        for template in self._templates.values():
            template.close()

    def text(
        self, token_ids: Sequence[int], first: int = 0, last: int | None = None, skip: bool = True
    ) -> str:
        """Return the text of token_ids[first:last] in the context of the tokens before.

        skip: leave special tokens out. See `Detokenizer.text`.
        """
        with _panics_as_errors(self.folder):
            return self.detokenizer.text(token_ids, first, last, skip)

    def round_trip(self, text: str) -> str:
        """Return a text encoded and decoded again, which may change or lose characters."""
        with _panics_as_errors(self.folder):
            return self.text(self.hf.encode(text, add_special_tokens=False, verbose=False))

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token; None if there is no tokenizer, or if it has none."""
        return self.hf.eos_token_id if self.exists else None

    def token_texts(self, token_ids: Sequence[int], first: int = 0) -> list[str]:
        """Return the text of each token from `first` on; special tokens by their names."""
        with _panics_as_errors(self.folder):
            pieces = self.detokenizer.pieces(token_ids, first)
            pairs = zip(token_ids[first:], pieces, strict=True)
            return [self.detokenizer.special(token) or piece for token, piece in pairs]

    def alternatives(
        self, token_ids: Sequence[int], last: int, others: Sequence[int]
    ) -> dict[int, str]:
        """Return the text that each of the other tokens would have in place of token `last`."""
        with _panics_as_errors(self.folder):
            texts = self.detokenizer.alternatives(token_ids, last, others)
        return dict(zip(others, texts, strict=True))

    @cached_property
    def detokenizer(self) -> Detokenizer:
        """The detokenizer, which decodes tokens in their context."""
        return Detokenizer(self.hf)

    @cached_property
    def hf(self):
        """The transformers tokenizer.

        Raises ValueError if the folder has none, or one that can't be loaded or is another model's.
        """
        if not self.exists:
            raise ValueError(
                f"{self.folder} has no tokenizer ({', '.join(VOCABULARIES)}); give prompts as "
                "token ids, or add the tokenizer's files"
            )
        with _panics_as_errors(self.folder):
            loaded = load_files(self.folder)
        # vocab_size leaves added tokens out: the model may lack some of those, and they are rare.
        if self._vocab_size is not None and loaded.vocab_size > self._vocab_size:
            raise ValueError(
                f"{self.folder}: the tokenizer has {loaded.vocab_size} tokens, but the model "
                f"{self._vocab_size} (vocab_size in config.json): it is another model's; put the "
                "model's own tokenizer files there"
            )
        return loaded


class GuessedTokenizer(Tokenizer):
    """A stand-in for a missing tokenizer: one meaningless token id for every 4 bytes of text."""

    is_guess = True

    @property
    def exists(self) -> bool:
        return True

    @property
    def eos_token_id(self) -> int | None:
        return None

    @cached_property
    def detokenizer(self) -> Any:
        """A detokenizer without special tokens; it decodes nothing."""
        return SimpleNamespace(special_names=())

    def check(self) -> None:
        """Do nothing: there are no files to check."""

    def load(self) -> None:
        """Do nothing: there are no files to load."""

    def encode(self, text: str) -> list[int]:
        """Return as many tokens as are expected; texts that begin alike have tokens that do."""
        data = text.encode()
        data += bytes(-len(data) % _BYTES_A_TOKEN)
        return [number % (self._vocab_size or 1) for number in memoryview(data).cast("I")]

    def encode_chat(self, messages: Messages, options: ChatOptions | None = None) -> list[int]:
        """Return tokens of the messages as JSON, which is about as long as a formatted chat."""
        return self.encode(json.dumps(messages, ensure_ascii=False))

    def round_trip(self, text: str) -> str:
        """Return the text unchanged, so that every stop string is accepted."""
        return text


def has_vocabulary(folder: Path) -> bool:
    """Return whether the folder has a file that may hold a vocabulary.

    tokenizer_config.json alone has none.
    """
    return any(any(folder.glob(pattern)) for pattern in (*VOCABULARIES, *_OTHERS))


def load_files(folder: Path):
    """Load a folder's transformers tokenizer. Raises ValueError, with the remedy, if it can't."""
    from transformers import AutoTokenizer

    _check_package(folder)
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # For damaged files the libraries raise exceptions of any type.
        raise ValueError(f"{folder}: the tokenizer can't be loaded: {_reason(error)}") from error
    if len(loaded) <= len(set(loaded.all_special_ids)):
        raise ValueError(
            f"{folder}: the tokenizer has only special tokens and no vocabulary; add the "
            f"vocabulary files that belong to tokenizer_config.json ({', '.join(VOCABULARIES)})"
        )
    return loaded


def _check_package(folder: Path) -> None:
    """Raise ValueError if reading the vocabulary takes a package that isn't installed."""
    if any((folder / name).is_file() for name in _READY):
        return
    for path in sorted(folder.glob("*.model")):
        with path.open("rb") as file:
            # A sentencepiece model is a protocol buffer, which begins with the tag 0x0a, a newline;
            # a tiktoken vocabulary is lines of base64.
            package = "sentencepiece" if file.read(1) == b"\n" else "tiktoken"
        try:
            import_module(package)
        except ImportError as error:
            raise ValueError(
                f"{folder}: the tokenizer's vocabulary is in {path.name} alone, which the package "
                f"{package} reads; pip install {package}, or add the model's tokenizer.json"
            ) from error


def _reason(error: Exception) -> str:
    """Return why a tokenizer can't be loaded, with a remedy, as the end of a sentence."""
    if "trust_remote_code" in str(error):
        return (
            "it needs Python code from its folder, which is never run; add a tokenizer.json, "
            "which needs none"
        )
    cause = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
    if isinstance(error, ImportError):
        return f"a package is missing ({cause}); install it, or add the model's tokenizer.json"
    return (
        "its files are damaged, incomplete or newer than the installed transformers "
        f"({cause}); download them again, or update transformers and tokenizers"
    )


@contextmanager
def _panics_as_errors(folder: Path) -> Iterator[None]:
    """Turn a panic of the tokenizers library (Rust), which is no Exception, into a RuntimeError.

    A panic is caused by the tokenizer's files rather than by one text, so it ends the job instead
    of one line of it.
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
