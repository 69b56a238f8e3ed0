"""What the ring between stages costs, and what a lost stage does: hops and recoveries, measured.

Two actors pass a tensor to and fro over the transport that stages use; then a stage of a small
model's pipeline is killed, and the parts of its recovery are timed. Measures; decides nothing.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.bench import t4
from flexgen_ray.bench.result import finish
from flexgen_ray.bench.scaling import Likeness, run
from flexgen_ray.bench.shapes import make_checkpoint
from flexgen_ray.config import HardwareSpec, ModelConfig, Policy, Workload
from flexgen_ray.cost.cost import CostModel, Resource
from flexgen_ray.cost.placed_rows import Composition
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.predict import decoding
from flexgen_ray.llm import LLM
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.options import JsonOption
from flexgen_ray.request import SamplingParams
from flexgen_ray.schedule.ops import Op, OpKind
from flexgen_ray.schedule.zigzag import StageLayers

FREE = 1e18  # a rate at which nothing takes time
HOP_SHAPE = "opt-125m"
HOP_SHARE = 2.0  # cells that a batch's hop takes, of the 7 that a stage computes for it
SIZES = (64 << 10, 4 << 20, 64 << 20)
STAGES = 3


def ring(
    rounds: Annotated[int, typer.Option(help="Trips of each size.")] = 200,
    kills: Annotated[int, typer.Option(help="Stages to kill, one run each.")] = 3,
    shape: Annotated[str, typer.Option(help="Of the model whose stage is killed.")] = "llama-1.2gb",
    json_file: JsonOption = None,
) -> None:
    """Milliseconds of a hop between two stages, and seconds of each part of a recovery.

    Example: flexgen-ray bench ring --kills 3
    """
    from flexgen_ray.distributed.rehearsal import hops

    # Large ones in fewer trips.
    trips = {size: max(3, min(rounds, (200 << 20) // size)) for size in SIZES}
    milliseconds = hops(trips)
    typer.echo(f"ms a hop: {milliseconds}", err=True)
    with tempfile.TemporaryDirectory(prefix="flexgen-bench-") as folder:
        model = make_checkpoint(shape, Path(folder, "model"))
        found = [_recovery(model, kill % STAGES) for kill in range(kills)]
    typer.echo(f"recoveries: {found}", err=True)
    hidden = _hidden()
    typer.echo(f"hidden hops: {hidden}", err=True)
    settings = {"rounds": rounds, "shape": shape, "stages": STAGES}
    result = {"hop_ms": milliseconds, "recoveries": found, "hidden_hops": hidden}
    finish({"settings": settings} | result, "CPU", json_file)


def _hidden() -> dict:
    """Emulated: what is left of two stages' throughput when a batch's hop takes as long as some of
    a stage's layers, with one block a stage and with two."""
    config = shape_config(HOP_SHAPE)
    found: dict = {"emulated": True, "hop_in_layers": HOP_SHARE}
    for each in (1, 2):
        policy = Policy(8, 2, blocks_in_flight=2 * each)
        plans = [_resident(config, stage, policy) for stage in StageLayers.split(12, (6, 6))]
        model, rows = CostModel(plans[0]), Composition(decoding(plans[0], t4.PROMPT_LEN), 0)
        cell = [
            model.amounts(Op(it, 0, 1, 0, 0, 0), rows) for it in (OpKind.PROJECT, OpKind.FINISH)
        ]
        flops = sum(it[Resource.DECODE_FLOPS] for it in cell)
        sent = model.amounts(Op(OpKind.SEND, 0, 7, 0, 0, 0), rows)[Resource.NETWORK]
        rates = dict.fromkeys((field.name for field in fields(HardwareSpec)), FREE)
        free = HardwareSpec(**rates | {"device_decode_flops_per_s": flops})
        slow = replace(free, network_bytes_per_s=sent / HOP_SHARE)
        found_rates = [run(Likeness(plans, it))["decode_tokens_per_s"] for it in (free, slow)]
        found[f"{each} blocks a stage"] = round(found_rates[1] / found_rates[0], 4)
    return found


def _resident(config: ModelConfig, stage: StageLayers, policy: Policy) -> StagePlan:
    workload = Workload(policy.block_size, t4.PROMPT_LEN, t4.PROMPT_LEN + t4.MAX_TOKENS)
    return StagePlan(
        config, stage, policy, workload, "float16", num_blocks=policy.blocks_in_flight or 1
    )


def _recovery(model: Path, stage: int) -> dict:
    """One stage's process is killed in the middle of a run; seconds of what follows."""
    prompts = [[1 + i, 2, 3, 4] for i in range(8)]
    with LLM(model, dtype="float32", device="cpu", pipeline_parallel_size=STAGES) as llm:
        params = SamplingParams(24, 0.0, ignore_eos=True)
        requests = [llm.request(index, prompt, params) for index, prompt in enumerate(prompts)]
        llm.prepare(requests)
        killed_at: list[float] = []

        def kill(pid: int) -> None:
            os.kill(pid, signal.SIGKILL)
            killed_at.append(time.time())

        driver: Any = llm._backend
        timer = threading.Timer(2.0, kill, [driver.pids()[stage]])
        timer.start()
        outputs = list(llm.stream(requests))
        timer.cancel()
        (found,) = driver.recoveries
    assert len(outputs) == len(prompts)
    return {
        "stage": stage,
        "detection_s": round(found.detected_at - killed_at[0], 3),
        "restart_s": round(found.restart_seconds, 3),
        "weights_s": round(found.weights_seconds, 3),
        "prefill_s": round(found.prefill_seconds, 3),
    }
