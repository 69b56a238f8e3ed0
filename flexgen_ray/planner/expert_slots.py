"""Room on the device for experts that stream: two whole layers of them, or some groups.

Room for whole layers is simple, and lets the host attend half of a block's rows while experts run
for the other half. If two layers would take much of the device's memory, experts stream in groups:
room for one and a half layers keeps the link busy while attention runs; small memory has less.

The module knows bytes of experts; no costs.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod

from flexgen_ray.config import DTYPE_BYTES, Policy
from flexgen_ray.layout import plan as plan_module
from flexgen_ray.layout.placement import is_stacked
from flexgen_ray.layout.plan import weight_format_of
from flexgen_ray.models.config import ModelConfig

MOST_SHARE = 0.25  # of the device's memory, for experts on their way


def with_expert_slots(policy: Policy, config: ModelConfig, dtype: str, nbytes: int) -> Policy:
    """The policy, with slots for groups of experts if two layers of them take too much memory.

    If experts are quantized, the values of a layer that is dequantized at once count, too. nbytes:
    the device's memory. A policy that has slots stays, and so does one for a model without experts.
    """
    mixture = next(filter(config.has_experts, range(1, config.num_layers + 1)), None)
    if mixture is None or policy.expert_slots is not None or policy.activations.gpu < 1:
        return policy
    weight_format = weight_format_of(config, policy, dtype)
    stacks = {name: it for name, it in config.tensors(mixture).items() if is_stacked(it)}
    layer = sum(weight_format.stored_bytes(*each) for each in stacks.items())
    values = sum(prod(it) for name, it in stacks.items() if weight_format.format_of(name, it))
    room = MOST_SHARE * nbytes
    if 2 * layer + values * DTYPE_BYTES[dtype] <= room:
        return policy
    expert = layer // config.num_experts
    group = expert * max(1, plan_module.EXPERT_GROUP_BYTES // expert)
    slots = min(int(room // group), ceil(1.5 * layer / group))
    return replace(policy, expert_slots=max(slots, 2), expert_batches=None)
