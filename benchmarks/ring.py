"""What the ring between stages costs, and what a lost stage does: hops and recoveries, measured.

Two actors pass a tensor to and fro over the transport that stages use; emulated stages show how
much of a slow network two blocks a stage hide; then a stage of a small model's pipeline is killed,
and the parts of its recovery are timed. Measures; decides nothing.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import run_as_command
from benchmarks.hidden_hops import hidden_hops
from flexgen_ray.cli.bench.random_checkpoints import make_checkpoint
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.llm import LLM
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say
from flexgen_ray.request import SamplingParams

SIZES = (64 << 10, 4 << 20, 64 << 20)
STAGES = 3


def ring(
    rounds: Annotated[int, typer.Option(min=1, help="Trips of each size.")] = 200,
    kills: Annotated[int, typer.Option(min=0, help="Stages to kill, one run each.")] = 3,
    shape: Annotated[str, typer.Option(help="Of the model whose stage is killed.")] = "llama-1.2gb",
    json_file: JsonOption = None,
) -> None:
    """Milliseconds of a hop between two stages, and seconds of each part of a recovery.

    Example: python -m benchmarks.ring --kills 3
    """
    from flexgen_ray.distributed.hop_benchmark import measure_hops

    # Large ones in fewer trips.
    trips = {size: max(3, min(rounds, (200 << 20) // size)) for size in SIZES}
    milliseconds = measure_hops(trips)
    say(f"ms a hop: {milliseconds}")
    hidden = hidden_hops()
    say(f"hidden hops: {hidden}")
    with tempfile.TemporaryDirectory(prefix="flexgen-bench-") as folder:
        model = make_checkpoint(shape, Path(folder, "model"))
        found = [_recovery(model, kill % STAGES) for kill in range(kills)]
    say(f"recoveries: {found}")
    settings = {"rounds": rounds, "shape": shape, "stages": STAGES}
    result = {"hop_ms": milliseconds, "hidden_hops": hidden, "recoveries": found}
    finish({"settings": settings} | result, "CPU", json_file)


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

        driver: Any = llm.backend
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


if __name__ == "__main__":
    run_as_command(ring)
