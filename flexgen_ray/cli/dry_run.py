"""`generate --dry-run`: every check of a job and its plan, said and not done.

Writes nothing, loads no weights. Knows a job's lines and an LLM that only plans.
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
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import stage_bytes, tier_totals
from flexgen_ray.llm import LLM
from flexgen_ray.reporting.progress import show_progress, track
from flexgen_ray.reporting.wording import block_line
from flexgen_ray.request import Request, SamplingParams
from flexgen_ray.runtime.events import Progress
from flexgen_ray.units import format_bytes


def plan_job(
    engine: dict[str, Any], input: Path, output: Path | None, defaults: SamplingParams
) -> Iterator[str]:
    """Lines for people. engine: the LLM's arguments; output: its answers aren't asked for again.

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
        yield from _plan_lines(llm)
        yield from notes


def _answered(output: Path | None) -> set[str]:
    """custom_ids of the output's whole rows; the output stays as it is."""
    if output is None or output == STANDARD_STREAM or not output.is_file():
        return set()
    found = set()
    with gzip.open(output) if output.suffix == ".gz" else output.open("rb") as file:
        try:
            for line in file:
                found.add(json.loads(line)["custom_id"])
        except (EOFError, ValueError, KeyError, TypeError, gzip.BadGzipFile):
            pass  # a torn end; the job itself refuses what isn't its own
    return found


def _input_line(lines: list[BatchLine], num_answered: int, errors: dict[str, str]) -> str:
    text = f"input: {len(lines):,} lines to answer"
    if num_answered:
        text += f", {num_answered:,} answered already"
    if errors:
        first = next(iter(errors))
        text += f"; {len(errors):,} would get an error row, the first {first}: {errors[first]}"
    return text


def _tokens_line(requests: list[Request], is_guess: bool) -> str:
    prompts = [len(request.prompt_token_ids) for request in requests]
    answers = [request.max_tokens for request in requests]
    about = "about " if is_guess else ""
    guess = " (guessed, 4 bytes a token: there is no tokenizer)" if is_guess else ""
    return (
        f"prompts: {about}{sum(prompts):,} tokens, the longest {max(prompts):,}{guess}; answers: "
        f"at most {sum(answers):,} tokens, the longest {max(answers):,}"
    )


def _plan_lines(llm: LLM) -> Iterator[str]:
    plans = llm.plans
    names = dict.fromkeys(machine.device_name for machine in llm.machines)
    yield f"model: {llm.model} in {llm.dtype} on {', '.join(names)}; {block_line(plans[0])}"
    for number, (plan, budget) in enumerate(zip(plans, llm.budgets, strict=True)):
        need = tier_totals(stage_bytes(plan))
        name = f"stage {number}, layers {plan.stage.first} to {plan.stage.last}: "
        sizes = ", ".join(
            f"{tier} {format_bytes(getattr(need, tier))} of {format_bytes(getattr(budget, tier))}"
            for tier in TIERS
        )
        yield f"{name if len(plans) > 1 else ''}{_placement(plan)}; {sizes}"


def _placement(plan: StagePlan) -> str:
    """Shares on GPU, host and disk."""
    policy = plan.policy
    parts = {"weights": policy.weights, "cache": policy.cache, "hidden states": policy.activations}
    shares = (
        f"{what} {'/'.join(f'{share:.0%}' for share in it.fractions)}" for what, it in parts.items()
    )
    return f"on gpu/cpu/disk: {', '.join(shares)}"
