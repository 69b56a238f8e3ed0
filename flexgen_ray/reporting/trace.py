"""Writes a run's ops as a Chrome trace: one process for each stage, one row for each lane.

Open it in ui.perfetto.dev or chrome://tracing. The format is Google's Trace Event Format, complete
events ("X"), times in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from flexgen_ray.files.json_text import to_json
from flexgen_ray.files.output_files import atomic_write
from flexgen_ray.schedule.ops import Lane, Span

_ROW = {lane: row for row, lane in enumerate(Lane)}


def write_trace(path: Path, stages: Iterable[Iterable[Span]], is_emulated: bool = False) -> None:
    """Write each stage's spans, which may be in any order. Raises OSError if the file can't be."""
    with atomic_write(path) as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        file.write(",\n".join(_events(stages, " (emulated time)" if is_emulated else "")))
        file.write("\n]}\n")


def _events(stages: Iterable[Iterable[Span]], note: str) -> Iterator[str]:
    for stage, spans in enumerate(stages):
        yield _named("process_name", stage, 0, f"stage {stage}{note}")
        for lane, row in _ROW.items():
            yield _named("thread_name", stage, row, lane.value)
            yield _event("M", "thread_sort_index", stage, row, args={"sort_index": row})
        for span in spans:
            yield _complete(stage, span)


def _complete(stage: int, span: Span) -> str:
    op = span.op
    name = f"{op.kind.value} L{op.layer} b{op.batch}"
    numbers = {"visit": op.visit, "layer": op.layer, "batch": op.batch}
    times = {"ts": round(span.start * 1e6, 3), "dur": round((span.end - span.start) * 1e6, 3)}
    row = _ROW[op.lane]
    return _event("X", name, stage, row, cat=op.kind.value, args=numbers, **times)


def _named(what: str, stage: int, row: int, name: str) -> str:
    return _event("M", what, stage, row, args={"name": name})


def _event(phase: str, name: str, stage: int, row: int, **fields: object) -> str:
    event = {"ph": phase, "name": name, "pid": stage, "tid": row} | fields
    return to_json(event, separators=(",", ":"))
