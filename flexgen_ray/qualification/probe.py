"""The step that asks what only the device can answer; each question alone, so that none is lost.

Knows the questions about the machine, attention, issuing and quantization; link.py has those about
the CPU-GPU link.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flexgen_ray.qualification import link
from flexgen_ray.qualification.setting import Figures, Setting, Skipped, run_step
from flexgen_ray.qualification.timing import Action, issue_seconds, timed, wait
from flexgen_ray.quant.packing import packed_bytes
from flexgen_ray.runtime.worker import find_device

Question = Callable[[torch.device, bool], Iterator[dict[str, Any]]]

_TRACE_CHARACTERS = 1500
_HEAD_DIM = 128
# (name, rows, KV heads, query heads for each of them, whether lengths differ)
_ATTENTION = (
    ("OPT-30B, equal lengths", 24, 56, 1, False),
    ("OPT-30B, ragged", 24, 56, 1, True),
    ("OPT-6.7B, few rows", 3, 32, 1, False),
    ("grouped queries, ragged", 24, 8, 8, True),
)
_NVIDIA_SMI = (
    "name,driver_version,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm,clocks.max.mem,"
    "memory.total,power.limit"
)


def probe(setting: Setting, figures: Figures) -> None:
    """Ask all questions; the step fails at the end if one of them did."""
    device = find_device(setting.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    failed = []
    for question in QUESTIONS:
        name = question.__name__
        try:
            with torch.inference_mode():
                for answer in question(device, setting.is_tiny):
                    figures.add(question=name, **answer)
        except Skipped as reason:
            figures.add(question=name, skipped=str(reason))
        except Exception as error:
            failed.append(name)
            trace = traceback.format_exc()[-_TRACE_CHARACTERS:]
            figures.add(question=name, error=repr(error), trace=trace)
    if failed:
        raise SystemExit(f"questions that failed: {', '.join(failed)}")


def machine(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Versions, memory and cores; for a GPU, torch's description of it."""
    yield {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "meminfo": _lines_of("/proc/meminfo")[:3],
        "huge_pages": _lines_of("/sys/kernel/mm/transparent_hugepage/enabled"),
        "device_name": "CPU",
    } | (_cuda(device) if device.type == "cuda" else {})


def driver(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Lines that NVIDIA's driver says of the GPU: its slot, clocks and limits."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        raise Skipped("nvidia-smi is not here")
    command = ["nvidia-smi", f"--query-gpu={_NVIDIA_SMI}", "--format=csv"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    yield {"nvidia_smi": (shown.stdout + shown.stderr).strip().splitlines()}


def _lines_of(path: str) -> list[str]:
    """Lines of one of the kernel's files; none if this kernel lacks it."""
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8").splitlines()
    return []


def _cuda(device: torch.device) -> dict[str, Any]:
    """Versions, and what torch says of the GPU."""
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device_name": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "free_bytes": free,
        "total_bytes": total,
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def attention(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """The kernel that attends a decoding batch, and the time of its first call at each new length.

    cuDNN's makes a plan for each length; so all is measured with cuDNN allowed and forbidden.
    """
    for is_allowed in (True, False):
        with _cudnn(is_allowed):
            for case in _ATTENTION[-1:] if is_tiny else _ATTENTION:
                yield {"cudnn_allowed": is_allowed} | _attention(device, case, is_tiny)


@contextmanager
def _cudnn(is_allowed: bool) -> Iterator[None]:
    """Context in which torch may, or may not, use cuDNN's attention."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(is_allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _attention(device: torch.device, case: tuple, is_tiny: bool) -> dict[str, Any]:
    """Times of one case over some lengths in turn, each of which is new at its first call."""
    name, rows, heads, group, is_ragged = case
    rows, first_len, count = (2, 20, 3) if is_tiny else (rows, 520, 10)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    shape = (2, rows, heads, 2 * first_len, _HEAD_DIM)
    keys, values = torch.randn(shape, device=device, dtype=dtype)
    q = torch.randn(rows, heads, group, _HEAD_DIM, device=device, dtype=dtype)
    new, again, kernel = [], [], "unknown"
    # The first length of all also loads libraries, so it is left out.
    for length in range(first_len - 1, first_len + count):
        k, v = keys[:, :, :length], values[:, :, :length]
        mask = _mask(device, rows, length) if is_ragged else None
        attend = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)
        wait(device)
        new.append(issue_seconds(attend))
        again.append(timed(device, attend, 10))
        kernel = _kernel_name(q, k, v, mask)
    best = min(again[1:], key=lambda each: each.device_s)
    return {
        "case": name,
        "kernel": kernel,
        "new_length_ms": [round(1e3 * seconds, 3) for seconds in new[1:]],
        "same_length_issue_us": min(each.issue_us for each in again[1:]),
        "gb_per_s": best.gb_per_s(2 * rows * heads * first_len * _HEAD_DIM * q.element_size()),
    }


def _mask(device: torch.device, rows: int, length: int) -> torch.Tensor:
    """Mask of rows of different lengths, bool [rows, 1, 1, length]."""
    lens = torch.randint(length // 2, length, (rows, 1), device=device)
    return (torch.arange(length, device=device) < lens)[:, None, None]


def _kernel_name(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> str:
    """Name of the kernel that torch chooses, by a private function that may change."""
    try:
        from torch.nn.attention import SDPBackend

        return SDPBackend(torch._fused_sdp_choice(q, k, v, attn_mask=mask)).name  # type: ignore[attr-defined]
    except Exception as error:
        return f"unknown ({error!r})"


def issuing(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Microseconds of the issuing thread for a small op, an event, and a switch of streams."""
    x, weight = torch.zeros(16, device=device), torch.zeros(16, 16, device=device)
    actions: dict[str, Action] = {
        "in-place sum": lambda: x.add_(1),
        "layer norm": lambda: F.layer_norm(x, (16,)),
        "matrix product": lambda: F.linear(x, weight),
    }
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        new_event = partial(torch.cuda.Event, enable_timing=True, blocking=True)
        event = new_event()
        event.record(stream)
        actions |= {
            "new timing event": lambda: new_event().record(stream),
            "same event again": lambda: event.record(stream),
            "wait for an event": lambda: stream.wait_event(event),
            "query of an event": event.query,
            "switch of streams": lambda: torch.cuda.set_stream(torch.cuda.current_stream(device)),
        }
    for name, action in actions.items():
        yield {"action": name, "us": timed(device, action, 10 if is_tiny else 500).issue_us}


def quantization(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Bytes and values of the device's kernels against those of plain torch, and their rates."""
    shapes: tuple[tuple[int, ...], ...] = ((28672, 7168), (2, 4, 56, 528, 128))
    shapes = ((64, 256), (2, 1, 2, 5, 96)) if is_tiny else shapes
    for shape in shapes:
        for bits in (4, 8):
            yield {"shape": shape, "bits": bits} | _quantization(device, shape, bits)


def _quantization(device: torch.device, shape: tuple[int, ...], bits: int) -> dict[str, Any]:
    """Comparison and times of one shape."""
    from flexgen_ray.kernels import pack_plain

    pack, unpack = _kernels(device)
    values = torch.randn(shape, device=device, dtype=torch.float16)
    size = (*shape[:-1], packed_bytes(shape[-1], bits))
    packed, plain = torch.zeros(2, *size, device=device, dtype=torch.uint8)
    ours, theirs = torch.zeros(2, *shape, device=device, dtype=torch.float16)
    pack(values, bits, packed)
    pack_plain.pack(values, bits, plain)
    unpack(packed, bits, ours)
    pack_plain.unpack(packed, bits, theirs)
    same_bytes, same_values = torch.equal(packed, plain), torch.equal(ours, theirs)
    packing = timed(device, lambda: pack(values, bits, packed))
    unpacking = timed(device, lambda: unpack(packed, bits, ours))
    moved = packed.nbytes + ours.nbytes
    if not (same_bytes and same_values):
        raise AssertionError(f"{shape} in {bits} bits: {same_bytes=}, {same_values=}")
    return {
        "same_bytes": same_bytes,
        "same_values": same_values,
        "pack_gb_per_s": packing.gb_per_s(moved),
        "unpack_gb_per_s": unpacking.gb_per_s(moved),
        "unpack_ms": round(unpacking.device_s * 1e3, 4),
        "pack_issue_us": packing.issue_us,
        "unpack_issue_us": unpacking.issue_us,
    }


def _kernels(device: torch.device) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The fast kernels of a device that quantize and dequantize: Triton's on a GPU."""
    if device.type != "cuda":
        from flexgen_ray.kernels import pack

        return pack.pack, pack.unpack
    if not find_spec("triton"):
        raise Skipped("Triton is not installed")
    from flexgen_ray.kernels import pack_cuda

    return pack_cuda.pack, pack_cuda.unpack


QUESTIONS: tuple[Question, ...] = (
    machine, driver, attention, issuing, quantization, link.one_direction, link.both_directions,
    link.overtaking, link.two_dimensional,
)  # fmt: skip


if __name__ == "__main__":
    run_step(probe)
