"""One JSONL job from file to file: each input line gets an output line as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexgen_ray.io.journal import Journal
from flexgen_ray.io.openai_batch import error_row, read_lines, response_row
from flexgen_ray.io.openai_logprobs import Echo
from flexgen_ray.llm import LLM
from flexgen_ray.request import Progress, Request, SamplingParams

OnProgress = Callable[[int, Progress], None]


@dataclass(frozen=True)
class JobInput:
    """The requests that can be answered, and what to say of the others."""

    requests: list[Request]
    custom_ids: list[str]
    echoes: list[Echo | None]
    errors: list[tuple[str, str]]


def read_job(llm: LLM, path: Path, defaults: SamplingParams) -> JobInput:
    """OSError if the file can't be read; a bad line is only its own fault."""
    requests: list[Request] = []
    custom_ids: list[str] = []
    echoes: list[Echo | None] = []
    errors: list[tuple[str, str]] = []
    with path.open("rb") as lines:
        for line in read_lines(lines, defaults):
            try:
                if line.error is not None:
                    raise ValueError(line.error)
                assert line.prompt is not None and line.params is not None
                request = llm.request(len(requests), line.prompt, line.params)
                echoes.append(_echo(llm, request, line.prompt) if line.echo else None)
                requests.append(request)
                custom_ids.append(line.custom_id)
            except ValueError as error:
                errors.append((line.custom_id, str(error)))
    return JobInput(requests, custom_ids, echoes, errors)


def _echo(llm: LLM, request: Request, prompt: str | list[int]) -> Echo:
    text = prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)
    return Echo(text, llm.tokenizer.token(request.prompt_token_ids[0]))


def run_job(
    llm: LLM, job: JobInput, output: Path, overwrite: bool, on_progress: OnProgress | None = None
) -> None:
    """Appends rows to `output`: errors at once, answers as they finish.

    What can't work (policy, budget, an output file with content) is said before the file is made.
    on_progress(requests done, Progress) is called after each pass.
    """
    Journal.check(output, overwrite)
    llm.prepare(job.requests)
    done = 0

    def report(progress: Progress) -> None:
        if on_progress:
            on_progress(done, progress)

    with Journal(output, overwrite) as journal:
        for custom_id, message in job.errors:
            journal.append(error_row(custom_id, message))
        for answer in llm.stream(job.requests, report):
            custom_id, echo = job.custom_ids[answer.index], job.echoes[answer.index]
            journal.append(response_row(custom_id, str(llm.model), answer, echo))
            done += 1
