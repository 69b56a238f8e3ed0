"""OLMoE (Muennighoff et al. 2024): Llama, with experts, and norms of queries and keys."""

from __future__ import annotations

from flexgen_ray.models import llama, qwen_moe

WEIGHT_NAMES = qwen_moe.WEIGHT_NAMES
embed, project, finish, head = llama.embed, llama.project, llama.finish, llama.head
