"""Runs an evaluation: opens an LLM, measures a file, prints the report and one JSON result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexgen_ray.files.text_files import read_text
from flexgen_ray.llm import LLM
from flexgen_ray.reporting.progress import show_progress
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say
from flexgen_ray.request import Request, RequestOutput

Measure = Callable[..., dict[str, Any]]
Describe = Callable[[dict[str, Any]], str]


def evaluate(
    measure: Measure,
    describe: Describe,
    engine: dict[str, Any],
    data: Path,
    settings: dict[str, Any],
    json_file: Path | None,
) -> None:
    """Run one evaluation, print its answer in one line, and its result with its settings as JSON.

    measure: called as measure(llm, text, **settings); returns the figures, by name.
    describe: called with the figures; returns the line for people.
    engine: arguments of LLM. data: the file whose text is measured. json_file: file that gets the
    result too, if not None.
    Raises OSError or ValueError if the data can't be read as text or the result can't be written.
    """
    text = read_text(data)
    with LLM(**engine) as llm:
        figures = measure(llm, text, **settings)
        for line in llm.report.lines():
            say(line)
        say(f"{describe(figures)}; {data.name}, {engine['model']} in {llm.dtype}")
        seconds = {"seconds": round(llm.report.seconds, 3)}
        stages = [stage.as_dict() for stage in llm.report.stages]
        device = llm.report.device
    job = {"model": engine["model"], "data": data.name, "dtype": llm.dtype}
    finish(figures | seconds | job | settings | {"stages": stages}, device, json_file)


def run_requests(llm: LLM, requests: list[Request]) -> list[RequestOutput]:
    """Run requests and return their outputs in order. Raises ValueError if one fails."""
    outputs: dict[int, RequestOutput] = {}
    with show_progress() as llm.on_progress:
        llm.prepare(requests)
        for output in llm.stream(requests):
            if output.error:
                raise ValueError(f"text {output.index} can't be scored: {output.error}")
            outputs[output.index] = output
    return [outputs[request.index] for request in requests]
