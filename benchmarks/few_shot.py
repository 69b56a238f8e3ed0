"""Is what real few-shot prompts share computed once, with the same answers? GSM8K and MMLU.

Claim: a few-shot job computes the examples once, and answers as it did without. The data are
GSM8K with 8 examples before each question, and MMLU with 5 of the question's subject. Each job is
run with sharing and without, in turns, by SmolLM2-135M-Instruct or the model of --model, in
float32. Then transformers generates the answers, in the faster of two batch sizes
(`transformers_seconds`), and reads each prompt with our answer, of which every token must be the
likeliest there, or within 0.0001 of it.

Good: a `share_of_possible_saving` of 0.97 or more: prompt tokens that need not be computed again,
as a share of those that lie in pages that are alike; and as many `equal_answers` and `confirmed`
answers as requests. A ratio rests on no run beside which others used the cores.
docs/results/prefixes-few-shot-cpu.json: python -m benchmarks.few_shot --data FOLDER --json FILE
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer

from benchmarks import gate
from benchmarks.command import run_as_command
from benchmarks.prefixes import WITH, in_turns, new_llm, run_with
from flexgen_ray.cli import demo
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.request import Request, SamplingParams

GSM8K, MMLU = "gsm8k", "mmlu"
GSM8K_EXAMPLES = 8
GSM8K_TOKENS, MMLU_TOKENS = 24, 4  # of an answer
LETTERS = "ABCD"
BATCHES = 4, 16  # of transformers
TIE = 1e-4  # logits that are as close may be in either order


def few_shot(
    data: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Folder with gsm8k_test.jsonl, and mmlu_SUBJECT_dev.csv and mmlu_SUBJECT_test.csv "
            "for each subject.",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Model. [default: the demo's, SmolLM2-135M-Instruct]"),
    ] = None,
    jobs: Annotated[
        str, typer.Option(metavar="NAME,...", help=f"Jobs to run, of: {GSM8K}, {MMLU}.")
    ] = f"{GSM8K},{MMLU}",
    questions: Annotated[
        int, typer.Option(metavar="N", min=1, help="Questions of a job; of each subject of MMLU.")
    ] = 32,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of runs with and without sharing.")
    ] = 1,
    reference: Annotated[
        bool, typer.Option(help="Let transformers confirm the answers; it takes minutes.")
    ] = True,
    json_file: JsonOption = None,
) -> None:
    """Run few-shot jobs with sharing and without; the prompt tokens computed, and seconds.

    Example: python -m benchmarks.few_shot --data ./data --jobs mmlu --questions 8
    """
    folder = model or demo.prepare_model()
    results = {}
    for job in jobs.split(","):
        read_texts, max_tokens = TEXTS[job]
        texts = read_texts(data, questions)
        results[job], requests, answers = _job(folder, texts, max_tokens, repeats)
        if reference:
            results[job] |= against_transformers(folder, requests, answers)
    device = results[job]["runs"][WITH][0]["device"]
    result = {"emulated": False, "model": folder.name, "questions": questions, "jobs": results}
    gate.finish(result, device, json_file)


def gsm8k_texts(folder: Path, questions: int) -> list[str]:
    """Prompts with GSM8K_EXAMPLES answered questions before each."""
    lines = (folder / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: GSM8K_EXAMPLES + questions]]
    solved = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows]
    header = "".join(solved[:GSM8K_EXAMPLES])
    return [f"{header}Question: {row['question']}\nAnswer:" for row in rows[GSM8K_EXAMPLES:]]


def mmlu_texts(folder: Path, questions: int) -> list[str]:
    """Prompts of every subject in the folder, with its answered questions before each."""
    texts = []
    for path in sorted(folder.glob("mmlu_*_dev.csv")):
        subject = path.stem.removeprefix("mmlu_").removesuffix("_dev")
        named = subject.replace("_", " ")
        header = f"The following are multiple choice questions (with answers) about {named}.\n\n"
        header += "".join(f"{_question(row)} {row[5]}\n\n" for row in _rows(path))
        asked = _rows(folder / f"mmlu_{subject}_test.csv")[:questions]
        texts += [header + _question(row) for row in asked]
    return texts


TEXTS = {GSM8K: (gsm8k_texts, GSM8K_TOKENS), MMLU: (mmlu_texts, MMLU_TOKENS)}


def _rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def _question(row: Sequence[str]) -> str:
    choices = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0]}\n{choices}Answer:"


def _job(
    folder: Path, texts: list[str], max_tokens: int, repeats: int
) -> tuple[dict, list[Request], list[list[int]]]:
    """Figures of a job's runs, its requests, and their answers with sharing."""
    answers: list[list[int]] = []
    requests: list[Request] = []
    params = SamplingParams(max_tokens, 0.0, ignore_eos=True)

    def run(shares: bool) -> tuple[dict, list[list[int]]]:
        with new_llm(str(folder), shares) as llm:
            prompts = [llm.tokenizer.encode(text) for text in texts]
            requests[:] = [llm.request(index, ids, params) for index, ids in enumerate(prompts)]
            figures, tokens = run_with(llm, requests)
        answers[:] = tokens if shares else answers
        return figures, tokens

    result = in_turns(run, requests, repeats)
    lengths = [len(request.prompt_token_ids) for request in requests]
    result |= {"mean_prompt_len": round(fmean(lengths), 1), "max_tokens": max_tokens}
    return result, requests, answers


def against_transformers(
    folder: Path, requests: list[Request], answers: list[list[int]]
) -> dict[str, float]:
    """Seconds in which transformers generates the answers, and how many of ours it confirms."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seconds = min(_generate(model, requests, size) for size in BATCHES)
    return {
        "transformers_seconds": round(seconds, 3),
        "confirmed": confirm(model, requests, answers),
    }


def _generate(model: Any, requests: list[Request], batch_size: int) -> float:
    """Seconds in which transformers answers the requests, the longest prompts first."""
    longest_first = sorted(requests, key=lambda request: -len(request.prompt_token_ids))
    began = time.perf_counter()
    for at in range(0, len(requests), batch_size):
        batch = longest_first[at : at + batch_size]
        longest = len(batch[0].prompt_token_ids)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            count = len(request.prompt_token_ids)
            ids[row, -count:], mask[row, -count:] = torch.tensor(request.prompt_token_ids), 1
        new = batch[0].params.max_tokens
        model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new
        )
    return time.perf_counter() - began


def confirm(model: Any, requests: list[Request], answers: list[list[int]]) -> int:
    """Number of answers of which transformers finds every token the likeliest, or within TIE."""
    confirmed = 0
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([[*request.prompt_token_ids, *answer[:-1]]])
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=len(answer)).logits[0]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        confirmed += bool((logits.amax(1) - chosen <= TIE).all())
    return confirmed


if __name__ == "__main__":
    run_as_command(few_shot)
