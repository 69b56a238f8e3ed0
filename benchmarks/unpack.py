"""Can a GPU dequantize at its memory's speed? Machine instructions for each value, as compiled.

Claim: a value of 4 bits in vectors of whole groups, as weights are and caches with heads of a
multiple of 64, takes at most 0.6 instructions of a warp, and is read and written 16 bytes at a
time. The kernels have no loops, so the instructions in their machine code are those that run: a
multiprocessor issues four a clock. Needs Triton, its disassembler included, and no GPU; so nothing
here is a speed.

Good: `most_of_4_bits` at most 0.6.
docs/results/unpack-instructions.json: python -m benchmarks.unpack --json FILE
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from benchmarks.command import run_as_command
from flexgen_ray import package_versions
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.quant.packing import GROUP, LARGEST
from flexgen_ray.reporting.result import finish

CAPABILITIES = (75, 80, 90)
_LANES, _WARPS = 32, 4  # of a warp; of a program, Triton's default
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)")


def unpack(json_file: JsonOption = None) -> None:
    """Count instructions for each value of both kernels that dequantize on GPUs.

    Example: python -m benchmarks.unpack
    """
    if disassembler() is None:
        raise ValueError("NVIDIA's disassembler isn't there; pip install triton brings it")
    rows = list(_rows())
    whole = [each for each in rows if each["kernel"] == "whole groups" and each["bits"] == 4]
    result = {
        "triton": package_versions("triton")["triton"],
        "most_of_4_bits": max(each["instructions_a_value"] for each in whole),
        "kernels": rows,
    }
    finish(result, "none", json_file)


def _rows() -> Iterator[dict]:
    for capability, bits, dtype in product(CAPABILITIES, (4, 8), ("fp16", "bf16")):
        case = {"capability": capability, "bits": bits, "dtype": dtype}
        yield {"kernel": "any vectors"} | case | _figures(compiled("_unpack", case))
        layouts = ((True, 16), (False, 8)) if dtype == "fp16" else ((True, 16),)
        for is_dense, alignment in layouts:
            made = compiled_whole(case, alignment, is_dense)
            layout = {"dense": is_dense, "alignment": alignment}
            yield {"kernel": "whole groups"} | case | layout | _figures(made)


def _figures(made: Any) -> dict:
    counts = instructions(made)
    moves = {it: n for it, n in counts.items() if it.startswith(("LDG", "STG"))}
    return {"instructions_a_value": round(a_value(made, counts), 3), "loads_and_stores": moves}


def compiled_whole(case: Mapping[str, Any], alignment: int, is_dense: bool) -> Any:
    """The kernel for whole groups, compiled for vectors of an alignment; dense: side by side."""
    even = ("values", "packed") if alignment == 16 else ("values",)
    return compiled(
        "_unpack_whole", case, even, {"ALIGNMENT": alignment, "IS_DENSE": is_dense, "UNITS": 64}
    )


def compiled(
    name: str,
    case: Mapping[str, Any],
    even: Iterable[str] | None = None,
    constants: Mapping[str, int] | None = None,
    wide: Iterable[str] = (),
) -> Any:
    """A kernel of kernels/pack_cuda.py as Triton compiles it, with `asm`, its code by format.

    case: capability of the GPU, bits, and dtype of the values. even: arguments that Triton knows to
    be multiples of 16, None for all that it looks at. constants: values of arguments that are known
    when the kernel is compiled. wide: integers of 64 bits.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flexgen_ray.kernels import pack_cuda

    kernel = getattr(pack_cuda, name)
    known = {"GROUP": GROUP, "UNITS": 32, "BITS": case["bits"], "LARGEST": LARGEST}
    known |= dict(constants or {})
    known = {it: value for it, value in known.items() if it in kernel.arg_names}
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(wide, "i64")
    signature |= {"values": f"*{case['dtype']}", "packed": "*u8"} | dict.fromkeys(
        known, "constexpr"
    )
    if even is None:
        even = (it.name for it in kernel.params if not it.do_not_specialize)
    places = [kernel.arg_names.index(it) for it in even if it not in known]
    attributes = {(place,): [["tt.divisibility", 16]] for place in places}
    source = ASTSource(kernel, signature, known, attributes)
    return triton.compile(source, target=GPUTarget("cuda", case["capability"], _LANES))


def compiled_mxfp4(capability: int, dtype: str, alignment: int) -> Any:
    """The kernel of kernels/mxfp4_cuda.py as Triton compiles it for addresses of an alignment."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flexgen_ray.kernels.mxfp4_cuda import _dequantize

    known = {"ALIGNMENT": alignment, "UNITS": 128}
    signature = dict.fromkeys(_dequantize.arg_names, "i32") | dict.fromkeys(known, "constexpr")
    signature |= {"blocks": "*u8", "scales": "*u8", "out": f"*{dtype}"}
    pointers = [_dequantize.arg_names.index(name) for name in ("blocks", "out", "block_stride")]
    even = {(place,): [["tt.divisibility", 16]] for place in pointers if alignment == 16}
    source = ASTSource(_dequantize, signature, known, even)
    return triton.compile(source, target=GPUTarget("cuda", capability, _LANES))


def a_value(made: Any, counts: Counter[str]) -> float:
    """Instructions of a warp for each value of a compiled kernel's program."""
    units = made.src.constants[made.src.fn.arg_names.index("UNITS"),]
    return sum(counts.values()) * _WARPS / (units * GROUP)


def instructions(made: Any) -> Counter[str]:
    """{instruction: number} in the machine code of a compiled kernel, without what only pads it."""
    counts = Counter(INSTRUCTION.findall(machine_code(made, "nvdisasm", "-c")))
    del counts["NOP"]
    return counts


def machine_code(made: Any, tool: str, option: str) -> str:
    """Output of one of NVIDIA's tools about a compiled kernel."""
    assert (command := nvidia_tool(tool)) is not None
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        shown = subprocess.run(
            [command, option, file.name], check=True, capture_output=True, text=True
        )
    return shown.stdout


def disassembler() -> Path | None:
    """NVIDIA's disassembler, which comes with Triton; None if it isn't there."""
    return nvidia_tool("nvdisasm")


def nvidia_tool(name: str) -> Path | None:
    """One of the programs of NVIDIA that come with Triton; None if it isn't there."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends/nvidia/bin" / name
    return path if path.is_file() else None


if __name__ == "__main__":
    run_as_command(unpack)
