"""Do long requests among short ones cost no more than their own memory? Beside another checkout.

Claim: memory holds as many requests as their own lengths allow, not as the longest one allows.
Requests of a mixture run in memory in which a cache of fixed slots, each as long as the longest
request, has so many slots (fixed_slots.py). The engine fills that memory, or plans for it, as it
likes. So does the engine of another checkout (--other), whose runs alternate with this one's; each
run is a process of its own (mixed_lengths_run.py). On this machine runs a small model with random
weights, in memory or, with --from-disk, mostly read from disk in each pass; with --emulated OPT-30B
on the paper's T4 (paper_machines.py), planned and emulated.

Good: a `ratio` of useful tokens/s of 3 or more to a checkout with fixed slots, at 4 and at 16 rows;
0.98 or more where all requests are alike; a `recomputed_share` of at most 0.05. `live_cache` says
how much of the cache's memory held tokens of requests under way, in an average pass. A ratio rests
on no run beside which others used the cores. Where others do, OMP_NUM_THREADS=1 makes runs
steadier: threads that share a core wait for each other.
docs/results/mixed-lengths-cpu.json: python -m benchmarks.mixed_lengths --other FOLDER --lengths
conversations --num-requests 1000 --json FILE, and five files with other options (docs/results.md)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median_low
from typing import Annotated, Any

import typer

from benchmarks import gate
from benchmarks import paper_machines as t4
from benchmarks.command import run_as_command
from benchmarks.fixed_slots import FixedSlots
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.lengths import MIXTURES, Lengths, draw, scale
from flexgen_ray.cli.bench.runs import beside, holds
from flexgen_ray.cli.bench.workload import live_tokens, summary
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_files import load_config
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.reporting.terminal import say

HERE = Path(__file__).resolve().parents[1]
RATE = "useful_tokens_per_s"
LONG_OPS = "share_of_time_in_ops_of_1_ms_or_more"  # below a millisecond Python distorts an op
EMULATED = "opt-30b"
IN_MEMORY, FROM_DISK, EMULATED_T4 = "in memory", "weights from disk", "emulated T4"
_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "float32",
}  # fmt: skip
# Models that run on this machine, by keys of config.json. A pass of the first takes little more
# than the time of Python; the third has large weights and a small cache, to be read from disk; the
# last is published.
MODELS: dict[str, dict[str, Any]] = {
    "llama-6m": {
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "vocab_size": 4096,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "llama-25m": {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 4096,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "llama-90m": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 4096,
        "num_attention_heads": 16, "num_key_value_heads": 1,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "vocab_size": 49152, "num_attention_heads": 9, "num_key_value_heads": 3,
    },
}  # fmt: skip


OtherOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        file_okay=False,
        exists=True,
        help="Checkout to compare with, in turns; d1a080c or later. It runs with the Python "
        "of its folder .venv, if there is one, else with this one. [default: none]",
    ),
]


def mixed_lengths(
    other: OtherOption = None,
    emulated: Annotated[
        bool, typer.Option("--emulated", help="Emulate OPT-30B on a T4 in place of a real run.")
    ] = False,
    model: Annotated[
        str, typer.Option(metavar="NAME", help=f"Model of a real run: {', '.join(MODELS)}.")
    ] = "llama-6m",
    from_disk: Annotated[
        bool,
        typer.Option("--from-disk", help="Real run: keep weights on disk, as far as possible."),
    ] = False,
    lengths: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Built-in mixtures to run; or tokens of all prompts and answers, as 512+32.",
        ),
    ] = ",".join(MIXTURES),
    rows: Annotated[
        str, typer.Option(metavar="N,...", help="Slots for which the memory is enough.")
    ] = "4,16,64",
    num_requests: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of requests to draw from a mixture. With few, every engine waits for the "
            "longest answer.",
        ),
    ] = 512,
    longest: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=2,
            max=2048,
            help="Tokens to which the longest request is scaled. A run takes about as long as "
            "that; what slots waste hardly depends on it.",
        ),
    ] = 2048,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of runs of each checkout.")
    ] = 1,
    cell_ms: Annotated[
        float,
        typer.Option(
            metavar="MS",
            help="Emulated: wall time of a decoding pass's cell (one batch in one layer), in "
            "milliseconds.",
        ),
    ] = 4.0,
    json_file: JsonOption = None,
) -> None:
    """Run mixed lengths in memory of so many slots; useful tokens/s, and what the cache held.

    Example: python -m benchmarks.mixed_lengths --other ../old --rows 4 --lengths conversations
    """
    checkouts = checkouts_with(other)
    cases: dict[str, dict] = {}
    where = EMULATED_T4 if emulated else FROM_DISK if from_disk else IN_MEMORY
    with made_up_model(None if emulated else model) as (name, config):
        for mixture in lengths.split(","):
            chosen = _lengths(mixture, num_requests, longest)
            for count in map(int, rows.split(",")):
                slots = fixed_slots(config, chosen, count, emulated)
                task = {
                    "model": name, "is_emulated": emulated, "lengths": chosen,
                    "budget": budget_of(slots, where), "cell_seconds": cell_ms / 1e3,
                    "fixed_slots": slots.as_dict(),
                }  # fmt: skip
                cases[f"{mixture}, {count} slots"] = case = _run_in_turns(checkouts, task, repeats)
                say(f"{mixture}, {count} slots: {case['runs']}")
    commits = {each: commit_of(folder) for each, folder in checkouts.items()}
    settings = {"model": EMULATED if emulated else model, "where": where, "checkouts": commits}
    result = settings | {"emulated": emulated, "cases": cases}
    gate.finish(result, "emulated T4 machine" if emulated else _device(cases), json_file)


def _lengths(mixture: str, num_requests: int, longest: int) -> Lengths:
    """Lengths of requests of a mixture, or of equal ones; ValueError for any other name."""
    if mixture in MIXTURES:
        return scale(draw(MIXTURES[mixture].make(), num_requests), longest)
    equal = re.fullmatch(r"([1-9]\d*)\+([1-9]\d*)", mixture)
    if equal is None:
        known = ", ".join(MIXTURES)
        raise ValueError(f"--lengths has {mixture!r}; it must be one of {known}, or as 512+32")
    return [(int(equal[1]), int(equal[2]))] * num_requests


def checkouts_with(other: Path | None) -> dict[str, Path]:
    """{name: folder} of this checkout, and of the other one if there is one."""
    return {"this": HERE} | ({} if other is None else {"other": other.resolve()})


@contextmanager
def made_up_model(name: str | None) -> Iterator[tuple[str, ModelConfig]]:
    """Folder, or built-in shape, and config of a model; None is the one that is emulated."""
    if name is None:
        yield EMULATED, shape_config(EMULATED)
        return
    if name not in MODELS:
        raise ValueError(f"--model is {name!r}; it must be one of {', '.join(MODELS)}")
    with tempfile.TemporaryDirectory(prefix="flexgen-bench-") as folder:
        text = json.dumps(_LLAMA | MODELS[name])
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        yield folder, load_config(folder)


def fixed_slots(config: ModelConfig, lengths: Lengths, rows: int, is_emulated: bool) -> FixedSlots:
    """Fixed slots for requests of these lengths: float16 on the emulated GPU, float32 elsewhere."""
    longest_prompt, longest = max(prompt_len for prompt_len, _ in lengths), max(map(sum, lengths))
    element = 2 if is_emulated else 4
    return FixedSlots(config, rows, longest_prompt, longest, element, is_emulated)


def budget_of(slots: FixedSlots, where: str) -> dict[str, int]:
    """{tier: bytes} that are enough for these slots, and for few more.

    IN_MEMORY: weights on the device, cache in host memory. FROM_DISK: slots for weights on the
    device; host memory twice that of the cache, because an engine that fills tiers shrinks its
    block rather than let the cache drive weights from more than half of it. EMULATED_T4: the GPU
    has its own memory, and the host the rest of what weights, cache and buffers need.
    """
    device, host = slots.device_work, slots.cache + slots.host_work
    if where == IN_MEMORY:
        return {"gpu": slots.weights + device, "cpu": host, "disk": 2**20}
    device += slots.weights_in_flight
    if where == FROM_DISK:
        return {"gpu": device, "cpu": host + slots.cache, "disk": slots.weights + 2**24}
    gpu = t4.BUDGET.gpu
    return {"gpu": gpu, "cpu": slots.weights + device + host - gpu, "disk": 0}


def _run_in_turns(checkouts: dict[str, Path], task: dict, repeats: int) -> dict:
    """A case: its lengths and memory, all runs, and the median ones' ratio of useful tokens/s."""
    runs: dict[str, list[dict]] = {each: [] for each in checkouts}
    for _ in range(repeats):
        for each, folder in checkouts.items():
            runs[each].append(run_once(folder, task))
    middle = {each: median_run(tried) for each, tried in runs.items()}
    ratio = gate.ratio(middle["this"], middle["other"], RATE) if "other" in runs else None
    sizes = {"budget_bytes": task["budget"], "fixed_slots": task["fixed_slots"]}
    return summary(task["lengths"]) | sizes | {"ratio": ratio, "runs": runs}


def run_once(checkout: Path, task: dict) -> dict:
    """Figures of one run with a checkout's package.

    Raises RuntimeError, with the last lines that it wrote, if it fails.
    """
    own = checkout / ".venv/bin/python"
    python = str(own) if checkout != HERE and own.exists() else sys.executable
    command = [python, "-P", str(HERE / "benchmarks/mixed_lengths_run.py")]
    text = json.dumps(task | {"checkout": str(checkout)})
    watch = OtherLoad()
    with tempfile.TemporaryDirectory(prefix="flexgen-bench-") as cache:
        # In a cache of its own it knows no rates that this machine was calibrated for.
        environment = os.environ | {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": cache}
        done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = "\n".join(done.stderr.splitlines()[-20:])
        raise RuntimeError(f"the run with {checkout} ended with {done.returncode}:\n{lines}")
    return figures(task, json.loads(done.stdout.splitlines()[-1])) | beside(watch)


def figures(task: dict, run: dict) -> dict:
    """Figures of a run, of which mixed_lengths_run.py printed `run`.

    recomputed_share: tokens that passes brought beyond those asked for, of those asked for.
    """
    lengths, seconds = [(prompt, answer) for prompt, answer in task["lengths"]], run["seconds"]
    prompts, answers = map(sum, zip(*lengths, strict=True))
    if run["tokens"] < answers:
        raise RuntimeError(f"{run['tokens']} tokens came, but {answers} were asked for")
    again = run["tokens"] + run["prompt_tokens"] - prompts - answers
    also = ("used_bytes", "policy", "device", "wall_s", "time_scale", "mean_op_ms", LONG_OPS)
    return {
        RATE: round(answers / seconds, 3),
        "useful_with_prompts_per_s": round((prompts + answers) / seconds, 3),
        "seconds": round(seconds, 3),
        "passes": run["passes"],
        "live_cache": round(live_tokens(lengths) / (run["passes"] * run["cache_tokens"]), 4),
        "recomputed_share": round(again / (prompts + answers), 4),
    } | {name: run[name] for name in also if name in run}


def median_run(runs: list[dict]) -> dict:
    """The run with the median rate, of those without a mark if there are any."""
    sound = list(filter(holds, runs)) or runs
    middle = median_low(run[RATE] for run in sound)
    return next(run for run in sound if run[RATE] == middle)


def _device(cases: dict[str, dict]) -> str:
    return next(iter(cases.values()))["runs"]["this"][0]["device"]


def commit_of(checkout: Path) -> str:
    """Commit of a checkout, or "unknown" outside of git."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    run_as_command(mixed_lengths)
