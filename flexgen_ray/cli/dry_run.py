"""`generate --dry-run`: checks a job and prints its plan, without running it.

Writes nothing and loads no weights. Knows a job's lines and an LLM that only plans.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexgen_ray.batch.job import check_any_answerable, job_requests, length_notes, line_name
from flexgen_ray.batch.request_lines import BatchLine, read_lines
from flexgen_ray.config import TIERS
from flexgen_ray.files.input_lines import STANDARD_STREAM, open_input
from flexgen_ray.layout.sizes import stage_bytes, tier_totals
from flexgen_ray.llm import LLM
from flexgen_ray.reporting.progress import show_progress, track
from flexgen_ray.reporting.wording import block_line, layout_line
from flexgen_ray.request import Request, SamplingParams
from flexgen_ray.runtime.events import Progress
from flexgen_ray.units import format_bytes

_TIER_NAMES = {"gpu": "GPU", "cpu": "host", "disk": "disk"}


def plan_job(
    engine: dict[str, Any], input: Path, output: Path | None, defaults: SamplingParams
) -> Iterator[str]:
    """Check and plan a job; yields lines for people.

    engine: LLM's arguments. input: the job's file. output: file whose answers are not planned
    again, or None. defaults: sampling parameters of lines that set none.
    Raises ValueError or OSError for what would stop the job before it begins.
    """
    notes: list[str] = []
    with show_progress() as show:
        answered = _answered(output)
        with open_input(input) as raw:
            read = track(read_lines(raw, defaults), show, "reading the input", "lines")
            lines = [line for line in read if line.custom_id not in answered]

        def listen(event: Progress) -> None:
            if event.note:
                notes.append(event.note)
            else:
                show(event)

        with LLM(**engine, dry_run=True, on_progress=listen) as llm:
            llm.check_stops(defaults.stop)
            owned, errors = job_requests(llm, lines)
            requests = [request for request, _, _ in owned]
            check_any_answerable(answered, [errors.get(line.custom_id) for line in lines])
            notes += length_notes(lines)
            llm.prepare(requests, line_name(owned))
    yield "dry run: nothing was written and no weights were loaded"
    yield _input_line(lines, len(answered), errors)
    if requests:
        yield _tokens_line(requests, llm.tokenizer.is_guess)
        if llm.sharing_line is not None:
            yield llm.sharing_line
        yield from _plan_lines(llm)
        yield from notes


def _answered(output: Path | None) -> set[str]:
    """custom_ids of the output's complete rows; the output is only read."""
    if output is None or output == STANDARD_STREAM or not output.is_file():
        return set()
    custom_ids = set()
    with gzip.open(output) if output.suffix == ".gz" else output.open("rb") as file:
        try:
            for line in file:
                custom_ids.add(json.loads(line)["custom_id"])
        except (EOFError, ValueError, KeyError, TypeError, gzip.BadGzipFile):
            pass  # an incomplete last row; the job itself refuses another job's output
    return custom_ids


def _input_line(lines: list[BatchLine], num_answered: int, errors: dict[str, str]) -> str:
    """One line on how many lines will be answered, are answered, or get an error row."""
    text = f"input: {len(lines):,} lines to answer"
    if num_answered:
        text += f", {num_answered:,} answered already"
    if errors:
        first = next(iter(errors))
        text += f"; {len(errors):,} would get an error row, the first {first}: {errors[first]}"
    return text


def _tokens_line(requests: list[Request], is_guess: bool) -> str:
    prompts = [len(request.prompt_token_ids) for request in requests]
    answers = [request.expected_tokens for request in requests]
    num_open = sum(request.is_open for request in requests)
    most = f"at most {sum(answers):,} tokens, the longest {max(answers):,}"
    if num_open:
        most = f"some {sum(answers):,} tokens; {num_open:,} of them may fill the context"
    about = "about " if is_guess else ""
    guess = " (estimated as 4 bytes per token, without a tokenizer)" if is_guess else ""
    return (
        f"prompts: {about}{sum(prompts):,} tokens, the longest {max(prompts):,}{guess}; answers: "
        f"{most}"
    )


def _plan_lines(llm: LLM) -> Iterator[str]:
    plans = llm.plans
    names = dict.fromkeys(machine.device_name for machine in llm.machines)
    yield f"model: {llm.model} in {plans[0].weight_format.described} on {', '.join(names)}"
    yield f"batches: {block_line(plans[0])}"
    for number, (plan, budget) in enumerate(zip(plans, llm.budgets, strict=True)):
        need = tier_totals(stage_bytes(plan))
        layers = f"layers {plan.stage.first} to {plan.stage.last}"
        name = f"stage {number} ({layers})" if len(plans) > 1 else "layout"
        sizes = ", ".join(
            f"{_TIER_NAMES[tier]} {format_bytes(getattr(need, tier))} of "
            f"{format_bytes(getattr(budget, tier))}"
            for tier in TIERS
        )
        yield f"{name} {layout_line(plan)}"
        yield f"memory needed, of its budget: {sizes}"
