"""A tokenizer that can't be loaded is refused with a remedy that a user can apply."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flexgen_ray.text.tokenizer import Tokenizer


def folder(path: Path, config: dict, **files: bytes | str) -> Tokenizer:
    """A tokenizer of these files; of their names underscores stand for dots."""
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (path / name.replace("_", ".")).write_bytes(data)
    return Tokenizer(path)


@pytest.mark.parametrize(
    ("package", "content"), [("sentencepiece", b"\n\x0e\n\x05<unk>"), ("tiktoken", b"IQ== 0\n")]
)
def test_a_vocabulary_that_a_missing_package_reads_names_the_package(
    tmp_path, monkeypatch, package, content
):
    """Older Llama and Mistral folders have tokenizer.model alone; Llama 3's is tiktoken's."""
    monkeypatch.setitem(sys.modules, package, None)
    tokenizer = folder(tmp_path, {"tokenizer_class": "LlamaTokenizer"}, tokenizer_model=content)
    with pytest.raises(ValueError, match=f"pip install {package}, or add .*tokenizer.json") as said:
        tokenizer.check()
    assert "download" not in str(said.value)


def test_a_configuration_without_a_vocabulary_is_no_tokenizer(tmp_path):
    """transformers makes one that turns every text into nothing."""
    tokenizer = folder(tmp_path, {"tokenizer_class": "LlamaTokenizer"})
    assert not tokenizer.exists
    with pytest.raises(ValueError, match="has no tokenizer .tokenizer.json, vocab.json"):
        tokenizer.encode("Hello")
    tokenizer = folder(tmp_path, {"tokenizer_class": "GPT2Tokenizer"}, vocab_txt="")
    with pytest.raises(ValueError, match="only special tokens and no vocabulary|can't be loaded"):
        tokenizer.encode("Hello")


def test_a_tokenizer_of_remote_code_is_refused_with_a_remedy_that_exists(tmp_path):
    own = {"tokenizer_class": "OwnTok", "auto_map": {"AutoTokenizer": ["own.OwnTok", None]}}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = folder(tmp_path, own, vocab_json="{}")
    with pytest.raises(ValueError, match="never run; add a tokenizer.json") as said:
        tokenizer.check()
    assert "trust_remote_code" not in str(said.value)


def test_files_of_a_newer_library_are_not_just_downloaded_again(tmp_path):
    model = {"version": "1.0", "model": {"type": "Unheard of"}}
    tokenizer = folder(tmp_path, {}, tokenizer_json=json.dumps(model))
    with pytest.raises(ValueError, match="update transformers and tokenizers") as said:
        tokenizer.check()
    assert "\n" not in str(said.value)
