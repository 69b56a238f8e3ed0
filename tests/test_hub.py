"""Models by their names on the Hugging Face hub, and shapes with made-up weights. No network."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from job_files import rows_by_id

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.paths import find_model

NAME = "someone/tiny-llama"
COMMIT = "0" * 40


@pytest.fixture
def hub_cache(text_model, tmp_path, monkeypatch) -> Path:
    """A cache that holds the model, as the hub's library lays it out."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny-llama"
    shutil.copytree(text_model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def generate(run_here, folder: Path, model: object, *more: object):
    (folder / "in.jsonl").write_text(json.dumps({"prompt": [5, 6, 7], "temperature": 0}))
    return run_here(
        "generate", "--model", model, "--input", folder / "in.jsonl", "--output",
        folder / "out.jsonl", "--device", "cpu", "--no-use-ray", "--max-tokens", 2, *more,
    )  # fmt: skip


def test_a_cached_model_runs_by_its_name_offline(run_here, hub_cache, tmp_path):
    done = generate(run_here, tmp_path, NAME)
    assert done.returncode == 0, done.stderr
    (row,) = rows_by_id(tmp_path / "out.jsonl").values()
    assert row["response"]["body"]["usage"]["completion_tokens"] == 2


def test_offline_and_not_cached_says_so(run_here, hub_cache, tmp_path):
    done = generate(run_here, tmp_path, "someone/else")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for word in ("someone/else", str(hub_cache), "HF_HUB_OFFLINE"):
        assert word in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_only_weights_and_what_reads_them_are_downloaded(monkeypatch, hub_cache):
    asked: dict = {}

    def download(name, **options):
        asked.update(options, name=name)
        return hub_cache

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said: list[str] = []
    assert find_model("someone/new", said.append) == hub_cache
    assert asked["name"] == "someone/new" and "someone/new" in said[0]
    find_model(NAME, said.append)
    assert len(said) == 1, "nothing is announced of a cached model"

    def wanted(path: str) -> bool:
        allowed, refused = asked["allow_patterns"], asked["ignore_patterns"]
        return any(fnmatch(path, it) for it in allowed) and not any(
            fnmatch(path, it) for it in refused
        )

    for path in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.model",
                 "model.safetensors.index.json", "merges.txt", "chat_template.jinja"):  # fmt: skip
        assert wanted(path), path
    for path in ("pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "tf_model.h5",
                 "original/params.json", "onnx/model.safetensors", "training_args.pt"):  # fmt: skip
        assert not wanted(path), path


def test_a_dry_run_asks_the_hub_for_no_weights(monkeypatch, text_model, tmp_path):
    """It plans by what describes the model: config and tokenizer."""
    folder = shutil.copytree(text_model, tmp_path / "described")
    asked: list[str] = []

    def download(name, **options):
        asked.extend(options["allow_patterns"])
        (folder / "model.safetensors").unlink(missing_ok=True)
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with LLM("someone/new", dry_run=True, use_ray=False, device="cpu") as llm:
        llm.prepare([llm.request(0, "Hello", SamplingParams(max_tokens=3))])
        assert llm.model == folder
    assert asked and not any(fnmatch("model.safetensors", pattern) for pattern in asked)


@pytest.mark.parametrize(
    ("error", "words"),
    [(GatedRepoError, ["gated", "licence", "HF_TOKEN"]), (RepositoryNotFoundError, ["nor has"])],
)
def test_what_the_hub_refuses_is_explained(monkeypatch, error, words):
    response = SimpleNamespace(headers={}, request=None, status_code=403)

    def download(name, **options):
        raise error("no", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(OSError) as told:
        find_model("someone/closed")
    assert all(word in str(told.value) for word in ["someone/closed", *words])


def test_a_shape_runs_with_made_up_weights_and_only_with_them(run_here, tmp_path):
    done = generate(run_here, tmp_path, "opt-125m")
    assert done.returncode == 1 and "--load-format dummy" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
    done = generate(run_here, tmp_path, "opt-126m", "--load-format", "dummy")
    assert done.returncode == 1 and "opt-125m" in done.stderr
    done = generate(run_here, tmp_path, "opt-125m", "--load-format", "dummy")
    assert done.returncode == 0, done.stderr
    assert len(rows_by_id(tmp_path / "out.jsonl")) == 1
