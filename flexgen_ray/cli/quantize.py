"""`flexgen-ray quantize`: a model's weights quantized once, for later runs to load as they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from flexgen_ray.cli.app import Writes
from flexgen_ray.cli.options import (
    FILES,
    LOSSY,
    MODEL,
    EmbeddingBitsOption,
    JsonOption,
)
from flexgen_ray.reporting.terminal import say


def quantize(
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=MODEL,
            help="Model folder in Hugging Face's format (safetensors), or a model's name on the "
            "Hugging Face hub, such as Qwen/Qwen3-32B.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            rich_help_panel=FILES,
            help="Model folder to write; it must not exist yet.",
        ),
        Writes.FOLDER,
    ],
    weight_bits: Annotated[
        int,
        typer.Option(
            metavar="4|8",
            rich_help_panel=LOSSY,
            help="Quantize the layers' weights to 4 or 8 bits (groups of 64). Lossy.",
        ),
    ] = 4,
    embedding_bits: EmbeddingBitsOption = None,
    json_file: JsonOption = None,
) -> None:
    """Write a copy of a model folder with quantized weights, smaller and faster to load.

    Use it before several runs with --weight-bits: each would quantize the weights while it loads
    them, with the same result. Runs with the copy need no --weight-bits.

    \b
    Example: flexgen-ray quantize --model ./opt-30b --output ./opt-30b-int4
    """
    from flexgen_ray.config import Policy
    from flexgen_ray.models.checkpoint import checkpoint_config
    from flexgen_ray.paths import find_model
    from flexgen_ray.reporting.progress import show_steps
    from flexgen_ray.reporting.result import finish
    from flexgen_ray.units import format_bytes

    bits = {"weight_bits": weight_bits, "embedding_bits": embedding_bits}
    Policy(**bits)  # type: ignore[arg-type]
    if output.exists():
        raise FileExistsError(f"{output} exists; give the name of a new folder")
    folder = find_model(model)
    config = checkpoint_config(folder)
    started = time.perf_counter()
    with show_steps("quantizing", config.num_layers + 2) as announce:
        before, after = write_quantized_copy(folder, output, bits, announce)
    seconds = time.perf_counter() - started
    say(
        f"wrote {output}: {format_bytes(after)}, from {format_bytes(before)} of {config.dtype} "
        f"({before / after:.2f} times smaller), in {seconds:.1f} s"
    )
    sizes = {"dtype": config.dtype, "bytes_before": before, "bytes_after": after}
    result = {"model": folder.name} | bits | sizes | {"seconds": round(seconds, 2)}
    finish(result, "CPU", json_file)


def write_quantized_copy(
    folder: Path,
    output: Path,
    bits: dict[str, int | None],
    announce: Callable[[str], None] = lambda name: None,
) -> tuple[int, int]:
    """Write a quantized copy of a model folder; returns the bytes of its tensors before and after.

    bits: values of weight_bits and embedding_bits, by name. announce: called with each step's name.
    """
    from flexgen_ray.models.checkpoint import checkpoint_config
    from flexgen_ray.models.quantized_checkpoint import write_quantized
    from flexgen_ray.quant.formats import WeightFormat

    config = checkpoint_config(folder)
    weight_format = WeightFormat(config.dtype, bits["weight_bits"], bits["embedding_bits"])
    return write_quantized(folder, config, weight_format, bits, output, announce)
