"""Phi-3 and 4 (Abdin et al. 2024): Llama's, but queries, keys and values are one matrix, and gate
and up are another.
"""

from __future__ import annotations

from flexgen_ray.models import llama

WEIGHT_NAMES = (
    llama.WEIGHT_NAMES
    | dict.fromkeys(("q_proj", "k_proj", "v_proj"), "model.layers.{}.self_attn.qkv_proj")
    | dict.fromkeys(("gate_proj", "up_proj"), "model.layers.{}.mlp.gate_up_proj")
)
embed, project, finish, head = llama.embed, llama.project, llama.finish, llama.head
