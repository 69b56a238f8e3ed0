"""Resources, how much of them an op takes, and how many seconds that is at a machine's rates."""

from __future__ import annotations

from enum import StrEnum

from flexgen_ray.config import HardwareSpec


class Resource(StrEnum):
    """What is scarce; each value is the name of its rate in HardwareSpec."""

    __hash__ = str.__hash__  # Enum's own is Python, and these are looked up all the time

    H2D = "h2d_bytes_per_s"
    D2H = "d2h_bytes_per_s"
    DISK_READ = "disk_read_bytes_per_s"
    DISK_WRITE = "disk_write_bytes_per_s"
    HOST_MEMORY = "host_bytes_per_s"
    HOST_ATTENTION = "host_attention_bytes_per_s"
    FLOPS = "device_flops_per_s"
    DECODE_FLOPS = "device_decode_flops_per_s"  # of batches no larger than a decoding one
    DEVICE_ATTENTION = "device_attention_bytes_per_s"
    DEVICE_MEMORY = "device_bytes_per_s"
    DEQUANTIZE = "dequantize_bytes_per_s"
    DEVICE_OPS = "device_ops_per_s"  # small ones, beside products
    ELEMENTWISE = "elementwise_bytes_per_s"  # read and written by those
    SAMPLING = "sampled_values_per_s"  # logits of which a token is drawn
    NETWORK = "network_bytes_per_s"  # to the next stage


Amounts = dict[Resource, float]

_BY_ITSELF = (
    Resource.DEQUANTIZE,
    Resource.DEVICE_OPS,
    Resource.ELEMENTWISE,
    Resource.SAMPLING,
)


def seconds_by_resource(amounts: Amounts, hardware: HardwareSpec) -> dict[Resource, float]:
    """Seconds that each resource is taken for, each with all of itself."""
    return {resource: amount / getattr(hardware, resource) for resource, amount in amounts.items()}


def seconds_alone(taken: dict[Resource, float]) -> float:
    """Of an op that has the machine to itself, by its `seconds_by_resource`: what it takes of them
    it takes at the same time, but packed values are unpacked first, and small ops stand between
    large ones."""
    first = sum(taken.get(resource, 0.0) for resource in _BY_ITSELF)
    return first + max((it for by, it in taken.items() if by not in _BY_ITSELF), default=0.0)
