"""The benchmarks that users run on their machines: `bench workload` and `bench scaling`."""

from __future__ import annotations

import json

import pytest
from bench_results import bench
from typer.testing import CliRunner

from flexgen_ray.cli.bench import runs
from flexgen_ray.cli.bench.lengths import read_lengths
from flexgen_ray.cli.bench.scaling import RATES, compare_with_copies, decode_rate
from flexgen_ray.cli.main import app
from flexgen_ray.llm import LLM
from flexgen_ray.runtime.meter import VisitTiming

ON_CPU = ("--dtype", "float32", "--device", "cpu", "--cpu-memory", "64MiB", "--gpu-memory", "64MiB",
          "--disk-memory", "64MiB")  # fmt: skip
POLICY = "gpu_batch_size: 3\nnum_gpu_batches: 2\n"


def test_a_mixture_of_lengths_is_run_whole_and_its_waste_is_told(tiny_models, tmp_path):
    rows = [(5, 4), (30, 12), (9, 2), (17, 12), (2, 7), (40, 1), (8, 8)]
    lengths, policy = tmp_path / "lengths.jsonl", tmp_path / "policy.yaml"
    lengths.write_text(
        "".join(f'{{"prompt_len": {prompt}, "max_tokens": {new}}}\n\n' for prompt, new in rows)
    )
    policy.write_text(POLICY)
    result = bench(
        "workload", "--model", tiny_models["opt"][0], "--lengths", lengths, "--policy", policy,
        "--offload-dir", tmp_path, *ON_CPU,
    )  # fmt: skip
    new, totals = sum(new for _, new in rows), [prompt + new for prompt, new in rows]
    assert result["num_requests"] == len(rows) and result["prompt_len"]["max"] == 40
    tokens = result["generated_tokens_per_s"] * result["total_s"]
    assert tokens == pytest.approx(new, rel=0.01)
    assert 0 < result["fraction_of_bound"] <= 1 and result["cores_elsewhere"] >= 0
    slots = 6 * result["passes"]
    assert result["slots_without_token"] == pytest.approx(1 - new / slots, abs=1e-4)
    assert result["unused_cache"] == pytest.approx(1 - sum(totals) / (7 * 42), abs=0.03)
    assert result["longest_to_mean"] == pytest.approx(42 / (sum(totals) / 7), abs=0.01)
    # The six longest requests have 11 pages; within a pass a token that came before is cached.
    live = sum(prompt + made for prompt, new in rows for made in range(new))
    assert result["live_cache"] == pytest.approx(live / (slots * 32), abs=1e-3)
    assert result["useful_tokens_per_s"] == pytest.approx(new / result["wall_s"], rel=0.01)
    both = result["useful_with_prompts_per_s"] * result["wall_s"]
    assert both == pytest.approx(sum(totals), rel=0.01) and result["recomputed_tokens"] == 0
    padded = 3 * max(totals[:3]) + 3 * max(totals[3:6]) + totals[6]
    assert result["padding_of_batches"] == pytest.approx(1 - sum(totals) / padded, abs=1e-4)
    assert result["lengths"] == "lengths.jsonl" and {"hardware", "versions", "command"} <= set(
        result
    )


def test_lengths_come_from_requests_too_and_a_bad_line_is_named(chat_model, tmp_path):
    file = tmp_path / "requests.jsonl"
    body = {"model": "any", "prompt": [5, 6, 7], "max_tokens": 9}
    lines = [
        {"prompt": "In the", "max_tokens": 3},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body},
        {"prompt_len": 11},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with LLM(chat_model, use_ray=False, device="cpu", dry_run=True) as llm:
        text, chat, batch, plain = read_lengths(file, llm, 20)
        assert text == (len(llm.tokenizer.encode("In the")), 3)
        assert chat == (len(llm.tokenizer.encode_chat(lines[1]["messages"])), 20)
        assert (batch, plain) == ((3, 9), (11, 20))
        built_in = read_lengths(None, llm, 20)
        assert len(built_in) == 48 and max(map(sum, built_in)) <= 1200
        for bad, said in (('{"prompt_len": 0}', "prompt_len is 0"), ('{"x": 1}', "prompt"),
                          ("[]", "object")):  # fmt: skip
            file.write_text(f'{{"prompt_len": 1}}\n{bad}\n')
            with pytest.raises(ValueError, match=f"line 2: .*{said}"):
                read_lengths(file, llm, 20)
        file.write_text("\n")
        with pytest.raises(ValueError, match="has no requests"):
            read_lengths(file, llm, 20)


def test_stages_are_compared_with_copies_of_one(tiny_models, local_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "name_disturbance", lambda cores: [])  # other tests run beside
    policy, picture = tmp_path / "policy.yaml", tmp_path / "scaling.png"
    policy.write_text(POLICY)
    result = bench(
        "scaling", "--model", tiny_models["opt"][0], "--pipeline-parallel-sizes", "1,2",
        "--prompt-len", 6,
        "--max-tokens", 6, "--num-prompts", 6, "--policy", policy, "--offload-dir", tmp_path,
        "--json", tmp_path / "result.json", "--plot", picture, *ON_CPU,
    )  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text()) == result
    (found,) = result["models"].values()
    alone, both = found["stages"]["1"], found["stages"]["2"]
    assert (alone["sequences"], both["sequences"]) == (6, 12)
    assert both["blocks_in_flight"] == 2 and len(both["policies"]) == 2 and both["hosts"] == 1
    assert alone["cores_elsewhere"] >= 0
    for phase in RATES:
        ratio = both[f"{phase}_tokens_per_s"] / alone[f"{phase}_tokens_per_s"]
        assert found[f"{phase}_of_one"]["2"] == pytest.approx(ratio, abs=2e-3)
        assert found[f"{phase}_of_copies"]["2"] == pytest.approx(ratio / 2, abs=2e-3)
    assert all(0 < share <= 1 for share in both["busy_share_of_stages"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_decode_throughput_counts_only_passes_in_which_every_block_decodes():
    prompts = [VisitTiming(1.0, 4, 40, {}), VisitTiming(2.0, 4, 40, {})]
    visits = prompts + [VisitTiming(3.0 + i, 4, 0, {}) for i in range(6)]
    assert decode_rate(visits, 2) == pytest.approx(4.0)  # visits that end at 4, 5 and 6
    assert decode_rate(visits, 2, time_scale=0.5) == pytest.approx(2.0)
    assert decode_rate(visits[:4], 2) is None


def test_decode_throughput_counts_no_pass_in_which_a_row_begins_or_ends():
    counts = [(2, 40), (4, 40), *[(4, 0)] * 6, (3, 0), (1, 0)]
    ends = [0.0, 2.0, *(3.0 + i for i in range(6)), 8.1, 8.2]
    visits = [VisitTiming(end, *count, {}) for end, count in zip(ends, counts, strict=True)]
    assert decode_rate(visits, 1) == pytest.approx(4.0)
    staggered = [VisitTiming(float(i), count, 0, {}) for i, count in enumerate((4, 3, 2, 1))]
    assert decode_rate([VisitTiming(-1.0, 5, 40, {}), *staggered], 1) is None


def test_ratios_need_a_run_of_one_stage():
    rates = {"decode_tokens_per_s": None, "generation_tokens_per_s": 3.0}
    assert compare_with_copies({"2": rates}) == {}
    faster = {"decode_tokens_per_s": 8.0, "generation_tokens_per_s": 9.0}
    ratios = compare_with_copies({"1": rates, "2": faster})
    assert ratios == {
        "generation_of_one": {"1": 1.0, "2": 3.0}, "generation_of_copies": {"1": 1.0, "2": 1.5}
    }  # fmt: skip


def test_a_benchmark_that_left_the_command_line_says_where_it_is():
    done = CliRunner().invoke(app, ["bench", "lanes", "--op-ms", "1"])
    assert done.exit_code == 2
    assert "`bench lanes` is now `python -m benchmarks.lanes`, in a checkout" in done.output
