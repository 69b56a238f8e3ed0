"""Does one long prompt slow a job of short ones by more than its own work? Beside another checkout.

Claim: a long request among short ones takes pages for itself; it takes none of the others' memory.
opt-125m with random weights in float32 answers 64 prompts of 40 tokens, and the same with one of
1,500 tokens among them, 12 new tokens each, in memory that is short: some weights, and the cache,
lie beside the device. The job with the long prompt has 1.4 times as many tokens. Both jobs run in
turns, each in a process of its own (mixed_lengths_run.py), with --other by that checkout too.

Good: a `ratio` of seconds with the long prompt to those without it of at most 2. Slots as long as
the longest request shrink the block from 2 x 16 requests to one, and take 6.4 times as long. A
ratio rests on no run beside which others used the cores.
docs/results/one-long-cpu.json: python -m benchmarks.one_long --repeats 2 --json FILE
"""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks import gate, mixed_lengths
from benchmarks.command import run_as_command
from flexgen_ray.cli.bench.lengths import Lengths
from flexgen_ray.cli.bench.workload import summary
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.reporting.terminal import say

MODEL = "opt-125m"
ANSWER = 12  # tokens
SHORT: Lengths = [(40, ANSWER)] * 64
WITHOUT, WITH = "without", "with"  # the long prompt
JOBS: dict[str, Lengths] = {WITHOUT: SHORT, WITH: [*SHORT[:32], (1500, ANSWER), *SHORT[32:]]}
MEMORY = {"gpu": 450 * 2**20, "cpu": 230 * 2**20, "disk": 2**30}


def one_long(
    other: mixed_lengths.OtherOption = None,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of runs of each job.")
    ] = 3,
    json_file: JsonOption = None,
) -> None:
    """Run short requests with a long one and without it, in little memory; the ratio of seconds.

    Example: python -m benchmarks.one_long --repeats 5
    """
    checkouts = mixed_lengths.checkouts_with(other)
    runs: dict[str, dict[str, list[dict]]] = {each: {job: [] for job in JOBS} for each in checkouts}
    for _ in range(repeats):
        for job, lengths in JOBS.items():
            task = {"model": MODEL, "is_emulated": False, "lengths": lengths, "budget": MEMORY}
            for each, folder in checkouts.items():
                done = mixed_lengths.run_once(folder, task)
                runs[each][job].append(done)
                say(f"{each} checkout, {job} the long prompt: {done['seconds']} s")
    commits = {each: mixed_lengths.commit_of(folder) for each, folder in checkouts.items()}
    result = {
        "model": MODEL, "emulated": False, "budget_bytes": MEMORY, "checkouts": commits,
        "jobs": {job: summary(lengths) for job, lengths in JOBS.items()},
        "ratio": {each: _ratio(jobs) for each, jobs in runs.items()}, "runs": runs,
    }  # fmt: skip
    gate.finish(result, runs["this"][WITH][0]["device"], json_file)


def _ratio(jobs: dict[str, list[dict]]) -> float | None:
    """Seconds of the median run with the long prompt, over those of the median one without."""
    middle = {job: mixed_lengths.median_run(tried) for job, tried in jobs.items()}
    return gate.ratio(middle[WITH], middle[WITHOUT], "seconds")


if __name__ == "__main__":
    run_as_command(one_long)
