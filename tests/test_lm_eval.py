"""lm-evaluation-harness gets from `flexgen_ray` what it gets from transformers, task by task."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_ray import SamplingParams

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


@pytest.fixture(scope="module")
def bos_model(tmp_path_factory):
    """A model whose tokenizer begins every text with a BOS token, as Llama's do."""
    folder = tiny.save("llama", tmp_path_factory.mktemp("bos"))
    tiny.add_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begin = {"single": "¤ $A", "pair": "¤ $A $B", "special_tokens": [("¤", 0)]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**begin)
    tokenizer.add_special_tokens({"bos_token": "¤", "eos_token": "¦"})
    tokenizer.save_pretrained(folder)
    turn = "<{{ message.role }}>{{ message.content }}"
    refuse = "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(
        f"{{% for message in messages %}}{refuse}{turn}{{% endfor %}}"
        "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    )
    return folder


def ours(folder, **options):
    from flexgen_ray.integrations.lm_eval import FlexGenRay

    options |= {"use_ray": False, "dtype": "float32", "device": "cpu"}
    return FlexGenRay(str(folder), **options)


def theirs(folder, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), dtype="float32", device="cpu", batch_size=1, **options)


def instances(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=it, idx=0) for it in arguments]


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_a_text_is_scored_once_after_its_bos(bos_model, add_bos_token):
    texts = [TEXT, TEXT[:40], "¤" + TEXT, TEXT * 5]
    llm = ours(bos_model, add_bos_token=add_bos_token)
    found = llm.loglikelihood_rolling(instances("loglikelihood_rolling", *((it,) for it in texts)))
    model = AutoModelForCausalLM.from_pretrained(bos_model, dtype=torch.float32)
    for text, value in zip(texts[:3], found, strict=False):
        ids = torch.tensor([[0, *(ord(it) - 30 for it in text.removeprefix("¤"))]])
        with torch.inference_mode():
            logprobs = model(ids).logits.log_softmax(-1)
        wanted = logprobs[0, :-1].gather(1, ids[0, 1:, None]).sum()
        assert value == pytest.approx(float(wanted), rel=1e-5)
    # In windows too; transformers' own counts P(BOS | BOS) unless it adds none itself.
    long = instances("loglikelihood_rolling", (texts[3],))
    (wanted,) = theirs(bos_model, add_bos_token=False).loglikelihood_rolling(
        long, disable_tqdm=True
    )
    assert found[3] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_bos_and_max_length_are_the_harness_s_own(bos_model, options):
    options |= {"max_length": 50}
    pairs = instances(
        "loglikelihood", ("It was a", " day"), ("", "It was"), ("¤It was", " bright"),
        (TEXT, " red"),
    )  # fmt: skip
    llm, peer = ours(bos_model, **options), theirs(bos_model, **options)
    assert llm.max_length == peer.max_length == 50
    for text in (TEXT, "¤" + TEXT, "x"):
        assert llm.tok_encode(text) == peer.tok_encode(text)
    for own, wanted in zip(
        llm.loglikelihood(pairs, disable_tqdm=True),
        peer.loglikelihood(pairs, disable_tqdm=True),
        strict=True,
    ):
        assert own[0] == pytest.approx(wanted[0], rel=1e-5) and own[1] == wanted[1]


def test_add_bos_token_adds_one_where_the_tokenizer_adds_none(model, bos_model, tmp_path):
    folder = shutil.copytree(bos_model, tmp_path / "model")
    shutil.copy(model / "tokenizer.json", folder)
    assert ours(folder).tok_encode("x") == [90] and ours(folder, add_bos_token=True).tok_encode(
        "x"
    ) == [0, 90]


def test_thinking_is_left_to_the_template_and_cut_from_the_answer(bos_model):
    chat = [{"role": "user", "content": "Hi"}]
    assert ours(bos_model).apply_chat_template(chat) == "<user>Hi"
    quiet = ours(bos_model, enable_thinking=False)
    assert quiet.apply_chat_template(chat) == "<user>HiFalse"
    with pytest.warns(UserWarning, match="no system.*system messages are left out"):
        system = {"role": "system", "content": "Be brief."}
        assert quiet.apply_chat_template([system, *chat]) == "<user>HiFalse"
    asked = instances("generate_until", ("Hello", {"max_gen_toks": 12, "until": []}))
    (whole,) = ours(bos_model).generate_until(asked)
    thoughtful = ours(bos_model, enable_thinking=True, think_end_token=whole[4])
    assert thoughtful.apply_chat_template(chat) == "<user>HiTrue"
    assert thoughtful.generate_until(asked) == [whole.split(whole[4])[-1].lstrip()]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'; it must be True, False or None"),
        ({"enable_thinking": 1}, "enable_thinking is 1; it must be True, False or None"),
        ({"enable_thinking": True}, "needs the text that ends the thoughts"),
        ({"max_length": 161}, "max_model_len is 161, but the model's context is 160"),
        ({"max_length": "long"}, "max_model_len is 'long'; it must be"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"parallelize": True}, "LLM: unknown option 'parallelize'"),
        ({"trust_remote_code": True}, "code from a model's folder is never run"),
    ],
)
def test_options_are_checked_where_they_enter(bos_model, options, said):
    from flexgen_ray.integrations.lm_eval import FlexGenRay

    with pytest.raises((ValueError, TypeError)) as refused:
        FlexGenRay(str(bos_model), use_ray=False, **options)
    assert said in str(refused.value)


def test_a_task_s_sampling_counts_or_is_refused(bos_model):
    llm = ours(bos_model)

    def answer(**wanted) -> str:
        asked = {"max_gen_toks": 12, "until": []} | wanted
        (text,) = llm.generate_until(instances("generate_until", ("Hello", asked)))
        return text

    greedy = answer(do_sample=False, num_beams=1)
    assert greedy == answer(do_sample=True, temperature=1.5, top_k=1)
    assert greedy != answer(do_sample=False, repetition_penalty=50.0)
    own = SamplingParams(12, 1.5, top_k=40, seed=5)
    (wanted,) = llm.llm.generate([llm.tok_encode("Hello")], own)
    assert answer(do_sample=True, temperature=1.5, top_k=40, seed=5) == wanted.outputs[0].text
    for unknown in ({"num_beams": 4}, {"typical_p": 0.9}):
        with pytest.raises(ValueError, match=f"generation_kwargs have {next(iter(unknown))} "):
            answer(**unknown)
