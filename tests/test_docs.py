"""README.md and docs/ are right: examples run, options exist, links and paths lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import documents
import pytest
import typer
from documents import DOCUMENTS, PACKAGE, ROOT, Block
from ray.scripts.scripts import cli as ray_cli

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.batch.request_lines import read_lines
from flexgen_ray.cli.main import app
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.models import config_files, registry
from flexgen_ray.planner.comparison import read_job, read_nodes
from flexgen_ray.planner.stage_policies import StagePolicies

# Commands that are not run here, by a part of them, and why. Those of this project, of its
# benchmarks and of Ray are parsed all the same.
NOT_RUN = {
    "python3 -m venv": "makes an environment; .ci/run does it",
    ". .venv/bin/activate": "enters an environment; .ci/run does it",
    "pip install": "needs a package index; .ci/run does it",
    "python -m pytest": "these tests",
    "ruff ": "needs seconds for the whole project; .ci/run does it",
    "mypy": "needs a minute; .ci/run does it",
    "python -m benchmarks.": "takes minutes; tests/test_bench.py runs them small",
    "flexgen-ray bench": "takes minutes; tests/test_bench.py runs them small",
    "flexgen-ray calibrate": "takes minutes; tests/test_calibrate.py runs it small",
    "flexgen-ray qualify": "takes minutes; tests/test_qualify.py runs it tiny",
    "python -m flexgen_ray qualify": "takes minutes; tests/test_qualify.py runs it tiny",
    "bash benchmarks/pack_wheels.sh": "needs a package index",
    "source ": "needs the bundle that pack_wheels.sh makes",
    "flexgen-ray demo": "fetches a model; tests/test_demo.py runs it without",
    "flexgen-ray-lm-eval": "needs lm-eval; tests/test_lm_eval.py",
    "--policy stages.yaml": "is for a model of 48 layers; the policy itself is read here",
    "--nodes nodes.yaml": "takes seconds to plan; the file itself is read here",
    "bash examples/submit_job.sh": "needs a cluster; tests/test_job_submit.py",
    "export RAY_AUTH_MODE": "sets a variable",
    "ray ": "needs a cluster or a cloud",
    "aws ": "needs a cloud",
    "docker ": "needs Docker",
    "kubectl ": "needs Kubernetes",
    "base64 ": "decodes what kubectl prints",
}
FENCES = {"", "text", "bash", "python", "yaml", "json", "csv"}  # the first two hold drawings
# Options of documents' sentences that are other programs', or hidden.
ELSEWHERE = {
    "--stages": "hidden", "--sparsity": "hidden", "--no-ray": "hidden", "--dummy-weights": "hidden",
    "--fast": "gone, as the changelog says", "--a-b": "any option",
    "--model_args": "of lm-eval",
}  # fmt: skip
SMALL = {
    "--shared-prefix": "16", "--prefix-groups": "1",
    "--gpu-memory": "64MiB", "--cpu-memory": "64MiB", "--disk-memory": "64MiB",
    "--offload-dir": "offload", "--pipeline-parallel-size": "2", "--context": "64",
    "--stride": "32",
}  # fmt: skip
SMALL_JOB = ["--num-requests", "2", "--prompt-len", "17", "--max-tokens", "4"]
HERE = ["--device", "cpu", "--dtype", "float32", "--no-use-ray"]


def of_language(*languages: str) -> list[Block]:
    return [
        block
        for document in DOCUMENTS
        for block in documents.blocks(document)
        if block.language in languages
    ]


def names(documents_or_blocks: Any) -> str:
    path = getattr(documents_or_blocks, "document", documents_or_blocks)
    return str(path.relative_to(ROOT)) + f":{getattr(documents_or_blocks, 'line', '')}".rstrip(":")


def reason_not_to_run(words: list[str]) -> str | None:
    """Key of NOT_RUN that stands for a command; None for one that is run."""
    command = " ".join(words).removeprefix("head=$(")
    found = [part for part in NOT_RUN if command.startswith(part)]
    found += [part for part in NOT_RUN if part.startswith("--") and part in command]
    return found[0] if found else None


def parse(command: Any, words: list[str], name: str) -> None:
    """Parse a command line as the program does; its own error says what is wrong."""
    while hasattr(command, "get_command"):
        subcommand = command.get_command(None, words[0])
        assert subcommand is not None, f"{name} has no command {words[0]}"
        command, words, name = subcommand, words[1:], f"{name} {words[0]}"
    command.make_context(name, list(words), resilient_parsing=False)


def parse_generate(words: list[str]) -> None:
    parse(typer.main.get_command(app), ["generate", *words], "flexgen-ray")


def parse_ray(words: list[str]) -> None:
    """Check a command of Ray's, and the one of this project that it passes on."""
    outer, inner = words, None
    if "--" in words:
        outer, inner = words[: words.index("--")], words[words.index("--") + 1 :]
    command: Any = ray_cli
    while hasattr(command, "commands"):
        command, outer = command.commands[outer[0]], outer[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in outer if word.startswith("-")} <= known, words
    if inner:
        parse_generate(inner[4:] if inner[0] == "python" else inner)


def parse_benchmark(words: list[str]) -> None:
    from importlib import import_module

    from benchmarks.command import as_app

    name = words[2].removeprefix("benchmarks.")
    benchmark = getattr(import_module(words[2]), name)
    parse(typer.main.get_command(as_app(benchmark)), words[3:], words[2])


def check_command(words: list[str]) -> None:
    """Parse a command of this project, its benchmarks or Ray; others are left alone."""
    if words[0] == "flexgen-ray":
        parse(typer.main.get_command(app), words[1:], "flexgen-ray")
    elif words[:2] == ["bash", "examples/submit_job.sh"]:
        parse_generate(["--model", "m", "--input", "i", "--output", "o", *words[5:]])
    elif words[0] == "ray":
        parse_ray(words[1:])
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        parse_benchmark(words)


@pytest.fixture
def folder(chat_model, tmp_path, monkeypatch) -> Path:
    """A working folder with what the documents' commands read, the model a tiny one."""
    (tmp_path / "opt-30b").symlink_to(chat_model)
    (tmp_path / "offload").mkdir()
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello", "max_tokens": 2}\n')
    (tmp_path / "wiki.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    (tmp_path / "lambada.jsonl").write_text('{"text": "one two three"}\n')
    (tmp_path / "policy.yaml").write_text("gpu_batch_size: 2\n")
    for name in ("nodes.yaml", "lengths.csv", "hardware.yaml"):
        block = next(it for it in of_language("yaml", "csv") if file_of(it) == name)
        (tmp_path / name).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def file_of(block: Block) -> str | None:
    return "lengths.csv" if block.language == "csv" else block.file_name


def made_small(words: list[str]) -> list[str]:
    """A command's words for a tiny model on this machine."""
    kind, rest = words[1], list(words[2:])
    for place, word in enumerate(rest[:-1]):
        rest[place + 1] = SMALL.get(word, rest[place + 1])
    if kind == "plan":
        rest = ["opt-125m" if word in ("opt-30b", "llama-3-70b") else word for word in rest]
        rest += [] if {"--hardware", "--nodes"} & set(rest) else ["--hardware", "cpu"]
        rest += ["--num-requests", "2"] if "--workload" in rest else SMALL_JOB
    elif kind in ("generate", "eval"):
        rest += HERE
    return [kind, *rest]


def python_here(text: str) -> str:
    """A Python example on this machine, in this process."""
    text = re.sub(r'="\d+GiB"', '="64MiB"', text)
    return text.replace('LLM("./opt-30b"', 'LLM("./opt-30b", use_ray=False, dtype="float32"')


# It compiles kernels for seconds, as tests/test_quantize.py does in every run.
SLOW = ROOT / "docs/compression.md"


@pytest.mark.parametrize(
    "document",
    [pytest.param(it, marks=pytest.mark.slow if it == SLOW else []) for it in DOCUMENTS],
    ids=names,
)
def test_examples_run(document, folder, run_here, monkeypatch):
    """In the document's order: what one writes, the next may read."""
    variables: dict[str, Any] = {"__name__": str(document)}
    for block in documents.blocks(document):
        if block.file_name and block.language == "yaml":
            (folder / block.file_name).write_text(block.text)
        elif block.language == "json" and '"response"' not in block.text:
            (folder / "in.jsonl").write_text(block.text)
        elif block.language == "python":
            exec(compile(python_here(block.text), str(block), "exec"), variables)
        elif block.language == "bash":
            for words in block.commands():
                if reason_not_to_run(words) is None:
                    done = run_here(*made_small(words))
                    assert done.returncode == 0, (str(block), shlex.join(words), done.stderr)


def test_every_command_is_run_or_listed_with_the_reason():
    used = Counter()
    for block in of_language("bash"):
        for words in block.commands():
            reason = reason_not_to_run(words)
            runs = words[0] == "flexgen-ray"
            assert runs or reason, f"{block}: {shlex.join(words)}"
            used[reason] += 1
    assert set(NOT_RUN) == set(used) - {None}
    assert used[None] > 15


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_options_of_commands_exist(document, folder):
    for block in documents.blocks(document):
        if block.language == "bash":
            for words in block.commands():
                check_command(words)


def all_options() -> set[str]:
    """Options of every command of this project and of every benchmark in the documents."""
    from importlib import import_module

    from benchmarks.command import as_app

    pending: list[Any] = [typer.main.get_command(app)]
    for block in of_language("bash"):
        for words in block.commands():
            if words[0] == "python" and words[2].startswith("benchmarks."):
                name = words[2].removeprefix("benchmarks.")
                benchmark = getattr(import_module(words[2]), name)
                pending.append(typer.main.get_command(as_app(benchmark)))
    found = {"--help"}
    while pending:
        command = pending.pop()
        if hasattr(command, "list_commands"):
            pending += [command.get_command(None, it) for it in command.list_commands(None)]
        found |= {
            option
            for parameter in command.params
            for option in [*parameter.opts, *parameter.secondary_opts]
        }
    return found


def test_options_within_sentences_exist():
    known = all_options() | set(ELSEWHERE)
    for document in [*DOCUMENTS, ROOT / "CHANGELOG.md"]:
        for code in documents.inline_code(document):
            if not code.startswith(("ray ", "uv ", "python -m pytest")):
                unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known
                assert not unknown, f"{document.name}: `{code}` has {unknown}"


READERS = {
    "policy": StagePolicies.from_yaml,
    "stages": StagePolicies.from_yaml,
    "hardware": Hardware.from_yaml,
    "nodes": read_nodes,
}


@pytest.mark.parametrize("block", of_language("yaml", "csv"), ids=names)
def test_files_are_read_as_they_are_shown(block, tmp_path):
    path = tmp_path / (file_of(block) or "")
    path.write_text(block.text)
    if block.language == "csv":
        assert read_job(path).num_requests == len(block.text.splitlines()) - 1
    else:
        assert READERS[path.stem](path)


def shape(value: object) -> object:
    """Names and types of a JSON value."""
    if isinstance(value, dict):
        return {name: shape(part) for name, part in value.items()}
    return [shape(value[0])] if isinstance(value, list) else type(value).__name__


def test_json_lines_are_input_that_is_taken_or_output_as_it_is_written(folder, run_here):
    shown = []
    for block in of_language("json"):
        lines = block.text.encode().splitlines()
        if '"response"' in block.text:
            shown += [json.loads(line) for line in lines]
            continue
        for line in read_lines(lines, SamplingParams()):
            assert line.error is None, (str(block), line.error)
    line = {"custom_id": "france", "prompt": "The capital of France is", "max_tokens": 3}
    (folder / "in.jsonl").write_text(json.dumps(line))
    model = ["--model", "opt-30b", *HERE]
    run_here("generate", *model, "--input", "in.jsonl", "--output", "out.jsonl")
    written = json.loads((folder / "out.jsonl").read_text())
    assert [shape(row) for row in shown] == [shape(written)]


def test_the_family_that_is_shown_runs(chat_model, tmp_path, monkeypatch):
    """docs/adding-a-model.md's, on a Llama's weights, whose tokens it changes."""
    module = ModuleType("parallel")
    for block in documents.blocks(ROOT / "docs/adding-a-model.md"):
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), module.__dict__)
    folder = Path(shutil.copytree(chat_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["ParallelForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(registry.FAMILIES, "parallel", module)
    parse_config = module.__dict__["parse_parallel"]
    monkeypatch.setitem(config_files.ARCHITECTURES, "ParallelForCausalLM", parse_config)
    tokens = []
    for model in (chat_model, folder):
        with LLM(model, use_ray=False, dtype="float32", device="cpu") as llm:
            params = SamplingParams(max_tokens=8, temperature=0.0)
            tokens.append(llm.generate("Hello", params)[0].outputs[0].token_ids)
    assert len(tokens[1]) == 8 and tokens[0] != tokens[1]


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=names)
def test_links_and_paths_lead_somewhere(document):
    for link in documents.links(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in documents.anchors(target), link
    for path in documents.paths(document):
        assert documents.exists(path, document), path


def test_every_block_says_what_it_is():
    for document in DOCUMENTS:
        for block in documents.blocks(document):
            assert block.language in FENCES, str(block)
            assert block.language != "yaml" or block.file_name, str(block)


def test_every_result_is_shown_and_every_shown_one_is_there():
    results = {path.name for path in (ROOT / "docs/results").iterdir()}
    mentioned = {
        Path(link).name
        for document in DOCUMENTS
        for link in documents.links(document)
        if "results/" in link and Path(link).name != "results"
    }
    assert mentioned == results


def result(name: str) -> Any:
    return json.loads((ROOT / f"docs/results/{name}.json").read_text())


def test_what_the_readme_makes_one_expect_is_in_result_files():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\|.*?\| ([\d.]+) tokens/s \| (measured|predicted|emulated)", readme, re.MULTILINE
    )
    plans = {case["command"]: case["tokens_per_s"] for case in result("plans-predicted")["cases"]}
    (ours,) = (
        it for it in result("peers-disk-warm-cpu")["contestants"] if it["peer"] == "flexgen-ray"
    )
    emulated = result("scaling-emulated")["models"]
    on_4090 = "flexgen-ray plan --model llama-3-70b --hardware rtx4090"
    expected = [
        ("measured", result("demo-cpu")["generated_tokens_per_s"]),
        ("measured", ours["best"]["tokens_per_s"]),
        ("predicted", plans["flexgen-ray plan --model opt-30b --hardware t4"]),
        ("predicted", plans[on_4090]),
        ("predicted", plans[f"{on_4090} --weight-bits 4 --cache-bits 4"]),
        ("predicted", plans["flexgen-ray plan --model llama-3-70b --hardware h100"]),
        ("emulated", emulated["opt-30b"]["stages"]["4"]["generation_tokens_per_s"]),
        ("emulated", emulated["opt-175b"]["stages"]["4"]["generation_tokens_per_s"]),
    ]
    assert [how for _, how in rows] == [how for how, _ in expected]
    for (shown, _), (_, exact) in zip(rows, expected, strict=True):
        assert float(shown) == pytest.approx(exact, rel=0.03)


def test_the_tree_names_every_folder_of_the_package():
    (tree,) = (
        block
        for block in documents.blocks(ROOT / "docs/design.md")
        if block.text.startswith("flexgen_ray/\n")
    )
    shown = re.findall(r"^  ([\w./]+?)/? ", tree.text, re.MULTILINE)
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(shown)
    assert all((PACKAGE / name).exists() for name in shown)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250
