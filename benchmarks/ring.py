"""Is the ring between stages cheap, and a lost stage soon replaced? Hops and recoveries, measured.

Claims: a hop between stages costs a millisecond or less, two blocks a stage hide a slow network,
and a killed stage costs seconds and no token. Two actors pass a tensor to and fro over the
transport that stages use; emulated stages decode with a slow and a free network (hidden_hops.py);
then a stage of a small model's pipeline is killed, and the parts of its recovery are timed.

Good: `hop_ms` of 64 KiB below 1, `throughput_of_blocks_a_stage` of 2 near 1, and detection plus
restart within a few seconds. Doubtful measurements (gate.py) are marked.
docs/results/ring-cpu.json: python -m benchmarks.ring --json FILE
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import gate
from benchmarks.command import run_as_command
from benchmarks.hidden_hops import hidden_hops
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.random_checkpoints import make_checkpoint
from flexgen_ray.cli.bench.runs import beside
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.llm import LLM
from flexgen_ray.reporting.terminal import say
from flexgen_ray.request import SamplingParams

SIZES = (64 << 10, 4 << 20, 64 << 20)
STAGES = 3
WATCH_SECONDS = 2.0


def ring(
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Round trips of each tensor size, at most.")
    ] = 200,
    kills: Annotated[
        int, typer.Option(metavar="N", min=0, help="Stages to kill, each in a run of its own.")
    ] = 3,
    shape: Annotated[
        str, typer.Option(metavar="NAME", help="Shape of the model whose stage is killed.")
    ] = "llama-1.2gb",
    json_file: JsonOption = None,
) -> None:
    """Measure the milliseconds of a hop between two stages, and the seconds of a recovery's parts.

    Example: python -m benchmarks.ring --kills 3
    """
    from flexgen_ray.distributed.hop_benchmark import measure_hops

    # Large tensors take fewer trips: 200 MiB of each size, but at least three.
    trips = {size: max(3, min(rounds, (200 << 20) // size)) for size in SIZES}
    hops = _after_a_watch(lambda: measure_hops(trips))
    say(f"ms a hop: {hops}")
    hidden = hidden_hops()
    say(f"hidden hops: {hidden}")
    with tempfile.TemporaryDirectory(prefix="flexgen-bench-") as folder:
        model = make_checkpoint(shape, Path(folder, "model"))
        recoveries = [
            _after_a_watch(partial(_recovery, model, kill % STAGES)) for kill in range(kills)
        ]
    say(f"recoveries: {recoveries}")
    settings = {"rounds": rounds, "shape": shape, "stages": STAGES}
    result = {"hop_ms": hops, "hidden_hops": hidden, "recoveries": recoveries}
    gate.finish({"settings": settings} | result, "CPU", json_file)


def _after_a_watch(measure: Callable[[], dict]) -> dict:
    """Measure, and mark the figures if other processes used the cores in the seconds before.

    Processes that end meanwhile take the sum of their own seconds with them.
    """

    def watched() -> dict:
        watch = OtherLoad()
        time.sleep(WATCH_SECONDS)
        return beside(watch) | measure()

    return gate.attempt(watched)


def _recovery(model: Path, stage: int) -> dict:
    """Kill one stage's process in the middle of a run; returns the seconds of each step after it.

    Raises AssertionError if a request went unanswered.
    """
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
        (recovery,) = driver.recoveries
    assert len(outputs) == len(prompts)
    return {
        "stage": stage,
        "detection_s": round(recovery.detected_at - killed_at[0], 3),
        "restart_s": round(recovery.restart_seconds, 3),
        "weights_s": round(recovery.weights_seconds, 3),
        "prefill_s": round(recovery.prefill_seconds, 3),
    }


if __name__ == "__main__":
    run_as_command(ring)
