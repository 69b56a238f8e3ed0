"""A pretend CUDA device: tensors that say cuda:0, and whose data lie in host memory.

While `pretend_cuda` lasts, torch has one GPU in this process. Ops on its tensors run on the CPU, as
soon as they are launched (late_streams.py holds the order of streams). Three things are made known:

    mixed       an op with host and device tensors raises DeviceMix, as CUDA would refuse it
    notes       copies across the link that CUDA would stage, or that block; whatever waits for the
                device
    launches    device ops that each kind of op makes: aten calls but for views and empty tensors.
                Most are one kernel; sorting and the like are several

The words of notes: "blocking": a copy without non_blocking; "staged": torch makes a contiguous copy
or converts on one side first; "unpinned": the host's side is pageable memory, so the copy blocks
after all; "sync": the thread waits for the device.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.kernels import mxfp4, pack, pack_plain
from flexgen_ray.kernels.host_kernel import load_kernel
from flexgen_ray.runtime import device_attention
from flexgen_ray.runtime.handlers import OpHandlers
from flexgen_ray.schedule.ops import OPS, Op, OpKind

GPU = torch.device("cuda", 0)
GPU_BYTES = 4 * 2**30
_CUDA, _META = 1, 14  # c10::DeviceType
aten = torch.ops.aten


class DeviceMix(RuntimeError):
    """An op has tensors on the host and on the device."""


class Note(NamedTuple):
    """A noted event: its name, the kind of op (None outside of ops), and the function."""

    what: str
    kind: OpKind | None
    where: str


class Cell(NamedTuple):
    """A kind of op of a layer, in passes with or without tokens of prompts."""

    kind: OpKind
    layer: int
    prefills: bool


class PretendCuda:
    """Records of a pretend device.

    launches, copies: launches by the name of the aten op, and copies across the link by their
    direction, both of ops alone; ops: how many had something to do.
    """

    def __init__(self) -> None:
        self.notes: Counter[Note] = Counter()
        self.launches: Counter[tuple[Cell, str]] = Counter()
        self.copies: Counter[tuple[Cell, str]] = Counter()
        self.ops: Counter[Cell] = Counter()
        self.is_there = True
        self._pinned: dict[int, int] = {}  # {first address: one behind the last}
        self._thread = threading.local()

    def note(self, what: str) -> None:
        kind = None if self._cell is None else self._cell.kind
        self.notes[Note(what, kind, _caller())] += 1

    def launch(self, name: str) -> None:
        if self._cell is not None:
            self.launches[self._cell, name] += 1

    def launches_per_op(self, layers: Collection[int], prefills: bool) -> dict[OpKind, float]:
        """Mean launches of each kind of op in these layers."""
        sums: Counter[OpKind] = Counter()
        ops: Counter[OpKind] = Counter()
        for cell, count in self.ops.items():
            if cell.layer in layers and cell.prefills is prefills:
                ops[cell.kind] += count
                sums[cell.kind] += sum(n for (of, _), n in self.launches.items() if of == cell)
        return {kind: count / ops[kind] for kind, count in sums.items() if count}

    @property
    def _cell(self) -> Cell | None:
        return getattr(self._thread, "cell", None)

    @contextmanager
    def op(self, handlers: OpHandlers, op: Op) -> Iterator[None]:
        """Everything until the end belongs to an op."""
        has_rows = OPS[op.kind].needs_rows
        prefills = has_rows and any(row.is_prefill for row in handlers.rows(op).rows)
        cell = self._thread.cell = Cell(op.kind, op.layer, prefills)
        self.ops[cell] += 1
        try:
            yield
        finally:
            self._thread.cell = None

    def pin(self, start: int, nbytes: int) -> None:
        self._pinned[start] = start + nbytes

    def pin_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pin a tensor's memory as long as there is any view of it."""
        if tensor.nbytes:
            start = tensor.data_ptr()
            self.pin(start, tensor.nbytes)
            weakref.finalize(tensor.untyped_storage(), self.unpin, start)
        return tensor

    def unpin(self, start: int) -> None:
        del self._pinned[start]

    @property
    def num_pinned(self) -> int:
        """Pieces of memory that are pinned."""
        return len(self._pinned)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        # A view's first address may lie anywhere in what is pinned.
        place = tensor.data_ptr()
        return any(start <= place < end for start, end in list(self._pinned.items()))

    def run(self, func, args: tuple, kwargs: dict):
        """An aten op, if any of its tensors lies on the device or will."""
        name = func.overloadpacket.__name__
        tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
        makes = _is_on_device(kwargs.get("device"))
        if not self.is_there or not (makes or any(isinstance(x, DeviceTensor) for x in tensors)):
            return self._run_on_host(func, args, kwargs)
        if name == "copy_":
            return self._copy(*args, **kwargs)
        if name == "_to_copy":
            return self._to_copy(*args, **kwargs)
        _check_devices(name, tensors)
        self._note_syncs(name, args)
        if not _is_view(func):
            self.launch(name)
        args, kwargs = _map(_data, args), {key: _map(_data, value) for key, value in kwargs.items()}
        if makes:
            kwargs["device"] = "cpu"
        if func is aten.bmm.dtype:  # there is none for CPUs
            return _on_device(torch.bmm(*(each.to(args[2]) for each in args[:2])))
        return _map(_on_device, func(*args, **kwargs))

    def _run_on_host(self, func, args: tuple, kwargs: dict):
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        return self.pin_tensor(func(*args, **kwargs | {"pin_memory": False}))

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False):
        if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
            if target.numel():
                self.launch("copy_")
        else:
            host = source if isinstance(target, DeviceTensor) else target
            self._cross(target, source, non_blocking, self.is_pinned(host))
        _data(target).copy_(_data(source))
        return target

    def _to_copy(self, source: torch.Tensor, *, non_blocking: bool = False, **options):
        to_device = _is_on_device(options.pop("device", None) or source.device)
        options.pop("pin_memory", None)
        made = aten._to_copy.default(_data(source), **options)
        if to_device is isinstance(source, DeviceTensor):
            self.launch("_to_copy")
        else:
            # torch pins what it allocates on the host for such a copy.
            is_pinned = not to_device or self.is_pinned(source)
            self._cross(made, source, non_blocking, is_pinned)
        return DeviceTensor(made) if to_device else made

    def _cross(
        self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool, is_pinned: bool
    ) -> None:
        """Note whatever keeps a copy from being one asynchronous request."""
        if not target.numel():
            return
        if self._cell is not None:
            to_device = isinstance(target, DeviceTensor) or not isinstance(source, DeviceTensor)
            self.copies[self._cell, "h2d" if to_device else "d2h"] += 1
        if not non_blocking:
            self.note("blocking")
        elif not is_pinned:
            self.note("unpinned")
        if not _is_one_piece(target, source):
            self.note("staged")

    def _note_syncs(self, name: str, args: tuple) -> None:
        if name in _WAITING:
            self.note("sync")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.note("sync")


# Ops whose result has a size, or a value, that the host has to know.
_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "unique_dim_consecutive", "is_nonzero", "equal", "bincount",
    "repeat_interleave", "histc",
}  # fmt: skip
_device: PretendCuda | None = None


class DeviceTensor(torch.Tensor):
    """A tensor on the pretend device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(),
            dtype=data.dtype, layout=data.layout, device=GPU,
        )  # fmt: skip
        made.data_in_host_memory = data
        return made

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"DeviceTensor({self.data_in_host_memory!r})"

    def tolist(self):
        assert _device is not None
        _device.note("sync")
        return self.data_in_host_memory.tolist()

    def is_pinned(self, device=None) -> bool:
        return False

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert _device is not None, "the pretend device is gone"
        return _written(func, args, kwargs or {}, _device.run(func, args, kwargs or {}))


class _Mode(TorchDispatchMode):
    """Brings ops that have no tensor on the device yet to the device, in one thread."""

    def __init__(self, device: PretendCuda) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return _written(func, args, kwargs, self.device.run(func, args, kwargs))


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _map(function, value):
    if isinstance(value, list | tuple):
        return type(value)(_map(function, each) for each in value)
    return function(value)


def _data(value):
    return value.data_in_host_memory if isinstance(value, DeviceTensor) else value


def _on_device(value):
    return DeviceTensor(value) if isinstance(value, torch.Tensor) else value


def _is_on_device(device) -> bool:
    """True for cuda, and for "meta": torch takes that from the guard for cuda without a number."""
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _check_devices(name: str, tensors: list[torch.Tensor]) -> None:
    """CUDA kernels take numbers of the host, that is tensors of no dimension, but nothing else."""
    takes_numbers = not name.startswith(("index", "cat", "stack", "attention"))
    on_device = [isinstance(x, DeviceTensor) for x in tensors]
    for tensor, is_there in zip(tensors, on_device, strict=True):
        if not is_there and any(on_device) and not (takes_numbers and tensor.dim() == 0):
            raise DeviceMix(
                f"{name} in {_caller()} has a host tensor of {list(tensor.shape)} among tensors of"
                " the device"
            )


@cache
def _is_view(func) -> bool:
    """True if an op launches nothing: views, and tensors that nobody fills."""
    name = func.overloadpacket.__name__
    if name.startswith("empty") or name in ("new_empty", "new_empty_strided", "_unsafe_view"):
        return True
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


@cache
def _written_arguments(func) -> list[tuple[int, str]] | None:
    """Place and name of the argument that each result is; None if results are tensors of their
    own."""
    arguments = {
        next(iter(argument.alias_info.before_set)): (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    aliases = [returned.alias_info for returned in func._schema.returns]
    if not aliases or any(alias is None or not alias.is_write for alias in aliases):
        return None
    return [arguments[next(iter(alias.before_set))] for alias in aliases]


def _written(func, args: tuple, kwargs: dict, result):
    """The result, or the arguments themselves of an op that writes to them."""
    places = _written_arguments(func)
    if places is None:
        return result
    own = [args[place] if place < len(args) else kwargs[name] for place, name in places]
    return own[0] if len(own) == 1 else tuple(own)


def _is_one_piece(target: torch.Tensor, source: torch.Tensor) -> bool:
    """True if one request copies all: torch stages what isn't dense and alike on both sides."""
    if target.dtype != source.dtype or target.shape != source.shape:
        return False
    dims = zip(target.shape, target.stride(), source.stride(), strict=True)
    dims = sorted((own, size, other) for size, own, other in dims if size != 1)
    dense = 1
    for own, size, other in dims:
        if own != dense or other != dense:
            return False
        dense *= size
    return True


def _attention(device: PretendCuda, attend):
    """scaled_dot_product_attention as CUDA has it: one kernel, and those that prepare its mask.

    A mask becomes one that is added, with rows of a multiple of 8 values.
    """

    def attention(q, k, v, attn_mask=None, **options):
        tensors = [x for x in (q, k, v, attn_mask) if x is not None]
        if not any(isinstance(x, DeviceTensor) for x in tensors):
            return attend(q, k, v, attn_mask=attn_mask, **options)
        _check_devices("attention", tensors)
        if attn_mask is not None:
            if attn_mask.dtype is torch.bool:
                least = torch.full((), -torch.inf, dtype=q.dtype, device=q.device)
                attn_mask = torch.where(attn_mask, 0.0, least)
            if any(stride % 8 for stride in attn_mask.stride()[:-1]) or attn_mask.stride(-1) != 1:
                size = attn_mask.shape[-1]
                padded = attn_mask.new_zeros(*attn_mask.shape[:-1], size + 8 - size % 8)
                attn_mask = padded[..., :size].copy_(attn_mask)
        device.launch("attention")
        return DeviceTensor(attend(*map(_data, (q, k, v)), attn_mask=_data(attn_mask), **options))

    return attention


def _rms_norm(device: PretendCuda, norm):
    """rms_norm as CUDA has it (_fused_rms_norm): one kernel, and a copy of an input with gaps.

    A weight of another dtype takes several kernels, as on the CPU.
    """

    def rms_norm(x, normalized_shape, weight=None, eps=None):
        if not isinstance(x, DeviceTensor) or (weight is not None and weight.dtype != x.dtype):
            return norm(x, normalized_shape, weight, eps)
        _check_devices("rms_norm", [it for it in (x, weight) if it is not None])
        x = x.contiguous()
        device.launch("rms_norm")
        return DeviceTensor(norm(_data(x), normalized_shape, _data(weight), eps))

    return rms_norm


def _caller() -> str:
    """The project's function that is running, such as runtime/handlers.py OpHandlers._accept."""
    frame = sys._getframe(1)
    while frame is not None:
        _, _, path = frame.f_code.co_filename.rpartition("/flexgen_ray/")
        if path != frame.f_code.co_filename:
            return f"{path} {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "a test"


class _Stream:
    def __init__(self, device=None) -> None:
        self.device = GPU

    def wait_event(self, event: _Event) -> None:
        assert event.is_recorded, "a stream waits for an event that was never recorded"

    def synchronize(self) -> None:
        assert _device is not None
        _device.note("sync")


class _Event:
    def __init__(self, **options) -> None:
        self.is_recorded = False
        self.time = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self.is_recorded, self.time = True, time.perf_counter()

    def synchronize(self) -> None:
        assert self.is_recorded, "a thread waits for an event that was never recorded"
        assert _device is not None
        _device.note("sync")

    def query(self) -> bool:
        assert self.is_recorded
        return True

    def elapsed_time(self, other: _Event) -> float:
        return (other.time - self.time) * 1e3


@contextmanager
def pretend_cuda() -> Iterator[PretendCuda]:
    """A GPU named "pretend", of GPU_BYTES, in all threads that start meanwhile and in this one.

    Everything made on it must be gone at the end. Not for machines with a GPU.
    """
    global _device
    assert not torch.cuda.is_available(), "there is a GPU: use that"
    _device = device = PretendCuda()
    attends_by_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.MonkeyPatch.context() as patch, _device_guard():
        _patch_torch(patch, device)
        _patch_project(patch, device)
        try:
            with _Mode(device):
                yield device
        finally:
            torch.backends.cuda.enable_cudnn_sdp(attends_by_cudnn)
            device.is_there = False
            _device = None


@contextmanager
def _device_guard() -> Iterator[None]:
    """A guard that does nothing, without which torch can't index a tensor that says "cuda".

    Builds of torch with CUDA have one for machines without a GPU. In those for the CPU the guard of
    "meta" tensors stands in, whose address torch keeps in a table by type of device.
    """
    torch._C._ensureCUDADeviceGuardSet()
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[_CUDA]
    guards[_CUDA] = before or guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before


def _patch_torch(patch: pytest.MonkeyPatch, pretend: PretendCuda) -> None:
    def sync(device_of_torch=None) -> None:
        pretend.note("sync")

    def register(start: int, nbytes: int, flags: int) -> int:
        pretend.pin(start, nbytes)
        return 0

    def unregister(start: int) -> int:
        pretend.unpin(start)
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda chosen: None,
        "synchronize": sync,
        "Stream": _Stream,
        "Event": _Event,
        "set_stream": lambda stream: None,
        "current_stream": lambda of=None: _Stream(),
        "mem_get_info": lambda of=None: (GPU_BYTES, GPU_BYTES),
        "get_device_name": lambda of=None: "pretend",
        "get_device_capability": lambda of=None: (9, 0),
        "get_device_properties": lambda of=None: SimpleNamespace(uuid="pretend"),
        "memory_reserved": lambda of=None: 0,
        "max_memory_reserved": lambda of=None: 0,
        "cudart": lambda: cudart,
    }.items():
        patch.setattr(torch.cuda, name, value)

    tensor, run_thread = torch.tensor, threading.Thread.run

    def made_tensor(*args, pin_memory: bool = False, device=None, **kwargs) -> torch.Tensor:
        made = tensor(*args, **kwargs)
        if pin_memory:
            pretend.pin_tensor(made)
        return made if device is None else made.to(device)

    def run(thread: threading.Thread) -> None:
        with _Mode(pretend):
            run_thread(thread)

    patch.setattr(torch, "tensor", made_tensor)
    patch.setattr(threading.Thread, "run", run)
    attend = torch.nn.functional.scaled_dot_product_attention
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _attention(pretend, attend))
    norm = torch.nn.functional.rms_norm
    patch.setattr(torch.nn.functional, "rms_norm", _rms_norm(pretend, norm))
    # Wrappers have no version counter that inference tensors could share.
    no_grad = torch.no_grad
    inference_mode = torch.inference_mode

    def enter(mode) -> None:
        mode.instead = no_grad()
        mode.instead.__enter__()

    patch.setattr(inference_mode, "__enter__", enter)
    patch.setattr(inference_mode, "__exit__", lambda mode, *error: mode.instead.__exit__(*error))


def _patch_project(patch: pytest.MonkeyPatch, device: PretendCuda) -> None:
    class Kernels:
        """In place of Triton's: one launch each, for tensors of the device alone."""

        @staticmethod
        def pack(x: torch.Tensor, bits: int, out: torch.Tensor) -> None:
            device.launch("pack")
            pack_plain.pack(_data_there(x), bits, _data_there(out))

        @staticmethod
        def unpack(packed: torch.Tensor, bits: int, out: torch.Tensor) -> None:
            device.launch("unpack")
            pack_plain.unpack(_data_there(packed), bits, _data_there(out))

        @staticmethod
        def dequantize(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
            device.launch("dequantize")
            mxfp4.dequantize_plain(*map(_data_there, (blocks, scales, out)))

        @staticmethod
        def attend_pages(
            q, keys, values, tables, lens, out, *, most: int, window: int | None, lse, sinks
        ):
            device.launch("attend_pages")
            there = [_data_there(it) for it in (q, keys, values, tables, lens, out)]
            assert max(there[4].tolist()) <= most
            sums, sinks = (None if it is None else _data_there(it) for it in (lse, sinks))
            how = 1.0, window, sums, sinks
            load_kernel("sdpa", 1)(*there[:4], there[4].tolist(), there[5], *how)

    run_op = OpHandlers.run

    def run(handlers: OpHandlers, op: Op, ready_at: float = 0.0) -> None:
        if not handlers.is_idle(op):
            with device.op(handlers, op):
                run_op(handlers, op, ready_at)

    on_host = mxfp4._dequantizer

    def dequantizer(of: torch.device):
        return on_host(of) if of.type == "cpu" else Kernels.dequantize

    patch.setattr(pack, "_on_device", lambda of: Kernels)
    patch.setattr(mxfp4, "_dequantizer", dequantizer)
    patch.setattr(device_attention, "page_kernel", lambda *of: Kernels)
    patch.setattr(OpHandlers, "run", run)


def _data_there(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DeviceTensor):
        raise DeviceMix(f"a kernel of the device gets a host tensor in {_caller()}")
    return tensor.data_in_host_memory


_HEADS = {
    "vocab_size": 500, "num_hidden_layers": 4, "max_position_embeddings": 600,
    "torch_dtype": "float32", "eos_token_id": 2,
}  # fmt: skip
_GATED = {
    "hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 16,
    "intermediate_size": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}  # fmt: skip
# Narrow models with as many heads as large ones.
SHAPES: dict[str, dict] = {
    "opt": _HEADS | {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 448,
        "num_attention_heads": 56, "ffn_dim": 448, "word_embed_proj_dim": 448,
    },
    "llama": _HEADS | _GATED | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen3": _HEADS | _GATED | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3-moe": _HEADS | _GATED | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "num_experts": 24, "num_experts_per_tok": 8, "moe_intermediate_size": 16,
        "norm_topk_prob": True, "torch_dtype": "bfloat16",
    },
    "gpt-oss": _HEADS | _GATED | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "intermediate_size": 16,
        "num_local_experts": 24, "num_experts_per_tok": 8, "torch_dtype": "bfloat16",
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "glm4-moe": _HEADS | _GATED | {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "n_group": 4,
        "topk_group": 2, "n_routed_experts": 24, "num_experts_per_tok": 8,
        "moe_intermediate_size": 16, "routed_scaling_factor": 2.5, "torch_dtype": "bfloat16",
    },
}  # fmt: skip


class DecodeLaunches(NamedTuple):
    """Launches of a decoding batch in one layer, {kind of op: mean}.

    What a pass makes once, such as a mask, is made in its first layer.
    """

    first_layer: dict[OpKind, float]
    other_layers: dict[OpKind, float]


def decode_launches(
    name: str, folder: Path, is_ragged: bool, shared: int = 0, **policy
) -> DecodeLaunches:
    """Launches of a model of SHAPES, in batches whose rows decode together.

    folder: an empty one, for the model; is_ragged: if the rows' lengths differ; shared: tokens with
    which all prompts begin.
    policy: fields of Policy; everything stays on the device unless they say otherwise.
    """
    rows, config = 6, SHAPES[name]
    (folder / "config.json").write_text(json.dumps(config))
    options = {
        "device": "cuda",
        "dtype": config["torch_dtype"],
        "use_ray": False,
        "executor": "serial",
    }
    memory = {"gpu_memory": GPU_BYTES // 2, "cpu_memory": GPU_BYTES // 8, "disk_memory": 0}
    with (
        pretend_cuda() as device,
        LLM(folder, policy=Policy(rows, 2, **policy), load_format="dummy", **options, **memory)
        as llm,
    ):  # fmt: skip
        lens = [9 + is_ragged * i % 5 for i in range(2 * rows)]
        params = SamplingParams(4, temperature=0.0, ignore_eos=True)
        requests = [
            llm.request(i, [2] * shared + list(range(3, 3 + n)), params) for i, n in enumerate(lens)
        ]
        llm.prepare(requests)
        for _ in llm.stream(requests):
            pass
        layers = range(1, config["num_hidden_layers"] + 1)
        parts = layers[:1], layers[1:]
        return DecodeLaunches(*(device.launches_per_op(part, prefills=False) for part in parts))
