"""One run of mixed_lengths.py in a process of its own, with the flexgen_ray of any checkout.

The file is run by its path, `python -P`, with the checkout in PYTHONPATH. A task comes as JSON on
standard input, and its figures leave as the last line of standard output. So that checkouts from
d1a080c on can be compared, it uses only what all of them have, by the older name where a module
has moved. Knows one task; not what is compared.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

WARM_UP = 16, 2  # most tokens of a prompt and of an answer


def measured(task: dict, folder: str) -> dict:
    """Run the model of a folder on the CPU, in memory of the task's budget."""
    package = import_module("flexgen_ray")
    memory = {f"{tier}_memory": nbytes for tier, nbytes in task["budget"].items()}
    options = {"load_format": "dummy", "dtype": "float32", "device": "cpu", "use_ray": False}
    with package.LLM(task["model"], offload_dir=folder, **options, **memory) as llm:
        requests = _requests(task["lengths"], llm.config.vocab_size)
        llm.prepare(requests)
        short = [tuple(map(min, pair, WARM_UP)) for pair in task["lengths"]]
        for _ in llm.stream(_requests(short, llm.config.vocab_size)):
            pass
        began = time.perf_counter()
        for _ in llm.stream(requests):
            pass
        seconds, report = time.perf_counter() - began, llm.report
        (stage,) = report.stages
        return _figures(stage.plan, stage.measured.visits, seconds) | {"device": report.device}


def emulated(task: dict, folder: str) -> dict:
    """Plan OPT-30B for the paper's T4 in memory of the task's budget, and emulate the run."""
    import_module("torch").set_num_threads(1)  # the small tensors' maths must not disturb the clock
    machine = _module("benchmarks.paper_machines", "flexgen_ray.bench.t4").MACHINE
    stand_ins = _module("benchmarks.stand_in", "flexgen_ray.bench.likeness")
    requests = _requests(task["lengths"], 96)
    plan, middle = _planned(task, requests, machine)
    make = _either(stand_ins, "StandIn", "Likeness")
    stand_in = make([plan], [machine], middle, task["cell_seconds"])
    worker = import_module("flexgen_ray.runtime.worker").Worker()
    worker.load(stand_in.specs(folder)[0])
    worker.add(requests)
    began = time.perf_counter()
    for _ in worker.run():
        pass
    wall, run = time.perf_counter() - began, worker.measured()
    worker.close()
    scale = stand_in.time_scale
    figures = _figures(plan, run.visits, run.wall / scale) | stand_in.op_times()
    return figures | {"device": "emulated T4", "wall_s": round(wall, 2), "time_scale": scale}


def _planned(task: dict, requests: list, machine: Any) -> tuple[Any, int]:
    """The planner's choice for these requests, and the position of an average decoding row."""
    config = _module("flexgen_ray.models.shapes").shape_config(task["model"])
    jobs = _module("flexgen_ray.planner.choose", "flexgen_ray.auto_policy")
    job = _either(jobs, "planned_job", "job_of")(requests)
    plans = _module("flexgen_ray.planner.pipeline_plan", "flexgen_ray.cost.pipeline_plan")
    budget = import_module("flexgen_ray.config").Budget(**task["budget"])
    device = _either(plans, "StageDevice", "Device")(lambda *rows: machine, budget)
    search = _module("flexgen_ray.planner.search", "flexgen_ray.cost.planner")
    planner = search.Planner(config, (device,), job, "float16")
    (plan,) = _either(search, "find_best_plan", "choose")(planner).stages
    return plan, job.middle_position


def _requests(lengths: Sequence[Sequence[int]], vocabulary: int) -> list:
    """Requests of random tokens, answered greedily to their last token."""
    module, rng = import_module("flexgen_ray.request"), Random(0)
    requests = []
    for index, (prompt_len, answer_len) in enumerate(lengths):
        prompt = [rng.randrange(4, vocabulary) for _ in range(prompt_len)]
        params = module.SamplingParams(answer_len, 0.0, ignore_eos=True)
        requests.append(module.Request(index, prompt, params))
    return requests


def _figures(plan: Any, visits: Sequence, seconds: float) -> dict:
    """Figures of a run that took `seconds`, in modelled time if it was emulated.

    tokens, prompt_tokens: sampled, and of prompts, as passes brought them. cache_tokens: number of
    tokens for which the plan's cache has memory.
    """
    sizes = _module("flexgen_ray.layout.sizes", "flexgen_ray.cost.sizes").stage_bytes(plan)
    passes = [each for each in visits if each.new_tokens or each.prefill_tokens]
    cache = sum(parts.get("cache", 0) + parts.get("cache tails", 0) for parts in sizes.values())
    return {
        "seconds": seconds,
        "passes": len(passes),
        "tokens": sum(each.new_tokens for each in passes),
        "prompt_tokens": sum(each.prefill_tokens for each in passes),
        "cache_tokens": cache / (plan.kv_bytes * plan.num_decoder_layers),
        "used_bytes": {tier: sum(parts.values()) for tier, parts in sizes.items()},
        "policy": asdict(plan.policy),
    }


def _module(*names: str) -> ModuleType:
    """The first of these modules that the checkout has."""
    *others, last = names
    for name in others:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return import_module(last)


def _either(module: ModuleType, name: str, older: str) -> Any:
    """An attribute of a module by this name or, in an older checkout, by the other one."""
    return getattr(module, name) if hasattr(module, name) else getattr(module, older)


def main() -> None:
    """Run the task on standard input, and print its figures."""
    task = json.load(sys.stdin)
    package = Path(str(import_module("flexgen_ray").__file__)).parents[1]
    if package != Path(task["checkout"]):
        raise SystemExit(f"flexgen_ray is that of {package}, not of {task['checkout']}")
    # A folder in memory takes no time beyond the modelled one.
    memory = "/dev/shm" if task["is_emulated"] and os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="flexgen-bench-", dir=memory) as folder:
        figures = (emulated if task["is_emulated"] else measured)(task, folder)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
