"""The comparison with peers: same work, same tokens, and a peer's fault is only its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import typer
from typer.testing import CliRunner

from flexgen_ray.cli.bench import contest, page_cache
from flexgen_ray.cli.bench.memory_cgroup import MemoryCgroup
from flexgen_ray.cli.bench.peer_task import PeerRun, PeerTask
from flexgen_ray.cli.bench.peers import peers
from flexgen_ray.cli.bench.random_checkpoints import SHAPES, make_checkpoint
from flexgen_ray.cli.bench.standings import standings
from flexgen_ray.models.config_files import load_config

MAX_TOKENS = 5


@pytest.fixture
def bench(tmp_path, text_model):
    """The command on a tiny model and ragged prompts; returns its result."""
    prompts = tmp_path / "prompts.jsonl"
    texts = ["Hello there", "And you?", "x" * 30, "One more"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    app = typer.Typer()
    app.command()(peers)

    def call(names: str, *options: str, work=("--prompts", str(prompts))) -> dict:
        arguments = ["--model", str(text_model), *work, "--peers", names]
        arguments += ["--max-tokens", str(MAX_TOKENS), "--batch-sizes", "3", "--threads", "1"]
        arguments += ["--device", "cpu", "--offload-dir", str(tmp_path / "offload")]
        arguments += ["--json", str(tmp_path / "out.json"), *options]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        result = json.loads((tmp_path / "out.json").read_text())
        assert json.loads(done.stdout.splitlines()[-1]) == result
        assert not list((tmp_path / "offload").iterdir()), "offload files were left behind"
        return result

    return call


def by_peer(result: dict) -> dict[str, dict]:
    return {entry["peer"]: entry for entry in result["contestants"]}


def assert_all_equal(entry: dict) -> None:
    assert entry["error"] is None
    for run in entry["runs"]:
        assert run["equal_sequences"] == run["sequences"] == 4
        assert run["tokens_per_s"] == pytest.approx(4 * MAX_TOKENS / run["seconds"], rel=0.2)
        assert run["peak_rss_bytes"] > 2**26


def test_transformers_and_we_do_the_same_work_with_the_same_tokens(bench):
    result = bench("transformers,flexgen-ray")
    found = by_peer(result)
    assert_all_equal(found["transformers"])
    assert_all_equal(found["flexgen-ray"])
    ours, theirs = (found[peer]["best"] for peer in ("flexgen-ray", "transformers"))
    ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
    assert found["transformers"]["ratio"] == pytest.approx(ratio, abs=1e-3)
    assert theirs["batch_size"] == 3
    assert {"date", "command", "hardware", "versions", "settings"} <= set(result)
    compared = {"peer": "transformers", "batch_size": 3, "experts": None}
    assert result["settings"]["tokens_compared_to"] == compared
    assert found["flexgen-ray"]["details"]["policy"]["gpu_batch_size"] >= 1


@pytest.mark.slow
def test_a_peer_that_is_missing_or_fails_costs_only_itself(bench, monkeypatch):
    monkeypatch.setitem(contest.PACKAGES, "deepspeed-cpu", ("no_such_package",))
    monkeypatch.setitem(contest.PACKAGES, "no-such-loader", ())
    found = by_peer(bench("deepspeed-cpu,no-such-loader,flexgen-ray", "--repeats", "2"))
    assert "no_such_package" in found["deepspeed-cpu"]["error"]
    assert "KeyError" in found["no-such-loader"]["error"]
    assert found["deepspeed-cpu"]["ratio"] is None
    assert_all_equal(found["flexgen-ray"])
    assert [len(entry["runs"]) for entry in found.values()] == [1, 1, 2]


@pytest.mark.peer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accelerate_generates_the_same_from_disk_and_from_host_memory(bench, dtype):
    pytest.importorskip("accelerate")
    result = bench("transformers,accelerate-cpu,accelerate-disk", "--dtype", dtype)
    for entry in result["contestants"]:
        assert_all_equal(entry)
    source = by_peer(result)["accelerate-disk"]["details"]["weights"]
    assert source == ("the checkpoint" if dtype == "float32" else "a copy in the dtype")


@pytest.mark.peer
def test_every_implementation_of_experts_is_tried_and_airllm_streams_them(
    bench, tmp_path, monkeypatch
):
    pytest.importorskip("airllm")
    small = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    monkeypatch.setitem(SHAPES, "small", SHAPES["qwen3-moe-6gb"] | small)
    folder = make_checkpoint("small", tmp_path / "mixture")
    options = ["--model", str(folder), "--experts", "eager,batched_mm,grouped_mm"]
    work = ("--prompt-len", "8", "--num-prompts", "4")
    result = bench("transformers,airllm,flexgen-ray", *options, work=work)
    for entry in result["contestants"]:
        assert_all_equal(entry)
        assert len(entry["runs"]) == (1 if entry["peer"] == "flexgen-ray" else 3)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--peers", "vllm"), "unknown; there are transformers"),
        (("--dtype", "int8"), "must be one of"),
        (("--page-cache", "hot"), "must be warm or cold"),
        (("--batch-sizes", "8,x"), "numbers from 1 up"),
        (("--prompt-len", "4"), "exclude each other"),
        (("--memory-limit", "1GiB"), "--cpu-memory"),
        (("--max-tokens", "1000"), "context of 160"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(bench, options, message):
    with pytest.raises(ValueError, match=message):
        bench("transformers,flexgen-ray", *options)


def test_standings_show_every_difference_and_the_best_set_up():
    runs = [
        PeerRun("transformers", 1, tokens=[[1, 2], [3, 4]], seconds=4.0),
        PeerRun("transformers", 2, tokens=[[1, 2], [3, 5]], seconds=2.0),
        PeerRun("transformers", 2, tokens=[[1, 2], [3, 4]], seconds=1.0),
        PeerRun("transformers", 2, tokens=[[1, 2], [3, 4]], seconds=8.0),
        PeerRun("transformers", 2, tokens=[[1, 2], [3, 4]], seconds=3.0, experts="eager"),
        PeerRun("flexgen-ray", None, tokens=[[1, 2], [3, 4]], seconds=1.0),
    ]
    theirs, ours = standings(runs)
    assert theirs["tokens_per_s"] == {"1": 1.0, "2": 2.0, "2 eager": 1.333}
    assert theirs["best"] == {"batch_size": 2, "experts": None, "tokens_per_s": 2.0}
    assert (theirs["ratio"], ours["ratio"]) == (2.0, 1.0)
    assert theirs["runs"][1]["first_differences"] == [(1, 1)]
    assert theirs["runs"][1]["equal_sequences"] == 1


def test_peers_answer_their_first_batches_alone(monkeypatch):
    seen = []

    def run(work, peer, setup, timeout):
        seen.append((peer, setup.batch_size, len(work.prompts)))
        return PeerRun(peer, error="not run", **setup._asdict())

    monkeypatch.setattr(contest, "_run_apart", run)
    work = PeerTask("m", [[1]] * 9, 1, "float32", "cpu", 1, "warm", None, None, "s")
    rules = contest.Rules(["transformers", "flexgen-ray"], [2, 5], 1, 1.0, peer_batches=2)
    contest.compete(work, rules, lambda run: None)
    assert seen == [("transformers", 2, 4), ("transformers", 5, 9), ("flexgen-ray", None, 9)]


def test_only_prompts_that_both_answered_are_compared():
    runs = [
        PeerRun("transformers", 1, tokens=[[1, 2], [3, 4]], seconds=4.0),
        PeerRun("flexgen-ray", None, tokens=[[1, 2], [3, 5], [6, 7]], seconds=1.0),
    ]
    theirs, ours = standings(runs)
    (run,) = ours["runs"]
    assert (run["sequences"], run["compared_sequences"], run["equal_sequences"]) == (3, 2, 1)
    assert theirs["ratio"] == 6.0


def test_nameless_open_files_belong_to_their_folder(tmp_path):
    (tmp_path / "named").write_bytes(b"x")
    with (tmp_path / "gone").open("wb") as gone:
        gone.write(b"y" * 10)
        gone.flush()
        (tmp_path / "gone").unlink()
        found = page_cache.files_in(str(tmp_path))
        assert sorted(path.stat().st_size for path in found) == [1, 10]
        page_cache.drop(found)


def test_a_memory_limit_holds_its_command_alone_and_leaves_nothing():
    command = [sys.executable, "-c", "len(bytearray(200 * 2**20))"]
    try:
        with MemoryCgroup(100 * 2**20) as cgroup:
            killed = subprocess.run(cgroup.wrap(command), timeout=60, check=False)
            assert killed.returncode == -9
            assert cgroup.killed_for_memory()
            assert (cgroup.peak_bytes() or 0) <= 100 * 2**20
    except OSError as error:
        assert "leave --memory-limit out" in str(error)
        pytest.skip(str(error))
    assert not cgroup.folder.exists()


def test_a_made_checkpoint_is_a_model_folder(tmp_path, monkeypatch):
    small = SHAPES["llama-1.2gb"] | {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}
    monkeypatch.setitem(SHAPES, "small", small | {"intermediate_size": 8})
    folder: Path = make_checkpoint("small", tmp_path / "model", "bfloat16")
    config = load_config(folder)
    assert (config.hidden_size, config.dtype, config.tie_word_embeddings) == (32, "bfloat16", True)
    assert len(tiny.references(folder, [[1, 2, 3]], 2)[0].tokens) == 2
    with pytest.raises(ValueError, match="there are"):
        make_checkpoint("huge", tmp_path / "other")
