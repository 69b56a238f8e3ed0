"""Stages' metrics, as Prometheus reads them from a node, and what a run says of lost stages."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import assert_same

from flexgen_ray.request import CompletionOutput

ROOT = Path(__file__).parents[1]
# A Ray of its own: the session's exports nothing.
SCRIPT = """
import json, os, signal, socket, sys, time, urllib.request
import ray
from benchmarks.emulation import emulated
from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.config import HardwareSpec

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(
    address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20,
    log_to_driver=False, _node_ip_address="127.0.0.1", _metrics_export_port=port,
    _system_config={"metrics_report_interval_ms": 1000},
)
SLOW = emulated(HardwareSpec(*[1e12] * 6, device_flops_per_s=5e6, device_bytes_per_s=1e12))

OF_FIRST = 'stage="0"'

def metrics():
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        return [line for line in page.read().decode().splitlines() if "flexgen_ray_" in line]

model, prompts, wanted, output = json.loads(sys.argv[1])
with LLM(
    model, policy=Policy(1, 2), dtype="float32", pipeline_parallel_size=2, **SLOW
) as llm:
    requests = [
        llm.request(i, prompt, SamplingParams(max_tokens=12, temperature=0.0))
        for i, prompt in enumerate(prompts)
    ]
    llm.prepare(requests)
    notes, answers = [], {}

    def on_progress(step):
        if answers and not notes:
            os.kill(ray.get(llm.backend.actors[1].pid.remote()), signal.SIGKILL)
            notes.append("killed")
        if step.note:
            notes.append(step.note)

    for answer in llm.stream(requests, on_progress):
        answers[answer.index] = answer.outputs[0].token_ids
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        lines = metrics()
        tags = [(name, f'stage="{stage}"') for name, stage in wanted]
        known = all(any(name in it and tag in it for it in lines) for name, tag in tags)
        counts = (it.rsplit(" ", 1)[1] for it in lines if "tokens_total" in it and OF_FIRST in it)
        if known and sum(map(float, counts)) >= 12 * len(prompts):
            break
        time.sleep(1)
    report = llm.report.lines(), llm.report.as_dict()
with open(output, "w") as file:
    json.dump([answers, notes, lines, report], file)
ray.shutdown()
"""
OF_STAGES = {
    "tokens_total": {"stage"},
    "tokens_per_s": {"stage"},
    "lane_utilisation": {"stage", "lane"},
    "bubbles": {"stage"},
}


@pytest.fixture(scope="module")
def run(tiny_models, tmp_path_factory):
    """Of two stages, the second of which is killed: answers, notes, metrics, the report."""
    folder, references = tiny_models["opt"]
    output = tmp_path_factory.mktemp("metrics") / "out.json"
    wanted = [(f"{name}{{", stage) for name in OF_STAGES for stage in (0, 1)]
    wanted.append(("restarts_total{", 1))
    job = [str(folder), [reference.prompt for reference in references], wanted, str(output)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(job)],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers, notes, lines, report = json.loads(output.read_text())
    found = [CompletionOutput("", answers[str(it)], "length") for it in range(len(references))]
    assert_same(found, references)
    return notes, lines, report


def values(lines: list[str], name: str) -> dict[tuple, float]:
    """{(stage, lane or None): value} of a metric."""
    found = {}
    for line in lines:
        if line.startswith(f"ray_flexgen_ray_{name}{{"):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', line))
            found[tags["stage"], tags.get("lane")] = float(line.rsplit(" ", 1)[1])
    return found


def test_each_stage_tells_prometheus_how_it_does(run):
    _, lines, _ = run
    for name, tags in OF_STAGES.items():
        found = values(lines, name)
        assert {stage for stage, _ in found} == {"0", "1"}, name
        assert all((lane is not None) == ("lane" in tags) for _, lane in found), name
    assert all(0 <= it <= 1 for it in values(lines, "lane_utilisation").values())
    assert {"device", "send"} <= {lane for _, lane in values(lines, "lane_utilisation")}
    assert all(0 <= it <= 1 for it in values(lines, "bubbles").values())
    # The first stage's process was there from beginning to end; every token passed it.
    assert values(lines, "tokens_total")["0", None] >= 7 * 12


def test_lost_stages_are_counted_noted_and_reported(run):
    notes, lines, (text, report) = run
    assert values(lines, "restarts_total") == {("1", None): 1.0}
    lost = f"stage 1 on {socket.gethostname()} lost its process"
    assert notes[1] == f"{lost}; to be replaced"
    assert notes[2].startswith(f"stage 1 replaced ({lost}): restart ")
    (recovery,) = report["recoveries"]
    assert recovery["stages"] == [1] and recovery["prefill_seconds"] > 0
    assert "prefill" in text[-1] and text[-1].startswith("stage 1 replaced")
    assert all(0 <= stage["bubbles"] <= 1 for stage in report["stages"])
    assert sum("CPU idle" in line for line in text) == 2
