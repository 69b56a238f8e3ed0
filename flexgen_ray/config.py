"""Settings of a run as frozen dataclasses: policy, workload, budget, rates, deployment.

Knows names, shapes and fractions, and checks them; knows neither bytes a tier (layout/sizes.py) nor
tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import ceil
from pathlib import Path

from flexgen_ray.checks import (
    Check,
    check_values,
    explains_unknown,
    instance,
    integer,
    number,
    one_of,
    optional,
    unknown_name,
)
from flexgen_ray.files.text_files import read_yaml

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
TRANSPORTS = ("auto", "nccl", "gloo")  # libraries that send hidden states between stages
TIERS = ("gpu", "cpu", "disk")
BITS = (4, 8)
_BITS = ("weight_bits", "embedding_bits", "cache_bits")
_MANY = 2**40  # slots and tokens, more than any machine has memory for
_MAX_BATCHES = 4096  # each batch and each block is planned one by one
LOSSY = (*_BITS, "attention_sparsity")  # fields of a policy that change answers
DEVICES = '"auto", "cpu", "cuda", or "cuda:N" for the GPU of number N'
# Names of the original FlexGen, whose shares were percents.
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
    """True for the name of a device that this project can use, even if this machine lacks it."""
    return isinstance(name, str) and re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name) is not None


@explains_unknown(_OTHER_TIERS)
@dataclass(frozen=True)
class Placement:
    """Shares of weights, KV cache or hidden states on each tier: fractions that sum to 1.

    gpu: share on the device that computes, 1.0 by default; without a GPU that is host memory too.
    cpu: share in host memory, 0.0 by default.
    disk: share on disk, 0.0 by default.
    """

    gpu: float = 1.0
    cpu: float = 0.0
    disk: float = 0.0

    def __post_init__(self) -> None:
        parts = (self.gpu, self.cpu, self.disk)
        if not all(map(_is_share, parts)):
            raise ValueError(f"{self} has a fraction outside 0 to 1; give fractions, not percents")
        if abs(sum(parts) - 1) > 1e-6:
            raise ValueError(f"{self} sums to {sum(parts):g}; the three fractions must sum to 1")

    @property
    def fractions(self) -> tuple[float, float, float]:
        """Shares in the order of TIERS: gpu, cpu, disk."""
        return self.gpu, self.cpu, self.disk


@explains_unknown(_FLEXGEN_POLICY)
@dataclass(frozen=True)
class Policy:
    """Layout and batch sizes of a stage: FlexGen's policy, with its fractions named.

    A *block* is the set of sequences that share one trip of the weights through a stage: so many
    batches of so many slots, one sequence a slot. Larger blocks use each loaded weight for more
    tokens, and need more memory for their KV cache.

    gpu_batch_size: sequences a batch, that is, computed together; 8 by default.
    num_gpu_batches: batches a block; 1 by default. With two or more, one batch computes while the
        next one's cache is loaded, or attended on the host.
    max_batch_tokens: tokens that linear layers take at a time, 2048 by default; longer prompts are
        cut into chunks.
    weights, cache, activations: Placement of the layers' weights, of the KV cache, and of hidden
        states between layers; all on the GPU by default.
    cpu_attention: share of the cache rows in host memory that are attended there, by the CPU; the
        others are streamed to the GPU. 1.0 by default.
    blocks_in_flight: blocks that circulate through a pipeline's stages, each with its own cache.
        None (the default) is one a stage.
    expert_batches: in a mixture of experts, the batches for whose rows a layer's experts run at
        once, so that each expert is read once for all of them. None (the default) is all batches of
        a block, or half of them if the host attends rows meanwhile. More than one needs activations
        on the GPU.
    expert_slots: in a mixture of experts, the groups of experts, some 256 MiB each, for which the
        GPU has room while they stream; 2 or more. Each group runs for the whole block, as soon as
        it is there. None (the default) is room for two whole layers.

    Lossy options, off by default:

    weight_bits, embedding_bits, cache_bits: 4 or 8 bits for the layers' matrices, for the embedding
        and the head, and for the KV cache, in groups of 64 values with a scale each. None keeps
        the dtype.
    attention_sparsity: share of each sequence's tokens that decoding attends to, above 0 up to 1:
        those with the largest attention weights. 1.0 (the default) attends to all.

    Raises ValueError for a wrong value, TypeError for an unknown name.
    """

    gpu_batch_size: int = 8
    num_gpu_batches: int = 1
    max_batch_tokens: int = 2048
    weights: Placement = field(default_factory=Placement)
    cache: Placement = field(default_factory=Placement)
    activations: Placement = field(default_factory=Placement)
    cpu_attention: float = 1.0
    blocks_in_flight: int | None = None
    expert_batches: int | None = None
    expert_slots: int | None = None
    weight_bits: int | None = None
    embedding_bits: int | None = None
    cache_bits: int | None = None
    attention_sparsity: float = 1.0

    def __post_init__(self) -> None:
        check_values(vars(self), _POLICY_CHECKS, "policy: ")
        if self.attention_sparsity < 1 and self.cache.disk > 0:
            raise ValueError(
                f"policy: attention_sparsity is {self.attention_sparsity:g} and cache.disk "
                f"{self.cache.disk:g}, but values of chosen tokens can't be read from disk alone; "
                "give cache.disk 0, or attention_sparsity 1"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        """Raise ValueError if rows are to wait for experts off the GPU, or groups to run in parts.

        A group of experts that streams apart crosses once a visit, so all batches wait for it.
        """
        batches, slots = self.expert_batches, self.expert_slots
        if self.activations.gpu < 1 and ((batches or 1) > 1 or slots):
            name, value = ("expert_slots", slots) if slots else ("expert_batches", batches)
            raise ValueError(
                f"policy: {name} is {value} and activations.gpu {self.activations.gpu:g}, but rows "
                f"wait for experts on the GPU alone; give activations.gpu 1, or leave out {name}"
            )
        if slots and batches is not None and batches < self.num_gpu_batches:
            raise ValueError(
                f"policy: expert_slots is {slots} and expert_batches {batches}, but groups of "
                f"experts run for all {self.num_gpu_batches} batches of a block at once; leave out "
                "one of them"
            )

    @property
    def block_size(self) -> int:
        """Sequences of a block."""
        return self.gpu_batch_size * self.num_gpu_batches

    def compressed(self, **lossy: int | float | None) -> Policy:
        """Copy with these lossy options; None leaves the policy's own value."""
        changed = {name: value for name, value in lossy.items() if value is not None}
        return replace(self, **changed)  # type: ignore[arg-type]

    @staticmethod
    def from_dict(values: dict) -> Policy:
        """Policy from a YAML file's keys, all optional; ValueError for an unknown key or value."""
        _refuse_unknown("policy", values, Policy, _FLEXGEN_POLICY)
        fields = dict(values)
        for name in ("weights", "cache", "activations"):
            if name in fields:
                fields[name] = _placement(name, fields[name])
        return Policy(**fields)

    @staticmethod
    def from_yaml(path: str | Path) -> Policy:
        """Policy from a YAML file.

        Raises ValueError for bad content and OSError for a file that can't be read, with its path.
        """
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


_is_share = number(0, 1)
_batches = integer(1, _MAX_BATCHES)
_bits: Check = (
    lambda value: value is None or (type(value) is int and value in BITS),
    f"one of {', '.join(map(str, BITS))}, or left out for values as the dtype has them",
)
_placement_check: Check = instance(Placement), "Placement(gpu=..., cpu=..., disk=...)"
_POLICY_CHECKS: dict[str, Check] = {
    "gpu_batch_size": (integer(1, _MANY), f"an integer, 1 to {_MANY}"),
    "num_gpu_batches": (_batches, f"an integer, 1 to {_MAX_BATCHES}"),
    "max_batch_tokens": (integer(1, _MANY), f"an integer, 1 to {_MANY}"),
    "blocks_in_flight": (optional(_batches), f"None or an integer, 1 to {_MAX_BATCHES}"),
    "expert_batches": (optional(_batches), f"None or an integer, 1 to {_MAX_BATCHES}"),
    "expert_slots": (optional(integer(2, _MAX_BATCHES)), f"None or 2 to {_MAX_BATCHES}"),
    "weights": _placement_check,
    "cache": _placement_check,
    "activations": _placement_check,
    "cpu_attention": (_is_share, "a share, 0 to 1"),
    "attention_sparsity": (number(0, 1, above=True),
                           "the share of tokens that are attended, above 0 and at most 1"),
    **dict.fromkeys(_BITS, _bits),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Sizes of a set of requests, for which stores are made.

    num_requests: sequences. max_prompt_len, max_seq_len: tokens of the longest prompt, and of the
    longest prompt with its answer. resumes: True if an interrupted answer may go on, its tokens so
    far as part of the prompt. drawn: mean work of sampling a token, as a share of sampling from all
    tokens (cost/ops.py). mean_seq_len: mean tokens of a row's cache while they run; None for those
    of the longest. mean_prompt_len: mean tokens of a prompt; None for those of the longest.
    sharing: what their prompts share; mean_seq_len is without it. None for nothing.
    """

    num_requests: int
    max_prompt_len: int
    max_seq_len: int
    resumes: bool = False
    drawn: float = 0.0
    mean_seq_len: float | None = None
    mean_prompt_len: float | None = None
    sharing: Sharing | None = None

    @property
    def mean_len(self) -> float:
        """Mean tokens of a row's cache."""
        return self.max_seq_len if self.mean_seq_len is None else self.mean_seq_len

    @property
    def max_prefill_len(self) -> int:
        """Tokens of the longest prefill; a resumed answer is prefilled with its prompt."""
        return self.max_seq_len if self.resumes else self.max_prompt_len

    def covers(self, other: Workload) -> bool:
        """True if stores that were made for this workload can serve `other` too."""
        return (
            self.num_requests >= other.num_requests
            and self.max_prompt_len >= other.max_prompt_len
            and self.max_seq_len >= other.max_seq_len
            and self.resumes >= other.resumes
            and (other.sharing is None or self.sharing is not None)
        )


@dataclass(frozen=True)
class Sharing:
    """Amount of prompts that lies in prefixes that several of them share (runtime/prefixes.py).

    num_requests: sequences. tokens: of all prefixes together. most_tokens, mean_tokens: of the
    prefixes of one prompt, at most and on average. levels: mean number of a prompt's prefixes.
    """

    num_requests: int
    tokens: int
    most_tokens: int
    mean_tokens: float
    levels: float

    @property
    def saved_tokens(self) -> int:
        """Prompt tokens that need no computing if each prefix is computed once."""
        return round(self.mean_tokens * self.num_requests) - self.tokens

    def pages(self, rows: int) -> int:
        """Pages of the prefixes that so many rows use at a time.

        Rows of a group follow each other. Two groups may be there in part, and the next one's
        prefixes are computed ahead.
        """
        share = min(1.0, rows / self.num_requests)
        at_a_time = ceil(self.tokens * share) + 2 * self.most_tokens
        return min(self.tokens, at_a_time) // PAGE_TOKENS

    def read_tokens(self, rows: int) -> float:
        """Tokens of the prefixes that so many rows read on average, if groups are alike."""
        others = (rows - 1) / self.num_requests * self.tokens
        return min(self.tokens, self.mean_tokens + others)


@explains_unknown()
@dataclass(frozen=True)
class HardwareSpec:
    """Rates of a device and its host, in bytes, flops, ops or values a second.

    All users of a resource share its rate.

    h2d_bytes_per_s, d2h_bytes_per_s: the CPU-GPU link, to the device and back.
    disk_read_bytes_per_s, disk_write_bytes_per_s: the disk.
    host_bytes_per_s: host memory, which both directions of the link, the disk and attention on the
        host use.
    host_attention_bytes_per_s, device_attention_bytes_per_s: KV cache that the host's cores, and
        the device, attend to alone.
    device_flops_per_s: matrix products of many tokens. device_decode_flops_per_s: products of few
        tokens, which are slower; 0 is device_flops_per_s.
    device_expert_flops_per_s, device_decode_expert_flops_per_s: products of a mixture's experts,
        with the rows of one each; 0 are the two rates above.
    device_bytes_per_s: the device's memory.
    dequantize_bytes_per_s: quantized values, counted as 16 bits each; 0 is half the memory's rate.
    device_ops_per_s: ops, for the constant time that each takes of the device, which a GPU's
        launches hide.
    elementwise_bytes_per_s: bytes that ops between matrix products read and write.
    sampled_values_per_s: logits of sampled tokens. This and the two rates before it are nearly
        infinite by default, for rates that were not measured.
    network_bytes_per_s: hidden states on their way to the next stage.
    append_bytes_per_s: new keys and values that one of the host's threads puts in their places;
        nearly infinite by default.
    launch_seconds, issue_seconds: seconds of the one thread that issues the ops of a GPU, for each
        torch op that it launches and for each op of the schedule. 0 (the default) is free; with a
        CPU, device_ops_per_s counts them.
    has_copy_engines: True if one engine serves each direction of the link, a piece of one copy at a
        time, as on a GPU. False (the default) if copies share the link.
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
    device_expert_flops_per_s: float = 0.0
    device_decode_expert_flops_per_s: float = 0.0
    device_attention_bytes_per_s: float = 0.0
    dequantize_bytes_per_s: float = 0.0
    device_ops_per_s: float = 1e12
    elementwise_bytes_per_s: float = 1e18
    sampled_values_per_s: float = 1e18
    network_bytes_per_s: float = 1.25e9
    append_bytes_per_s: float = 1e18
    launch_seconds: float = 0.0
    issue_seconds: float = 0.0
    has_copy_engines: bool = False

    def __post_init__(self) -> None:
        decode = self.device_decode_flops_per_s or self.device_flops_per_s
        for name, usual in (
            ("device_decode_flops_per_s", decode),
            ("device_expert_flops_per_s", self.device_flops_per_s),
            ("device_decode_expert_flops_per_s", decode),
            ("device_attention_bytes_per_s", self.device_bytes_per_s),
            ("dequantize_bytes_per_s", self.device_bytes_per_s / 2),
        ):
            object.__setattr__(self, name, getattr(self, name) or usual)
        check_values(vars(self), _SPEC_CHECKS)


# The fields of HardwareSpec that are rates.
RATE_NAMES = tuple(it.name for it in fields(HardwareSpec) if it.name.endswith("_per_s"))
_SPEC_CHECKS: dict[str, Check] = {
    **dict.fromkeys(RATE_NAMES, (number(0, above=True), "a number above 0")),
    **dict.fromkeys(("launch_seconds", "issue_seconds"), (number(0), "seconds, 0 or more")),
    "has_copy_engines": (instance(bool), "True or False"),
}


@dataclass(frozen=True)
class Budget:
    """Limits in bytes on each tier's use: checked before a run, and kept during it."""

    gpu: int
    cpu: int
    disk: int


@explains_unknown()
@dataclass(frozen=True)
class Faults:
    """Limits on the failures that a Ray run tolerates.

    max_restarts: number of times that lost stages are replaced before the run fails; 3 by default.
    stall_seconds: time without any finished op after which stages count as lost; 300 by default.
    restart_seconds: time limit for starting them again. None (the default) is 120, or 600 where the
        cluster may start machines.
    """

    max_restarts: int = 3
    stall_seconds: float = 300.0
    restart_seconds: float | None = None

    def __post_init__(self) -> None:
        check_values(vars(self), _FAULTS_CHECKS)


_seconds = number(0, above=True)
_FAULTS_CHECKS: dict[str, Check] = {
    "max_restarts": (integer(0), "an integer from 0 up"),
    "stall_seconds": (_seconds, "a number above 0"),
    "restart_seconds": (optional(_seconds), "None or a number above 0"),
}


@dataclass(frozen=True)
class Deployment:
    """Number of an LLM's stages, and the machines and processes in which they run.

    num_stages: number of stages; "auto" is one for every GPU of the cluster, or one without Ray or
        GPUs.
    device: "auto", "cpu", "cuda" or "cuda:N".
    use_ray: run stages as Ray actors; False runs them in this process.
    address: the Ray cluster's address; None starts a cluster for this process.
    transport: library that sends hidden states between stages (TRANSPORTS).
    faults: limits on failures.
    threads: host threads of each stage; None is its share of the node's cores.
    wait_seconds: limit of the wait for resources on the cluster; None is 10 s, or 15 minutes where
        the cluster may start machines.
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
        check_values(vars(self), _DEPLOYMENT_CHECKS)


_from_1 = integer(1)
_DEPLOYMENT_CHECKS: dict[str, Check] = {
    "num_stages": (lambda value: value == "auto" or _from_1(value), "auto or a number from 1 up"),
    "threads": (optional(_from_1), "None or a number from 1 up"),
    "wait_seconds": (optional(number(0)), "None or seconds, 0 or more"),
    "transport": one_of(*TRANSPORTS),
}


PAGE_TOKENS = 16  # tokens of a page: their keys and values lie together in a cache
# Further dimensions of prompts' queries and keys if heads have sinks: one carries the sink, and the
# others fill the 16 bytes that a GPU's attention needs.
SINK_DIMS = 8
PART_TOKENS = 1024  # tokens of a row that one thread of the host attends at a time


def kept_tokens(tokens: int, sparsity: float) -> int:
    """Number of tokens that sparse attention keeps: ceil(sparsity * tokens), at least one.

    Raises ValueError if sparsity is not in (0, 1].
    """
    if not 0 < sparsity <= 1:
        raise ValueError(f"sparsity, the share of tokens kept, must be in (0, 1], not {sparsity}")
    # 0.07 * 100 is a little more than 7, but 7 tokens are meant.
    return max(1, ceil(sparsity * tokens - 1e-9 * tokens))
