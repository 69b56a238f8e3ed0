"""`ray job submit` as examples/submit_job.sh does it, to a head that asks for a token."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flexgen_ray import LLM, SamplingParams

ROOT = Path(__file__).parents[1]
MAX_TOKENS = 6
START_SECONDS = 60
PROMPTS = ["Hello there", "Once upon a time", "2, 4, 6"]
# `ray start --head` would take fixed ports, and the address of the machine's network. `ray.init`
# takes a fixed port for its agent, which another Ray on this machine may have.
HEAD = """
import signal, ray
from ray._private.parameter import RayParams
from ray._private.utils import write_ray_address
make = RayParams.__init__
RayParams.__init__ = lambda self, **given: make(self, dashboard_agent_listen_port=0, **given)
head = ray.init(
    address="local", num_cpus=2, include_dashboard=True, object_store_memory=80 * 2**20,
    log_to_driver=False, _node_ip_address="127.0.0.1",
)
# As `ray start` does, or "auto" would take whatever Ray it meets on the machine.
write_ray_address(head.address_info["gcs_address"])
print(head.dashboard_url, flush=True)
signal.pause()
"""


@dataclass(frozen=True)
class Cluster:
    """A folder to submit from, and the environment of somebody who has the token."""

    folder: Path
    environment: dict[str, str]

    def submit(
        self, output: Path, model: Path, *options: object, **environment: str
    ) -> subprocess.CompletedProcess:
        """The example, in the folder; again while the head's agent is still on its way."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            done = self.run(
                "bash", ROOT / "examples/submit_job.sh", model, "in.jsonl", output, "--device",
                "cpu", "--dtype", "float32", "--temperature", 0, "--max-tokens", MAX_TOKENS,
                *options, **environment,
            )  # fmt: skip
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(1)

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*map(str, command)], cwd=self.folder, env=self.environment | environment,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with a dashboard and a token of its own; its process group ends with the tests."""
    home = Path(tempfile.mkdtemp(prefix="fgj-", dir="/tmp"))  # Ray's sockets need a short path.
    folder = home / "project"
    shutil.copytree(
        ROOT / "flexgen_ray", folder / "flexgen_ray", ignore=shutil.ignore_patterns("__pycache__")
    )
    lines = [json.dumps({"custom_id": prompt, "prompt": prompt}) for prompt in PROMPTS]
    (folder / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    environment = os.environ | {
        "HOME": str(home), "RAY_TMPDIR": str(home), "RAY_AUTH_MODE": "token",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    # What is not submitted must not be found.
    for name in (
        "OMP_NUM_THREADS",
        "PYTHONPATH",
        "RAY_ADDRESS",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
    ):
        environment.pop(name, None)
    subprocess.run(
        ["ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True
    )
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD], env=environment, stdout=subprocess.PIPE, text=True,
        cwd=home, start_new_session=True,
    )  # fmt: skip
    try:
        assert head.stdout is not None
        dashboard = head.stdout.readline().strip()
        assert dashboard, "the head did not start; is ray[default] installed?"
        yield Cluster(folder, environment | {"RAY_API_SERVER_ADDRESS": f"http://{dashboard}"})
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


def test_a_submitted_job_answers_as_this_process_does(cluster, text_model, tmp_path):
    output = tmp_path / "out.jsonl"
    report = tmp_path / "report.json"
    done = cluster.submit(output, text_model, "--report", report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout and "generated tokens/s" in done.stdout
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    answers = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
    with LLM(text_model, use_ray=False, device="cpu", dtype="float32") as llm:
        greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
        expected = llm.generate(PROMPTS, greedy)
    assert answers == {output.prompt: output.outputs[0].text for output in expected}
    # Ray set OMP_NUM_THREADS=1 for the job; the head has two cores.
    assert json.loads(report.read_text())["threads"] == 2


@pytest.mark.parametrize(
    "without",
    [{"RAY_AUTH_TOKEN": "not the token"}, {"RAY_AUTH_MODE": "disabled", "HOME": "/nonexistent"}],
    ids=["wrong token", "no token"],
)
def test_nobody_submits_without_the_token(cluster, text_model, tmp_path, without):
    done = cluster.submit(tmp_path / "out.jsonl", text_model, **without)
    assert done.returncode != 0 and "Authentication" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_job_whose_answers_would_be_lost_fails_the_submission(cluster, text_model):
    """Ray deletes the folder in which the job runs."""
    done = cluster.submit(Path("out.jsonl"), text_model)
    assert done.returncode != 0
    shown = done.stdout + done.stderr
    assert "error: --output out.jsonl would be /" in shown
    assert "a folder that Ray deletes after the job; give an absolute path" in shown


def test_ray_submit_runs_the_script_on_the_head(cluster, text_model, tmp_path):
    """What `ray submit` does there: the script in the home folder, with the package installed."""
    script = cluster.folder.parent / "generate.py"
    shutil.copy(ROOT / "cluster/generate.py", script)
    output, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    # `ray submit` and `ray exec` export these two for whatever they run.
    exported = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = cluster.run(
        "python", script, "--model", text_model, "--input", "in.jsonl", "--output", output,
        "--device", "cpu", "--max-tokens", 2, "--report", report,
        PYTHONPATH=str(ROOT), **exported,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(output.read_text(encoding="utf-8").splitlines()) == len(PROMPTS)
    assert json.loads(report.read_text())["threads"] == 2
