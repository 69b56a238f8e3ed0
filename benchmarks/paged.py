"""Can a GPU attend to pages at its memory's speed? Instructions for each cached byte, as compiled.

Claim: a cache that isn't packed takes at most a third of the instructions which a T4, an A100 and
an H100 can issue while their memory delivers it at full speed, with 1 and with 8 query heads a KV
head. One of 4 bits takes more than there are, except on a T4 with 1 query head, and is read at
1 / `issue_slots` of the memory's speed at best. Nothing is spilled to memory. The instructions
counted are those of the loop over a row's tokens in the kernel of kernels/paged_cuda.py. No GPU has
run them, and nothing here is a speed. Needs Triton with NVIDIA's tools, which come with it, and no
GPU.

Good: `most_slots` at most 0.35, `most_slots_packed` at most 2; `spills` 0.
docs/results/decode-attention-instructions.json: python -m benchmarks.paged --json FILE
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from math import gcd
from typing import Any

import torch

from benchmarks.command import run_as_command
from benchmarks.unpack import CAPABILITIES, INSTRUCTION, machine_code, nvidia_tool
from flexgen_ray import package_versions
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.quant.packing import packed_bytes
from flexgen_ray.reporting.result import finish

_LANES, _WARPS, _VECTOR = 32, 4, 16
_SCHEDULERS = 4  # of a multiprocessor, each of which issues an instruction a clock
# Multiprocessors, clock in Hz at its boost, and bytes a second of the memory, by data sheets.
_GPUS = {
    75: ("T4", 40, 1.59e9, 320e9),
    80: ("A100 80 GB", 108, 1.41e9, 2039e9),
    90: ("H100 SXM", 132, 1.755e9, 3350e9),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
POINTERS = ("q", "out", "keys", "values", "tables", "lens", "lse", "sinks", "parts", "ends")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"BRA\S*\s.*`\((\.L_x_\d+)\)")
_KINDS = ("LDG", "LDS", "STS", "SHFL", "BAR", "HMMA", "HGMMA", "WARPGROUP", "FFMA", "MUFU")


def paged(json_file: JsonOption = None) -> None:
    """Count instructions of the kernel that attends to pages, by GPU and kind of cache.

    Example: python -m benchmarks.paged
    """
    if not nvidia_tool("nvdisasm") or not nvidia_tool("cuobjdump"):
        raise ValueError("NVIDIA's tools aren't there; pip install triton brings them")
    rows = [case | figures(case) for case in cases()]
    used = [row for row in rows if "is_other" not in row]
    packed, plain = (
        [row for row in used if bool(row["bits"]) is wanted] for wanted in (True, False)
    )
    result = {
        "triton": package_versions("triton")["triton"],
        "gpus": {str(number): gpu[0] for number, gpu in _GPUS.items()},
        "ran_on_a_gpu": False,
        "most_slots": max(row["issue_slots"] for row in plain),
        "most_slots_packed": max(row["issue_slots"] for row in packed),
        "spills": sum(row["spills"] for row in used),
        "kernels": rows,
    }
    finish(result, "none", json_file)


def cases() -> Iterator[dict]:
    """Kinds of caches by GPU: capability, bits, dtype, head_dim, and query heads a KV head.

    is_other: the kernel is compiled as it is for GPUs with tensor cores if this one has none, or
    the other way round, to compare.
    """
    kinds = product(CAPABILITIES, (None, 8, 4), ("fp16", "bf16"), (64, 128), (1, 8))
    for capability, bits, dtype, head_dim, sharing in kinds:
        case = {
            "capability": capability, "bits": bits, "dtype": dtype, "head_dim": head_dim,
            "sharing": sharing,
        }  # fmt: skip
        if dtype == "fp16" or (capability >= 80 and not bits):
            yield case
        if dtype == "fp16" and bits != 8 and head_dim == 128 and sharing == 1:
            yield case | {"is_other": True}


def figures(case: Mapping[str, Any]) -> dict:
    """Registers, spills, shared memory and instructions of a case's kernel."""
    made, known = compiled(case), constants(case)
    counts = Counter(loop(made))
    # Heads that one program doesn't take are another's, which reads the tile again.
    programs = -(-known["SHARING"] // known["TAKEN"])
    _, multiprocessors, clock, memory = _GPUS[case["capability"]]
    a_byte = programs * sum(counts.values()) * _WARPS / tile_bytes(case, known["TILE"])
    shown = machine_code(made, "cuobjdump", "-res-usage")
    return {
        "by": "dot" if known["BY_DOT"] else "sum",
        "tile": known["TILE"],
        "heads_a_program": known["TAKEN"],
        "instructions_a_byte": round(a_byte, 4),
        "issue_slots": round(a_byte * memory / (multiprocessors * clock * _SCHEDULERS), 3),
        "registers": int(re.findall(r"REG:(\d+)", shown)[0]),
        "spills": sum(n for name, n in counts.items() if name.startswith(("LDL", "STL"))),
        "shared_bytes": made.metadata.shared,
        "in_loop": {
            kind: n for kind in _KINDS
            if (n := sum(n for name, n in counts.items() if name.startswith(kind)))
        },
    }  # fmt: skip


def tile_bytes(case: Mapping[str, Any], tokens: int) -> int:
    """Bytes of keys and values of some tokens of a KV head."""
    return 2 * tokens * width(case) * (1 if case["bits"] else DTYPES[case["dtype"]].itemsize)


def width(case: Mapping[str, Any]) -> int:
    """Elements of a cached vector."""
    return packed_bytes(case["head_dim"], case["bits"]) if case["bits"] else case["head_dim"]


def constants(case: Mapping[str, Any]) -> dict[str, Any]:
    """Constants with which a case's kernel is compiled."""
    from flexgen_ray.kernels.paged_cuda import variant

    return variant(
        case["head_dim"], DTYPES[case["dtype"]], case["bits"], case["sharing"],
        (case["capability"] >= 80) != case.get("is_other", False),
    )  # fmt: skip


def compiled(case: Mapping[str, Any], is_split: bool = False, has_sinks: bool = False) -> Any:
    """The kernel as Triton compiles it, for tensors at addresses as CUDA allocates them."""
    from flexgen_ray.kernels.paged_cuda import _attend

    itemsize = 1 if case["bits"] else DTYPES[case["dtype"]].itemsize
    alignment = gcd(width(case) * itemsize, _VECTOR) // itemsize
    known = constants(case) | {"K_ALIGN": alignment, "V_ALIGN": alignment}
    absent = [*(() if has_sinks else ("sinks",)), *(() if is_split else ("parts", "ends"))]
    return _compiled(_attend, case, known | dict.fromkeys(absent))


def compiled_merge(case: Mapping[str, Any], splits: int) -> Any:
    """The kernel that merges parts of rows, as Triton compiles it."""
    import triton

    from flexgen_ray.kernels.paged_cuda import _merge

    size = case["head_dim"]
    known = {"D": size, "WIDTH": triton.next_power_of_2(size), "SPLITS": splits}
    return _compiled(_merge, case, known)


def _compiled(kernel: Any, case: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """A kernel compiled with some of its arguments known; None for a tensor that isn't there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_stages": known.get("num_stages", 2), "num_warps": _WARPS}
    known = {name: value for name, value in known.items() if name != "num_stages"}
    floats = f"*{case['dtype']}"
    pointers = dict.fromkeys(("q", "out"), floats)
    pointers |= dict.fromkeys(("keys", "values"), "*u8" if case["bits"] else floats)
    pointers |= dict.fromkeys(("tables", "lens"), "*i32")
    pointers |= dict.fromkeys(("lse", "sinks", "parts", "ends"), "*fp32")
    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(known, "constexpr")
    places = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    attributes = {(place,): [["tt.divisibility", 16]] for place in places}
    source = ASTSource(kernel, signature, known, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", case["capability"], _LANES), options=options
    )


def loop(made: Any) -> list[str]:
    """Instructions of a kernel's longest loop, without what only pads it."""
    labels: dict[str, int] = {}
    code: list[str] = []
    longest: list[str] = []
    for line in machine_code(made, "nvdisasm", "-c").splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        if name := INSTRUCTION.search(line):
            code.append(name[1])
        if (branch := _BRANCH.search(line)) and branch[1] in labels:
            longest = max(longest, code[labels[branch[1]] :], key=len)
    return [name for name in longest if name != "NOP"]


if __name__ == "__main__":
    run_as_command(paged)
