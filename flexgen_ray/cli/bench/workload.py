"""`flexgen-ray bench workload`: requests of mixed lengths, as real jobs have them.

Lengths come from a file or a built-in mixture (lengths.py); tokens are random, and every answer
runs to its full length. Beside tokens/s the result says what mixed lengths waste: slots that idle
while long answers finish, and cache that holds no token. Knows one run; not what was asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.cli.bench.lengths import BUILT_IN, Lengths, lengths_to_run
from flexgen_ray.cli.bench.runs import (
    WORKLOAD,
    ModelOrShapeOption,
    run_figures,
    run_watched,
    synthetic_requests,
)
from flexgen_ray.cli.options import (
    CpuOption,
    DeviceOption,
    DiskOption,
    Dtype,
    DtypeOption,
    GpuOption,
    JsonOption,
    OffloadOption,
    PolicyOption,
    TraceOption,
)
from flexgen_ray.llm import LLM
from flexgen_ray.reporting.report import Report, StageReport
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say


def workload(
    model: ModelOrShapeOption,
    lengths: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WORKLOAD,
            metavar="FILE|NAME",
            help='JSONL file of lengths, such as {"prompt_len": 120, "max_tokens": 80}, or of '
            "requests as for generate, whose prompts are counted with the model's tokenizer; or a "
            "built-in mixture of 2,000: conversations (a published trace), or long-answers "
            "(synthetic). [default: a built-in synthetic mixture of 48 chats, summaries and "
            "extractions]",
        ),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=WORKLOAD,
            metavar="N",
            min=1,
            help="Number of requests to draw from --lengths, always with the longest; the same in "
            "every run. [default: all]",
        ),
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=WORKLOAD,
            metavar="N",
            min=2,
            help="Tokens of the longest request, prompt and answer together: all lengths are "
            "scaled by one factor. [default: the model's context for conversations, and for "
            "long-answers where it is shorter; others stay as they are]",
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            rich_help_panel=WORKLOAD,
            metavar="N",
            min=1,
            help="Tokens of the answer, for requests that don't set it.",
        ),
    ] = 128,
    policy: PolicyOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    gpu_memory: GpuOption = None,
    cpu_memory: CpuOption = None,
    disk_memory: DiskOption = None,
    offload_dir: OffloadOption = None,
    trace: TraceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure generated tokens/s on requests of mixed lengths, the fraction of the hardware's bound
    that is reached, and what the mixture wastes. Prompts are random, and each is computed whole,
    even if they share tokens.

    Example: flexgen-ray bench workload --model opt-6.7b --lengths my-job.jsonl
    """
    options: dict[str, Any] = {
        "policy": policy, "dtype": dtype.value, "device": device, "gpu_memory": gpu_memory,
        "cpu_memory": cpu_memory, "disk_memory": disk_memory, "offload_dir": offload_dir,
        "hardware": "measured", "trace": trace is not None, "use_ray": False,
        "load_format": "auto" if Path(model).is_dir() else "dummy",
        "enable_prefix_caching": False,
    }  # fmt: skip
    with LLM(model, **options) as llm:
        mixture = lengths_to_run(lengths, llm, max_tokens, num_requests, longest)
        requests = synthetic_requests(llm, mixture)
        llm.prepare(requests)
        watched = run_watched(llm, requests)
        if trace is not None:
            llm.write_trace(trace)
        for line in llm.report.lines():
            say(line)
        (stage,) = llm.report.stages
        wasted = waste(mixture, stage)
        name = BUILT_IN if lengths is None else lengths.name
        result = {"model": model, "lengths": name} | summary(mixture) | wasted
        result |= useful(mixture, llm.report, watched["wall_s"])
        result |= run_figures(llm.report) | watched
    say(
        f"{wasted['slots_without_token']:.0%} of the slots gave no token in an average pass, "
        f"{wasted['live_cache']:.0%} of the cache held tokens of requests under way; batches "
        f"padded to their longest request would be {wasted['padding_of_batches']:.0%} padding"
    )
    finish(result, llm.report.device, json_file)


def summary(mixture: Lengths) -> dict:
    """Number of requests, mean and largest length of prompts and answers, and how unequal requests
    are: the longest, prompt and answer together, as a multiple of the mean."""
    prompts, answers = zip(*mixture, strict=True)
    totals = [prompt_len + answer_len for prompt_len, answer_len in mixture]
    return {
        "num_requests": len(mixture),
        "prompt_len": {"mean": round(sum(prompts) / len(prompts), 1), "max": max(prompts)},
        "max_tokens": {"mean": round(sum(answers) / len(answers), 1), "max": max(answers)},
        "longest_to_mean": round(max(totals) * len(totals) / sum(totals), 2),
    }


def useful(mixture: Lengths, report: Report, wall: float) -> dict:
    """Tokens that were asked for, by the second of the run's wall time, and tokens computed twice.

    useful_tokens_per_s: tokens of answers, each counted once. useful_with_prompts_per_s: with the
    tokens of prompts. recomputed_tokens: tokens of rows that were set back, computed again.
    """
    prompts, answers = map(sum, zip(*mixture, strict=True))
    return {
        "useful_tokens_per_s": round(answers / wall, 3),
        "useful_with_prompts_per_s": round((prompts + answers) / wall, 3),
        "recomputed_tokens": report.recomputed_tokens,
    }


def waste(mixture: Lengths, stage: StageReport) -> dict:
    """Shares of slots and cache that mixed lengths leave unused, each from 0 to 1.

    slots_without_token: of the slots in all passes, those that gave no token: empty, or still
    reading a prompt. unused_cache: of the tokens that a slot's cache has room for, those that the
    average request doesn't fill. live_cache: of the cache's memory, the part that holds tokens of
    requests under way in an average pass. padding_of_batches: for comparison, the share of padding
    in batches of gpu_batch_size requests, in the order of the file, padded to the longest of each.
    """
    plan = stage.plan
    policy, longest = plan.policy, plan.max_seq_len
    totals = [prompt_len + answer_len for prompt_len, answer_len in mixture]
    size = policy.gpu_batch_size
    batches = [totals[start : start + size] for start in range(0, len(totals), size)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    passes = [each for each in stage.measured.visits if each.new_tokens or each.prefill_tokens]
    tokens, slots = sum(each.new_tokens for each in passes), policy.block_size * len(passes)
    windows = [(len(plan.layers_of(kind)), kind.window) for kind in plan.kinds]
    live = sum(count * live_tokens(mixture, window) for count, window in windows)
    room = len(passes) * plan.num_decoder_layers * cache_tokens(stage)
    return {
        "passes": len(passes),
        "slots_without_token": round(1 - tokens / slots, 4),
        "unused_cache": round(1 - sum(totals) / (len(totals) * longest), 4),
        "live_cache": round(live / room, 4),
        "padding_of_batches": round(1 - sum(totals) / padded, 4),
    }


def live_tokens(mixture: Lengths, window: int | None = None) -> int:
    """Tokens in the cache of requests under way, summed over the passes that gave a token.

    A request has its prompt there in the pass of its first new token, and one token more in each
    pass after it; in a layer with a window no more than that. Passes that only bring a part of a
    prompt are left out.
    """
    tokens = 0
    for prompt_len, new in mixture:
        growing = new if window is None else min(max(window - prompt_len, 0), new)
        tokens += growing * prompt_len + growing * (growing - 1) // 2
        tokens += (new - growing) * (window or 0)
    return tokens


def cache_tokens(stage: StageReport) -> float:
    """Number of tokens for which a block's cache has memory, on all tiers together."""
    plan = stage.plan
    nbytes = sum(used.get("cache", 0) + used.get("cache tails", 0) for used in stage.used.values())
    return nbytes / (plan.num_decoder_layers * plan.kv_bytes * plan.num_blocks)
