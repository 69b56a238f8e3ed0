"""gpt-oss (OpenAI 2025): Llama, with experts in place of the MLP, and a sink for each head.

Layers with and without a sliding window alternate; all products have biases. The checkpoint stacks
experts, with matrices [in, out], in which columns of the gate and the up projection take turns.
"""

from __future__ import annotations

from flexgen_ray.models import llama

TAKES_TURNS = True
WEIGHT_NAMES = llama.WEIGHT_NAMES | {
    "attention": "model.layers.{}.self_attn",  # has the sinks
    "router": "model.layers.{}.mlp.router",
    "gate_up_experts": "model.layers.{}.mlp.experts.gate_up_proj",
    "down_experts": "model.layers.{}.mlp.experts.down_proj",
}
embed, project, finish, head = llama.embed, llama.project, llama.finish, llama.head
