"""`generate --dry-run` and `--hardware`: what a job would take, and no trace of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import ray

from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.llm import LLM
from flexgen_ray.request import SamplingParams


@pytest.fixture
def input(tmp_path) -> Path:
    lines = [
        json.dumps({"custom_id": "a", "prompt": "Hello there, how", "max_tokens": 8}),
        json.dumps({"custom_id": "b", "prompt": "x" * 64, "max_tokens": 16, "stop": "y"}),
        json.dumps({"custom_id": "c", "messages": [{"role": "user", "content": "Hi"}]}),
        "no json",
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(it): it.read_bytes() for it in folder.rglob("*") if it.is_file()}


def rehearse(run_here, folder: Path, input: Path, *more: object):
    before, ray_ran = files(folder), ray.is_initialized()
    done = run_here("generate", "--input", input, "--dry-run", "--offload-dir", folder, *more)
    assert files(folder) == before and ray.is_initialized() == ray_ran
    return done


def test_a_shape_on_a_preset_needs_neither_gpu_nor_weights_nor_output(run_here, tmp_path, input):
    done = rehearse(
        run_here, tmp_path, input, "--model", "opt-6.7b", "--load-format", "dummy",
        "--plan-for", "t4", "--gpu-memory", "6GiB",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nothing was written and no weights were loaded" in done.stdout
    assert "4 lines to answer; 1 would get an error row, the first line-4: " in done.stdout
    assert "the longest 16 (estimated as 4 bytes per token" in done.stdout
    assert "opt-6.7b in float16 on t4" in done.stdout
    (gpu,) = re.findall(r"GPU ([\d.]+) GiB of 5.9 GiB", done.stdout)
    assert 0 < float(gpu) <= 5.9
    assert re.search(
        r"predicted: 3 answers with .* take about .*; by the rates of t4\n", done.stdout
    )


def test_stages_are_a_machine_each(run_here, tmp_path, input):
    done = rehearse(
        run_here, tmp_path, input, "--model", "opt-1.3b", "--load-format", "dummy",
        "--plan-for", "t4", "--pipeline-parallel-size", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"stage [01] \(layers \d+ to \d+\) on GPU/host/disk: ", done.stdout)) == 2


def test_here_the_output_counts_and_is_left_as_it_is(run_here, tmp_path, input, chat_model):
    output = tmp_path / "out.jsonl"
    output.write_text('{"custom_id": "b"}\n{"custom_id": "c", "torn')
    arguments = ("--model", chat_model, "--output", output, "--device", "cpu", "--cpu-memory")
    arguments = *arguments, "200MiB", "--gpu-memory", "100MiB"
    done = rehearse(run_here, tmp_path, input, *arguments)
    assert done.returncode == 0, done.stderr
    assert "input: 3 lines to answer, 1 answered already; 1 would get" in done.stdout
    assert "guessed" not in done.stdout and "no prediction: " in done.stdout
    anew = rehearse(run_here, tmp_path, input, *arguments, "--overwrite")
    assert "input: 4 lines to answer; 1 would get" in anew.stdout


def test_what_would_stop_the_job_stops_the_dry_run(run_here, tmp_path, input):
    shape = "--model", "opt-6.7b", "--load-format", "dummy", "--plan-for", "t4"
    for more, complaint in (
        (("--gpu-memory", "30GiB"), "more than the 15.0 GiB free on t4"),
        (("--cpu-memory", "1MiB", "--disk-memory", "1MiB", "--gpu-memory", "1GiB"), "GiB"),
        (("--max-latency", "0.001"), "0.001"),
        (("--max-latency", "-1"), "above 0"),
        (("--plan-for", "t5"), "presets are"),
    ):
        done = rehearse(run_here, tmp_path, input, *shape, *more)
        assert done.returncode == 1 and complaint in done.stderr, (more, done.stderr)
    input.write_text("no json\n")
    done = rehearse(run_here, tmp_path, input, *shape)
    assert done.returncode == 1 and "none of the 1 lines can be answered" in done.stderr


def test_without_a_dry_run_an_output_is_required(run_here, input):
    done = run_here("generate", "--model", "opt-1.3b", "--load-format", "dummy", "--input", input)
    assert done.returncode not in (0, 1, 2) or "--output" in done.stderr
    assert "--output" in done.stderr and "--dry-run" in done.stderr


def test_a_bound_on_latency_is_the_plans():
    def block_seconds(max_latency: float | None) -> float:
        notes: list[str] = []
        with LLM(
            "opt-1.3b", load_format="dummy", plan_for="t4", dry_run=True, gpu_memory="1GiB",
            max_latency=max_latency, on_progress=lambda event: notes.append(event.note),
        ) as llm:  # fmt: skip
            params = SamplingParams(max_tokens=16)
            llm.prepare([llm.request(i, [1] * 400, params) for i in range(6)])
            with pytest.raises(RuntimeError, match="dry_run"):
                list(llm.stream([llm.request(0, [1], params)]))
            assert any(note.startswith("predicted: 6 answers") for note in notes)
            return llm.report.forecast.block_seconds

    unbounded = block_seconds(None)
    assert block_seconds(2 * unbounded) <= 2 * unbounded
    with pytest.raises(ValueError, match="raise --max-latency"):
        block_seconds(0.1 * unbounded)


def test_given_hardware_plans_a_run_on_this_machine(text_model):
    notes: list[str] = []
    options = {"dtype": "float32", "device": "cpu", "use_ray": False, "cpu_memory": "64MiB"}
    with LLM(
        text_model, plan_for="cpu", gpu_memory="64MiB", **options,
        on_progress=lambda event: notes.append(event.note),
    ) as llm:  # fmt: skip
        (output,) = llm.generate("Hello", SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 3
        assert llm.machines[0].hardware == Hardware.preset("cpu")
        assert [note for note in notes if note][0].endswith("rates of cpu")
        assert any(line.startswith("predicted") for line in llm.report.lines())
    with pytest.raises(ValueError, match="hardware t4 has a GPU"):
        LLM(text_model, plan_for="t4", **options)


def test_a_plan_for_rows_that_enter_one_by_one_fits_its_budget_also_when_it_is_given():
    """Where many equal requests wait, rows are half grown on average, and more of them fit."""

    def policy_of(**options):
        with LLM(
            "opt-1.3b", load_format="dummy", plan_for="t4", dry_run=True, gpu_memory="4GiB",
            cpu_memory="8GiB", disk_memory="1GiB", **options,
        ) as llm:  # fmt: skip
            params = SamplingParams(max_tokens=512)
            llm.prepare([llm.request(i, [1] * 100, params) for i in range(3000)])
            (plan,) = llm.plans
            assert plan.workload.mean_len < 100 + 512
            return plan.policy

    planned = policy_of()
    assert policy_of(policy=planned) == planned
