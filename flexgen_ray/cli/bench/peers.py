"""`flexgen-ray bench peers`: the same work, in the same run, by peers and by us, with the ratio.

Settles what the work is and shows who did it how fast. The questions that ship with it are every
41st of GSM8K's test set (Cobbe et al., 2021; github.com/openai/grade-school-math, MIT licence).
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from importlib import metadata, resources
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from flexgen_ray.cli.bench.contest import PACKAGES, Rules, compete
from flexgen_ray.cli.bench.peer_task import OURS, PeerRun, PeerTask
from flexgen_ray.cli.bench.random_checkpoints import SHAPES, make_checkpoint
from flexgen_ray.cli.bench.standings import reference, standings, table
from flexgen_ray.cli.options import DeviceOption, JsonOption
from flexgen_ray.config import DTYPE_BYTES
from flexgen_ray.files.text_files import read_lines
from flexgen_ray.reporting.result import emit
from flexgen_ray.reporting.terminal import say
from flexgen_ray.text.tokenizer import Tokenizer
from flexgen_ray.units import format_bytes, parse_bytes

_DEFAULT = "transformers,accelerate-cpu,accelerate-disk,deepspeed-cpu," + OURS
_BUSY_CORES = 0.2
_PAGE_CACHE = {
    ("warm", False): "model files read once before each run",
    ("warm", True): "model files dropped, then read once inside the cgroup, before each run",
    ("cold", False): "model and offload files dropped before each run and between its passes, "
    "which is timed with it",
    ("cold", True): "model and offload files dropped before each run; the cgroup's limit after",
}


def peers(
    model: Annotated[Path, typer.Option(help="Hugging Face model folder (safetensors).")],
    shape: Annotated[
        str | None,
        typer.Option(help=f"If there is no such folder, make it, random: {', '.join(SHAPES)}."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL of {"prompt": ...}; 32 GSM8K questions.')
    ] = None,
    prompt_len: Annotated[
        int | None, typer.Option(min=1, help="Random prompts of so many tokens instead.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="At most so many prompts.")] = 32,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Exact number of new tokens a prompt.")
    ] = 64,
    dtype: Annotated[str, typer.Option(help=f"Everyone's: {', '.join(DTYPE_BYTES)}.")] = "float32",
    device: DeviceOption = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Everyone's; all cores.")] = None,
    peers: Annotated[str, typer.Option(help=f"Any of {', '.join(PACKAGES)}.")] = _DEFAULT,
    batch_sizes: Annotated[
        str, typer.Option(help="Of the peers; the best one counts.")
    ] = "8,16,32",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, in turns; the median counts.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds that one run may take.")] = 3600.0,
    memory_limit: Annotated[
        str | None, typer.Option(help="Everyone's cgroup, page cache included, such as 4GiB; root.")
    ] = None,
    page_cache: Annotated[str, typer.Option(help="warm or cold.")] = "warm",
    policy: Annotated[Path | None, typer.Option(help="Ours: a YAML policy.")] = None,
    executor: Annotated[str, typer.Option(help="Ours: async or serial.")] = "async",
    gpu_memory: Annotated[
        str | None, typer.Option(help="GPU memory of everyone; without CUDA our gpu tier's.")
    ] = None,
    cpu_memory: Annotated[str | None, typer.Option(help="Ours: host memory.")] = None,
    disk_memory: Annotated[str | None, typer.Option(help="Ours: disk space.")] = None,
    offload_dir: Annotated[Path | None, typer.Option(help="Everyone's offload files.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Do the same work with peers and with this project, and compare.

    Example: flexgen-ray bench peers --model ./smollm2 --peers transformers,flexgen-ray --repeats 3
    """
    from flexgen_ray.paths import default_offload_dir

    ours = {"policy": None if policy is None else str(policy.resolve()), "executor": executor}
    ours |= {"gpu_memory": gpu_memory, "cpu_memory": cpu_memory, "disk_memory": disk_memory}
    rules = Rules(peers.split(","), _sizes(batch_sizes), repeats, timeout)
    _check(rules, dtype, page_cache, memory_limit, ours)
    if shape is not None and not model.exists():
        _say(f"writing {model}, a random {shape}")
        make_checkpoint(shape, model, dtype)
    root = (offload_dir or default_offload_dir()).resolve()
    root.mkdir(parents=True, exist_ok=True)
    token_ids = _prompts(model, prompts, prompt_len, num_prompts, max_tokens)
    with tempfile.TemporaryDirectory(prefix=".peers-", dir=root) as scratch:
        work = PeerTask(
            model=str(model.resolve()),
            prompts=token_ids,
            max_tokens=max_tokens,
            dtype=dtype,
            device=device,
            threads=threads or len(os.sched_getaffinity(0)),
            page_cache=page_cache,
            memory_limit=None if memory_limit is None else parse_bytes(memory_limit),
            gpu_memory=None if gpu_memory is None else parse_bytes(gpu_memory),
            scratch=scratch,
            ours=ours,
        )
        runs = compete(work, rules, _tell)
    result = _result(work, rules, runs)
    Console(stderr=True).print(table(result["contestants"]))
    emit(result, json_file)


def _check(rules: Rules, dtype: str, page_cache: str, memory_limit: str | None, ours: dict) -> None:
    """ValueError for what can't work, before any work."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}")
    if page_cache not in ("warm", "cold"):
        raise ValueError(f"page cache is {page_cache!r}; it must be warm or cold")
    if OURS in rules.peers and memory_limit and None in (ours["cpu_memory"], ours["gpu_memory"]):
        raise ValueError(
            "with --memory-limit say how much of it is for our data, the interpreter and its "
            "libraries left out: give --cpu-memory and --gpu-memory"
        )


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if len(sizes) != len(text.split(",")) or min(sizes) < 1:
        raise ValueError(f"batch sizes are {text!r}; write numbers from 1 up such as 8,16,32")
    return sizes


def _prompts(
    model: Path, file: Path | None, prompt_len: int | None, count: int, max_tokens: int
) -> list[list[int]]:
    """Token ids; ValueError if there are none or the model's context is too short for them."""
    if file is not None and prompt_len is not None:
        raise ValueError("--prompts and --prompt-len exclude each other; give one")
    from flexgen_ray.models.config_files import load_config

    config = load_config(model)
    if prompt_len is not None:
        rng = random.Random(0)
        found = [
            [rng.randrange(config.vocab_size) for _ in range(prompt_len)] for _ in range(count)
        ]
    else:
        tokenizer = Tokenizer(model)
        if not tokenizer.exists:
            raise ValueError(f"{model} has no tokenizer; use --prompt-len for random prompts")
        shipped = resources.files("flexgen_ray.cli.bench").joinpath("gsm8k_32.jsonl")
        with resources.as_file(shipped) as path:
            texts = read_lines(file or path)
        lines = [json.loads(line) for line in texts if line.strip()]
        found = [tokenizer.encode(line["prompt"]) for line in lines[:count]]
    longest = max(map(len, found), default=0)
    if not longest or longest + max_tokens > config.max_seq_len:
        raise ValueError(
            f"{len(found)} prompts of up to {longest} tokens and {max_tokens} new ones don't fit "
            f"the model's context of {config.max_seq_len}; change the prompts or --max-tokens"
        )
    return found


def _tell(run: PeerRun) -> None:
    batch = "" if run.batch_size is None else f", batch {run.batch_size}"
    said = run.error or (
        f"{run.tokens_per_s:.2f} tokens/s, {run.seconds:.1f} s, "
        f"peak RSS {format_bytes(run.peak_rss_bytes)}"
    )
    if run.cores_elsewhere > _BUSY_CORES:
        said += f"; others kept {run.cores_elsewhere:.1f} cores busy, so don't trust it"
    _say(f"{run.peer}{batch}: {said}")


def _result(work: PeerTask, rules: Rules, runs: list[PeerRun]) -> dict:
    """What --json holds: all that is needed to believe the figures, or to do the same again."""
    from flexgen_ray.reporting.report import environment

    result = environment(next((run.device for run in runs if run.device), ""))
    result["hardware"]["memory_bytes"] = psutil.virtual_memory().total
    for package in ("accelerate", "deepspeed"):
        try:
            result["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            result["versions"][package] = None
    right = reference(runs)
    lengths = [len(prompt) for prompt in work.prompts]
    result["settings"] = {
        "model": Path(work.model).name,
        "model_bytes": sum(path.stat().st_size for path in work.model_files()),
        "prompts": len(lengths),
        "prompt_tokens": sum(lengths),
        "longest_prompt": max(lengths),
        "max_tokens": work.max_tokens,
        "dtype": work.dtype,
        "threads": work.threads,
        "batch_sizes": rules.batch_sizes,
        "rounds": rules.rounds,
        "memory_limit_bytes": work.memory_limit,
        "gpu_memory_bytes": work.gpu_memory,
        "page_cache": work.page_cache,
        "page_cache_means": _PAGE_CACHE[work.page_cache, work.memory_limit is not None],
        "ours": work.ours | {"policy": Path(work.ours["policy"] or "").name or None},
        "tokens_compared_to": right and {"peer": right.peer, "batch_size": right.batch_size},
    }
    result["contestants"] = standings(runs)
    return result


def _say(text: str) -> None:
    say(text)
