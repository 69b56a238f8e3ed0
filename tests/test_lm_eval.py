"""lm-evaluation-harness gets of `flexgen_ray` what it gets of transformers, task by task."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
import yaml
from transformers import AutoTokenizer

pytest.importorskip("lm_eval", reason="pip install 'flexgen-ray[lm-eval]'")

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
CHOICES = [" red", " blue and green", " y", " no"]
GENERATION = {"max_gen_toks": 12, "until": ["~", "q"], "do_sample": False}
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": CHOICES,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "nothing_before": {
        "output_type": "loglikelihood",
        "doc_to_text": "",
        "doc_to_target": "{{text[:150]}}",  # transformers' has to fit whole
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "generation_kwargs": GENERATION,
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With an end token, which the harness insists on."""
    folder = tiny.save("llama", tmp_path_factory.mktemp("model"))
    tiny.add_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "¦"
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"eos_token_id": 1}))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks on texts of a few to some hundreds of tokens, more than the context."""
    folder = tmp_path_factory.mktemp("tasks")
    places = [(0, 5), (3, 40), (10, 80), (1, 159), (2, 160), (7, 161), (0, 350)]
    docs = [{"text": (TEXT * 5)[at : at + size], "label": at % 4} for at, size in places]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for name, task in TASKS.items():
        source = {
            "task": name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / "docs.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(source | task))
    return folder


def evaluate(model: str, arguments: dict, folder) -> dict:
    """{task: each document's answers by the model}, and the metrics."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import flexgen_ray.integrations.lm_eval  # noqa: F401

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        model, arguments, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, batch_size=1
    )
    samples = {
        name: [it["resps"] for it in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in found["samples"].items()
    }
    return {"samples": samples, "results": found["results"]}


@pytest.fixture(scope="module")
def by_transformers(model, tasks):
    return evaluate("hf", {"pretrained": str(model), "dtype": "float32", "device": "cpu"}, tasks)


@pytest.mark.parametrize("stages", [1, 2])
def test_every_kind_of_task_gives_what_transformers_gives(
    model, tasks, by_transformers, policy_of_all, stages
):
    options = {"dtype": "float32", "use_ray": False, "pipeline_parallel_size": stages}
    options |= {"policy": policy_of_all, "pretrained": str(model)}
    ours = evaluate("flexgen_ray", options, tasks)
    for name in ("choice", "nothing_before", "rolling"):
        for mine, theirs in zip(
            ours["samples"][name], by_transformers["samples"][name], strict=True
        ):
            for (own,), (wanted,) in zip(mine, theirs, strict=True):
                if name != "rolling":
                    (own, is_greedy), (wanted, was_greedy) = own, wanted
                    assert is_greedy == was_greedy
                assert float(own) == pytest.approx(float(wanted), rel=1e-5, abs=1e-3)
    assert ours["samples"]["writing"] == by_transformers["samples"]["writing"]
    answers = [answer for ((answer,),) in ours["samples"]["writing"]]
    assert len(set(answers)) > 2 and any(len(answer) < 12 for answer in answers)


def test_the_command_knows_this_model_and_lm_evals_own(model, tasks, tmp_path):
    script = "from flexgen_ray.integrations.lm_eval_command import main; main()"
    command = [
        sys.executable, "-c", script, "run", "--model", "flexgen_ray", "--model_args",
        f"pretrained={model},use_ray=False,dtype=float32,offload_dir={tmp_path / 'offload'}",
        "--include_path", tasks, "--tasks", "choice", "--output_path", tmp_path / "results",
    ]  # fmt: skip
    done = subprocess.run([str(it) for it in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "results").rglob("results*.json")
    assert "acc,none" in json.loads(path.read_text())["results"]["choice"]
    script = "import flexgen_ray.integrations.lm_eval; from lm_eval.api.registry import get_model;"
    script += "print(get_model('hf').__name__, get_model('flexgen_ray').__name__)"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stdout.split() == ["HFLM", "FlexGenRay"]
