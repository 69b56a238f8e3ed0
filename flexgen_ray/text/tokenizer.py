"""Text to tokens and back, by the model folder's own tokenizer. transformers does the work.

The files of a tokenizer, and in our own words why transformers can't load them.

What a library says is meant for its callers; a remedy here must be one that users have.

A stand-in for a missing tokenizer where only the number of tokens matters, as in a dry run.
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

# Each may hold a vocabulary; tokenizer_config.json alone has none.
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_OTHERS = ("vocab.txt", "tekken.json", "*.model", "*.tiktoken", "*.spm")
_READY = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")  # need no other package


def has_vocabulary(folder: Path) -> bool:
    """True if the folder has a file that may hold a vocabulary."""
    return any(any(folder.glob(pattern)) for pattern in (*VOCABULARIES, *_OTHERS))


def load_files(folder: Path):
    """The transformers tokenizer; ValueError, with the remedy, if it can't be loaded."""
    from transformers import AutoTokenizer

    _check_package(folder)
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # Of damaged files libraries raise anything.
        raise ValueError(f"{folder}: the tokenizer can't be loaded: {_reason(error)}") from error
    if len(loaded) <= len(set(loaded.all_special_ids)):
        raise ValueError(
            f"{folder}: the tokenizer has no vocabulary but special tokens; add the files that "
            f"its tokenizer_config.json is for ({', '.join(VOCABULARIES)})"
        )
    return loaded


def _check_package(folder: Path) -> None:
    """ValueError if only a package that isn't installed reads the vocabulary."""
    if any((folder / name).is_file() for name in _READY):
        return
    for path in sorted(folder.glob("*.model")):
        with path.open("rb") as file:
            # A sentencepiece model is a protocol buffer; tiktoken's is lines of base64.
            package = "sentencepiece" if file.read(1) == b"\n" else "tiktoken"
        try:
            import_module(package)
        except ImportError as error:
            raise ValueError(
                f"{folder}: the tokenizer's vocabulary is in {path.name} alone, which the package "
                f"{package} reads; pip install {package}, or add the model's tokenizer.json"
            ) from error


def _reason(error: Exception) -> str:
    """A sentence's end, with a remedy: the library's own may be none."""
    if "trust_remote_code" in str(error):
        return (
            "it is made by Python code in its folder, which is never run; add a tokenizer.json, "
            "which needs none"
        )
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
    if isinstance(error, ImportError):
        return f"a package is missing ({said}); install it, or add the model's tokenizer.json"
    return (
        f"its files are damaged, incomplete or newer than transformers here ({said}); download "
        "them again, or update transformers and tokenizers"
    )


class Tokenizer:
    """Loaded on first use; `exists` is false for a folder without a vocabulary.

    vocab_size: the model's, if the tokenizer is to be refused that has more. now: the time of day
    for templates that ask for it, one for all chats.
    """

    is_guess = False  # whether its tokens are only as many as there may be

    def __init__(self, folder: str | Path, vocab_size: int | None = None) -> None:
        self.folder = Path(folder)
        self._vocab_size = vocab_size
        self._templates: dict[str, ChatTemplate] = {}  # by their source
        self._bad_words: dict[str, list[tuple[int, ...]]] = {}
        self.now = datetime.now()

    def load(self) -> None:
        """Takes the seconds that loading takes now."""
        _ = self.hf

    def check(self) -> None:
        """Loads it if there is one, for answers will need it; ValueError as `hf`."""
        if self.exists:
            self.load()

    @property
    def exists(self) -> bool:
        return has_vocabulary(self.folder)

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer puts around a text by itself."""
        with _panics_named(self.folder):
            return self.hf.encode(text, verbose=False)

    def encode_chat(self, messages: Messages, options: ChatOptions | None = None) -> list[int]:
        """A chat up to where the model's answer begins, as its template formats it.

        Raises ValueError if there is no template, or if it refuses these messages.
        """
        text = self.format_chat(messages, options)
        with _panics_named(self.folder):
            return self.hf.encode(text, add_special_tokens=False, verbose=False)

    def format_chat(self, messages: Messages, options: ChatOptions | None = None) -> str:
        """The text of which `encode_chat` makes token ids. ValueError as there."""
        options = options or ChatOptions()
        return self._template(options.tools).render(messages, options, self.now)

    def _template(self, tools: list[dict[str, Any]] | None) -> ChatTemplate:
        """The model's template, or of several the one for chats with or without tools."""
        if not self.hf.chat_template:
            raise ValueError(
                f"{self.folder} has no chat template; give a prompt instead of messages, or add "
                "the model's chat_template.jinja"
            )
        named = self.hf.chat_template
        if isinstance(named, dict) and not named.keys() & {"default", "tool_use" if tools else ""}:
            raise ValueError(
                f"{self.folder} has several chat templates ({', '.join(sorted(named))}), none of "
                "them the default; put the one to use there as chat_template.jinja"
            )
        source = self.hf.get_chat_template(tools=tools)
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source, self.hf.special_tokens_map)
        return self._templates[source]

    def bad_word(self, word: str | Sequence[int]) -> list[tuple[int, ...]]:
        """Token sequences that make up a word; with a space before it too if that is as long.

        As in vLLM. ValueError for a word without tokens, and as `hf`.
        """
        if not isinstance(word, str):
            return [tuple(word)]
        if word not in self._bad_words:
            plain, spaced = (
                tuple(self.hf.encode(f"{space}{word.lstrip()}", add_special_tokens=False))
                for space in ("", " ")
            )
            if not plain:
                raise ValueError(f"bad_words has {word!r}, of which the tokenizer makes no token")
            differs = len(spaced) == len(plain) and spaced[0] != plain[0]
            self._bad_words[word] = [plain, spaced] if differs else [plain]
        return self._bad_words[word]

    def close(self) -> None:
        """Ends what formats chats; the next chat starts it again."""
        for template in self._templates.values():
            template.close()

    def text(
        self, token_ids: Sequence[int], first: int = 0, last: int | None = None, skip: bool = True
    ) -> str:
        """Text that the tokens from `first` to before `last` add to that of the tokens before.

        skip: leave special tokens out.
        """
        with _panics_named(self.folder):
            return self.detokenizer.text(token_ids, first, last, skip)

    def round_trip(self, text: str) -> str:
        """The text as it comes back from its tokens, which may not have all its characters."""
        with _panics_named(self.folder):
            return self.text(self.hf.encode(text, add_special_tokens=False, verbose=False))

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None without a tokenizer, or if it has none."""
        return self.hf.eos_token_id if self.exists else None

    def token_texts(self, token_ids: Sequence[int], first: int = 0) -> list[str]:
        """Text of each token from `first` on, special ones as they are written."""
        with _panics_named(self.folder):
            pieces = self.detokenizer.pieces(token_ids, first)
            pairs = zip(token_ids[first:], pieces, strict=True)
            return [self.detokenizer.special(token) or piece for token, piece in pairs]

    def alternatives(
        self, token_ids: Sequence[int], last: int, others: Sequence[int]
    ) -> dict[int, str]:
        """Text of each of the other tokens, if it came after the tokens before `last`."""
        with _panics_named(self.folder):
            texts = self.detokenizer.alternatives(token_ids, last, others)
        return dict(zip(others, texts, strict=True))

    @cached_property
    def detokenizer(self) -> Detokenizer:
        """Decodes tokens in their context; ValueError as `hf`."""
        return Detokenizer(self.hf)

    @cached_property
    def hf(self):
        """The transformers tokenizer; ValueError if the folder has none, or one that can't be
        loaded or is another model's."""
        if not self.exists:
            raise ValueError(
                f"{self.folder} has no tokenizer ({', '.join(VOCABULARIES)}); give prompts as "
                "token ids, or add the tokenizer's files"
            )
        with _panics_named(self.folder):
            found = load_files(self.folder)
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

    def encode_chat(self, messages: Messages, options: ChatOptions | None = None) -> list[int]:
        """Zeros for the messages as JSON, which takes about as much as a template adds."""
        return self.encode(json.dumps(messages, ensure_ascii=False))

    def round_trip(self, text: str) -> str:
        """Every text can come up."""
        return text
