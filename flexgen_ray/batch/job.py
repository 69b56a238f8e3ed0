"""One JSONL job from input file to output file; each answer is written as soon as it is known.

`read_job` reads the lines that the output doesn't answer yet, `run_job` answers them. `job_facts`
is what answers depend on: a resumed run must have the same facts (journal.py).
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

# A request, its line, and the place of its prompt among the line's.
LineRequest = tuple[Request, BatchLine, int]
# Files of a model that are read whole for its fingerprint.
_SMALL_FILES = (
    "config.json", "generation_config.json", "chat_template*", "tokenizer*", "*.model",
    "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.index.json",
)  # fmt: skip
_WEIGHTS = "model.safetensors"
_MAX_HEADER_BYTES = 100 * 2**20
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # pieces of a weights file that are read


def read_job(
    input: Path,
    journal: Journal,
    defaults: SamplingParams,
    facts: dict,
    on_progress: OnProgress = ignore_progress,
) -> list[BatchLine]:
    """Read the lines that the output doesn't answer yet. Bad lines are returned with their error.

    defaults: sampling parameters of lines that set none.
    facts: what answers depend on besides the input and the defaults, by name.
    Raises OSError or ValueError if the input can't be read, has only bad lines, or differs from the
    input with which the output was begun.
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


def run_job(llm: LLM, journal: Journal, lines: list[BatchLine]) -> None:
    """Append a row to the output for every line: errors first, answers as they finish.

    Everything that may refuse the run (policy, memory budgets) is checked before the output is
    changed.
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
    """Return the response line for one prompt of a line, or for its chat. place: the prompt's."""
    if answer.error is not None:
        fault = line_error(line.number, ValueError(answer.error))
        return error_row(line.custom_id, fault, SERVER_ERROR)
    is_chat = line.messages is not None
    echo = _echo(llm, line.prompts[place], answer) if line.echo else None
    top = (line.params.logprobs or 0) if line.params else 0
    return response_row(line.custom_id, str(llm.model), answer, is_chat, echo, top)


def job_requests(llm: LLM, lines: list[BatchLine]) -> tuple[list[LineRequest], dict[str, str]]:
    """Return the requests of all lines that can be answered, and the others' errors by custom_id.

    Index and random stream of a line's first request are the line's number, so that a resumed run
    samples the same tokens. Further prompts of a line have indexes above all line numbers, and
    negative random streams, which depend on line and place alone.
    """
    requests: list[LineRequest] = []
    errors: dict[str, str] = {}
    llm.tokenizer.check()  # a broken tokenizer ends the run, and is no line's error
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
    """Return a request for each prompt of a line, or for its chat.

    Raises ValueError if it can't.
    """
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


def line_name(requests: list[LineRequest]) -> Callable[[int], str]:
    """Return a function that names a request, by index, by its line.

    The custom_id is escaped, since a terminal would obey control characters in it.
    """
    owners = {request.index: line for request, line, _ in requests}
    return lambda index: f"line {owners[index].number} (custom_id {owners[index].custom_id!r})"


def length_notes(lines: list[BatchLine]) -> list[str]:
    """Return notes on answer lengths that the user may not have intended."""
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
    """Return a prompt's text, to be written before the answer. asked: the prompt of the line."""
    prompt, tokenizer = answer.prompt_token_ids, llm.tokenizer
    (first,) = tokenizer.token_texts(prompt[:1])
    if isinstance(asked, str):
        return Echo(asked, first)
    # Decode prompt and answer together, and take the answer's text off the end: a character whose
    # bytes are in both belongs to the answer.
    token_ids = prompt + answer.outputs[0].token_ids
    own = len(tokenizer.text(token_ids, len(prompt)))
    text = tokenizer.text(token_ids)
    return Echo(text[: len(text) - own], first)


def check_any_answerable(answered: set[str], errors: list[str | None]) -> None:
    """Raise ValueError if no line can be answered and none has been.

    Then the fault is probably not the lines' (a wrong file, or a wrong model), and the output is
    better left as it is.
    answered: custom_ids that the output answers. errors: error of each other line, None if it has
    none.
    """
    if errors and not answered and None not in errors:
        raise ValueError(
            f"none of the {len(errors)} lines can be answered, so the output is left as it is; "
            f"the first fault is {errors[0]}"
        )


def sampling_defaults(model: Path | None, options: dict[str, Any]) -> SamplingParams:
    """Return the sampling parameters of lines that set none: the user's, else the model folder's.

    model: the model folder; None for made-up weights. options: what the user set, by name.
    max_tokens stays None if neither sets it, and then depends on the line.
    """
    own = {"max_tokens": None} | ({} if model is None else load_sampling_defaults(model))
    return SamplingParams(**own | options)


def job_facts(engine: dict[str, Any], model: Path | None) -> dict[str, Any]:
    """Return everything about the model and engine that a job's answers depend on, by name.

    Placements are left out: they change no answer, so a resumed run may use another policy or more
    memory. Lossy settings (compression, sparse attention) are in.
    engine: arguments of LLM. model: the model folder; None for made-up weights.
    """
    lossy = lossy_facts(engine["policy"], **{name: engine[name] for name in LOSSY})
    name = f"dummy {engine['model']}" if model is None else str(model)
    facts = {"model": name, "dtype": engine["dtype"], "max_model_len": engine["max_model_len"]}
    return lossy | facts | ({} if model is None else {MODEL_FILES: fingerprint(model)})


def lossy_facts(policy: Path | None, **lossy: int | float | None) -> dict:
    """Return the settings of a policy that change answers, each as a list of its distinct values.

    policy: a policy file. lossy: settings by name that override the policy's; None doesn't.
    Raises OSError or ValueError for a policy that can't be read.
    """
    stages = (StagePolicies.parse(policy) or StagePolicies((Policy(),))).compressed(**lossy)
    values = {name: [getattr(it, name) for it in stages.policies] for name in lossy}
    return {name: list(dict.fromkeys(bits)) for name, bits in values.items()}


def fingerprint(folder: Path) -> dict[str, str]:
    """Return a digest of each file of a model that answers depend on, by name, in milliseconds.

    Small files are read whole. A digest of a safetensors file covers its size, its header (names,
    shapes, dtypes and offsets of tensors) and sixteen pieces of its values, since weights that were
    trained further have the same header.
    """
    small = {path for pattern in _SMALL_FILES for path in folder.glob(pattern) if path.is_file()}
    has_one = (folder / _WEIGHTS).is_file()
    weights = [folder / _WEIGHTS] if has_one else sorted(folder.glob("*.safetensors"))
    digests = {path.name: _digest([path.read_bytes()]) for path in sorted(small)}
    return digests | {path.name: _digest(_parts(path)) for path in weights}


def _digest(parts: Iterator[bytes] | list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(path: Path) -> Iterator[bytes]:
    """Yield the parts of a safetensors file that its digest covers: size, header, some values."""
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    with path.open("rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES)
        yield file.read(length)
        last = max(size - 8 - length - _SAMPLE_BYTES, 0)
        for sample in range(_SAMPLES):
            file.seek(8 + length + last * sample // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)
