"""Does quantizing a checkpoint in advance pay? Three ways to load it, in turns.

Claim: a folder that `flexgen-ray quantize` wrote loads faster than the checkpoint itself, and much
faster than quantizing while loading. Each way loads from the page cache to memory, once a round.

Good: `load_s` of the folder quantized in advance is below that of the checkpoint, about by their
bytes. docs/results/loading-cpu.json: python -m benchmarks.loading --json FILE
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks import gate
from benchmarks.command import run_as_command
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.page_cache import read_once
from flexgen_ray.cli.bench.random_checkpoints import SHAPES, make_checkpoint
from flexgen_ray.cli.bench.runs import beside
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.cli.quantize import write_quantized_copy
from flexgen_ray.config import Policy
from flexgen_ray.llm import LLM
from flexgen_ray.models.config_files import load_config
from flexgen_ray.paths import find_model
from flexgen_ray.request import SamplingParams


def loading(
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help=f"Model folder, or a shape to make with random weights: {', '.join(SHAPES)}.",
        ),
    ] = "llama-2.5gb",
    weight_bits: Annotated[
        int, typer.Option(metavar="4|8", help="Bits of the quantized weights.")
    ] = 4,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Loads of each way; medians count.")
    ] = 5,
    json_file: JsonOption = None,
) -> None:
    """Measure the seconds to load a checkpoint in its own dtype, with --weight-bits, and quantized
    in advance.

    Random checkpoints are float16.

    Example: python -m benchmarks.loading --model ./llama
    """
    Policy(weight_bits=weight_bits)
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made-up"
        folder = make_checkpoint(model, made, "float16") if model in SHAPES else find_model(model)
        packed = Path(scratch) / "packed"
        seconds = _quantize(folder, packed, weight_bits)
        lossy = {"weight_bits": weight_bits}
        ways = {
            "the checkpoint": (folder, {}),
            f"the checkpoint, packed into {weight_bits} bits": (folder, lossy),
            "packed by quantize": (packed, {}),
        }
        watch = OtherLoad()
        # The first round compiles the kernels that quantize, and doesn't count.
        reports = [{name: _load(*way) for name, way in ways.items()} for _ in range(rounds + 1)]
        runs = [
            _run(name, way[0], [each[name] for each in reports[1:]]) for name, way in ways.items()
        ]
        disturbed = beside(watch)
        dtype = load_config(folder).dtype
    settings = {"model": Path(model).name, "dtype": dtype, "weight_bits": weight_bits}
    settings |= {"page_cache": "warm", "rounds": rounds, "quantize_s": round(seconds, 3)}
    gate.finish(settings | {"runs": runs} | disturbed, "CPU", json_file, rests_on=())


def _quantize(folder: Path, output: Path, weight_bits: int) -> float:
    """Write a quantized copy of a model folder; returns the seconds that took."""
    started = time.perf_counter()
    bits = {"weight_bits": weight_bits, "embedding_bits": None}
    write_quantized_copy(folder, output, bits)
    return time.perf_counter() - started


def _load(folder: Path, lossy: dict[str, Any]) -> tuple[float, int]:
    """Seconds of loading alone, and bytes of the weights in memory."""
    read_once(folder.glob("*.safetensors"))
    policy, dtype = Policy(gpu_batch_size=1, num_gpu_batches=1), load_config(folder).dtype
    with LLM(folder, policy=policy, dtype=dtype, device="cpu", use_ray=False, **lossy) as llm:
        request = llm.request(0, [1, 2], SamplingParams(max_tokens=1))
        llm.prepare([request])
        list(llm.stream([request]))
        return llm.report.load_seconds, sum(llm.report.stages[0].weights.values())


def _run(name: str, folder: Path, loads: list[tuple[float, int]]) -> dict:
    seconds = [seconds for seconds, _ in loads]
    return {
        "name": name,
        "bytes_on_disk": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "bytes_in_memory": loads[0][1],
        "load_s": round(median(seconds), 4),
        "each_s": [round(each, 4) for each in seconds],
    }


if __name__ == "__main__":
    run_as_command(loading)
