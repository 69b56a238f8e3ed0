"""The files and tensors of a model folder that count are those that transformers takes.

What it would not take, or what is ambiguous, is refused by name before any work.
"""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.cli.quantize import write_quantized_copy
from flexgen_ray.models.checkpoint import Checkpoint, checkpoint_config
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_files import load_config
from flexgen_ray.quant.formats import WeightFormat

MAX_TOKENS = 8
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def tokens(folder, prompts: list[list[int]]) -> list[list[int]]:
    small = {"gpu_memory": "4MiB", "cpu_memory": "4MiB", "disk_memory": "4MiB"}
    with LLM(folder, policy=Policy(2, 2), use_ray=False, dtype="float32", **small) as llm:
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def assert_as_transformers(folder, like=None) -> None:
    references = tiny.references(like or folder, tiny.prompts(3, 20), MAX_TOKENS)
    answers = tokens(folder, [reference.prompt for reference in references])
    for answer, reference in zip(answers, references, strict=True):
        certain = reference.certain_len()
        assert certain and answer[:certain] == reference.tokens[:certain]


@pytest.fixture
def folder(tiny_models, tmp_path):
    """A copy of a model with a tied head, which a test may change."""
    return shutil.copytree(tiny_models["llama"][0], tmp_path / "model")


def change(folder, update: dict[str, torch.Tensor | None], name: str = WEIGHTS) -> None:
    """Writes some tensors anew; None takes one out."""
    tensors = load_file(folder / name) | update
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, folder / name, {"format": "pt"})


def shards(folder, parts: int = 2) -> list[str]:
    """Divides model.safetensors into shards with an index, and returns their names."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    files = {key: names[i % parts] for i, key in enumerate(sorted(tensors))}
    for name in names:
        of_it = {key: value for key, value in tensors.items() if files[key] == name}
        save_file(of_it, folder / name, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return names


@pytest.mark.parametrize("head", ["own", "equal", "alone"])
def test_a_head_in_the_file_counts_as_in_transformers(folder, head):
    """Though config.json says that head and embedding are one."""
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    own = torch.randn(embedding.shape) if head == "own" else embedding.clone()
    change(folder, {"lm_head.weight": own})
    if head == "alone":
        change(folder, {"model.embed_tokens.weight": None})
    assert checkpoint_config(folder).tie_word_embeddings == (head != "own")
    assert_as_transformers(folder)


def test_a_head_of_its_own_is_still_there_in_a_quantized_checkpoint(folder, tmp_path):
    change(folder, {"lm_head.weight": torch.randn(tiny.VOCABULARY, 32)})
    write_quantized_copy(folder, tmp_path / "packed", {"weight_bits": 8, "embedding_bits": 8})
    assert not checkpoint_config(tmp_path / "packed").tie_word_embeddings
    assert not load_config(tmp_path / "packed").tie_word_embeddings


def test_quantized_checkpoints_have_the_permissions_of_new_files(folder, tmp_path):
    for path in folder.iterdir():
        path.chmod(0o600)
    before = os.umask(0o022)
    try:
        write_quantized_copy(
            folder, tmp_path / "packed", {"weight_bits": 4, "embedding_bits": None}
        )
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "packed").iterdir()}
    assert len(modes) > 3 and set(modes.values()) == {0o644}


def test_a_weight_of_which_only_some_tensors_are_quantized_is_refused(folder, tmp_path):
    """Keys of the original among quantized queries and values, which are one weight here."""
    packed = tmp_path / "packed"
    write_quantized_copy(folder, packed, {"weight_bits": 8, "embedding_bits": None})
    config, key = load_config(packed), "model.layers.0.self_attn.k_proj.weight"
    weight_format = WeightFormat("float32", 8)
    Checkpoint(packed, config).check(1, config.tensors(1), weight_format)
    name = json.loads((packed / INDEX).read_text())["weight_map"][key]
    change(packed, {key: load_file(folder / WEIGHTS)[key]}, name)
    with pytest.raises(ValueError, match="q_proj.weight, .*k_proj.weight, .* some are quantized"):
        Checkpoint(packed, config).check(1, config.tensors(1), weight_format)


@pytest.mark.parametrize("stray", ["ema.safetensors", "zz-00001-of-00001.safetensors", "index"])
def test_other_files_beside_model_safetensors_count_for_nothing(folder, stray):
    noise = {key: torch.randn(it.shape) for key, it in load_file(folder / WEIGHTS).items()}
    if stray == "index":
        stray = "model-00001-of-00001.safetensors"
        files = {"metadata": {}, "weight_map": dict.fromkeys(noise, stray)}
        (folder / INDEX).write_text(json.dumps(files))
    save_file(noise, folder / stray, {"format": "pt"})
    assert_as_transformers(folder)


def test_files_beside_listed_shards_count_for_nothing(folder):
    noise = {key: torch.randn(it.shape) for key, it in load_file(folder / WEIGHTS).items()}
    shards(folder)
    save_file(noise, folder / "zz.safetensors", {"format": "pt"})
    assert_as_transformers(folder)


def test_complete_shards_need_no_index(folder, tiny_models):
    shards(folder)
    (folder / INDEX).unlink()
    assert_as_transformers(folder, like=tiny_models["llama"][0])


def refusal(folder) -> str:
    """The words with which the folder is refused."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Checkpoint(folder, load_config(folder))
    return str(caught.value)


def test_a_tensor_in_two_shards_is_refused(folder):
    one, two = shards(folder)
    change(folder, {"model.norm.weight": torch.zeros(32)}, one)
    change(folder, {"model.norm.weight": torch.ones(32)}, two)
    assert f"{one} both hold the tensor model.norm.weight" in refusal(folder)


def test_incomplete_shards_without_an_index_are_refused(folder):
    one, two = shards(folder)
    (folder / INDEX).unlink()
    (folder / two).unlink()
    assert f"{one} are not the complete shards" in refusal(folder)


def test_a_single_file_of_another_name_is_refused_with_the_remedy(folder):
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    said = refusal(folder)
    assert "consolidated.safetensors" in said and "rename it to model.safetensors" in said


@pytest.mark.parametrize("place", ["../{}", "{folder}/{}", "sub/{}", "..", ""])
def test_an_index_names_only_files_of_its_folder(folder, place):
    one, _ = shards(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = place.format(one, folder=folder)
    (folder / INDEX).write_text(json.dumps(index))
    assert "only *.safetensors files in the same folder are read" in refusal(folder)


def test_a_tensor_that_is_not_in_its_listed_file_is_named(folder):
    one, _ = shards(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.7.x"] = one
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{one} holds the tensor model.layers.7.x, but it does not" in refusal(folder)


def test_values_of_an_unknown_dtype_are_refused(folder):
    key = "model.layers.0.mlp.up_proj.weight"
    change(folder, {key: load_file(folder / WEIGHTS)[key].to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=f"{key} is stored as F8_E4M3, which is not supported"):
        tokens(folder, [[5, 6]])


def test_linear_rope_stretches_the_context(tiny_models):
    """max_position_embeddings 160 and factor 2 make a context of 320."""
    folder, _ = tiny_models["llama-linear"]
    assert load_config(folder).max_seq_len == 2 * tiny.CONTEXT
    [reference] = tiny.references(folder, [[5, 9, 11, 30] * 50], MAX_TOKENS)
    certain = reference.certain_len()
    assert certain and tokens(folder, [reference.prompt])[0][:certain] == reference.tokens[:certain]


def test_gemma_s_context_is_not_stretched_again(tiny_models):
    assert load_config(tiny_models["gemma3"][0]).max_seq_len == tiny.CONTEXT


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([10**6, 10**18, 10**400])
    | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(tiny.CONFIGS)), data=st.data())
def test_any_config_is_read_or_refused_immediately(tiny_models, tmp_path_factory, name, data):
    keys = json.loads((tiny_models[name][0] / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(keys)))
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(keys | {key: data.draw(JSON)}))
    started = time.process_time()
    try:
        config = load_config(path.parent)
    except ValueError as error:
        assert str(path.parent) in str(error)
    else:
        assert isinstance(config, ModelConfig) and 1 <= config.num_layers <= 1024
    assert time.process_time() - started < 1


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a": ' * 10**5, "[]", "\0", "{" + " " * 2**24])
def test_a_config_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_config(tmp_path)
