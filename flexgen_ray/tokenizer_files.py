"""The files of a tokenizer, and in our own words why transformers can't load them.

What a library says is meant for its callers; a remedy here must be one that users have.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

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
