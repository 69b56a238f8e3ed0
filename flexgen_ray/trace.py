"""Writes a run's ops as a Chrome trace: one row a lane, for ui.perfetto.dev or chrome://tracing.

The format is Google's Trace Event Format, complete events ("X"), times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from flexgen_ray.runtime.meter import Span
from flexgen_ray.schedule.ops import LANE, Lane

_ROW = {lane: row for row, lane in enumerate(lane for lane in Lane if lane.worker is lane)}


def write_trace(path: Path, spans: Iterable[Span], is_emulated: bool = False) -> None:
    """Spans of one stage, in any order; OSError if the file can't be written."""
    process = "stage 0 (emulated time)" if is_emulated else "stage 0"
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        file.write(_named("process_name", 0, process))
        for lane, row in _ROW.items():
            file.write(",\n" + _named("thread_name", row, lane.value))
            file.write(",\n" + _event("M", "thread_sort_index", row, args={"sort_index": row}))
        for span in spans:
            file.write(",\n" + _complete(span))
        file.write("\n]}\n")


def _complete(span: Span) -> str:
    op = span.op
    name = f"{op.kind.value} L{op.layer} b{op.batch}"
    numbers = {"visit": op.visit, "layer": op.layer, "batch": op.batch}
    times = {"ts": round(span.start * 1e6, 3), "dur": round((span.end - span.start) * 1e6, 3)}
    return _event("X", name, _ROW[LANE[op.kind].worker], cat=op.kind.value, args=numbers, **times)


def _named(what: str, row: int, name: str) -> str:
    return _event("M", what, row, args={"name": name})


def _event(phase: str, name: str, row: int, **fields: object) -> str:
    event = {"ph": phase, "name": name, "pid": 0, "tid": row} | fields
    return json.dumps(event, separators=(",", ":"))
