"""What a policy, a workload and a budget are: frozen facts, with no torch behind them.

Knows names, shapes and fractions. Does not know bytes per tier (layout/sizes.py) or any tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from numbers import Real
from pathlib import Path

from flexgen_ray.files.text_files import read_yaml
from flexgen_ray.names import explains_unknown, unknown_name

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
TRANSPORTS = ("auto", "nccl", "gloo")  # of hidden states, from stage to stage
TIERS = ("gpu", "cpu", "disk")
BITS = (4, 8)
_BITS = ("weight_bits", "embedding_bits", "cache_bits")
# What no machine has room for; each batch and block is planned one by one.
_MOST = {"gpu_batch_size": 2**40, "max_batch_tokens": 2**40}
_MOST |= {"num_gpu_batches": 4096, "blocks_in_flight": 4096}
LOSSY = (*_BITS, "attention_sparsity")  # what of a policy changes answers
DEVICES = '"auto", "cpu", "cuda", or "cuda:N" for the GPU of number N'
# FlexGen's own names, whose shares were percents.
_FLEXGEN_PLACEMENT = "use {}=Placement(gpu=..., cpu=..., disk=...), fractions that sum to 1"
_FLEXGEN_POLICY = {
    **{f"{short}_{tier}_percent": _FLEXGEN_PLACEMENT.format(name)
       for short, name in (("w", "weights"), ("cache", "cache"), ("act", "activations"))
       for tier in ("gpu", "cpu", "disk")},
    "compress_weight": "use weight_bits=4 or 8",
    "compress_cache": "use cache_bits=4 or 8",
    "attn_sparsity": "use attention_sparsity",
    "cpu_cache_compute": "use cpu_attention=1.0",
    "overlap": "give executor to LLM: \"async\" overlaps, \"serial\" doesn't",
    "sep_layer": "attention and MLP are always planned together; leave it out",
    "pin_weight": "host memory is always pinned; leave it out",
}  # fmt: skip
_OTHER_TIERS = {"host": "use cpu", "ram": "use cpu", "cuda": "use gpu", "device": "use gpu",
                "ssd": "use disk", "nvme": "use disk"}  # fmt: skip


def is_device(name: object) -> bool:
    """True for the name of a device that a run may be put on, whether or not it is there."""
    return isinstance(name, str) and re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name) is not None


@explains_unknown(_OTHER_TIERS)
@dataclass(frozen=True)
class Placement:
    """Fractions of something that lie on each tier; they sum to one."""

    gpu: float = 1.0
    cpu: float = 0.0
    disk: float = 0.0

    def __post_init__(self) -> None:
        parts = (self.gpu, self.cpu, self.disk)
        if not all(_is_share(part) for part in parts):
            raise ValueError(f"{self} has a fraction outside 0 to 1; give fractions, not percents")
        if abs(sum(parts) - 1) > 1e-6:
            raise ValueError(f"{self} sums to {sum(parts):g}; the three fractions must sum to 1")

    @property
    def fractions(self) -> tuple[float, float, float]:
        return self.gpu, self.cpu, self.disk


@explains_unknown(_FLEXGEN_POLICY)
@dataclass(frozen=True)
class Policy:
    """How a stage lays out and walks its work (FlexGen's policy, with its fractions named).

    A block is `num_gpu_batches` batches of `gpu_batch_size` slots; linear layers take at most
    `max_batch_tokens` tokens at a time; `cpu_attention` is the share of the host-resident rows
    that are attended on the host, the others stream to the device. `blocks_in_flight`: blocks that
    circulate through a pipeline's stages, each with its own cache; as many as stages if None.

    Lossy, and off unless asked for: `weight_bits`, `embedding_bits` (of the table and the head) and
    `cache_bits`, 4 or 8, keep matrices and cache quantized in groups of 64 (quant/packing.py);
    `attention_sparsity` is the share of a row's tokens that decoding attends, those of most weight.
    """

    gpu_batch_size: int = 8
    num_gpu_batches: int = 1
    max_batch_tokens: int = 2048
    weights: Placement = field(default_factory=Placement)
    cache: Placement = field(default_factory=Placement)
    activations: Placement = field(default_factory=Placement)
    cpu_attention: float = 1.0
    blocks_in_flight: int | None = None
    weight_bits: int | None = None
    embedding_bits: int | None = None
    cache_bits: int | None = None
    attention_sparsity: float = 1.0

    def __post_init__(self) -> None:
        for name in _BITS:
            bits = getattr(self, name)
            if bits not in (None, *BITS) or not isinstance(bits, int | None):
                known = ", ".join(map(str, BITS))
                raise ValueError(
                    f"policy: {name} is {getattr(self, name)!r}; it must be one of {known}, or "
                    "left out for values as the dtype has them"
                )
        for name in ("gpu_batch_size", "num_gpu_batches", "max_batch_tokens", "blocks_in_flight"):
            value = getattr(self, name)
            if name == "blocks_in_flight" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"policy: {name} is {value!r}; it must be an integer from 1 up")
            if value > (most := _MOST[name]):
                raise ValueError(f"policy: {name} is {value:.4g}; it may be {most} at most")
        if not _is_share(self.attention_sparsity) or not self.attention_sparsity:
            raise ValueError(
                f"policy: attention_sparsity is {self.attention_sparsity!r}; it is the share of "
                "tokens that are attended, above 0 and at most 1"
            )
        if not _is_share(self.cpu_attention):
            raise ValueError(
                f"policy: cpu_attention is {self.cpu_attention!r}; it is a share (0-1)"
            )
        for name in ("weights", "cache", "activations"):
            if not isinstance(getattr(self, name), Placement):
                raise ValueError(
                    f"policy: {name} is {getattr(self, name)!r}; it must be "
                    "Placement(gpu=..., cpu=..., disk=...)"
                )

    @property
    def block_size(self) -> int:
        return self.gpu_batch_size * self.num_gpu_batches

    def compressed(self, **lossy: int | float | None) -> Policy:
        """With what is given of the lossy options, None for what isn't."""
        return replace(self, **{name: it for name, it in lossy.items() if it is not None})  # type: ignore[arg-type]

    @staticmethod
    def from_dict(values: dict) -> Policy:
        """Every key optional, unknown keys refused; ValueError names the key."""
        _refuse_unknown("policy", values, Policy, _FLEXGEN_POLICY)
        fields = dict(values)
        for name in ("weights", "cache", "activations"):
            if name in fields:
                fields[name] = _placement(name, fields[name])
        return Policy(**fields)

    @staticmethod
    def from_yaml(path: str | Path) -> Policy:
        """ValueError (bad content) and OSError (no such file) name the path."""
        values = read_yaml(path)
        try:
            if not isinstance(values or {}, dict):
                raise ValueError("the file must hold keys and values, such as `gpu_batch_size: 8`")
            return Policy.from_dict(values or {})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _placement(name: str, values: object) -> Placement:
    if not isinstance(values, dict):
        raise ValueError(f"policy: {name} is {values!r}; write e.g. {{gpu: 0.5, cpu: 0.5}}")
    _refuse_unknown(f"policy: {name}", values, Placement, _OTHER_TIERS)
    try:
        return Placement(**{tier: values.get(tier, 0.0) for tier in TIERS})
    except ValueError as error:
        raise ValueError(f"policy: {name}: {error}") from error


def _refuse_unknown(where: str, values: dict, cls: type, hints: Mapping[str, str]) -> None:
    known = list(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    if sentence := unknown_name(where, "key", values, known, hints):
        raise ValueError(sentence)


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


@dataclass(frozen=True)
class Workload:
    """What a job asks of the stores: how many sequences, and how long the longest are.

    resumes: whether an answer that was interrupted may go on, its tokens so far as a prompt.
    drawn: mean work of sampling a token, as a share of sampling from all tokens (cost/ops.py).
    """

    num_requests: int
    max_prompt_len: int
    max_seq_len: int
    resumes: bool = False
    drawn: float = 0.0

    @property
    def max_prefill_len(self) -> int:
        """Tokens that a request brings when it comes."""
        return self.max_seq_len if self.resumes else self.max_prompt_len

    def covers(self, other: Workload) -> bool:
        """True if stores made for this workload can also serve `other`."""
        return (
            self.num_requests >= other.num_requests
            and self.max_prompt_len >= other.max_prompt_len
            and self.max_seq_len >= other.max_seq_len
            and self.resumes >= other.resumes
        )


@explains_unknown()
@dataclass(frozen=True)
class HardwareSpec:
    """Rates of a device and its host, per second; what shares a resource shares its rate.

    host_bytes_per_s is host memory, which both links, the disk and host attention draw on;
    *_attention_bytes_per_s is what the host's cores, and the device, attend of a cache by
    themselves. Matrix products of few tokens are slower than those of many:
    device_decode_flops_per_s, if given. dequantize: of packed values, counted as 16 bits each.
    device_ops: what an op takes of a device beside its work, which a GPU's launches hide;
    elementwise: what ops between products read and write; sampled: logits, where tokens are drawn;
    both beyond measure where nobody measured.
    The network carries hidden states to the next stage.
    """

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    host_bytes_per_s: float
    host_attention_bytes_per_s: float
    device_flops_per_s: float
    device_bytes_per_s: float
    device_decode_flops_per_s: float = 0.0
    device_attention_bytes_per_s: float = 0.0
    dequantize_bytes_per_s: float = 0.0
    device_ops_per_s: float = 1e12
    elementwise_bytes_per_s: float = 1e18
    sampled_values_per_s: float = 1e18
    network_bytes_per_s: float = 1.25e9

    def __post_init__(self) -> None:
        for name, usual in (
            ("device_decode_flops_per_s", self.device_flops_per_s),
            ("device_attention_bytes_per_s", self.device_bytes_per_s),
            ("dequantize_bytes_per_s", self.device_bytes_per_s / 2),
        ):
            object.__setattr__(self, name, getattr(self, name) or usual)
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} is {value!r}; a rate must be a number above 0")


@dataclass(frozen=True)
class Budget:
    """Bytes that may be used on each tier; promises, checked before a run and kept during it."""

    gpu: int
    cpu: int
    disk: int


@explains_unknown()
@dataclass(frozen=True)
class Faults:
    """Limits on the failures that a Ray run tolerates.

    max_restarts: times that lost stages are replaced. stall_seconds: without any op's end, after
    which stages count as lost. restart_seconds: that Ray gets to start them elsewhere; None is 120,
    or 600 where the cluster may start machines.
    """

    max_restarts: int = 3
    stall_seconds: float = 300.0
    restart_seconds: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.max_restarts, int) or self.max_restarts < 0:
            raise ValueError(f"max_restarts is {self.max_restarts!r}; it must be 0 or more")
        for name in ("stall_seconds", "restart_seconds"):
            seconds = getattr(self, name)
            if seconds is None and name == "restart_seconds":
                continue
            if not isinstance(seconds, int | float) or not seconds > 0:
                raise ValueError(f"{name} is {seconds!r}; it must be a number above 0")


@dataclass(frozen=True)
class Deployment:
    """Where the stages of an LLM run, and on how much of it.

    num_stages: auto is a stage for every GPU of the cluster, or one without Ray or GPUs. device:
    auto, cuda, cuda:N or cpu. use_ray: stages are Ray actors on the cluster at `address`, or on one
    that is started; else they run in this process. threads: host threads of each stage; None is its
    share of the node's cores. wait_seconds: for room on the cluster; None is 10 s, or 15 minutes
    where the cluster may start machines. Raises ValueError for what can't be.
    """

    num_stages: int | str = 1
    device: str = "auto"
    use_ray: bool = True
    address: str | None = None
    transport: str = "auto"
    faults: Faults = field(default_factory=Faults)
    threads: int | None = None
    wait_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_stages", "threads"):
            value, none = getattr(self, name), {"num_stages": "auto", "threads": None}[name]
            is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not is_number and value != none:
                shown = name.removeprefix("num_")
                raise ValueError(f"{shown} is {value!r}; it must be {none} or a number from 1 up")
        if self.wait_seconds is not None and not self.wait_seconds >= 0:
            raise ValueError(f"wait is {self.wait_seconds!r}; it must be seconds, 0 or more")
        if self.transport not in TRANSPORTS:
            known = ", ".join(TRANSPORTS)
            raise ValueError(f"transport is {self.transport!r}; it must be one of {known}")


def kept_tokens(tokens: int, sparsity: float) -> int:
    """ceil(sparsity * tokens), at least one; ValueError if sparsity is not in (0, 1]."""
    if not 0 < sparsity <= 1:
        raise ValueError(f"sparsity, the share of tokens kept, must be in (0, 1], not {sparsity}")
    # 0.07 * 100 is a little more than 7, but 7 tokens are meant.
    return max(1, ceil(sparsity * tokens - 1e-9 * tokens))
