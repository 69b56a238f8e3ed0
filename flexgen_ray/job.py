"""One JSONL job from file to file: each input line gets an output line as soon as it is known."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from flexgen_ray.config import Policy
from flexgen_ray.events import OnProgress, Progress, ignore
from flexgen_ray.io.files import check_distinct
from flexgen_ray.io.journal import Journal
from flexgen_ray.io.lines import open_input
from flexgen_ray.io.openai_batch import (
    SERVER_ERROR,
    BatchLine,
    error_row,
    line_error,
    read_lines,
    response_row,
    with_columns,
)
from flexgen_ray.io.openai_logprobs import Echo
from flexgen_ray.llm import LLM
from flexgen_ray.progress import counted
from flexgen_ray.request import DEFAULT_MAX_TOKENS, Request, RequestOutput, SamplingParams
from flexgen_ray.stage_policies import StagePolicies


def read_job(
    input: Path,
    journal: Journal,
    defaults: SamplingParams,
    facts: dict,
    on_progress: OnProgress = ignore,
) -> list[BatchLine]:
    """The lines that the journal's file doesn't answer yet; a bad line is only its own fault.

    facts: what answers depend on besides, by name. Raises OSError or ValueError if the input can't
    be read, holds bad lines only, or is not that of the output.
    """
    check_distinct({"--output": journal.path}, {"--input": input})
    custom_ids: list[str] = []
    missing: list[BatchLine] = []
    with open_input(input) as lines:
        numbered = read_lines(lines, defaults)
        for line in counted(numbered, on_progress, "reading the input", "lines"):
            custom_ids.append(line.custom_id)
            if line.custom_id not in journal.answered:
                missing.append(line)
        facts = {"input_sha256": lines.sha256(), **asdict(defaults), **facts}
    journal.check(facts, custom_ids, asdict(SamplingParams()))
    _refuse_hopeless(journal, [line.error for line in missing])
    return missing


def _refuse_hopeless(journal: Journal, errors: list[str | None]) -> None:
    """ValueError if no line can be answered, nor has been: the fault is not the lines'.

    errors: what is wrong with each line that is to be answered, or None.
    """
    if errors and not journal.answered and None not in errors:
        raise ValueError(
            f"none of the {len(errors)} lines can be answered, so the output is left as it is; "
            f"the first fault is {errors[0]}"
        )


def lossy_facts(policy: Path | None, **lossy: int | float | None) -> dict:
    """What of a policy, with what is given over it, changes answers; each kind of stage once.

    Raises OSError or ValueError for a policy that can't be read.
    """
    given = (StagePolicies.given(policy) or StagePolicies((Policy(),))).compressed(**lossy)
    kinds = {name: [getattr(it, name) for it in given.policies] for name in lossy}
    return {name: list(dict.fromkeys(bits)) for name, bits in kinds.items()}


def run_job(llm: LLM, journal: Journal, lines: list[BatchLine]) -> None:
    """Appends a row for every line: errors at once, answers as they finish.

    What can't work (policy, budget) is said before the output is changed.
    """
    llm.tokenizer.now = journal.begun_at
    requests, errors = _requests(llm, lines)
    _refuse_hopeless(journal, [errors.get(line.custom_id) for line in lines])
    for note in _notes(lines):
        llm.on_progress(Progress(note=note))
    custom_ids = {line.number: line.custom_id for line in lines}
    # Escaped, as terminals do what a raw name may say.
    llm.prepare(requests, lambda number: f"line {number} (custom_id {custom_ids[number]!r})")
    journal.begin()
    for line in lines:
        if line.custom_id in errors:
            row = error_row(line.custom_id, errors[line.custom_id])
            journal.append(with_columns(row, line.columns))
    by_number = {line.number: line for line in lines}
    for answer in llm.stream(requests):
        line = by_number[answer.index]
        if answer.error is not None:
            fault = line_error(line.number, ValueError(answer.error))
            journal.append(
                with_columns(error_row(line.custom_id, fault, SERVER_ERROR), line.columns)
            )
            continue
        is_chat, echo = line.messages is not None, _echo(llm, line, answer)
        top = (line.params.logprobs or 0) if line.params else 0
        row = response_row(line.custom_id, str(llm.model), answer, is_chat, echo, top)
        journal.append(with_columns(row, line.columns))


def _requests(llm: LLM, lines: list[BatchLine]) -> tuple[list[Request], dict[str, str]]:
    """Requests that can be answered, known by their lines' numbers, as a resumed run draws the
    same tokens; and what to say to the others, by custom_id."""
    requests: list[Request] = []
    errors: dict[str, str] = {}
    llm.tokenizer.check()  # its own faults are no line's
    for line in counted(lines, llm.on_progress, "tokenizing", "lines", len(lines)):
        try:
            requests.append(_request(llm, line))
        except ValueError as error:
            errors[line.custom_id] = line.error or line_error(line.number, error)
    return requests, errors


def _request(llm: LLM, line: BatchLine) -> Request:
    if line.params is None:
        raise ValueError(line.error)
    prompt = (
        llm.tokenizer.chat(line.messages, line.chat) if line.messages is not None else line.prompt
    )
    assert prompt is not None
    if line.echo:
        llm.tokenizer.load()
    request = llm.request(line.number, prompt, line.params)
    return request if request.limit == "context" else replace(request, limit=line.limit)


def _notes(lines: list[BatchLine]) -> list[str]:
    """What the job's owner may not have meant."""
    count = sum(
        line.limit == "default" and line.params is not None and line.params.max_tokens is not None
        for line in lines
    )
    if not count:
        return []
    return [
        f"{count} of {len(lines)} lines have no max_tokens: their answers end after "
        f"{DEFAULT_MAX_TOKENS} tokens, the default of completions; --max-tokens sets another number"
    ]


def _echo(llm: LLM, line: BatchLine, answer: RequestOutput) -> Echo | None:
    """The prompt, if the line asks for it."""
    if not line.echo:
        return None
    prompt, tokenizer = answer.prompt_token_ids, llm.tokenizer
    (first,) = tokenizer.names(prompt[:1])
    if isinstance(line.prompt, str):
        return Echo(line.prompt, first)
    # A character of both is the answer's.
    token_ids = prompt + answer.outputs[0].token_ids
    own = len(tokenizer.text(token_ids, len(prompt)))
    text = tokenizer.text(token_ids)
    return Echo(text[: len(text) - own], first)
