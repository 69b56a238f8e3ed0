"""Words that several reports share: names of lanes and resources, and the shape of blocks.

Knows names and plans; imports no torch, since `flexgen-ray plan` uses it.
"""

from __future__ import annotations

from flexgen_ray.layout.plan import StagePlan

_SHARED = "the node's "
_NAMES = {
    # Lanes of the schedule.
    "device": "{compute} compute",
    "host": "host attention",
    "gather_values": "gathering values for sparse attention",
    "load_weights": "weights to {device}",
    "load_cache": "KV cache to {device}",
    "load_small": "hidden states to {device}",
    "store": "copies from {device} to host",
    "disk_read": "disk reads",
    "disk_write": "disk writes",
    "recv": "receiving from another stage",
    "send": "sending to another stage",
    # Resources (cost/resources.py); disk_read and disk_write are both lanes and resources.
    "h2d": "link to {device}",
    "d2h": "link from {device}",
    "host_memory": "host memory bandwidth",
    "host_attention": "host attention",
    "flops": "{compute} matrix products",
    "decode_flops": "{compute} matrix products of small batches",
    "expert_flops": "{compute} products of experts",
    "decode_expert_flops": "{compute} products of experts with few rows",
    "device_attention": "{compute} attention",
    "device_memory": "{compute} memory bandwidth",
    "dequantize": "dequantization",
    "device_ops": "launches of small {compute} ops",
    "elementwise": "elementwise {compute} ops",
    "sampling": "sampling tokens",
    "network": "network between stages",
    "append": "putting new keys and values in place",
    "issue": "issuing ops (Python)",
    "cores": "CPU cores",
}


def resource_name(name: str, on_gpu: bool = True) -> str:
    """The name for people of a lane or resource, such as "weights to GPU" for "load_weights".

    name: as in plans and measurements; "the node's ..." is one that a node's stages share.
    on_gpu: False if layers are computed on the CPU; copies then go to "device", its share of host
    memory.
    """
    compute, device = ("GPU", "GPU") if on_gpu else ("CPU", "device")
    own = name.removeprefix(_SHARED)
    shown = _NAMES.get(own, own).format(compute=compute, device=device)
    return shown if own == name else f"{_SHARED}{shown}"


def block_line(plan: StagePlan) -> str:
    """One line on the shape of a run's blocks, such as "block of 4 x 8 sequences, ..."."""
    policy = plan.policy
    blocks = f"{plan.num_blocks} blocks" if plan.num_blocks > 1 else "block"
    return (
        f"{blocks} of {policy.num_gpu_batches} x {policy.gpu_batch_size} sequences "
        f"(num_gpu_batches x gpu_batch_size), up to {plan.max_seq_len} tokens each"
    )


def layout_line(plan: StagePlan) -> str:
    """One line on a stage's data by tier, such as "on GPU/host/disk: weights 36/64/0%, ..."."""
    policy = plan.policy
    placements = {
        "weights": policy.weights,
        "KV cache": policy.cache,
        "hidden states": policy.activations,
    }
    parts = (
        f"{what} {'/'.join(f'{abs(100 * share):.0f}' for share in placement.fractions)}%"
        for what, placement in placements.items()
    )
    return f"on GPU/host/disk: {', '.join(parts)}"
