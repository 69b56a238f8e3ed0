"""Qwen 2 and 3 with experts (Yang et al. 2024, 2025): Llama, with experts in place of the MLP.

Some layers may have a plain MLP. Qwen 2's tokens take a shared expert besides, as far as a gate
lets them.
"""

from __future__ import annotations

from flexgen_ray.models import llama

WEIGHT_NAMES = llama.WEIGHT_NAMES | {
    "router": "model.layers.{}.mlp.gate",
    "gate_up_experts": (
        "model.layers.{}.mlp.experts.{}.gate_proj",
        "model.layers.{}.mlp.experts.{}.up_proj",
    ),
    "down_experts": "model.layers.{}.mlp.experts.{}.down_proj",
    "shared_gate": "model.layers.{}.mlp.shared_expert_gate",
    "shared_gate_up_proj": (
        "model.layers.{}.mlp.shared_expert.gate_proj",
        "model.layers.{}.mlp.shared_expert.up_proj",
    ),
    "shared_down_proj": "model.layers.{}.mlp.shared_expert.down_proj",
}
embed, project, finish, head = llama.embed, llama.project, llama.finish, llama.head
