"""Mixtral (Jiang et al. 2024): Llama, with experts in place of the MLP."""

from __future__ import annotations

from flexgen_ray.models import llama

WEIGHT_NAMES = llama.WEIGHT_NAMES | {
    "router": "model.layers.{}.block_sparse_moe.gate",
    "gate_up_experts": (
        "model.layers.{}.block_sparse_moe.experts.{}.w1",
        "model.layers.{}.block_sparse_moe.experts.{}.w3",
    ),
    "down_experts": "model.layers.{}.block_sparse_moe.experts.{}.w2",
}
embed, project, finish, head = llama.embed, llama.project, llama.finish, llama.head
