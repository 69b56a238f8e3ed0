"""Models that need no checkpoint: shapes as published, weights made up but always the same."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from strategies import MIB, tiers

from flexgen_ray.config import Placement, Policy, Workload
from flexgen_ray.kernels.pack import unpack
from flexgen_ray.layout.placement import stored_tensors
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.dummy import DummyWeights
from flexgen_ray.models.shapes import SHAPES, shape_config
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.packing import packed_bytes
from flexgen_ray.schedule.ops import OpKind
from flexgen_ray.schedule.zigzag import StageLayers, zigzag
from flexgen_ray.store.weights import WeightStore


def opt_parameters(layers: int, hidden: int) -> int:
    """Zhang et al. 2022: tables, the final norm, and 12 h^2 + 13 h a layer."""
    return (50272 + 2050 + 2) * hidden + layers * (12 * hidden**2 + 13 * hidden)


PARAMETERS = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": opt_parameters(64, 9216),
    "opt-175b": opt_parameters(96, 12288),
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "phi-3-mini": 3_821_079_552,
    "gemma-7b": 8_537_680_896,
    "gemma-3-1b": 999_885_952,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "olmoe-1b-7b": 6_919_161_856,
    # Without the layer that predicts a token more.
    "glm-4.5-air": 106_852_251_264,
    "glm-4.5": 352_797_829_024,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_parameters_of_the_published_models(name):
    config = shape_config(name)
    stage = StageLayers.whole(config.num_layers)
    count = sum(
        prod(shape)
        for layer in stage.layers
        for shape in stored_tensors(config, stage, layer).values()
    )
    count += config.attention_sinks * config.num_heads * config.num_layers  # stored apart
    if config.qk_norm == "heads":
        # One norm is published for all query heads, and one for all key heads.
        repeated = config.num_heads + config.num_kv_heads - 2
        count -= repeated * config.head_dim * config.num_layers
    assert count == PARAMETERS[name]


def test_an_unknown_shape_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="opt-66b.*llama-3-70b"):
        shape_config("opt-65b")


@pytest.mark.parametrize("bits", [None, 4])
def test_dummy_weights_are_the_same_wherever_they_lie(tmp_path, monkeypatch, bits):
    """120 MB on three tiers, against all in one; progress ends when all is there.

    Quantized ones are never computed.
    """
    monkeypatch.setattr("flexgen_ray.store.weights.pack", None)
    config = replace(shape_config("opt-125m"), num_layers=3)
    stage = StageLayers.whole(config.num_layers)
    spread, whole = (
        StagePlan(config, stage, policy.compressed(weight_bits=bits), work, "float16")
        for work in [Workload(1, 1, 2)]
        for weights in (Placement(0.3, 0.3, 0.4), Placement(1, 0, 0))
        for policy in [Policy(num_gpu_batches=3, weights=weights)]
    )
    places, steps = tiers(tmp_path, 400 * MIB), []
    try:
        store = WeightStore(spread, DummyWeights(), places, lambda *step: steps.append(step))
        expected = WeightStore(whole, DummyWeights(), tiers(tmp_path, 400 * MIB))
        for op in zigzag(stage, 3, range(1)):
            if op.kind is OpKind.READ_WEIGHTS:
                store.read_part(op)
            elif op.kind is OpKind.LOAD_WEIGHTS:
                store.load_part(op)
            elif op.kind is OpKind.FINISH and op.layer in stage.with_weights:
                for name, tensor in store.tensors(op).items():
                    assert torch.equal(tensor, expected.tensors(op)[name]), (op.layer, name)
    finally:
        places.disk.close()
    assert steps == sorted(steps) and len(steps) == 40
    assert steps[-1] == (sum(spread.weights.nbytes.values()),) * 2


def test_dummy_weights_keep_activations_in_range():
    """Norms one, biases zero, matrices of variance 1 / inputs with rows that all differ."""
    source = DummyWeights()
    norm, bias, matrix = torch.empty(64), torch.ones(64), torch.empty(4100, 1024).half()
    source.read_into(1, "mlp_norm.weight", norm)
    source.read_into(1, "up_proj.bias", bias)
    source.read_into(1, "up_proj.weight", matrix)
    assert norm.eq(1).all() and bias.eq(0).all()
    assert matrix.float().std().item() == pytest.approx(1024**-0.5, rel=0.01)
    assert len(matrix.unique(dim=0)) == len(matrix)
    other = torch.empty_like(matrix)
    source.read_into(2, "up_proj.weight", other)
    assert not torch.equal(matrix, other)


def test_experts_in_mxfp4_are_the_same_wherever_they_lie(tmp_path, monkeypatch):
    """Cut between experts, on three tiers; of the usual size, and no two experts alike."""
    monkeypatch.setattr("flexgen_ray.store.weights.pack", None)
    config = replace(
        shape_config("qwen3-30b-a3b"), num_layers=2, num_experts=7, vocab_size=512,
        hidden_size=256, num_heads=4, expert_size=160, expert_format="mxfp4",
    )  # fmt: skip
    stage = StageLayers.whole(config.num_layers)
    plans = [
        StagePlan(config, stage, Policy(weights=weights), Workload(1, 1, 2), "bfloat16")
        for weights in (Placement(0.3, 0.3, 0.4), Placement(1, 0, 0))
    ]
    places, found = tiers(tmp_path, 100 * MIB), []
    try:
        for plan in plans:
            store = WeightStore(plan, DummyWeights(), places)
            found.append({})
            for op in zigzag(stage, 1, range(1)):
                if op.kind is OpKind.READ_WEIGHTS:
                    store.read_part(op)
                elif op.kind is OpKind.LOAD_WEIGHTS:
                    store.load_part(op)
                elif op.kind is OpKind.FINISH and op.layer in stage.decoders:
                    for key, tensor in store.tensors(replace(op, kind=OpKind.EXPERTS)).items():
                        name, _, first = key.partition("@")
                        for number, expert in enumerate(tensor if first else (), int(first or 0)):
                            found[-1][op.layer, name, number] = expert.clone()
    finally:
        places.disk.close()
    assert len(found[1]) == 2 * 2 * 7 and found[0].keys() == found[1].keys()
    for key, expert in found[1].items():
        assert torch.equal(found[0][key], expert), key
        rows, columns = expert.shape
        assert expert.float().std().item() == pytest.approx(columns**-0.5, rel=0.5)
    assert len({expert.float().sum().item() for expert in found[1].values()}) == len(found[1])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_dummy_weights_are_of_the_usual_size(bits):
    """Finite, of variance 1 / inputs and mean zero, with rows that all differ."""
    source, (count, size) = DummyWeights(), (3000, 1088)
    source.check(1, {"up_proj.weight": (count, size)}, WeightFormat("float16", bits))
    packed = torch.empty(count, packed_bytes(size, bits), dtype=torch.uint8)
    source.read_into(1, "up_proj.weight", packed)
    values = torch.empty(count, size)
    unpack(packed, bits, values)
    assert values.isfinite().all() and values.abs().max() < 2 * size**-0.5
    assert values.std().item() == pytest.approx(size**-0.5, rel=0.01)
    assert abs(values.mean().item()) < 0.01 * size**-0.5
    assert len(packed.unique(dim=0)) == count
