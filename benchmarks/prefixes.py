"""Is what prompts share computed and read once? Groups of long prompts, with sharing and without.

Claim: requests whose prompts begin alike take the time of what is their own. Requests come in
groups; the prompts of a group begin with the same tokens (--shared), in whole pages. Each case runs
with sharing and without, in turns, in the same memory, with made-up weights: `resident` in memory
that holds everything; `disk` with weights read from disk in each pass, and memory for a quarter of
the requests (mixed_lengths.budget_of). In `nothing shared` no prompts begin alike.

Good: a `ratio` of seconds of 3 or more at 1,024 tokens of which 80 % are shared, and of 0.98 or
more where nothing is shared. `prompt_tokens` are those that passes computed. `cache_bytes_a_pass`
are the bytes of keys and values that decoding rows attended, a prefix once for all rows of a batch,
or with each row's own pages if they are few.
`equal_answers` have the same tokens in both; orders of summing may part where two tokens are
equally likely. A ratio rests on no run beside which others used the cores;
`processor_seconds` hardly depend on these where OMP_NUM_THREADS is 1.
docs/results/prefixes-cpu.json: python -m benchmarks.prefixes --repeats 2 --json FILE, and
docs/results/prefixes-nothing-shared-cpu.json with --cases "nothing shared" --repeats 3
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from random import Random
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks import gate
from benchmarks.command import run_as_command
from benchmarks.mixed_lengths import FROM_DISK, budget_of, fixed_slots, made_up_model
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.lengths import Lengths
from flexgen_ray.cli.bench.runs import beside, holds, warm_up
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.config import PAGE_TOKENS
from flexgen_ray.llm import LLM
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.reporting.terminal import say
from flexgen_ray.request import Request, SamplingParams
from flexgen_ray.runtime.handlers import HANDLERS, OpHandlers
from flexgen_ray.runtime.prefixes import find_prefixes
from flexgen_ray.schedule.ops import Op, OpKind

RESIDENT, DISK, NOTHING_SHARED = "resident", "disk", "nothing shared"
MODEL_OF = {RESIDENT: "llama-25m", DISK: "llama-90m", NOTHING_SHARED: "llama-25m"}
WITH, WITHOUT = "with", "without"  # sharing
GroupsOption = Annotated[int, typer.Option(metavar="N", min=1, help="Number of groups.")]
RowsOption = Annotated[int, typer.Option(metavar="N", min=1, help="Requests of a group.")]
PromptOption = Annotated[
    int, typer.Option(metavar="N", min=PAGE_TOKENS + 1, help="Tokens of a prompt.")
]
SharedOption = Annotated[
    float,
    typer.Option(
        metavar="SHARE", min=0, max=1, help="Share of a prompt that its group has in common."
    ),
]
AnswerOption = Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of an answer.")]
SLOTS = 4  # requests for each that memory has room for, where weights come from disk


@dataclass(frozen=True)
class Groups:
    """Requests in groups: their number, requests of each, tokens of prompts and of answers.

    shared: tokens with which all prompts of a group begin.
    """

    groups: int
    rows: int
    prompt_len: int
    shared: int
    max_tokens: int

    @property
    def lengths(self) -> Lengths:
        """(tokens of the prompt, tokens of the answer) of each request."""
        return [(self.prompt_len, self.max_tokens)] * (self.groups * self.rows)

    def requests(self, vocabulary: int) -> list[Request]:
        """Requests of random tokens, of all groups in turn, answered to their last token."""
        rng, params = Random(0), SamplingParams(self.max_tokens, 0.0, ignore_eos=True)

        def draw(count: int) -> list[int]:
            return [rng.randrange(4, vocabulary) for _ in range(count)]

        beginnings = [draw(self.shared) for _ in range(self.groups)]
        prompts = [
            beginning + draw(self.prompt_len - self.shared)
            for _ in range(self.rows)
            for beginning in beginnings
        ]
        return [Request(index, prompt, params) for index, prompt in enumerate(prompts)]


def whole_pages(tokens: float) -> int:
    """Tokens of the whole pages among so many; no more are shared."""
    return int(tokens) // PAGE_TOKENS * PAGE_TOKENS


@dataclass
class CacheReads:
    """Bytes of cache that decoding rows attended, by passes of batches with any."""

    nbytes: list[int] = field(default_factory=list)


@contextmanager
def counted_reads() -> Iterator[CacheReads]:
    """Context in which the stages of this process count what decoding rows attend."""
    reads, compose = CacheReads(), HANDLERS[OpKind.COMPOSE]

    def counting(cells: OpHandlers, op: Op) -> None:
        compose(cells, op)
        plan, current, nbytes = cells.plan, cells.passes.pass_of(op), 0
        for kind in plan.kinds:
            placed = current.placed(op.batch, kind)
            own = sum(placed.length(row) for row in placed.rows.rows if not row.is_prefill)
            tokens = own + sum(it.end - it.start for it, _ in placed.shared(kind.window))
            nbytes += tokens * plan.kv_bytes * len(plan.layers_of(kind))
        reads.nbytes += [nbytes] if nbytes else []

    HANDLERS[OpKind.COMPOSE] = counting
    try:
        yield reads
    finally:
        HANDLERS[OpKind.COMPOSE] = compose


def prefixes(
    cases: Annotated[
        str, typer.Option(metavar="NAME,...", help=f"Cases to run, of: {', '.join(MODEL_OF)}.")
    ] = ",".join(MODEL_OF),
    groups: GroupsOption = 4,
    rows: RowsOption = 16,
    prompt_len: PromptOption = 1024,
    shared: SharedOption = 0.8,
    max_tokens: AnswerOption = 32,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of runs with and without sharing.")
    ] = 1,
    json_file: JsonOption = None,
) -> None:
    """Run prompts that begin alike with sharing and without; the ratio of seconds.

    Example: python -m benchmarks.prefixes --cases resident --groups 8 --rows 8
    """
    work = Groups(groups, rows, prompt_len, whole_pages(shared * prompt_len), max_tokens)
    results = {}
    for case in cases.split(","):
        alike = replace(work, shared=0) if case == NOTHING_SHARED else work
        with made_up_model(MODEL_OF[case]) as (folder, config):
            budget = _budget(config, work) if case == DISK else {}
            results[case] = _case(folder, config, alike, budget, repeats)
        results[case] |= {"model": MODEL_OF[case]}
    device = results[case]["runs"][WITH][0]["device"]
    gate.finish({"emulated": False, **asdict(work), "cases": results}, device, json_file)


def _budget(config: ModelConfig, work: Groups) -> dict[str, int]:
    """{tier: bytes} in which weights are read from disk, and some of the requests have room."""
    slots = -(-len(work.lengths) // SLOTS)
    return budget_of(fixed_slots(config, work.lengths, slots, False), FROM_DISK)


def _case(
    folder: str, config: ModelConfig, work: Groups, budget: dict[str, int], repeats: int
) -> dict:
    """All runs of a case, and the ratios of the median ones."""
    requests = work.requests(config.vocab_size)
    memory = {f"{tier}_memory": nbytes for tier, nbytes in budget.items()}

    def run(shares: bool) -> tuple[dict, list[list[int]]]:
        with new_llm(folder, shares, load_format="dummy", **memory) as llm:
            return run_with(llm, requests)

    return {"budget_bytes": budget} | in_turns(run, requests, repeats)


@contextmanager
def new_llm(folder: str, shares: bool, **options: Any) -> Iterator[LLM]:
    """LLM that shares prefixes or not, on the CPU, in float32 and in this process."""
    options |= {"dtype": "float32", "device": "cpu", "use_ray": False}
    options |= {"enable_prefix_caching": shares}
    with (
        tempfile.TemporaryDirectory(prefix="flexgen-bench-") as offload,
        LLM(folder, offload_dir=offload, **options) as llm,
    ):
        yield llm


def in_turns(
    run: Callable[[bool], tuple[dict, list[list[int]]]], requests: list[Request], repeats: int
) -> dict:
    """Runs with sharing and without it, in turns; the ratios of the median ones.

    run: runs the requests with sharing, or without; returns figures and the answers' tokens.
    """
    runs: dict[str, list[dict]] = {WITH: [], WITHOUT: []}
    answers: dict[str, list[list[int]]] = {}

    def attempted(name: str) -> dict:
        figures, answers[name] = run(name == WITH)
        return figures

    for _ in range(repeats):
        for name in runs:
            figures = gate.attempt(partial(attempted, name))
            runs[name].append(figures)
            brief = {key: figures[key] for key in ("seconds", "prompt_tokens", "passes")}
            say(f"{name} sharing: {brief | {'rows': figures['policy']['gpu_batch_size']}}")
    middle = {name: median_run(tried) for name, tried in runs.items()}
    possible = find_prefixes(requests).possible_tokens
    saved = middle[WITHOUT]["prompt_tokens"] - middle[WITH]["prompt_tokens"]
    equal = sum(map(list.__eq__, answers[WITH], answers[WITHOUT]))
    return {
        "requests": len(requests),
        "ratio": gate.ratio(middle[WITHOUT], middle[WITH], "seconds"),
        "saved_prompt_tokens": saved,
        "share_of_possible_saving": round(saved / possible, 4) if possible else None,
        "cache_bytes_ratio": gate.ratio(middle[WITHOUT], middle[WITH], "cache_bytes_a_pass"),
        "equal_answers": equal,
        "runs": runs,
    }


def run_with(llm: LLM, requests: list[Request]) -> tuple[dict, list[list[int]]]:
    """Figures of a run, and the tokens of each answer."""
    llm.prepare(requests)
    warm_up(llm, requests)
    with counted_reads() as reads:
        watch, began, used = OtherLoad(), time.perf_counter(), time.process_time()
        outputs = sorted(llm.stream(requests), key=lambda output: output.index)
        seconds, disturbed = time.perf_counter() - began, beside(watch)
        used = time.process_time() - used
    report = llm.report
    (stage,) = report.stages
    figures = {
        "seconds": round(seconds, 3),
        "processor_seconds": round(used, 3),
        "prefill_seconds": round(report.prefill_seconds, 3),
        "passes": len(stage.measured.visits),
        "prompt_tokens": report.computed_tokens,
        "cache_bytes_a_pass": round(fmean(reads.nbytes)),
        "policy": asdict(stage.plan.policy),
        "used_bytes": stage.peak_bytes(),
        "prefix_tier": stage.plan.prefix_tier if stage.plan.prefix_pages else None,
        "device": report.device,
    }
    return figures | disturbed, [output.outputs[0].token_ids for output in outputs]


def median_run(runs: list[dict]) -> dict:
    """The run with the median seconds, of those without a mark if there are any."""
    sound = sorted(list(filter(holds, runs)) or runs, key=lambda run: run["seconds"])
    return sound[(len(sound) - 1) // 2]


if __name__ == "__main__":
    run_as_command(prefixes)
