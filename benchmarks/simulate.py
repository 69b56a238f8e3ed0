"""Does the simulation predict how long a run takes? Cases of benchmarks.lanes, run and simulated.

Claim: the planner may trust `simulate`, which plays a run's ops in modelled time. Run and
simulation use the same ops, amounts and rates; the simulation has neither threads nor a clock, so
they differ by the cost of running the emulation.

Good: every case's `ratio` (run over simulation) near 1, and tens of thousands of `ops_per_s`.
With a doubtful run (gate.py) no file is written.
docs/results/simulate-emulated.json: python -m benchmarks.simulate --json FILE
"""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated

import typer

from benchmarks import gate
from benchmarks.command import run_as_command
from benchmarks.lanes import CASES, Case, hardware_of, plan_of, requests_of, run_case
from flexgen_ray.cli.bench.runs import BESIDE
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.simulate import simulate as play
from flexgen_ray.cost.steady import op_stream
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import NO_ROWS, Rows
from flexgen_ray.reporting.terminal import say
from flexgen_ray.runtime.scheduler import Scheduler


def simulate(
    layers: Annotated[int, typer.Option(metavar="N", min=1, help="Decoder layers.")] = 8,
    batches: Annotated[int, typer.Option(metavar="N", min=1, help="Batches in a block.")] = 4,
    passes: Annotated[int, typer.Option(metavar="N", min=1, help="Decoding passes.")] = 16,
    op_ms: Annotated[
        float, typer.Option(metavar="MS", help="Mean modelled time of an op, in milliseconds.")
    ] = 1.9,
    json_file: JsonOption = None,
) -> None:
    """Emulate lanes: the run's time as a multiple of the simulated time.

    Example: python -m benchmarks.simulate --op-ms 1.9
    """
    results = {}
    for name, case in CASES.items():
        plan = plan_of(case, layers, batches, passes)
        simulated = _simulated(plan, hardware_of(case, plan, op_ms / 1e3))
        compare = partial(_compared, case, plan, op_ms / 1e3, simulated)
        results[name] = gate.attempt(compare, _judge)
        say(f"{name:>15}: {results[name]}")
    settings = {"layers": layers, "batches": batches, "passes": passes, "op_ms": op_ms}
    gate.finish({"emulated": True, "settings": settings, "cases": results}, "emulated", json_file)


def _judge(figures: dict) -> list[str]:
    return gate.missed("seconds", figures["measured_s"], figures["simulated_s"])


def _compared(case: Case, plan: StagePlan, op_seconds: float, simulated: dict) -> dict:
    """Times of a run and of its simulation, with their ratios.

    ratio: when the last token was chosen, against the simulated time. wall_ratio: when the run was
    over, after a pass without rows that shows that no other follows.
    """
    measured, predicted = run_case(case, plan, op_seconds), simulated["simulated_s"]
    disturbed = {name: measured[name] for name in measured if name in BESIDE}
    return (
        simulated
        | disturbed
        | {
            "measured_s": measured["last_token_s"],
            "wall_s": measured["wall_s"],
            "ratio": round(measured["last_token_s"] / predicted, 4),
            "wall_ratio": round(measured["wall_s"] / predicted, 4),
        }
    )


def _simulated(plan: StagePlan, hardware: HardwareSpec) -> dict:
    """Simulated seconds of the run of `run_case`, and the ops simulated per second."""
    composed = _compose(plan)
    num_visits = len(composed) // plan.num_batches
    # One more visit, as in the run: only when it is composed is it known to have no rows.
    played = op_stream(
        plan, hardware, lambda op: composed.get((op.visit, op.batch), NO_ROWS), num_visits + 1
    )
    started = time.perf_counter()
    simulation = play(played)
    seconds = time.perf_counter() - started
    return {
        "simulated_s": round(simulation.visit_ends[num_visits - 1], 4),
        "ops_per_s": round(len(simulation.spans) / seconds),
    }


def _compose(plan: StagePlan) -> dict[tuple[int, int], Rows]:
    """Rows of every pass of the run, {(visit, batch): rows}; they depend on no token's value."""
    batcher = Scheduler(plan.policy.gpu_batch_size, plan.num_batches, plan.cell_tokens, frozenset())
    batcher.add(requests_of(plan))
    composed: dict[tuple[int, int], Rows] = {}
    visit = 0
    while not batcher.is_done:
        for batch in range(plan.num_batches):
            rows = composed[visit, batch] = batcher.compose(batch)
            slots = [row.slot for row in rows.sampled]
            batcher.accept(batch, slots, [0] * len(slots))
        visit += 1
    return composed


if __name__ == "__main__":
    run_as_command(simulate)
