"""A run on several nodes that one computer emulates; a script, for a Ray cluster of its own.

    python tests/emulated_nodes.py JOB

JOB is JSON: model, prompts, max_tokens, num_stages, nodes (CPUs of each, besides a head without
any), lose (the stage whose node goes when the first answers are there, or null), faults, and
output, a file for JSON: answers, the stages' nodes before and after, recoveries, what the run
ended with, and what a run says on a node whose GPU torch can't find.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import ray
import torch
from ray.cluster_utils import Cluster

from benchmarks.emulation import emulated
from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.config import Faults, HardwareSpec

THIRD = Placement(0.3, 0.3, 0.4)
# Not all requests at once, so that some are answered when a node goes.
POLICY = Policy(1, 2, 16, THIRD, THIRD, THIRD, 0.5)
# Slow enough that a node goes in the middle of a run.
SLOW = emulated(HardwareSpec(*[1e12] * 6, device_flops_per_s=1e6, device_bytes_per_s=1e12))
# Ray's own are 3 s and 5, and make the loss of a node known after some 15 s.
HEALTH = {"health_check_period_ms": 1000, "health_check_failure_threshold": 2}


class Nodes:
    """The cluster; knows which stage is where."""

    def __init__(self, cpus: list[float]) -> None:
        self.cluster = Cluster()
        self._add(0, _system_config=HEALTH)
        for count in cpus:
            self._add(count)

    def _add(self, num_cpus: float, **options) -> None:
        self.cluster.add_node(
            num_cpus=num_cpus,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            **options,
        )

    def of_stages(self, llm: LLM) -> list[str]:
        """Their nodes' ids."""
        return [
            ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))
            for actor in llm.backend.actors
        ]

    def lose(self, llm: LLM, stage: int) -> None:
        """Its node and all that runs there, without a word."""
        actor, node_id = llm.backend.actors[stage], self.of_stages(llm)[stage]
        pid = ray.get(actor.pid.remote())
        (node,) = [it for it in self.cluster.worker_nodes if it.node_id == node_id]
        self.cluster.remove_node(node, allow_graceful=False)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    job = json.loads(sys.argv[1])
    nodes = Nodes(job["nodes"])
    result: dict = {"answers": {}, "error": None, "before": [], "after": []}
    with LLM(
        job["model"],
        policy=POLICY,
        dtype="float32",
        device="cpu",
        pipeline_parallel_size=job["num_stages"],
        address=nodes.cluster.address,
        faults=Faults(**job["faults"]),
        **({} if job["lose"] is None else SLOW),
    ) as llm:
        params = SamplingParams(max_tokens=job["max_tokens"], temperature=0.0)
        requests = [llm.request(index, it, params) for index, it in enumerate(job["prompts"])]
        llm.prepare(requests)
        result["before"] = nodes.of_stages(llm)
        left = [] if job["lose"] is None else [job["lose"]]

        def on_progress(_) -> None:
            # With an answer there is something that must not be lost, and more to come.
            if left and result["answers"]:
                nodes.lose(llm, left.pop())
                result["lost_at"] = time.time()

        try:
            for output in llm.stream(requests, on_progress):
                result["answers"][output.index] = output.outputs[0].token_ids
            result["after"] = nodes.of_stages(llm)
        except RuntimeError as error:
            result["error"] = str(error)
            result["seconds"] = time.time() - result["lost_at"]
        result["recoveries"] = [vars(it) for it in llm.backend.recoveries]
    if job["lose"] is not None and not torch.cuda.is_available():
        nodes.cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80 * 2**20)
        try:
            LLM(job["model"], address=nodes.cluster.address, wait=60)
        except ValueError as error:
            result["without_cuda"] = str(error)
    # Not printed, where Ray has its say when a node goes.
    Path(job["output"]).write_text(json.dumps(result))
    ray.shutdown()
    nodes.cluster.shutdown()


if __name__ == "__main__":
    main()
