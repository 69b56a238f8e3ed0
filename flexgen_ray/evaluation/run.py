"""How every evaluation runs: an LLM, a file, a progress bar, and one JSON line at the end."""

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


def evaluate(
    measure: Measure,
    engine: dict[str, Any],
    data: Path,
    settings: dict[str, Any],
    json_file: Path | None,
) -> None:
    """measure(llm, the file's text, **settings) finds the figures; what was set is told with them.

    OSError or ValueError if the file can't be read as text, or the result not be written.
    """
    text = read_text(data)
    with LLM(**engine) as llm:
        figures = measure(llm, text, **settings)
        for line in llm.report.lines():
            say(line)
        seconds = {"seconds": round(llm.report.seconds, 3)}
        stages = [stage.as_dict() for stage in llm.report.stages]
        device = llm.report.device
    told = {"model": engine["model"], "data": data.name, "dtype": llm.dtype}
    finish(figures | seconds | told | settings | {"stages": stages}, device, json_file)


def run_requests(llm: LLM, requests: list[Request]) -> list[RequestOutput]:
    """Each request's output, in their order; ValueError if one failed."""
    outputs: dict[int, RequestOutput] = {}
    with show_progress() as llm.on_progress:
        llm.prepare(requests)
        for output in llm.stream(requests):
            if output.error:
                raise ValueError(f"text {output.index} can't be scored: {output.error}")
            outputs[output.index] = output
    return [outputs[request.index] for request in requests]
