"""Does a run take no longer than its busiest lane? Emulated hardware, a real schedule and tokens.

Claim: loads, stores, disk, host attention and compute overlap so well that a run takes the time of
its busiest lane alone. A tiny model runs at rates chosen so that one lane, or all, take a given
time for each cell. Time is emulated, so the schedule and the executor are measured, not a device.

Good: every case's `ratio` (run over busiest lane) near 1; it can't be below. With a doubtful run
(gate.py) no file is written.
docs/results/lanes-emulated.json: python -m benchmarks.lanes --json FILE
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import gate
from benchmarks.command import run_as_command
from benchmarks.emulation import emulated
from benchmarks.stand_in import alike_requests
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.runs import beside
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.config import RATE_NAMES, Budget, HardwareSpec, Placement, Policy, Workload
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.resources import Resource
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import Composition, Row, Rows
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.reporting.terminal import say
from flexgen_ray.request import Request
from flexgen_ray.runtime.events import Progress
from flexgen_ray.runtime.stage import StageSpec
from flexgen_ray.runtime.worker import Worker
from flexgen_ray.schedule.ops import Op, OpKind
from flexgen_ray.schedule.zigzag import StageLayers

PROMPT_LEN = 64  # long against the answers, so that all passes take about the same time
BATCH_SIZE = 4
FREE = 1e18  # a rate at which nothing takes time
OTHERS = 0.4  # share of the slowest lane's time that each other lane takes
_DEVICE, _HOST, _DISK = Placement(1, 0, 0), Placement(0, 1, 0), Placement(0, 0, 1)


@dataclass(frozen=True)
class Case:
    """A placement that uses the lanes in question, and the slowest of them (None: all alike)."""

    weights: Placement
    cache: Placement
    cpu_attention: float
    slowest: Resource | None


CASES = {
    "weights link": Case(_HOST, _HOST, 1.0, Resource.H2D),
    "cache link": Case(_DEVICE, _HOST, 0.0, Resource.H2D),
    "disk": Case(_DISK, _HOST, 1.0, Resource.DISK_READ),
    "host attention": Case(_HOST, _HOST, 1.0, Resource.HOST_ATTENTION),
    "compute": Case(_HOST, _HOST, 0.5, Resource.DECODE_FLOPS),
    "balanced": Case(Placement(0, 0.5, 0.5), _HOST, 0.5, None),
}
_CELL_OPS = (
    OpKind.READ_WEIGHTS,
    OpKind.LOAD_WEIGHTS,
    OpKind.LOAD_CACHE,
    OpKind.PROJECT,
    OpKind.ATTEND_DEVICE,
    OpKind.ATTEND_HOST,
    OpKind.LOAD_ATTENTION,
    OpKind.FINISH,
)


def lanes(
    layers: Annotated[int, typer.Option(metavar="N", min=1, help="Decoder layers.")] = 8,
    batches: Annotated[int, typer.Option(metavar="N", min=1, help="Batches in a block.")] = 4,
    passes: Annotated[int, typer.Option(metavar="N", min=1, help="Decoding passes.")] = 16,
    op_ms: Annotated[
        float, typer.Option(metavar="MS", help="Mean modelled time of an op, in milliseconds.")
    ] = 1.9,
    json_file: JsonOption = None,
) -> None:
    """Emulate lanes: the run's time as a multiple of the busiest lane's.

    Example: python -m benchmarks.lanes --op-ms 1.9
    """
    results = {}
    for name, case in CASES.items():
        plan = plan_of(case, layers, batches, passes)
        results[name] = gate.attempt(partial(run_case, case, plan, op_ms / 1e3), judge)
        say(f"{name:>15}: {results[name]}")
    settings = {"layers": layers, "batches": batches, "passes": passes, "op_ms": op_ms}
    gate.finish({"emulated": True, "settings": settings, "cases": results}, "emulated", json_file)


def judge(figures: dict) -> list[str]:
    """Reasons to doubt a case's figures."""
    return gate.off_pace(1 / figures["ratio"])


def plan_of(case: Case, layers: int, batches: int, passes: int) -> StagePlan:
    """Plan of a tiny model for one block of requests and this many decoding passes."""
    config = ModelConfig(
        family="opt", num_layers=layers, hidden_size=32, num_heads=4, num_kv_heads=4, head_dim=8,
        intermediate_size=64, vocab_size=96, max_seq_len=2048, embedding_size=32, dtype="float32",
        tie_word_embeddings=False, activation="relu", norm_eps=1e-5, norm_bias=True,
        attention_bias=True, output_bias=True, mlp_bias=True, position_table=2050,
    )  # fmt: skip
    policy = Policy(
        gpu_batch_size=BATCH_SIZE,
        num_gpu_batches=batches,
        weights=case.weights,
        cache=case.cache,
        cpu_attention=case.cpu_attention,
    )
    workload = Workload(BATCH_SIZE * batches, PROMPT_LEN, PROMPT_LEN + passes + 1)
    return StagePlan(config, StageLayers.whole(layers), policy, workload, "float32")


def requests_of(plan: StagePlan) -> list[Request]:
    """Equal requests that fill the plan's block."""
    return alike_requests(plan.workload.num_requests, PROMPT_LEN, plan.max_seq_len - PROMPT_LEN)


def run_case(case: Case, plan: StagePlan, op_seconds: float) -> dict:
    """Figures of one emulated run of a block, from its prompts to its last tokens.

    op_seconds: mean modelled time of an op. last_token_s: when the last token was chosen; wall_s:
    when the run was over. ratio: of the wall time to the busiest lane's modelled time.
    """
    worker = Worker()
    torch.set_num_threads(1)  # the tiny model's maths must not disturb the clock
    with tempfile.TemporaryDirectory(prefix="flexgen-bench-") as folder:
        budget = Budget(*[2**30] * 3)
        spec = StageSpec(None, plan, budget, "cpu", str(Path(folder)))
        hardware = hardware_of(case, plan, op_seconds)
        worker.load(replace(spec, **emulated(hardware), keeps_spans=True))
        worker.add(requests_of(plan))
        watch = OtherLoad()
        tokens = sum(it.new_tokens for it in worker.run() if isinstance(it, Progress))
        disturbed = beside(watch)
        measured, spans = worker.measured(), worker.spans(0, 10**9)
        worker.close()
    busiest = max(measured.bound.values())
    last = len(measured.visits) - 1
    last_token = max(span.end for span in spans if span.op.ends_visit and span.op.visit == last)
    return {
        "wall_s": round(measured.wall, 4),
        "last_token_s": round(last_token, 4),
        "busiest_s": round(busiest, 4),
        "ratio": round(measured.wall / busiest, 4),
        "busy_s": {lane: round(each, 4) for lane, each in measured.modelled_lanes.items()},
        "op_ms": round(1e3 * sum(measured.modelled_lanes.values()) / len(spans), 3),
        "generated_tokens": tokens,
    } | disturbed


def hardware_of(case: Case, plan: StagePlan, op_seconds: float) -> HardwareSpec:
    """Rates at which a mean op takes op_seconds, and the case's slowest lane most of the time."""
    rates: dict[str, float] = dict.fromkeys(RATE_NAMES, FREE)  # issuing ops costs nothing
    amounts = dict.fromkeys(Resource, 0.0)
    model, pattern = CostModel(plan), _middle_pass(plan)
    num_ops = 2  # STORE_CACHE and APPEND_CACHE, which take no time here
    for kind in _CELL_OPS:
        taken = model.amounts(Op(kind, 0, 1, 0, 0, 0), pattern)
        timed = {name: amount for name, amount in taken.items() if name in rates}
        num_ops += any(timed.values())
        for resource, amount in timed.items():
            amounts[resource] += amount
    limiting = (Resource.H2D, Resource.DISK_READ, Resource.HOST_ATTENTION, Resource.DECODE_FLOPS)
    shares = {
        resource: 1.0 if case.slowest in (None, resource) else OTHERS
        for resource in limiting
        if amounts[resource]
    }
    for resource, share in shares.items():
        seconds = op_seconds * num_ops * share / sum(shares.values())
        rates[resource] = amounts[resource] / seconds
    # Prefill is this much faster for each token, so its pass takes about as long as any other.
    rates[Resource.FLOPS] = PROMPT_LEN * rates[Resource.DECODE_FLOPS]
    return HardwareSpec(**rates, has_copy_engines=False)


def _middle_pass(plan: StagePlan) -> Composition:
    position = (PROMPT_LEN + plan.max_seq_len) // 2
    rows = tuple(Row(slot, position, 1, slot, True, False) for slot in range(BATCH_SIZE))
    return Composition(Rows(rows, (0,) * BATCH_SIZE), plan.splits)


if __name__ == "__main__":
    run_as_command(lanes)
