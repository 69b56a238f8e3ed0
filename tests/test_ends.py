"""An answer ends where the model or the user says, and at no other place."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.batch.request_lines import read_lines
from flexgen_ray.processor import generation_request

SPECIAL = "~"
LONG = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Diverse answers of one character a token, of which ~ is a special one."""
    folder = tmp_path_factory.mktemp("ends") / "model"
    tiny.save("llama", folder, tie_word_embeddings=False)
    tiny.add_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(SPECIAL, special=True)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, use_ray=False, dtype="float32") as llm:
        yield llm


def token(character: str) -> int:
    return ord(character) - 30


def test_end_tokens_are_those_of_config_generation_config_and_tokenizer(llm, model, tmp_path):
    """As transformers' generate ends with all of them."""
    folder = shutil.copytree(model, tmp_path / "model")
    greedy = SamplingParams(LONG, 0.0)
    prompts = tiny.prompts(6, 10, seed=5)
    whole = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
    ends = list(dict.fromkeys(answer[at] for at, answer in zip((9, 7, 5), whole, strict=False)))
    assert len(ends) == 3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[2])
    tokenizer.save_pretrained(folder)
    for name, end in zip(("config.json", "generation_config.json"), ends, strict=False):
        values = json.loads((folder / name).read_text()) | {"eos_token_id": [end, 10**6, -1]}
        (folder / name).write_text(json.dumps(values))
    with LLM(folder, use_ray=False, dtype="float32") as ended:
        assert set(ended.config.eos_token_ids) == set(ends)
        outputs = ended.generate(prompts, greedy)
        (free,) = ended.generate(prompts[:1], SamplingParams(LONG, 0.0, ignore_eos=True))
        ended.generate(prompts[:1], SamplingParams(LONG, min_tokens=20))
    assert free.outputs[0].token_ids == whole[0]
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for output, prompt in zip(outputs, prompts, strict=True):
        made = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=LONG, do_sample=False, eos_token_id=ends, pad_token_id=0,
        )  # fmt: skip
        (answer,) = output.outputs
        assert answer.token_ids == made[0, len(prompt) :].tolist()
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] in ends else "length")
        assert answer.stop_reason is None
        shown = answer.token_ids[: -(answer.finish_reason == "stop") or None]
        assert answer.text == ended.tokenizer.text(shown)
    assert {output.outputs[0].finish_reason for output in outputs} >= {"stop"}


@pytest.mark.parametrize("keeps", [False, True])
def test_a_special_token_is_a_stop_string_alone_and_with_others(llm, keeps):
    """Texts leave special tokens out, so a stop string with one is looked for beside them."""
    seeds = [SamplingParams(LONG, 2.0, seed=seed) for seed in range(8)]
    whole = {it.index: it.outputs[0].token_ids for it in llm.generate(["Hello"] * 8, seeds)}
    index = next(i for i, it in whole.items() if token(SPECIAL) in it[3:-1])
    at = whole[index].index(token(SPECIAL), 3)
    written = llm.tokenizer.text(whole[index], skip=False)
    assert written[at] == SPECIAL and whole[index].index(token(SPECIAL)) == at
    for start, end in ((at, at + 1), (at, at + 2), (at - 2, at + 1), (at - 1, at + 2)):
        stop = written[start:end]
        params = SamplingParams(
            LONG, 2.0, seed=index, stop=["zzzz", stop], include_stop_str_in_output=keeps
        )
        (output,) = llm.generate(["Hello"], params)
        (answer,) = output.outputs
        assert answer.token_ids == whole[index][:end] and answer.finish_reason == "stop"
        assert answer.stop_reason == stop
        assert answer.text == written[:start] + (stop if keeps else "")


def test_a_stop_string_that_the_tokenizer_cannot_make_is_refused_with_the_reason(llm):
    with pytest.raises(ValueError, match="stop 'Stöp' can't occur in an answer.*into 'St.p'"):
        llm.generate(["Hello"], SamplingParams(stop=["ok", "Stöp"]))
    llm.generate(["Hello"], SamplingParams(stop=["ok", f"o{SPECIAL}k", " ", "  x "]))


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
LENGTHS = {
    "chat": CHAT,
    "chat null": CHAT | {"max_tokens": None},
    "chat own": CHAT | {"max_completion_tokens": 5},
    "chat own, null": CHAT | {"max_completion_tokens": 5, "max_tokens": None},
    "prompt": {"prompt": "Hi"},
    "prompt null": {"prompt": "Hi", "max_tokens": None},
    "prompt own": {"prompt": "Hi", "max_tokens": 7},
}


@pytest.mark.parametrize("job", [None, 9])
def test_chats_and_null_may_fill_the_context_and_prompts_end_after_16_tokens(llm, job):
    """Where neither the line nor the job says how long an answer may be."""
    lines = [json.dumps({"custom_id": name, **line}).encode() for name, line in LENGTHS.items()]
    found = {it.custom_id: it for it in read_lines(lines, SamplingParams(max_tokens=job))}
    lengths = {name: it.params.max_tokens for name, it in found.items()}
    own = {"chat own": 5, "chat own, null": 5, "prompt own": 7}
    assert lengths == dict.fromkeys(LENGTHS, job) | {"prompt": job or 16} | own
    for name, line in found.items():
        assert line.limit == ("line" if name in own else "job" if job else "default")


def test_an_answer_without_a_limit_has_what_the_context_leaves(llm):
    whole = SamplingParams(max_tokens=None, min_tokens=3)
    for context in (160, 2058, 9000):
        request = generation_request(0, [5] * 10, whole, llm.config, context)
        assert (request.max_tokens, request.limit) == (context - 10, "context")
    (output,) = llm.generate(["Hello"], whole)
    assert len(output.prompt_token_ids + output.outputs[0].token_ids) == 160
    assert llm.report.cut == {"context": 1}


@pytest.fixture
def job(model, tmp_path, run_here):
    """Runs `generate` on lines; its answers by custom_id, and what it said."""
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")

    def run(lines: list[dict], *options: object):
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
        files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
        return run_here(
            "generate", "--no-use-ray", "--dtype", "float32", "--model", model, *files,
            "--report", tmp_path / "report.json", *options,
        )  # fmt: skip

    def call(lines: list[dict], *options: object):
        done = run(lines, *options)
        rows = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
        answers = {it["custom_id"]: it["response"]["body"] for it in rows}
        return answers, done, tmp_path / "report.json"

    call.run = run
    return call


def test_the_report_counts_answers_cut_by_whose_limit(job):
    """And the run says at once how many lines have the default of 16."""
    lines = [
        {"custom_id": "16", "prompt": "Hello"},
        {"custom_id": "own", "prompt": "Hello", "max_tokens": 3, "n": 2},
        {"custom_id": "context", "max_tokens": 1000, "prompt": "Hello", "temperature": 0},
        {"custom_id": "chat"} | CHAT,
        {"custom_id": "scored", "prompt": "Hello", "max_tokens": 0, "echo": True, "logprobs": 0},
    ]
    answers, done, report = job(lines)
    assert done.returncode == 0, done.stderr
    lengths = {name: it["usage"]["completion_tokens"] for name, it in answers.items()}
    assert lengths == {"16": 16, "own": 6, "context": 155, "chat": 158, "scored": 0}
    assert "1 of 5 lines have no max_tokens: their answers end after 16 tokens" in done.stderr
    assert json.loads(report.read_text())["answers_cut"] == {"default": 1, "line": 2, "context": 2}
    assert "answers cut: 2 at their line's max_tokens, 1 at the default length" in done.stderr
    answers, done, report = job(lines, "--overwrite", "--max-tokens", 5)
    assert "lines have no max_tokens" not in done.stderr
    assert json.loads(report.read_text())["answers_cut"] == {"job": 2, "line": 2, "context": 1}


def test_stop_strings_of_a_job_apply_to_lines_without_and_are_facts_of_the_job(job):
    lines = [{"custom_id": str(seed), "prompt": "Hello", "seed": seed} for seed in range(8)]
    lines += [{"custom_id": "own", "prompt": "Hello", "seed": 0, "stop": ["zzzz"]}]
    options = ("--temperature", 2, "--max-tokens", LONG)
    whole, done, _ = job(lines, *options)
    text = whole["0"]["choices"][0]["text"]
    stops = [text[5:7], SPECIAL]
    stopped, done, _ = job(lines, *options, "--overwrite", *(f"--stop={it}" for it in stops))
    assert stopped["0"]["choices"][0] | {"text": ""} == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "stop"
    }  # fmt: skip
    assert stopped["own"]["choices"] == whole["own"]["choices"]
    for name in map(str, range(8)):
        before, after = whole[name]["choices"][0]["text"], stopped[name]["choices"][0]["text"]
        assert before.startswith(after) and stops[0] not in after
    reasons = [it["choices"][0]["finish_reason"] for it in stopped.values()]
    assert reasons.count("stop") >= 2
    _, done, _ = job(lines, *options, "--stop=Another")
    assert done.returncode == 1 and "was begun with stop" in done.stderr
    _, done, _ = job(lines, *options, "--overwrite", "--stop=Stöp")
    assert done.returncode == 1 and "stop 'Stöp' can't occur" in done.stderr


def test_a_long_line_leaves_the_block_its_size_and_is_named_where_it_does_not_fit(job, tmp_path):
    """With its need, and how many sequences would fit without it."""
    lines = [{"custom_id": f"r{i}", "prompt": "Hello", "max_tokens": 4} for i in range(15)]
    outlier = {"custom_id": "long\x1b[2J", "prompt": "Hello", "max_tokens": 150, "stop": "a"}
    memory = ("--gpu-memory", "600KiB", "--cpu-memory", "800KiB", "--disk-memory", "2MiB")
    sizes = []
    for most in (150, 4):
        _, done, _ = job([*lines, outlier | {"max_tokens": most}], *memory, "--overwrite")
        assert "is the longest request" not in done.stderr
        found = re.search(r"block of (\d+) x (\d+) seq", done.stderr).groups()
        sizes.append(int(found[0]) * int(found[1]))
    assert 2 * sizes[0] >= sizes[1]
    done = job.run([*lines, outlier], "--overwrite", *memory, "--gpu-memory", "250KiB")
    assert done.returncode == 1
    assert re.search(
        r"line 16 \(custom_id 'long\\x1b\[2J'\) \(5 prompt tokens, max_tokens 150\) is the "
        r"longest request, and takes memory for 155 tokens; without it 9 tokens would do, and \d+ "
        r"sequences would fit",
        done.stderr,
    )
