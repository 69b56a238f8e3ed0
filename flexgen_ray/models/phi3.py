"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama, with fused matrices in the checkpoint.

Queries, keys and values are one tensor there, and the MLP's gate and up projections another. The
maths is Llama's.
"""

from __future__ import annotations

from flexgen_ray.models import llama

WEIGHT_NAMES = llama.WEIGHT_NAMES | {
    "qkv_proj": "model.layers.{}.self_attn.qkv_proj",
    "gate_up_proj": "model.layers.{}.mlp.gate_up_proj",
}
embed, project, finish, head = llama.embed, llama.project, llama.finish, llama.head
