"""Launches of a decoding cell on a GPU: few, and as many as the cost model says."""

from __future__ import annotations

from collections import Counter

import pytest
from pretend_cuda import decode_launches

from flexgen_ray.config import Placement
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.resources import Resource
from flexgen_ray.kernels import host_kernel
from flexgen_ray.runtime.handlers import OpHandlers
from flexgen_ray.schedule.ops import OPS, Lane, OpKind

MOST = {"opt": 12, "llama": 16, "qwen3": 16, "qwen3-moe": 28, "gpt-oss": 45, "glm4-moe": 50}
POLICIES = {
    "resident": {},
    "experts in parts": {"weights": Placement(0.5, 0.5, 0)},
    "groups of experts": {"weights": Placement(0.5, 0.5, 0), "expert_slots": 2},
    "half on the host": {"cache": Placement(0.5, 0.5, 0), "cpu_attention": 1.0},
    "half streamed": {
        "cache": Placement(0.5, 0.5, 0), "cpu_attention": 0.0,
        "activations": Placement(0.5, 0.5, 0), "cache_bits": 4,
    },
}  # fmt: skip


@pytest.fixture
def modelled(monkeypatch) -> Counter[OpKind]:
    """Sums of modelled launches by kind of op, of decoding batches in the layers after the first;
    and under (kind,) the number of ops."""
    sums: Counter = Counter()
    run = OpHandlers.run

    def noted(handlers: OpHandlers, op, ready_at: float = 0.0) -> None:
        composition = None if handlers.is_idle(op) else handlers.composition(op)
        decodes = composition and not any(row.is_prefill for row in composition.rows.rows)
        on_device = OPS[op.kind].lane.worker is Lane.DEVICE
        if decodes and on_device and 1 < op.layer < handlers.config.head_layer:
            amounts = CostModel(handlers.plan).amounts(op, composition)
            sums[op.kind] += amounts.get(Resource.DEVICE_OPS, 0)
            sums[op.kind,] += 1
        run(handlers, op, ready_at)

    monkeypatch.setattr(OpHandlers, "run", noted)
    # Which kernel attends on the host is not measured.
    monkeypatch.setattr(host_kernel, "_LEAST_HEAD_DIM", 64)
    return sums


@pytest.mark.parametrize(
    ("name", "policy", "is_ragged", "shared"),
    [
        *((name, "resident", name != "qwen3", 0) for name in MOST),
        *((name, "half on the host", name == "qwen3", 0) for name in tuple(MOST)[:3]),
        ("qwen3-moe", "experts in parts", False, 0),
        ("qwen3-moe", "groups of experts", False, 0),
        ("gpt-oss", "experts in parts", False, 0),
        ("opt", "half streamed", True, 0),
        ("qwen3", "half streamed", True, 0),
        ("llama", "resident", True, 64),
        ("opt", "half on the host", False, 64),
    ],
)
def test_a_decoding_cell_takes_few_launches_as_many_as_modelled(
    modelled, name, policy, is_ragged, shared, tmp_path
):
    """With tokens that all prompts share, too: a tile of them takes a fixed number.

    The experts run once for both batches.
    """
    counted = decode_launches(name, tmp_path, is_ragged, shared, **POLICIES[policy]).other_layers
    assert counted == {
        kind: sums / modelled[kind,] for kind, sums in modelled.items() if isinstance(kind, OpKind)
    }
    if policy in ("resident", "half on the host") and not shared:
        assert sum(counted.values()) - counted.get(OpKind.EXPERTS, 0) / 2 <= MOST[name]
