"""Checkpoints of gpt-oss in MXFP4: tokens are transformers', and the bytes are never rounded."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import tiny
import torch
from engine_runs import assert_same, greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_cuda import pretend_cuda
from safetensors.torch import load_file, save_file
from strategies import pipelines, placements, policies
from torch import Tensor
from transformers import Mxfp4Config

from flexgen_ray import LLM, Placement, Policy
from flexgen_ray.cli.main import app
from flexgen_ray.config import Workload
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.checkpoint import Checkpoint
from flexgen_ray.models.config_files import load_config
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.mxfp4 import MAGNITUDES, Mxfp4
from flexgen_ray.schedule.ops import OpKind
from flexgen_ray.schedule.zigzag import StageLayers

EXPERTS = ("gate_up_proj", "down_proj")


def to_mxfp4(matrices: Tensor) -> dict[str, Tensor]:
    """Blocks and scales of the nearest values to matrices [..., rows, columns]."""
    groups = matrices.unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    table = torch.tensor([*MAGNITUDES, *(-it for it in MAGNITUDES)])
    scaled = groups / 2.0 ** exponents[..., None]
    codes = (scaled[..., None] - table).abs().argmin(-1).byte()
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return {"_blocks": blocks, "_scales": (exponents + 127).byte()}


def save_packed(folder: Path, **changes) -> Path:
    """A tiny gpt-oss whose experts are published in MXFP4."""
    tiny.save("gpt-oss", folder, hidden_size=64, intermediate_size=32, **changes)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(EXPERTS)]:
        packed = to_mxfp4(tensors.pop(key).mT)
        tensors |= {key + suffix: it.contiguous() for suffix, it in packed.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit(folder, quantization_config={"quant_method": "mxfp4"})
    return folder


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, references), by transformers' loader, which dequantizes."""
    folder = save_packed(tmp_path_factory.mktemp("mxfp4"))
    prompts, dequantizing = tiny.prompts(4, 24), Mxfp4Config(dequantize=True)
    return folder, tiny.references(folder, prompts, 12, quantization_config=dequantizing)


@settings(max_examples=2)
@given(policy=policies, executor=st.sampled_from(["serial", "async"]))
def test_every_policy_generates_the_same_tokens_as_transformers(model, policy, executor):
    folder, references = model
    assert sum(it.certain_len() for it in references) >= 4 * 12 - 4
    prompts = [reference.prompt for reference in references]
    assert_same(greedy(folder, prompts, policy, use_ray=False, executor=executor), references)


@settings(max_examples=2)
@given(data=st.data())
def test_every_split_generates_the_same_tokens(model, data):
    folder, references = model
    stages = data.draw(pipelines(3))
    options = {"pipeline_parallel_size": len(stages.layers), "use_ray": False}
    prompts = [reference.prompt for reference in references]
    assert_same(greedy(folder, prompts, stages, **options), references)


def test_a_cuda_run_dequantizes_on_the_device_and_waits_for_nothing(model):
    """Experts on three tiers, in the op that multiplies them and in no other."""
    folder, references = model
    prompts = [reference.prompt for reference in references]
    policy = Policy(2, 2, weights=Placement(0.4, 0.3, 0.3))
    with pretend_cuda() as device:
        found = greedy(folder, prompts, policy, "cuda", use_ray=False, gpu_memory="1GiB")
    assert_same(found, references)
    in_ops = [note.where for note in device.notes if note.kind is not None]
    assert not [where for where in in_ops if "mxfp4" in where or "weights" in where]
    cells = {cell for cell, name in device.launches if name == "dequantize"}
    assert {cell.kind for cell in cells} == {OpKind.EXPERTS}
    assert {cell.layer for cell in cells} == {1, 2, 3}


def test_stored_bytes_are_the_checkpoints(model):
    """Blocks, then scales, of each expert; rows of the gate before those of the up projection."""
    folder, _ = model
    config = load_config(folder)
    checkpoint, tensors = Checkpoint(folder, config), load_file(folder / "model.safetensors")
    for name, key in (("gate_up_experts.weight", EXPERTS[0]), ("down_experts.weight", EXPERTS[1])):
        _, *shape = config.tensors(2)[name]
        stored = torch.zeros(Mxfp4().stored_shape((3, *shape)), dtype=torch.uint8)
        checkpoint.read_into(2, name, stored, 2)
        found = iter(stored.unbind())
        for expert in range(2, 5):
            ends = (
                f"model.layers.1.mlp.experts.{key}{suffix}" for suffix in ("_blocks", "_scales")
            )
            parts = [tensors[end][expert] for end in ends]
            if key == EXPERTS[0]:
                parts = [torch.cat((it[0::2], it[1::2])) for it in parts]
            assert torch.equal(next(found), torch.cat([it.flatten() for it in parts]))


@given(placement=placements())
def test_experts_take_their_published_bytes_on_every_tier(model, placement):
    """17 bytes for 32 values, also where a layer is cut between experts."""
    config = load_config(model[0])
    plan = StagePlan(
        config, StageLayers.whole(3), Policy(weights=placement), Workload(1, 1, 2), "bfloat16"
    )
    layout, counted = plan.weights, 0
    for layer in plan.stage.decoders:
        for key, cut in layout.cuts[layer].items():
            if "experts.weight" in cut.name:
                place, exact = layout.places[layer][key], prod(cut.shape) // 32 * 17
                assert 0 <= place.nbytes - exact < (64 if place.tier == "gpu" else 4096)
                counted += prod(cut.shape)
    assert counted == 3 * 6 * (64 * 64 + 64 * 32)


@pytest.mark.parametrize(
    "name, total_size", [("gpt-oss-20b", 13_761_264_768), ("gpt-oss-120b", 65_248_815_744)]
)
def test_built_in_shapes_take_the_bytes_that_published_checkpoints_name(name, total_size):
    config = shape_config(name)
    kept = WeightFormat("bfloat16", experts=config.expert_format)
    assert kept.described == "bfloat16, experts in MXFP4"
    layers = map(config.tensors, range(config.num_layers + 2))
    assert total_size == sum(kept.stored_bytes(*it) for layer in layers for it in layer.items())


def test_quantizing_again_is_refused(model, tmp_path):
    folder, _ = model
    with pytest.raises(ValueError, match="experts in MXFP4.*aren't quantized again.*weight_bits"):
        LLM(folder, use_ray=False, weight_bits=4)
    command = ["quantize", "--model", str(folder), "--output", str(tmp_path / "packed")]
    with pytest.raises(ValueError, match="quantized already"):
        app(command, standalone_mode=False)
    # Other weights and the cache may be.
    LLM(folder, use_ray=False, embedding_bits=4, cache_bits=4)


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", r"no safetensors file holds the tensor .*\.1\.mlp\.experts\.down_proj_scales"),
        ("shape", r"down_proj_scales is U8 \[6, 64, 2\], but config.json says MXFP4.*\[6, 64, 1\]"),
        ("infinite", "experts 5 to 5 of .*down_proj hold values beyond float32"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(model, tmp_path, change, message):
    folder, _ = model
    tensors = load_file(folder / "model.safetensors")
    key, config = "model.layers.1.mlp.experts.down_proj_scales", load_config(folder)
    scales = tensors.pop(key)
    if change == "shape":
        tensors[key] = scales.repeat(1, 1, 2)
    if change == "infinite":
        tensors[key] = scales.clone()
        tensors[key][5, 3] = 255
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        checkpoint, name = Checkpoint(tmp_path, config), "down_experts.weight"
        checkpoint.check(2, {name: config.tensors(2)[name]}, WeightFormat("float32"))
        checkpoint.read_into(2, name, torch.zeros(1, 64 * 17, dtype=torch.uint8), 5)
