"""`flexgen-ray bench workload`: requests of mixed lengths, as real jobs have them.

Lengths come from a file; tokens are random, and every answer runs to its full length. Beside
tokens/s the result says what mixed lengths waste: slots that idle while long answers finish, and
cache that a slot reserves for the longest request. The built-in mixture is synthetic: 24 chats, 12
summaries and 12 extractions, whose lengths were drawn from log-normal distributions around a
typical prompt and answer of each (90 and 110 tokens, 520 and 90, 260 and 14), at most 900 and 300.
Knows lengths and one run; not what was asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.batch.request_lines import BatchLine, read_lines
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
from flexgen_ray.files.input_lines import open_input
from flexgen_ray.files.json_text import parse_object
from flexgen_ray.llm import LLM
from flexgen_ray.reporting.report import StageReport
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say
from flexgen_ray.request import SamplingParams

BUILT_IN = "mixed_lengths_48.jsonl"
Lengths = list[tuple[int, int]]  # (tokens of the prompt, tokens of the answer) of each request


def workload(
    model: ModelOrShapeOption,
    lengths: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WORKLOAD,
            metavar="FILE",
            help='JSONL file of lengths, such as {"prompt_len": 120, "max_tokens": 80}, or of '
            "requests as for generate, whose prompts are counted with the model's tokenizer. "
            "[default: a built-in synthetic mixture of 48 chats, summaries and extractions]",
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
    that is reached, and what the mixture wastes.

    Example: flexgen-ray bench workload --model opt-6.7b --lengths my-job.jsonl
    """
    options: dict[str, Any] = {
        "policy": policy, "dtype": dtype.value, "device": device, "gpu_memory": gpu_memory,
        "cpu_memory": cpu_memory, "disk_memory": disk_memory, "offload_dir": offload_dir,
        "hardware": "measured", "trace": trace is not None, "use_ray": False,
        "load_format": "auto" if Path(model).is_dir() else "dummy",
    }  # fmt: skip
    with LLM(model, **options) as llm:
        mixture = read_lengths(lengths, llm, max_tokens)
        requests = synthetic_requests(llm, mixture)
        llm.prepare(requests)
        disturbed = run_watched(llm, requests)
        if trace is not None:
            llm.write_trace(trace)
        for line in llm.report.lines():
            say(line)
        (stage,) = llm.report.stages
        wasted = waste(mixture, stage)
        name = BUILT_IN if lengths is None else lengths.name
        result = {"model": model, "lengths": name} | summary(mixture) | wasted
        result |= run_figures(llm.report) | disturbed
    say(
        f"{wasted['slots_without_token']:.0%} of the slots gave no token in an average pass, "
        f"{wasted['unused_cache']:.0%} of the cache was never filled; batches padded to their "
        f"longest request would be {wasted['padding_of_batches']:.0%} padding"
    )
    finish(result, llm.report.device, json_file)


def read_lengths(path: Path | None, llm: LLM, max_tokens: int) -> Lengths:
    """Lengths of the requests of a file, or of the built-in mixture.

    max_tokens: of requests that don't set it. Raises ValueError, with the line, for a line that is
    neither lengths nor a request, and for a file without any.
    """
    if path is None:
        shipped = resources.files("flexgen_ray.cli.bench").joinpath(BUILT_IN)
        with resources.as_file(shipped) as built_in:
            return read_lengths(built_in, llm, max_tokens)
    mixture: Lengths = []
    with open_input(path) as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            try:
                mixture += _lengths_of_line(raw, llm, max_tokens)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not mixture:
        raise ValueError(f"{path} has no requests")
    return mixture


def _lengths_of_line(raw: bytes, llm: LLM, max_tokens: int) -> Lengths:
    value = parse_object(raw)
    if "prompt_len" not in value:
        return list(_lengths_of_request(raw, llm, max_tokens))
    prompt_len, answer_len = value["prompt_len"], value.get("max_tokens", max_tokens)
    for name, count in (("prompt_len", prompt_len), ("max_tokens", answer_len)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} is {count!r}; it must be a number of tokens, from 1 up")
    return [(prompt_len, answer_len)]


def _lengths_of_request(raw: bytes, llm: LLM, max_tokens: int) -> Iterator[tuple[int, int]]:
    """One pair for each prompt of a request line, or for its chat."""
    line: BatchLine
    (line,) = read_lines([raw], SamplingParams(max_tokens=max_tokens))
    if line.error is not None or line.params is None:
        raise ValueError((line.error or "not a request").removeprefix("line 1: "))
    answer_len = line.params.max_tokens or max_tokens
    if line.messages is not None:
        yield len(llm.tokenizer.encode_chat(line.messages, line.chat)), answer_len
    for prompt in line.prompts:
        tokens = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        yield len(tokens), answer_len


def summary(mixture: Lengths) -> dict:
    """Number of requests, and the mean and largest length of prompts and answers."""
    prompts, answers = zip(*mixture, strict=True)
    return {
        "num_requests": len(mixture),
        "prompt_len": {"mean": round(sum(prompts) / len(prompts), 1), "max": max(prompts)},
        "max_tokens": {"mean": round(sum(answers) / len(answers), 1), "max": max(answers)},
    }


def waste(mixture: Lengths, stage: StageReport) -> dict:
    """Shares of slots and cache that mixed lengths leave unused, each from 0 to 1.

    slots_without_token: of the slots in all passes, those that gave no token: empty, or still
    reading a prompt. unused_cache: of the tokens that a slot's cache has room for, those that the
    average request doesn't fill. padding_of_batches: for comparison, the share of padding in
    batches of gpu_batch_size requests, in the order of the file, padded to the longest of each.
    """
    policy, longest = stage.plan.policy, stage.plan.max_seq_len
    totals = [prompt_len + answer_len for prompt_len, answer_len in mixture]
    size = policy.gpu_batch_size
    batches = [totals[start : start + size] for start in range(0, len(totals), size)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    passes = [each for each in stage.measured.visits if each.new_tokens or each.prefill_tokens]
    tokens, slots = sum(each.new_tokens for each in passes), policy.block_size * len(passes)
    return {
        "passes": len(passes),
        "slots_without_token": round(1 - tokens / slots, 4),
        "unused_cache": round(1 - sum(totals) / (len(totals) * longest), 4),
        "padding_of_batches": round(1 - sum(totals) / padded, 4),
    }
