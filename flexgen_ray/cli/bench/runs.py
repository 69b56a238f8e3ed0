"""Shared by the benchmarks of one model: synthetic requests, and a run's figures with its bound.

The bound is the cost of the run's own ops at rates measured just before: the busiest lane or
resource, or, where the device is the CPU, the cores that all lanes share. Knows an LLM and its
report; not what a benchmark varies.

A run beside which other processes used the cores is marked: its figures have a list of sentences,
`doubtful`, and no comparison rests on them.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated

import typer

from flexgen_ray.calibration.steady import OtherLoad, name_disturbance
from flexgen_ray.cli.options import MODEL
from flexgen_ray.llm import LLM
from flexgen_ray.reporting.report import Report
from flexgen_ray.reporting.terminal import say
from flexgen_ray.request import Request, SamplingParams

WORKLOAD = "Workload"  # heading of a command's help
BESIDE = ("cores_elsewhere", "doubtful")  # figures of `beside`
ModelOrShapeOption = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        rich_help_panel=MODEL,
        help="Model folder in Hugging Face's format, or a built-in shape, such as opt-30b, which "
        "gets random weights.",
    ),
]


def synthetic_requests(llm: LLM, lengths: Iterable[tuple[int, int]]) -> list[Request]:
    """Requests of random tokens, answered greedily to their last token.

    lengths: (tokens of the prompt, tokens of the answer) of each request. Raises ValueError for a
    prompt that doesn't fit the model's context.
    """
    rng, vocabulary = random.Random(0), llm.config.vocab_size
    requests = []
    for index, (prompt_len, max_tokens) in enumerate(lengths):
        prompt = [rng.randrange(vocabulary) for _ in range(prompt_len)]
        params = SamplingParams(max_tokens, 0.0, ignore_eos=True)
        requests.append(llm.request(index, prompt, params))
    return requests


def run_watched(llm: LLM, requests: list[Request]) -> dict:
    """Warm up, and answer all requests.

    Returns how it warmed up, the seconds of the run (wall_s), and what other processes did during
    it, as `beside` does.
    """
    warm = warm_up(llm, requests)
    watch, began = OtherLoad(_pids_here(llm)), time.perf_counter()
    for _ in llm.stream(requests):
        pass
    wall, disturbed = time.perf_counter() - began, beside(watch)
    for doubt in disturbed.get("doubtful", ()):
        say(f"doubtful: {doubt} beside this run; end other programs, and run it again")
    return {"warm_up": warm, "wall_s": round(wall, 4)} | disturbed


def _pids_here(llm: LLM) -> list[int]:
    """Processes of the stages on this machine; those of a cluster that ran before aren't ours."""
    if not hasattr(llm.backend, "pids"):
        return []  # all stages are in this process
    here = socket.gethostname()
    pids = zip(llm.machines, llm.backend.pids(), strict=True)
    return [pid for machine, pid in pids if machine.host == here]


def beside(watch: OtherLoad) -> dict:
    """Number of cores that others used beside a run, and its mark if these were many."""
    cores = watch.cores
    return {"cores_elsewhere": round(cores, 2)} | mark(name_disturbance(cores))


def mark(doubts: list[str]) -> dict:
    """The mark of a run for these reasons, if there are any."""
    return {"doubtful": doubts} if doubts else {}


def holds(run: dict) -> bool:
    """True if a run's figures bear no mark."""
    return not run.get("doubtful")


def warm_up(llm: LLM, requests: list[Request]) -> dict[str, int]:
    """Answer a block of short requests; returns their number, prompt tokens and new tokens.

    On first use GPUs load code and Triton compiles, which would count as prefill. Prompts together
    fill a tile of tokens, as the run's do, and each gets two tokens where the run's get so many.
    """
    plan, policy = llm.plans[0], llm.plans[0].policy
    requests = requests[: policy.block_size * plan.num_blocks]
    share = -(-plan.tile_tokens // policy.gpu_batch_size)
    prompt_len = min(share, *(len(it.prompt_token_ids) for it in requests))
    max_tokens = min(2, *(it.max_tokens for it in requests))
    for _ in llm.stream(synthetic_requests(llm, [(prompt_len, max_tokens)] * len(requests))):
        pass
    return {"prompts": len(requests), "prompt_len": prompt_len, "max_tokens": max_tokens}


def run_figures(report: Report) -> dict:
    """Seconds, tokens/s, the bound and what the stage held, of a run with measured rates.

    report: of an LLM of one stage that was made with hardware="measured". The prediction is that of
    the machine's hardware file or preset, if there is one for the dtype.
    """
    (stage,) = report.stages
    measured, bound = stage.measured, stage.measured.bound
    shortest = max(bound.values())
    decode = report.decode_tokens / report.decode_seconds if report.decode_seconds else 0.0
    assert measured.hardware is not None
    return _predicted(report) | {
        "prefill_s": round(report.prefill_seconds, 4),
        "decode_s": round(report.decode_seconds, 4),
        "total_s": round(report.seconds, 4),
        "generated_tokens_per_s": round(report.tokens_per_s, 3),
        "decode_tokens_per_s": round(decode, 3),
        "bound_tokens_per_s": round(report.new_tokens / shortest, 3),
        "fraction_of_bound": round(shortest / report.seconds, 4),
        "binding_lane": max(bound, key=lambda lane: bound[lane]),
        "bound_s": {lane: round(seconds, 4) for lane, seconds in bound.items()},
        "busiest_lane": measured.binding_lane,
        "lanes": {lane: each["fraction"] for lane, each in stage.lanes().items()},
        "peak_bytes": stage.peak_bytes(),
        "rates": asdict(measured.hardware),
        "policy": asdict(stage.plan.policy),
    }


def _predicted(report: Report) -> dict:
    """The prediction beside the measurement; empty if the machine's rates are unknown."""
    if report.forecast is None:
        return {}
    predicted = report.forecast.tokens_per_s
    return {
        "predicted_tokens_per_s": round(predicted, 3),
        "measured_to_predicted": round(report.tokens_per_s / predicted, 4),
    }
