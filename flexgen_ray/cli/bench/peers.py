"""`flexgen-ray bench peers`: the same work done by other systems and by this one, with the ratio.

Makes the task and shows the result; contest.py runs it. The built-in questions are every 41st of
GSM8K's test set (Cobbe et al., 2021; github.com/openai/grade-school-math, MIT licence).
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

from flexgen_ray.calibration.steady import name_disturbance
from flexgen_ray.cli.bench.contest import PACKAGES, Rules, compete
from flexgen_ray.cli.bench.peer_task import OURS, PeerRun, PeerTask
from flexgen_ray.cli.bench.random_checkpoints import SHAPES, make_checkpoint
from flexgen_ray.cli.bench.runs import WORKLOAD
from flexgen_ray.cli.bench.standings import reference, standings, table
from flexgen_ray.cli.options import MEMORY, MODEL, DeviceOption, JsonOption
from flexgen_ray.config import DTYPE_BYTES
from flexgen_ray.files.text_files import read_lines
from flexgen_ray.reporting.result import emit
from flexgen_ray.reporting.terminal import say
from flexgen_ray.text.tokenizer import Tokenizer
from flexgen_ray.units import format_bytes, parse_bytes

CONTEST, OURS_ONLY = "Contest", "This project's own run"  # headings of the help
_DEFAULT = "transformers,accelerate-cpu,accelerate-disk,deepspeed-cpu," + OURS
_PAGE_CACHE = {
    ("warm", False): "model files read once before each run",
    ("warm", True): "model files dropped, then read once inside the cgroup, before each run",
    ("cold", False): "model and offload files dropped before each run and between its passes, "
    "which is timed with it",
    ("cold", True): "model and offload files dropped before each run; the cgroup's limit after",
}


def peers(
    model: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            rich_help_panel=MODEL,
            help="Model folder in Hugging Face's format (safetensors).",
        ),
    ],
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=MODEL,
            help=f"Shape to write with random weights if --model isn't there: {', '.join(SHAPES)}. "
            "[default: --model must be there]",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=WORKLOAD,
            help='JSONL file of {"prompt": ...} lines. [default: 32 questions of GSM8K]',
        ),
    ] = None,
    prompt_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=WORKLOAD,
            help="Tokens of each prompt, to use random prompts. [default: real prompts]",
        ),
    ] = None,
    num_prompts: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, rich_help_panel=WORKLOAD, help="Number of prompts, at most."
        ),
    ] = 32,
    max_tokens: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, rich_help_panel=WORKLOAD, help="Exact number of tokens per answer."
        ),
    ] = 64,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            rich_help_panel=MODEL,
            help=f"Number format that every contestant uses: {', '.join(DTYPE_BYTES)}.",
        ),
    ] = "float32",
    device: DeviceOption = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=CONTEST,
            help="Threads of each contestant. [default: all cores]",
        ),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            rich_help_panel=CONTEST,
            help=f"Contestants, any of {', '.join(PACKAGES)}. Those whose package isn't installed "
            "are reported as failed.",
        ),
    ] = _DEFAULT,
    batch_sizes: Annotated[
        str,
        typer.Option(
            metavar="N,...",
            rich_help_panel=CONTEST,
            help="Batch sizes that each peer tries; its best one counts. This project's policy "
            "sets its own.",
        ),
    ] = "8,16,32",
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            rich_help_panel=CONTEST,
            help="Implementations of a mixture's experts that each peer tries with each batch "
            "size, such as eager,batched_mm,grouped_mm; its best one counts. "
            "[default: transformers' choice]",
        ),
    ] = None,
    peer_batches: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=CONTEST,
            help="Number of batches that each peer answers, the first ones. Peers run one batch "
            "after the other, so some batches of equal prompts have the rate of all. "
            "[default: all]",
        ),
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=CONTEST,
            help="Rounds, in which contestants take turns; the median counts.",
        ),
    ] = 1,
    timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", rich_help_panel=CONTEST, help="Time limit of one run."),
    ] = 3600.0,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=CONTEST,
            help="Memory limit of each contestant's cgroup, page cache included, such as 4GiB; "
            "needs root. [default: no limit]",
        ),
    ] = None,
    page_cache: Annotated[
        str,
        typer.Option(
            metavar="[warm|cold]",
            rich_help_panel=CONTEST,
            help="State of the page cache. warm: model files are read once before each run. cold: "
            "they are dropped before each run.",
        ),
    ] = "warm",
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=OURS_ONLY,
            help="YAML policy of this project's run. [default: planned, as in generate]",
        ),
    ] = None,
    executor: Annotated[
        str,
        typer.Option(
            metavar="[async|serial]",
            rich_help_panel=OURS_ONLY,
            help="Order of this project's ops. async: they overlap. serial: one after the other.",
        ),
    ] = "async",
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=MEMORY,
            help="GPU memory that each contestant may use; without CUDA the budget of this "
            "project's gpu tier. [default: no limit]",
        ),
    ] = None,
    cpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=OURS_ONLY,
            help="Host memory budget of this project's run. [default: 80% of what is free]",
        ),
    ] = None,
    disk_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=OURS_ONLY,
            help="Disk space budget of this project's run. [default: 90% of what is free]",
        ),
    ] = None,
    offload_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=MEMORY,
            help="Folder for the contestants' offload files. [default: flexgen_ray/offload in "
            "$XDG_CACHE_HOME, else in ~/.cache]",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Do the same work with other systems and with this project, in turns, and compare throughput.
    All contestants compute each prompt whole, even if prompts share tokens.

    Example: flexgen-ray bench peers --model ./smollm2 --peers transformers,flexgen-ray --repeats 3
    """
    from flexgen_ray.paths import default_offload_dir

    ours = {"policy": None if policy is None else str(policy.resolve()), "executor": executor}
    ours |= {"gpu_memory": gpu_memory, "cpu_memory": cpu_memory, "disk_memory": disk_memory}
    implementations = (None,) if experts is None else tuple(experts.split(","))
    sizes = _sizes(batch_sizes)
    rules = Rules(peers.split(","), sizes, repeats, timeout, implementations, peer_batches)
    _check(rules, dtype, page_cache, memory_limit, ours)
    if shape is not None and not model.exists():
        say(f"writing {model}, a random {shape}")
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
        runs = compete(work, rules, _say_run)
    result = _result(work, rules, runs)
    Console(stderr=True).print(table(result["contestants"]))
    emit(result, json_file)


def _check(rules: Rules, dtype: str, page_cache: str, memory_limit: str | None, ours: dict) -> None:
    """Raise ValueError for options that can't work, before any work."""
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
    """Batch sizes from `8,16,32`; ValueError for anything else."""
    sizes = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if len(sizes) != len(text.split(",")) or min(sizes) < 1:
        raise ValueError(f"batch sizes are {text!r}; write numbers from 1 up such as 8,16,32")
    return sizes


def _prompts(
    model: Path, file: Path | None, prompt_len: int | None, count: int, max_tokens: int
) -> list[list[int]]:
    """Token ids of the prompts; ValueError if there are none or the context is too short."""
    if file is not None and prompt_len is not None:
        raise ValueError("--prompts and --prompt-len exclude each other; give one")
    from flexgen_ray.models.config_files import load_config

    config = load_config(model)
    if prompt_len is not None:
        rng = random.Random(0)
        token_ids = [
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
        token_ids = [tokenizer.encode(line["prompt"]) for line in lines[:count]]
    longest = max(map(len, token_ids), default=0)
    if not longest or longest + max_tokens > config.max_seq_len:
        raise ValueError(
            f"{len(token_ids)} prompts of up to {longest} tokens and {max_tokens} new ones don't "
            f"fit the model's context of {config.max_seq_len}; change the prompts or --max-tokens"
        )
    return token_ids


def _say_run(run: PeerRun) -> None:
    """Print a line on a run that has ended."""
    batch = "" if run.batch_size is None else f", batch {run.batch_size}"
    batch += "" if run.experts is None else f", {run.experts}"
    said = run.error or (
        f"{run.tokens_per_s:.2f} tokens/s, {run.seconds:.1f} s, "
        f"peak RSS {format_bytes(run.peak_rss_bytes)}"
    )
    for doubt in name_disturbance(run.cores_elsewhere):
        said += f"; doubtful: {doubt} beside this run, so run it again"
    say(f"{run.peer}{batch}: {said}")


def _result(work: PeerTask, rules: Rules, runs: list[PeerRun]) -> dict:
    """Result for --json, with all that is needed to check the figures or to repeat them."""
    from flexgen_ray.reporting.report import environment

    result = environment(next((run.device for run in runs if run.device), ""))
    result["hardware"]["memory_bytes"] = psutil.virtual_memory().total
    for package in ("accelerate", "airllm", "deepspeed"):
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
        "experts": rules.experts,
        "peer_batches": rules.peer_batches,
        "rounds": rules.rounds,
        "memory_limit_bytes": work.memory_limit,
        "gpu_memory_bytes": work.gpu_memory,
        "page_cache": work.page_cache,
        "page_cache_means": _PAGE_CACHE[work.page_cache, work.memory_limit is not None],
        "ours": work.ours | {"policy": Path(work.ours["policy"] or "").name or None},
        "tokens_compared_to": right
        and {"peer": right.peer, "batch_size": right.batch_size, "experts": right.experts},
    }
    result["contestants"] = standings(runs)
    return result
