"""Mixtures of experts: exact wherever their experts lie, and laid out however many there are."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache as memoized
from types import SimpleNamespace

import pytest
import tiny
import torch
from engine_runs import assert_same, generate, greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import pipelines, placements, policies
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.cli.main import app
from flexgen_ray.config import TIERS, Workload
from flexgen_ray.cost.experts import touched_experts
from flexgen_ray.kernels.pack import pack, unpack
from flexgen_ray.layout import plan as plan_module
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import (
    FRAGMENTATION,
    _op_bytes,
    expert_workspace_bytes,
    stage_bytes,
)
from flexgen_ray.models import experts
from flexgen_ray.models.checkpoint import Checkpoint
from flexgen_ray.models.config_files import load_config
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.expert_slots import with_expert_slots
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.schedule.zigzag import StageLayers

EXECUTORS = st.sampled_from(["serial", "async"])
ROUTERS = ("mlp.gate.weight", "mlp.router.weight", "shared_expert_gate.weight")  # never packed


PARTS = st.builds(
    # Rows wait for experts if hidden states stay on the device.
    lambda policy, options: replace(policy, activations=Placement(), **options)
    if options is not None else policy,
    policies,
    st.sampled_from(
        [None, {}, {"expert_batches": 1}, {"expert_batches": 2}, {"expert_slots": 2},
         {"expert_slots": 3}]
    ),
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_rows_at_a_time():
    """Let few rows wait for experts, experts take few at a time, and groups of them be small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "WAITING", 9)
        patch.setattr(plan_module, "EXPERT_ROWS", 4)
        patch.setattr(plan_module, "EXPERT_GROUP_BYTES", 20_000)
        yield


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """{name: (folder, references)} of each family."""
    models = {}
    for name in tiny.MIXTURES:
        folder = tiny.save(name, tmp_path_factory.mktemp(name))
        models[name] = (folder, tiny.references(folder, tiny.prompts(4, 24), 12))
    return models


def test_little_is_too_close_to_call(mixtures):
    for name, (_, references) in mixtures.items():
        assert len({token for it in references for token in it.tokens}) >= 12, name
        assert sum(it.certain_len() for it in references) >= 4 * 12 - 4, name


@pytest.mark.parametrize("name", tiny.MIXTURES)
@settings(max_examples=2)
@given(policy=PARTS, executor=EXECUTORS)
def test_every_policy_generates_the_same_tokens_as_transformers(mixtures, name, policy, executor):
    folder, references = mixtures[name]
    prompts = [reference.prompt for reference in references]
    assert_same(greedy(folder, prompts, policy, use_ray=False, executor=executor), references)


def test_a_layer_larger_than_the_device_streams_through_it(tmp_path):
    """From memory and disk: the device has not even room for one layer's experts."""
    folder = tiny.save("qwen3-moe", tmp_path, num_experts=96, moe_intermediate_size=64,
                       num_hidden_layers=2, mlp_only_layers=[])  # fmt: skip
    references = tiny.references(folder, tiny.prompts(4, 24), 12)
    prompts = [reference.prompt for reference in references]
    experts_of_layer = 96 * 3 * 64 * 32 * 4
    policy = Policy(2, 2, 32, weights=Placement(0, 0.5, 0.5), expert_slots=2)
    with LLM(
        folder, policy=policy, dtype="float32", device="cpu", use_ray=False,
        gpu_memory=experts_of_layer * 2 // 3,
    ) as llm:  # fmt: skip
        params = SamplingParams(max_tokens=12, temperature=0)
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
        (stage,) = llm.report.stages
        in_flight = stage.used["gpu"]["weights in flight"]
    assert_same(outputs, references)
    assert 2 * 20_000 <= in_flight < 0.1 * experts_of_layer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@settings(max_examples=6)
@given(name=st.sampled_from(sorted(tiny.MIXTURES)), policy=policies)
def test_a_gpu_generates_the_same_tokens_as_transformers(mixtures, name, policy):
    folder, references = mixtures[name]
    prompts = [reference.prompt for reference in references]
    assert_same(greedy(folder, prompts, policy, device="cuda", use_ray=False), references)


@settings(max_examples=2)
@given(
    name=st.sampled_from(["qwen3-moe", "qwen2-moe", "glm4-moe", "gpt-oss"]),
    executor=EXECUTORS,
    data=st.data(),
)
def test_every_split_generates_the_same_tokens(mixtures, name, executor, data):
    folder, references = mixtures[name]
    stages = data.draw(pipelines(tiny.MIXTURES[name].num_hidden_layers))
    options = {"pipeline_parallel_size": len(stages.layers), "executor": executor}
    prompts = [reference.prompt for reference in references]
    assert_same(greedy(folder, prompts, stages, use_ray=False, **options), references)


@settings(max_examples=2)
@given(name=st.sampled_from(sorted(tiny.MIXTURES)), policy=policies)
def test_async_equals_serial_bit_for_bit(mixtures, name, policy, monkeypatch):
    folder, references = mixtures[name]
    prompts = [reference.prompt for reference in references]
    tokens, logits = generate(folder, prompts, policy, "serial", monkeypatch)
    others, their_logits = generate(folder, prompts, policy, "async", monkeypatch)
    assert others == tokens
    assert all(torch.equal(a, b) for a, b in zip(their_logits, logits, strict=True))


@memoized
def rounded_references(folder, bits: int) -> list[tiny.Reference]:
    """transformers' tokens with the layers' matrices rounded, but for routers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for key, parameter in model.named_parameters():
        if ".layers." in key and parameter.dim() > 1 and not key.endswith((*ROUTERS, "_bias")):
            # gpt-oss stacks matrices [in, out].
            is_turned = "gpt_oss" in model.config.model_type and parameter.dim() == 3
            matrix = (parameter.mT if is_turned else parameter).detach().contiguous()
            unpack(pack(matrix, bits, least_squares=True), bits, matrix)
            parameter.data.copy_(matrix.mT if is_turned else matrix)
    made = [tiny.generate(model, prompt, 12) for prompt in tiny.prompts(4, 24)]
    return tiny.with_routes(model, made)


@settings(max_examples=3)
@given(name=st.sampled_from(sorted(tiny.MIXTURES)), bits=st.sampled_from([4, 8]), policy=policies)
def test_packed_experts_are_those_of_the_rounded_model(mixtures, name, bits, policy):
    folder, _ = mixtures[name]
    wanted = rounded_references(folder, bits)
    policy = replace(policy, weight_bits=bits)
    assert_same(greedy(folder, [it.prompt for it in wanted], policy, use_ray=False), wanted)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_a_packed_checkpoint_has_packed_experts(mixtures, tmp_path, name):
    folder, _ = mixtures[name]
    app(["quantize", "--model", str(folder), "--output", str(tmp_path / "packed"),
         "--weight-bits", "4"], standalone_mode=False)  # fmt: skip
    wanted = rounded_references(folder, 4)
    policy = Policy(3, 2, weights=Placement(0.3, 0.3, 0.4))
    prompts = [it.prompt for it in wanted]
    assert_same(greedy(tmp_path / "packed", prompts, policy, use_ray=False), wanted)


def test_stacked_checkpoints_are_read_as_published_ones(mixtures, tmp_path):
    """Published ones have a tensor an expert; Mixtral's have other names besides."""
    folder, _ = mixtures["mixtral"]
    config = load_config(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path, save_original_format=False)
    stacked, published = Checkpoint(tmp_path, config), Checkpoint(folder, config)
    assert any(key.endswith("mlp.experts.down_proj") for key in stacked._tensors)
    assert any(key.endswith("experts.3.w2.weight") for key in published._tensors)
    for name, shape in config.tensors(2).items():
        stacked.check(2, {name: shape}, WeightFormat("float32"))
        count = 3 if len(shape) == 3 else shape[0]
        one, other = torch.empty(count, *shape[1:]), torch.empty(count, *shape[1:])
        stacked.read_into(2, name, one, len(shape) == 3)
        published.read_into(2, name, other, len(shape) == 3)
        assert torch.equal(one, other), name


def test_a_missing_expert_is_named(mixtures, tmp_path):
    folder, _ = mixtures["olmoe"]
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    config = load_config(folder)
    with pytest.raises(ValueError, match=r"holds the tensor model\.layers\.1\.mlp\.experts\.7\.up"):
        Checkpoint(tmp_path, config).check(2, config.tensors(2), WeightFormat("float32"))


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("qwen3-moe", {"mlp_only_layers": [0, 2]}, (1, 3)),
        ("qwen3-moe", {"mlp_only_layers": None, "decoder_sparse_step": 2}, (1, 3)),
        ("qwen3-moe", {"num_local_experts": None, "num_experts": 9}, (2,)),
        ("qwen2-moe", {"decoder_sparse_step": 3}, (1, 2)),
        ("mixtral", {}, ()),
        ("glm4-moe", {}, (1, 2)),
        ("glm4-moe", {"first_k_dense_replace": 0}, ()),
        ("glm4-moe", {"first_k_dense_replace": 9}, (1, 2, 3, 4)),
    ],
)
def test_layers_without_experts_are_those_of_transformers(
    mixtures, tmp_path, name, changes, expected
):
    keys = json.loads((mixtures[name][0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | changes))
    config = load_config(tmp_path)
    layers = range(1, config.num_layers + 1)
    assert config.dense_layers == expected
    assert [it for it in layers if not config.has_experts(it)] == list(expected)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
        ("qwen3-moe", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ("mixtral", {"num_experts_per_tok": 5}, "experts_per_token is 5; .* integer, 1 to 4"),
        ("qwen2-moe", {"moe_intermediate_size": 0}, "expert_size is 0"),
        ("glm4-moe", {"n_group": 5}, "n_group is 5 and n_routed_experts 12; groups must be of one"),
        ("glm4-moe", {"topk_group": 5}, "topk_group is 5 of 4 groups of 3 experts"),
        ("glm4-moe", {"num_experts_per_tok": 7}, "must hold the num_experts_per_tok, 7: correct"),
        ("glm4-moe", {"routed_scaling_factor": 0}, "routed_scale is 0; it must be a number above"),
        ("gpt-oss", {"swiglu_limit": -7.0}, "swiglu_limit is -7.0; it must be a number above 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(mixtures, tmp_path, name, changes, message):
    keys = json.loads((mixtures[name][0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | changes))
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)


def test_gpt_oss_is_refused_in_float16_before_anything_is_loaded(mixtures):
    with pytest.raises(ValueError, match="65504.*use --dtype bfloat16 or float32"):
        LLM(mixtures["gpt-oss"][0], dtype="float16", use_ray=False)


def layout_of(config, placement: Placement, bits: int | None = None):
    policy = Policy(weights=placement, weight_bits=bits)
    stage = StageLayers.whole(config.num_layers)
    return StagePlan(config, stage, policy, Workload(1, 1, 2), "bfloat16").weights


@settings(max_examples=30)
@given(placement=placements(), bits=st.sampled_from([None, 4]))
def test_experts_follow_a_placement_within_one_of_them(placement, bits):
    config = replace(shape_config("qwen3-30b-a3b"), num_layers=6)
    layout, weight_format = layout_of(config, placement, bits), WeightFormat("bfloat16", bits)
    nbytes, one = dict.fromkeys(TIERS, 0), 0
    for layer in range(config.num_layers + 2):
        ends = {}
        for key, cut in layout.cuts[layer].items():
            nbytes[layout.places[layer][key].tier] += weight_format.stored_bytes(
                cut.name, cut.shape
            )
            if cut.first is not None:
                # From the first on, and whole: both matrices of an expert lie on one tier.
                assert ends.get(cut.name, 0) == cut.first
                ends[cut.name] = cut.first + cut.shape[0]
                each = weight_format.stored_bytes(cut.name, (1, *cut.shape[1:]))
                one = max(one, 2 * each)
        assert set(ends.values()) <= {config.num_experts}
        first, *others = [
            [(cut.first, layout.places[layer][key].tier)
             for key, cut in layout.cuts[layer].items() if cut.name == name]
            for name in ("gate_up_experts.weight", "down_experts.weight")
        ]  # fmt: skip
        assert others == [first]
    # Tables at both ends are larger than an expert.
    table = weight_format.stored_bytes("lm_head.weight", (config.vocab_size, config.hidden_size))
    total, slack = sum(nbytes.values()), one
    in_the_middle = [tier for tier in TIERS if getattr(placement, tier) * total > 2 * table]
    for tier, fraction in zip(TIERS, placement.fractions, strict=True):
        assert fraction > 0 or nbytes[tier] == 0
        if len(in_the_middle) == sum(it > 0 for it in placement.fractions):
            assert abs(nbytes[tier] - fraction * total) <= 2 * slack


def test_a_layout_does_not_grow_with_the_number_of_experts():
    few = replace(shape_config("qwen3-30b-a3b"), num_layers=4)
    many = replace(few, num_experts=8192, expert_size=8)
    third = Placement(0.3, 0.3, 0.4)
    for layer in (2, 3):
        a, b = (layout_of(config, third) for config in (few, many))
        assert a.cuts[layer].keys() >= {"router.weight"}
        assert abs(len(a.cuts[layer]) - len(b.cuts[layer])) <= 2
        assert len(a.streams[layer].extents) == len(b.streams[layer].extents) == 2


@settings(max_examples=25)
@given(
    ends=st.lists(st.integers(1, 11), max_size=2, unique=True),
    tokens=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    has_bias=st.booleans(),
)
def test_parts_and_groups_on_a_device_give_each_choice_its_expert(ends, tokens, dtype, has_bias):
    """The way of GPUs, which never asks how long a group is, here on the CPU."""
    config = SimpleNamespace(
        num_experts=12, experts_per_token=4, activation="silu", swiglu_limit=None
    )
    generator = torch.Generator().manual_seed(tokens)
    shapes = (tokens, 32), (12, 32, 32), (12, 32, 16), (12, 1, 32), (12, 1, 32)
    x, gate_up, down, *biases = (torch.randn(it, generator=generator).to(dtype) for it in shapes)
    chosen = torch.stack([torch.randperm(12, generator=generator)[:4] for _ in range(tokens)])
    bounds = [0, *sorted(ends), 12]
    weights = {}
    for first, end in zip(bounds, bounds[1:], strict=False):
        weights[f"gate_up_experts.weight@{first}"] = gate_up[first:end]
        weights[f"down_experts.weight@{first}"] = down[first:end]
        if has_bias:
            for name, bias in zip(("gate_up", "down"), biases, strict=True):
                weights[f"{name}_experts.bias@{first}"] = bias[first:end]
    in_turn = experts._outputs(config, weights, x, chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "_groups_on_gpu", lambda parts: True)
        grouped = experts._outputs(config, weights, x, chosen)
    for token, numbers in enumerate(chosen.tolist()):
        for place, number in enumerate(numbers):
            before, after = (has_bias * bias[number, 0] for bias in biases)
            gate, up = (x[token] @ gate_up[number].T + before).chunk(2)
            wanted = (torch.nn.functional.silu(gate) * up) @ down[number].T + after
            for found in (in_turn, grouped):
                torch.testing.assert_close(found[token, place], wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(in_turn, grouped)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bounds", [[0, 12], [0, 5, 12], [0, 1, 9, 12]])
def test_a_gpu_gives_each_choice_its_expert(bounds, dtype):
    config = SimpleNamespace(
        num_experts=12, experts_per_token=4, activation="silu", swiglu_limit=None
    )
    generator = torch.Generator().manual_seed(0)
    shapes = (7, 32), (12, 32, 32), (12, 32, 16)
    x, gate_up, down = (torch.randn(it, generator=generator).to(dtype) for it in shapes)
    chosen = torch.stack([torch.randperm(12, generator=generator)[:4] for _ in range(7)])
    outputs = []
    for device in ("cpu", "cuda"):
        weights = {}
        for first, end in zip(bounds, bounds[1:], strict=False):
            weights[f"gate_up_experts.weight@{first}"] = gate_up[first:end].to(device)
            weights[f"down_experts.weight@{first}"] = down[first:end].to(device)
        outputs.append(experts._outputs(config, weights, x.to(device), chosen.to(device)).cpu())
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=5e-2)


class Live(TorchDispatchMode):
    """peak: most bytes of memory that ops took and that was in use at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {it.untyped_storage()._cdata for it in args if isinstance(it, torch.Tensor)}
        for made in result if isinstance(result, tuple | list) else (result,):
            storage = made.untyped_storage()
            if storage._cdata not in before:
                self._taken[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._taken = {key: it for key, it in self._taken.items() if not it[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._taken.values()))
        return result


@pytest.mark.parametrize("corrects", [False, True])  # then all tokens choose the same experts
@pytest.mark.parametrize("shared", [0, 700])
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(("count", "choices", "size"), [(16, 8, 96), (4, 2, 304), (256, 1, 8)])
def test_temporaries_are_no_more_than_a_plan_counts(
    count, choices, size, on_gpu, shared, corrects, monkeypatch
):
    config = replace(
        shape_config("qwen3-30b-a3b"), num_layers=1, hidden_size=128, num_heads=1, num_kv_heads=1,
        num_experts=count, experts_per_token=choices, expert_size=size, shared_expert_size=shared,
        vocab_size=8, corrects_choice=corrects, shared_expert_gate=not corrects,
        expert_groups=2, chosen_groups=2 - corrects,
        expert_bias=not shared, swiglu_limit=None if shared else 7.0,
    )  # fmt: skip
    policy = Policy(1, max_batch_tokens=64)
    plan = StagePlan(config, StageLayers.whole(1), policy, Workload(1, 64, 65), "bfloat16")
    weights = {}
    for cut in plan.weights.cuts[1].values():
        shape = cut.shape
        if cut.first is not None:
            # In two parts.
            half = shape[0] // 2
            weights[f"{cut.name}@0"], weights[f"{cut.name}@{half}"] = torch.randn(
                2, half, *shape[1:], dtype=torch.bfloat16
            )
        else:
            weights[cut.name] = torch.randn(shape, dtype=torch.bfloat16)
    hidden, attention = torch.randn(2, 64, 128, dtype=torch.bfloat16)
    monkeypatch.setattr(experts, "_groups_on_gpu", lambda parts: on_gpu)
    routed = experts.Routed(
        torch.empty_like(hidden),
        torch.empty(64, choices, dtype=hidden.dtype),
        torch.empty(64, choices, dtype=torch.int64),
    )
    with Live() as live:
        experts.route(config, weights, hidden, attention, routed)
    counted = _op_bytes(plan)[1]
    assert counted / 3 <= live.peak <= counted
    with Live() as live:
        experts.mix(config, weights, routed)
    counted = expert_workspace_bytes(plan) / FRAGMENTATION
    assert counted / 3 <= live.peak <= counted


def test_blocks_touch_nearly_every_expert():
    config = shape_config("qwen3-30b-a3b")
    assert touched_experts(config, 1) == pytest.approx(8)
    assert 0.97 < touched_experts(config, 64) / 128 < 0.99
    assert touched_experts(shape_config("mixtral-8x7b"), 64) == pytest.approx(8, rel=1e-6)


@settings(max_examples=6)
@given(name=st.sampled_from(sorted(tiny.MIXTURES)), policy=PARTS, bits=st.sampled_from([None, 4]))
def test_the_stores_take_exactly_what_was_computed(mixtures, name, policy, bits):
    folder, references = mixtures[name]
    policy = replace(policy, weight_bits=bits)
    with LLM(folder, policy=policy, dtype="float32", device="cpu", use_ray=False) as llm:
        llm.generate([references[0].prompt], SamplingParams(max_tokens=2, temperature=0))
        (stage,) = llm.report.stages
        assert stage.used == stage_bytes(stage.plan)


def test_experts_get_slots_where_two_layers_take_too_much_of_the_device():
    """Quantized ones with the values of a layer; nothing else in a policy changes."""
    plain, packed = shape_config("mixtral-8x7b"), shape_config("gpt-oss-120b")
    layer = 8 * 3 * 4096 * 14336 * 2  # bytes
    assert with_expert_slots(Policy(), plain, "float16", 8 * layer) == Policy()
    assert with_expert_slots(Policy(), shape_config("opt-30b"), "float16", 2**30) == Policy()
    for config, nbytes in (
        (plain, 8 * layer - 1),
        (plain, layer),
        (plain, 1),
        (packed, 22 * 10**9),
    ):
        policy = with_expert_slots(Policy(), config, "bfloat16", nbytes)
        assert policy.expert_slots and policy.expert_slots >= 2
        assert replace(policy, expert_slots=None) == Policy()
    given = Policy(expert_slots=5)
    assert with_expert_slots(given, plain, "float16", 1) == given
    # Rows that wait for groups of experts must be on the device.
    off_device = Policy(activations=Placement(0, 1, 0))
    assert with_expert_slots(off_device, plain, "float16", 1) == off_device
