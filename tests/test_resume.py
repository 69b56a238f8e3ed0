"""`flexgen-ray generate` as a user stops, kills and repeats it: the output is that of one run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from job_files import POLICY, command, comparable_rows, run

from flexgen_ray.cli.main import main

NUM_LINES = 30


def line(number: int) -> str:
    """Sampled, without a seed of its own; every seventh is bad, every fifth a chat, and every third
    has several answers."""
    rng = random.Random(number)
    text, max_tokens = "x" * rng.randint(1, 60), rng.randint(20, 60)
    asked = {"messages": [{"role": "user", "content": text}]} if number % 5 == 0 else {}
    asked = asked or {"prompt": "" if number % 7 == 0 else text}
    several = {"n": 3, "max_tokens": max_tokens // 3} if number % 3 == 0 else {}
    asked |= {"max_tokens": max_tokens} | several
    return json.dumps({"custom_id": f"{number:02}", **asked})


@pytest.fixture(scope="module")
def job(chat_model, tmp_path_factory):
    """Arguments of a job but for its output."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "in.jsonl").write_text("\n".join(map(line, range(NUM_LINES))))
    (folder / "policy.yaml").write_text(yaml.safe_dump(POLICY))
    return [
        "generate", "--model", chat_model, "--input", folder / "in.jsonl",
        "--policy", folder / "policy.yaml", "--offload-dir", folder / "offload",
        "--device", "cpu", "--dtype", "float32", "--temperature", 0.9, "--no-use-ray",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["", *map(str, job), "--output", str(output), "--keep-order"])
        main()
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])
    assert ended.value.code == 2
    found = comparable_rows(output)
    assert [row["custom_id"] for row in found] == [f"{number:02}" for number in range(NUM_LINES)]
    return found


def written(output: Path) -> int:
    files = (output, output.with_name(f"{output.name}.waiting"))
    return sum(file.stat().st_size for file in files if file.exists())


def kill_at(job: list, output: Path, num_bytes: int) -> None:
    """Starts the job and kills it once so much is written."""
    with subprocess.Popen(command(*job, "--output", output), stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 100
        while written(output) < num_bytes:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("name", "options", "seed"),
    [("out.jsonl", [], 0)]
    + [
        pytest.param(name, options, seed, marks=pytest.mark.slow)
        for name in ("out.jsonl", "out.jsonl.gz")
        for options in ([], ["--keep-order"])
        for seed in range(1, 7)
    ],
)
def test_killed_and_resumed_the_output_is_that_of_one_run(
    run_here,
    job,
    undisturbed,
    tmp_path,
    name,
    options,
    seed,
):
    output, arguments = tmp_path / name, [*job, *options]
    whole = 300 * NUM_LINES if name.endswith(".gz") else 500 * NUM_LINES
    rng = random.Random(seed)
    for share in sorted(rng.uniform(0.02, 0.8) for _ in range(1 if seed < 2 else 2)):
        kill_at(arguments, output, int(share * whole))
        assert output.exists()
    done = run_here(*arguments, "--output", output)
    assert done.returncode == 2, done.stderr
    found = comparable_rows(output)
    if "--keep-order" not in options:
        found.sort(key=lambda row: row["custom_id"])
    assert found == undisturbed
    before = output.read_bytes()
    again = run_here(*arguments, "--output", output)
    assert again.returncode == 2 and f"{output} answers all of" in again.stderr
    assert output.read_bytes() == before
    assert {it.name for it in tmp_path.iterdir()} == {name, f"{name}.job.json"}


def test_a_job_in_work_is_guarded_and_says_how_to_go_on_when_it_is_stopped(
    run_here,
    job,
    tmp_path,
):
    output = tmp_path / "out.jsonl"
    with subprocess.Popen(
        command(*job, "--output", output), stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 100
        while written(output) < 2000:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        for more in ([], ["--overwrite"]):
            done = run_here(*job, "--output", output, *more)
            assert done.returncode == 1 and "another run is writing" in done.stderr
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    count = len(comparable_rows(output))
    assert f"{count} lines are answered in {output}; run the same command" in said
    done = run_here(*job, "--output", output, "--temperature", 0.8)
    assert done.returncode == 1 and "was begun with temperature 0.9" in done.stderr
    assert len(comparable_rows(output)) == count
    assert run_here(*job, "--output", output, "--resume").returncode == 2
    assert len(comparable_rows(output)) == NUM_LINES


def test_from_standard_input_to_standard_output(job, undisturbed):
    text = "\n".join(map(line, range(8)))
    done = run(*job, "--input", "-", "--output", "-", "--keep-order", input=text)
    assert done.returncode == 2 and "generated tokens/s" in done.stderr
    found = [json.loads(it) for it in done.stdout.split("\n")[:-1]]
    assert [row["custom_id"] for row in found] == [f"{number:02}" for number in range(8)]
    for row, other in zip(found, undisturbed, strict=False):
        body, wanted = row["response"]["body"], other["response"]["body"]
        assert body.get("choices") == wanted.get("choices")
        assert body.get("usage") == wanted.get("usage")


@pytest.mark.parametrize(
    ("output", "complaint"), [("/dev/full", "No space left on device"), (".", "Is a directory")]
)
def test_where_nothing_can_be_written_is_said(run_here, job, output, complaint):
    done = run_here(*job, "--output", output)
    assert done.returncode == 1 and complaint in done.stderr, done.stderr


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_run(job):
    """Without a word, as it does for others that write to a pipe."""
    with subprocess.Popen(
        command(*job, "--output", "-"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 1 and "Traceback" not in said


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_takes_ray_along(job, tmp_path):
    """It goes to every process of the group."""
    output, input = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    input.write_text("\n".join(line(number) for number in range(400) if number % 7))
    arguments = [it for it in job if it != "--no-use-ray"]
    whole = command(*arguments, "--input", input, "--output", output)
    with subprocess.Popen(
        whole, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 100
        while written(output) < 2000:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert "the same command" in said
    assert children and psutil.wait_procs(children, timeout=30)[1] == []
