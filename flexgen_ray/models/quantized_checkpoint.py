"""Writes a checkpoint whose matrices are quantized already: `flexgen-ray quantize`.

The result is a Hugging Face folder with the same tensor names. A quantized matrix [out, in] is
uint8 [out, packed_bytes(in, bits)] (quant/packing.py); all other tensors and files are copied, and
`quantization_config` in config.json names the bits. Each layer is a file, so memory peaks at one
layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flexgen_ray.kernels.pack import pack
from flexgen_ray.models.checkpoint import Checkpoint
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_files import QUANT_METHOD
from flexgen_ray.models.tensor_files import INDEX, save_tensors
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.packing import PackedRows

_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")  # tokenizer, generation_config, templates


def write_quantized(
    source: Path,
    config: ModelConfig,
    weight_format: WeightFormat,
    bits: dict[str, int | None],
    output: Path,
    announce: Callable[[str], None],
) -> tuple[int, int]:
    """Write a quantized copy of a checkpoint; return the bytes of its tensors before and after.

    source, config: the model folder and its config. weight_format: the bits of each weight.
    bits: weight_bits and embedding_bits for config.json.
    announce: called with a sentence such as "layer 3 of 34" as each layer begins.
    Raises FileExistsError if the output folder exists, ValueError if the source is quantized
    already. After an error no output folder is left.
    """
    if config.weight_bits or config.embedding_bits or config.expert_format:
        raise ValueError(f"{source} is quantized already; take the original checkpoint")
    checkpoint = Checkpoint(source, config)
    output.mkdir(parents=True)
    try:
        sizes, files = [0, 0], {}
        count = config.num_layers + 2
        for layer in range(count):
            announce(f"layer {layer + 1} of {count}")
            tensors = _packed(checkpoint, config, layer, weight_format, sizes)
            name = f"model-{layer + 1:05}-of-{count:05}.safetensors"
            if tensors:
                save_tensors(tensors, output / name)
                files.update(dict.fromkeys(tensors, name))
        changes = {
            "tie_word_embeddings": config.tie_word_embeddings,
            "quantization_config": {"quant_method": QUANT_METHOD} | bits,
        }
        _write_beside(source, output, changes, files, sizes[1])
        return sizes[0], sizes[1]
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise


def _packed(
    checkpoint: Checkpoint,
    config: ModelConfig,
    layer: int,
    weight_format: WeightFormat,
    sizes: list[int],
) -> dict[str, Tensor]:
    """Return a layer's tensors, quantized, by their names in the checkpoint.

    sizes: bytes before and after, to which this layer's are added.
    """
    packed: dict[str, Tensor] = {}
    for name, shape in config.tensors(layer).items():
        # A tied head's matrix is the embedding's, which layer 0 wrote.
        if layer == config.head_layer and config.tie_word_embeddings and name in config.tensors(0):
            continue
        form = weight_format.format_of(name, shape)
        for part in checkpoint.parts(layer, name, shape):
            read = part if form else part.as_stored()
            values = torch.empty(read.shape, dtype=getattr(torch, weight_format.dtype_of(name)))
            checkpoint.read_part(read, values)
            written = values
            if isinstance(form, PackedRows):
                written = pack(values, form.bits, least_squares=True)
            sizes[0] += values.nbytes
            sizes[1] += written.nbytes
            packed[part.key] = written
    return packed


def _write_beside(
    source: Path, output: Path, changes: dict, files: dict[str, str], nbytes: int
) -> None:
    """Write the files of a model folder other than tensors.

    The index comes last: without it, the folder isn't accepted as a model.
    changes: keys of config.json that differ from the source's. files: file of each tensor.
    nbytes: bytes of all tensors.
    """
    for pattern in _BESIDE:
        for path in source.glob(pattern):
            if path.name not in (INDEX, "config.json"):
                shutil.copyfile(path, output / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _write_json(output / "config.json", config | changes)
    _write_json(output / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": files})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
