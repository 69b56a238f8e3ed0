"""One JSONL job from file to file: each input line gets an output line as soon as it is known.

Fingerprints that tell a model folder from one with changed files, in some milliseconds.

Knows files, and of safetensors the header; reads little of the weights themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

from flexgen_ray.batch.journal import MODEL_FILES, Journal
from flexgen_ray.batch.logprobs import Echo
from flexgen_ray.batch.request_lines import MAX_PROMPTS, BatchLine, Prompt, line_error, read_lines
from flexgen_ray.batch.response_lines import (
    SERVER_ERROR,
    error_row,
    join_rows,
    response_row,
    with_columns,
)
from flexgen_ray.config import LOSSY, Policy
from flexgen_ray.files.input_lines import open_input
from flexgen_ray.files.output_files import check_distinct
from flexgen_ray.llm import LLM
from flexgen_ray.models.config_files import load_sampling_defaults
from flexgen_ray.planner.stage_policies import StagePolicies
from flexgen_ray.reporting.progress import track
from flexgen_ray.request import DEFAULT_MAX_TOKENS, Request, RequestOutput, SamplingParams
from flexgen_ray.runtime.events import OnProgress, Progress, ignore_progress

_WHOLE = (
    "config.json", "generation_config.json", "chat_template*", "tokenizer*", "*.model",
    "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.index.json",
)  # fmt: skip
_WEIGHTS = "model.safetensors"
_MAX_HEADER_BYTES = 100 * 2**20
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def fingerprint(folder: Path) -> dict[str, str]:
    """A digest of each file of a model that answers depend on, by name.

    Small files are read whole. Of safetensors the digest covers the size, the header (names,
    shapes, dtypes and offsets of tensors) and sixteen places of the values: weights that were
    trained further have the same header.
    """
    whole = {path for pattern in _WHOLE for path in folder.glob(pattern) if path.is_file()}
    has_one = (folder / _WEIGHTS).is_file()
    weights = [folder / _WEIGHTS] if has_one else sorted(folder.glob("*.safetensors"))
    found = {path.name: _digest([path.read_bytes()]) for path in sorted(whole)}
    return found | {path.name: _digest(_parts(path)) for path in weights}


def _digest(parts: Iterator[bytes] | list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(path: Path) -> Iterator[bytes]:
    """The size of a safetensors file, its header, and a few pieces of its values."""
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    with path.open("rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES)
        yield file.read(length)
        last = max(size - 8 - length - _SAMPLE_BYTES, 0)
        for sample in range(_SAMPLES):
            file.seek(8 + length + last * sample // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)


Owned = tuple[Request, BatchLine, int]  # whose it is, and which of its prompts


def read_job(
    input: Path,
    journal: Journal,
    defaults: SamplingParams,
    facts: dict,
    on_progress: OnProgress = ignore_progress,
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
        for line in track(numbered, on_progress, "reading the input", "lines"):
            custom_ids.append(line.custom_id)
            if line.custom_id not in journal.answered:
                missing.append(line)
        facts = {"input_sha256": lines.sha256(), **asdict(defaults), **facts}
    journal.check(facts, custom_ids, asdict(SamplingParams()))
    check_any_answerable(journal.answered, [line.error for line in missing])
    return missing


def check_any_answerable(answered: set[str], errors: list[str | None]) -> None:
    """ValueError if no line can be answered, nor has been: the fault is not the lines'.

    errors: what is wrong with each line that is to be answered, or None.
    """
    if errors and not answered and None not in errors:
        raise ValueError(
            f"none of the {len(errors)} lines can be answered, so the output is left as it is; "
            f"the first fault is {errors[0]}"
        )


def sampling_defaults(model: Path | None, given: dict[str, Any]) -> SamplingParams:
    """Sampling parameters of lines that set none: those given, else the model folder's own.

    model: None for made-up weights. Without a number of anyone's, max_tokens depends on the line.
    """
    own = {"max_tokens": None} | ({} if model is None else load_sampling_defaults(model))
    return SamplingParams(**own | given)


def job_facts(engine: dict[str, Any], model: Path | None) -> dict[str, Any]:
    """Facts about the model on which a job's answers depend, by name.

    engine: LLM's arguments; model: its folder, None for made-up weights. Where data lies changes no
    answer; a resumed run may have other memory, and another policy.
    """
    lossy = lossy_facts(engine["policy"], **{name: engine[name] for name in LOSSY})
    name = f"dummy {engine['model']}" if model is None else str(model)
    facts = {"model": name, "dtype": engine["dtype"], "max_model_len": engine["max_model_len"]}
    return lossy | facts | ({} if model is None else {MODEL_FILES: fingerprint(model)})


def lossy_facts(policy: Path | None, **lossy: int | float | None) -> dict:
    """What of a policy, with what is given over it, changes answers; each kind of stage once.

    Raises OSError or ValueError for a policy that can't be read.
    """
    given = (StagePolicies.parse(policy) or StagePolicies((Policy(),))).compressed(**lossy)
    kinds = {name: [getattr(it, name) for it in given.policies] for name in lossy}
    return {name: list(dict.fromkeys(bits)) for name, bits in kinds.items()}


def run_job(llm: LLM, journal: Journal, lines: list[BatchLine]) -> None:
    """Appends a row for every line: errors at once, answers as they finish.

    What can't work (policy, budget) is said before the output is changed.
    """
    llm.tokenizer.now = journal.begun_at
    requests, errors = job_requests(llm, lines)
    check_any_answerable(journal.answered, [errors.get(line.custom_id) for line in lines])
    for note in length_notes(lines):
        llm.on_progress(Progress(note=note))
    owners = {request.index: (line, place) for request, line, place in requests}
    llm.prepare([request for request, _, _ in requests], line_name(requests))
    journal.begin()
    for line in lines:
        if line.custom_id in errors:
            row = error_row(line.custom_id, errors[line.custom_id])
            journal.append(with_columns(row, line.columns))
    pending: dict[int, dict[int, dict]] = {}
    for answer in llm.stream([request for request, _, _ in requests]):
        line, place = owners[answer.index]
        rows = pending.setdefault(line.number, {})
        rows[place] = _row(llm, line, place, answer)
        if len(rows) == max(len(line.prompts), 1):
            row = join_rows([rows[place] for place in sorted(rows)])
            journal.append(with_columns(row, line.columns))
            del pending[line.number]


def _row(llm: LLM, line: BatchLine, place: int, answer: RequestOutput) -> dict:
    """The response line of one of the line's prompts, or of its chat."""
    if answer.error is not None:
        fault = line_error(line.number, ValueError(answer.error))
        return error_row(line.custom_id, fault, SERVER_ERROR)
    is_chat = line.messages is not None
    echo = _echo(llm, line.prompts[place], answer) if line.echo else None
    top = (line.params.logprobs or 0) if line.params else 0
    return response_row(line.custom_id, str(llm.model), answer, is_chat, echo, top)


def job_requests(llm: LLM, lines: list[BatchLine]) -> tuple[list[Owned], dict[str, str]]:
    """Requests that can be answered, and what to say to the others, by custom_id.

    A request is known by its line's number, so that a resumed run draws the same tokens; those of a
    line's further prompts by numbers beyond the lines', and they draw from streams of their own.
    """
    requests: list[Owned] = []
    errors: dict[str, str] = {}
    llm.tokenizer.check()  # its own faults are no line's
    unused = count(1 + max((line.number for line in lines), default=0))
    for line in track(lines, llm.on_progress, "tokenizing", "lines", len(lines)):
        try:
            made = _line_requests(llm, line)
        except ValueError as error:
            errors[line.custom_id] = line.error or line_error(line.number, error)
            continue
        for place, request in enumerate(made):
            if place:
                stream = -(line.number * MAX_PROMPTS + place)
                request = replace(request, index=next(unused), first=stream)
            requests.append((request, line, place))
    return requests, errors


def _line_requests(llm: LLM, line: BatchLine) -> list[Request]:
    """A request for each of the line's prompts, or for its chat."""
    if line.params is None:
        raise ValueError(line.error)
    prompts: Sequence[Prompt] = line.prompts
    if line.messages is not None:
        prompts = [llm.tokenizer.encode_chat(line.messages, line.chat)]
    if line.echo:
        llm.tokenizer.load()
    made = []
    for place, prompt in enumerate(prompts):
        try:
            request = llm.request(line.number, prompt, line.params)
        except ValueError as error:
            where = f"prompt[{place}]: " if len(prompts) > 1 else ""
            raise ValueError(f"{where}{error}") from error
        in_context = request.limit == "context"
        made.append(request if in_context else replace(request, limit=line.limit))
    return made


def line_name(requests: list[Owned]) -> Callable[[int], str]:
    """Names requests by their lines, escaped: terminals would do what a raw name says."""
    owners = {request.index: line for request, line, _ in requests}
    return lambda index: f"line {owners[index].number} (custom_id {owners[index].custom_id!r})"


def length_notes(lines: list[BatchLine]) -> list[str]:
    """Notes on lengths of answers that the job's owner may not have meant."""
    num_lines = sum(
        line.limit == "default" and line.params is not None and line.params.max_tokens is not None
        for line in lines
    )
    if not num_lines:
        return []
    return [
        f"{num_lines} of {len(lines)} lines have no max_tokens: their answers end after "
        f"{DEFAULT_MAX_TOKENS} tokens, the default of completions; --max-tokens sets another number"
    ]


def _echo(llm: LLM, asked: Prompt, answer: RequestOutput) -> Echo:
    """The prompt, to come before the answer."""
    prompt, tokenizer = answer.prompt_token_ids, llm.tokenizer
    (first,) = tokenizer.token_texts(prompt[:1])
    if isinstance(asked, str):
        return Echo(asked, first)
    # A character of both is the answer's.
    token_ids = prompt + answer.outputs[0].token_ids
    own = len(tokenizer.text(token_ids, len(prompt)))
    text = tokenizer.text(token_ids)
    return Echo(text[: len(text) - own], first)
