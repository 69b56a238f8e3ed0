"""How long a checkpoint takes to load: as it is, packed while it loads, and packed before.

All in one run, in turn, from the page cache to memory; what is packed before is packed here.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.command import run_as_command
from flexgen_ray.cli.bench.page_cache import read_once
from flexgen_ray.cli.bench.random_checkpoints import SHAPES, make_checkpoint
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.cli.quantize import write_quantized_copy
from flexgen_ray.config import Policy
from flexgen_ray.llm import LLM
from flexgen_ray.models.config_files import load_config
from flexgen_ray.paths import find_model
from flexgen_ray.reporting.result import finish
from flexgen_ray.request import SamplingParams


def loading(
    model: Annotated[
        str, typer.Option(help=f"Model folder, or a made-up one: {', '.join(SHAPES)}.")
    ] = "llama-2.5gb",
    weight_bits: Annotated[int, typer.Option(help="4 or 8.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Each is loaded so often; medians count.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Seconds to load a checkpoint in its own dtype, with --weight-bits, and packed by quantize.

    Made-up checkpoints are float16. Example: python -m benchmarks.loading --model ./llama
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
        # The first compiles what packs.
        reports = [{name: _load(*way) for name, way in ways.items()} for _ in range(rounds + 1)]
        runs = [
            _run(name, way[0], [each[name] for each in reports[1:]]) for name, way in ways.items()
        ]
        dtype = load_config(folder).dtype
    settings = {"model": Path(model).name, "dtype": dtype, "weight_bits": weight_bits}
    settings |= {"page_cache": "warm", "rounds": rounds, "quantize_s": round(seconds, 3)}
    finish(settings | {"runs": runs}, "CPU", json_file)


def _quantize(folder: Path, output: Path, weight_bits: int) -> float:
    """Seconds."""
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
        "each_s": [round(it, 4) for it in seconds],
    }


if __name__ == "__main__":
    run_as_command(loading)
