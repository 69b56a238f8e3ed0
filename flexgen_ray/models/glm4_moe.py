"""GLM 4.5 and 4.6 (Zeng et al. 2025): Llama, with experts in all but the first layers.

A part of each head is rotated. Routers score experts by a sigmoid, choose by corrected scores, and
may choose groups of experts first; every token takes a shared expert besides.
"""

from __future__ import annotations

from flexgen_ray.models import llama, qwen_moe

WEIGHT_NAMES = qwen_moe.WEIGHT_NAMES | {
    "shared_gate_up_proj": (
        "model.layers.{}.mlp.shared_experts.gate_proj",
        "model.layers.{}.mlp.shared_experts.up_proj",
    ),
    "shared_down_proj": "model.layers.{}.mlp.shared_experts.down_proj",
}
embed, project, finish, head = llama.embed, llama.project, llama.finish, llama.head
